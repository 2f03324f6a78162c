// SPDX-License-Identifier: Apache-2.0
// Blocks of split codes, or of parts with an LSB each. The first and the third pass take each part
// for a block; the second plans blocks from the peaks of their parts, and parts from the plans of
// their blocks.
#pragma once

#include <algorithm>
#include <vector>

#include "plan.h"
#include "shape.h"

namespace dynasty {
namespace {

// What the first and the third pass are given: parts for blocks.
QuantizeArgs PartArgs(const QuantizeArgs& a) {
  QuantizeArgs parts = a;
  parts.block_rows = a.part_rows, parts.block_channels = a.part_channels;
  parts.group_rows = parts.group_channels = 1;
  parts.peaks = a.part_peaks, parts.plans = a.part_plans, parts.headers = a.part_headers;
  return parts;
}

// The parts of a unit's blocks.
Unit PartUnit(const QuantizeArgs& a, const Shape& parts, Unit unit) {
  const int64_t rows = a.block_rows / a.part_rows;
  return {unit.begin * rows, std::min(parts.row_blocks, unit.end * rows)};
}

// Largest magnitudes above and below zero.
struct Ends {
  Ends(Int high_word, Int low_word)
      : high(high_word), low(low_word), high_is_larger(high_word > low_word) {}
  Peak high, low;
  Mask high_is_larger;
};

// How many levels an end has beyond 2**p - 1.
struct More {
  Int high, low;
};

class FineBlocks {
 public:
  struct Found {
    Ends ends;
    Peak peak;
  };

  FineBlocks(const QuantizeArgs& args, const Shape& s)
      : planner_(args),
        a_(args),
        blocks_(s),
        parts_(PartArgs(args)),
        part_count_(parts_.row_blocks * parts_.BlocksOfRow(args)) {}

  Found Load(const Place& at) const {
    Int high = Ints(0), low = Ints(0);
    EachPart(at, [&](int64_t first, int32_t step, Mask lanes) {
      high = Greatest(high, PartPeaks(first, step, lanes));
      low = Greatest(low, PartPeaks(part_count_ + first, step, lanes));
    });
    return {Ends(high, low), Peak(Greatest(high, low))};
  }
  static Mask Nonfinite(const Found& found) { return found.peak.nonfinite; }

  Int Widths(const Found& found, Int request, Int numbers) const {
    const Int sign =
        planner_.finds_sign ? Select(found.ends.low.occupied, Ints(1), Ints(0)) : Ints(1);
    const Int negated = a_.is_split ? Select(found.ends.high_is_larger, sign, Ints(0)) : Ints(0);
    const More more = MoreOf(sign, negated);
    const Int above = found.peak.exponent - request;
    Int needed = above + Ints(1) + sign -
                 Select(Fits(found.ends, above, sign, more, request), Ints(1), Ints(0));
    if (a_.stochastic) {
      needed =
          needed + Select(Fits(found.ends, above + Ints(1), sign, more, request), Ints(0), Ints(1));
    }
    return planner_.Widths(found.peak, sign, request, needed, numbers) |
           ShiftLeft<kNegatedShift>(negated) | Ints(a_.is_split ? 1 << kSplitShift : 0);
  }

  // Plans the parts; adds the finest of their scale exponents before the window; returns the
  // exponent after drop scaling.
  Int Scale(const Found& found, Int request, const Place& at, Int& plan) const {
    const Int width = plan & Ints(kBitsMask), sign = ShiftRight<kSignedShift>(plan) & Ints(1),
              depth = ShiftRight<kDepthShift>(plan) & Ints(3),
              negated = ShiftRight<kNegatedShift>(plan) & Ints(1);
    const Mask kept = (plan & Ints(kKeptFlag)) > Ints(0);
    const More more = MoreOf(sign, negated);
    const Int p = width - sign, natural = found.peak.exponent + Ints(1) - p;
    Int scale =
        natural - Select(Fits(found.ends, p, sign, more, natural - Ints(1)), Ints(1), Ints(0));
    if (a_.stochastic) {
      scale = scale + Select(Fits(found.ends, p, sign, more, natural), Ints(0), Ints(1));
    }
    scale = scale + depth;
    if (planner_.drops) scale = Select(kept, Greatest(scale, planner_.KeptLsb(request)), scale);
    const Int flags = plan & Ints((1 << kExponentShift) - 1);
    Int finest = scale;
    EachPart(at, [&](int64_t first, int32_t step, Mask lanes) {
      Int part = scale;
      if (a_.micro_bits) {
        const Ends ends(PartPeaks(first, step, lanes), PartPeaks(part_count_ + first, step, lanes));
        for (int32_t below = 1; below < 1 << a_.micro_bits; ++below) {
          const Mask fits = Fits(ends, p, sign, more, scale - depth - Ints(below));
          part = part - Select(fits, Ints(1), Ints(0));
        }
        if (planner_.drops) part = Select(kept, Greatest(part, planner_.KeptLsb(request)), part);
        finest = Select(lanes, Least(finest, part), finest);
      }
      StoreEach(a_.part_plans + first, step, flags | ShiftLeft<kExponentShift>(part), lanes);
    });
    plan = flags | ShiftLeft<kExponentShift>(finest);
    return Select(width > Ints(0), found.peak.exponent + depth, Ints(kNoExponent));
  }

  bool drops() const { return planner_.drops; }

 private:
  More MoreOf(Int sign, Int negated) const {
    return {negated, a_.is_split ? sign & (Ints(1) - negated) : Ints(0)};
  }

  Int PartPeaks(int64_t first, int32_t step, Mask lanes) const {
    return step == 1 ? dynasty::Load(a_.part_peaks + first, lanes)
                     : LoadEach(a_.part_peaks + first, step, lanes);
  }

  // Whether an end is at most (2**p - 1 + more + slack / 4) * 2**scale; p at most 12.
  static Mask FitsEnd(const Peak& end, Int p, Int more, Int slack, Int scale) {
    const Int limit = ShiftLeft(Ints(1), Least(Greatest(p, Ints(0)), Ints(12))) - Ints(1) + more;
    // significand * 2**(exponent - 23) <= quarters * 2**(scale - 2), the significand rounded up.
    const Int quarters = ShiftLeft<2>(limit) + slack;
    const Int k = scale - end.exponent + Ints(21), by = Least(Greatest(k, Ints(0)), Ints(24));
    const Int whole = ShiftRight(end.significand + ShiftLeft(Ints(1), by) - Ints(1), by);
    // Where k < 0 the limit is below 2**14 and a significand, which is not shifted then, above it.
    return Mask(~((whole > quarters) & end.occupied));
  }

  Mask Fits(const Ends& ends, Int p, Int sign, const More& more, Int scale) const {
    const Int slack =
        a_.stochastic ? Ints(0) : Select(sign > Ints(0), Ints(kSignedSlack), Ints(kUnsignedSlack));
    return Mask(FitsEnd(ends.high, p, more.high, slack, scale) &
                FitsEnd(ends.low, p, more.low, slack, scale));
  }

  // visit(index of the first block's part, step from block to block, blocks that have it).
  template <typename Visit>
  void EachPart(const Place& at, Visit visit) const {
    const int64_t rows = a_.block_rows / a_.part_rows,
                  channels = a_.block_channels / a_.part_channels;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = at.row_block * rows + i;
      if (row >= parts_.row_blocks) break;
      const int64_t base = row * parts_.BlocksOfRow(a_);
      for (int64_t j = 0; j < channels; ++j) {
        if (blocks_.positions_innermost) {
          const int64_t channel = at.run * channels + j;
          if (channel >= parts_.channel_blocks) break;
          visit(base + channel * a_.positions + at.first, 1, at.lanes());
        } else {
          const int64_t run = blocks_.flat ? 0 : at.run * parts_.channel_blocks;
          // A run of parts may go on where one of blocks ends.
          const int64_t length = blocks_.flat ? parts_.BlocksOfRow(a_) : parts_.channel_blocks,
                        first = at.first * channels + j;
          const int64_t has = first >= length ? 0 : (length - first + channels - 1) / channels;
          visit(base + run + first, int32_t(channels), FirstLanes(std::min(at.count, has)));
        }
      }
    }
  }

  Planner planner_;
  const QuantizeArgs& a_;
  const Shape& blocks_;
  const Shape parts_;
  const int64_t part_count_;
};

// A run of blocks, one behind the other as they were planned and as their headers lie; its parts.
struct Run {
  const int32_t* plans;
  uint8_t* headers;
  int64_t count;             // of blocks
  const int64_t* parts;      // where the first block's parts lie
  int64_t parts_of_a_block;  // how many those are
};

// kStep: parts from block to block, or 0 for `step` of them.
template <int64_t kStep>
void MergeRun(const QuantizeArgs& a, const Run& run, int64_t step) {
  constexpr int64_t kChunk = 256;
  const int64_t by = kStep ? kStep : step;
  for (int64_t first = 0; first < run.count; first += kChunk) {
    const int64_t count = std::min(kChunk, run.count - first);
    uint8_t kept[kChunk] = {};
    for (int64_t k = 0; k < run.parts_of_a_block; ++k) {
      const uint8_t* headers = a.part_headers + run.parts[k] + first * by;
      for (int64_t i = 0; i < count; ++i) kept[i] |= headers[i * by];
    }
    for (int64_t k = 0; k < run.parts_of_a_block; ++k) {
      uint8_t* headers = a.part_headers + run.parts[k] + first * by;
      int8_t* exponents = a.relative_exponents + run.parts[k] + first * by;
      for (int64_t i = 0; i < count; ++i) {
        headers[i * by] = kept[i];
        exponents[i * by] = int8_t(exponents[i * by] & (kept[i] ? -1 : 0));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t plan = run.plans[first + i];
      const int32_t flags =
          (plan & (kBitsMask | kSignedFlag)) | (plan >> kNegatedShift & 1 ? kNegatedFlag : 0);
      run.headers[first + i] = uint8_t((plan & kOccupiedFlag) | (kept[i] ? flags : 0));
    }
  }
}

// Headers of a unit's blocks, and no exponent where no part kept an element. Leaves the block's
// bits in the headers of its parts.
void MergeParts(const QuantizeArgs& a, const Shape& s, const Shape& parts, Unit unit) {
  const int64_t rows = a.block_rows / a.part_rows, channels = a.block_channels / a.part_channels;
  std::vector<int64_t> at(rows * channels);
  // Blocks first .. first + count - 1 of a row of them, which begin with part `part` of each row of
  // parts and have `wide` parts side by side.
  const auto merge = [&](int64_t row, int64_t first, int64_t count, int64_t part, int64_t wide,
                         int64_t beside, int64_t step) {
    int64_t n = 0;
    for (int64_t r = row * rows; r < std::min(parts.row_blocks, (row + 1) * rows); ++r) {
      for (int64_t j = 0; j < wide; ++j) at[n++] = r * parts.BlocksOfRow(a) + part + j * beside;
    }
    const int64_t block = row * s.BlocksOfRow(a) + first;
    const Run run = {a.plans + block, a.headers + block, count, at.data(), n};
    step == 1   ? MergeRun<1>(a, run, 1)
    : step == 2 ? MergeRun<2>(a, run, 2)
                : MergeRun<0>(a, run, step);
  };
  for (int64_t row = unit.begin; row < unit.end; ++row) {
    if (s.positions_innermost) {
      for (int64_t c = 0; c < s.channel_blocks; ++c) {
        merge(row, c * a.positions, a.positions, c * channels * a.positions,
              std::min(channels, parts.channel_blocks - c * channels), a.positions, 1);
      }
    } else if (parts.channel_blocks == s.channel_blocks * channels) {
      merge(row, 0, s.BlocksOfRow(a), 0, channels, 1, channels);
    } else {
      const int64_t whole = parts.channel_blocks / channels;
      for (int64_t p = 0; p < a.positions; ++p) {
        const int64_t block = p * s.channel_blocks, part = p * parts.channel_blocks;
        if (whole) merge(row, block, whole, part, channels, 1, channels);
        merge(row, block + whole, 1, part + whole * channels,
              parts.channel_blocks - whole * channels, 1, channels);
      }
    }
  }
}

}  // namespace
}  // namespace dynasty
