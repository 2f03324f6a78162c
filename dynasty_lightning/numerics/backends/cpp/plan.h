// SPDX-License-Identifier: Apache-2.0
// Second pass: width, sign, drop and scale of each block from its peak.
#pragma once

#include <algorithm>
#include <vector>

#include "shape.h"
#include "stream.h"

namespace dynasty {
namespace {

// A plan: width, signed, occupied and drop depth as args.h has them, bit 8 kept by a drop, bits
// 16-31 scale exponent before the window (fine.h has more of it).
constexpr int kExponentShift = 16;
constexpr int32_t kKeptFlag = 0x100;
// Its codes are negated, and have a level more at one end.
constexpr int kNegatedShift = 9, kSplitShift = 10;

// Exponent floor(log2 peak) and 24-bit significand of a peak, subnormals included.
struct Peak {
  explicit Peak(Int word) {
    const Int magnitude = word & Ints(INT32_MAX);
    const Mask subnormal = Ints(0x00800000) > magnitude;
    const Int normalised = Select(subnormal, BitsOf(ToFloat(magnitude)),
                                  magnitude);  // an integer below 2**23 is exact
    exponent = ShiftRight<23>(normalised) - Select(subnormal, Ints(127 + 149), Ints(127));
    significand = (normalised & Ints(0x007FFFFF)) | Ints(0x00800000);
    occupied = magnitude > Ints(0);
    nonfinite = magnitude > Ints(0x7F7FFFFF);
    negative = Ints(0) > word;
  }
  // significand * 2**-24 > 1 - 2**-p: the peak does not fit p magnitude bits of its own scale.
  Mask Exceeds(Int p) const {
    return significand > Ints(1 << 24) - ShiftLeft(Ints(1), Ints(24) - p);
  }

  Int exponent, significand;
  Mask occupied, nonfinite, negative;
};

// Sixteen consecutive blocks of a run, as they are planned.
struct Place {
  int64_t index;  // of the first, in the order in which blocks are planned
  int64_t row_block, run, first, count;
  Mask lanes() const { return FirstLanes(count); }
};

struct Planner {
  explicit Planner(const QuantizeArgs& args)
      : a(args),
        drops(args.is_threshold && args.stochastic && args.role == kError),
        finds_sign(args.role == kActivation && !args.force_signed),
        raises(args.raised_widths != kAllWidths),
        kept_bits(std::min(Raised(kMinBits), int32_t(args.most_bits))) {}

  // What a width is raised to.
  int32_t Raised(int64_t bits) const { return int32_t(a.raised_widths >> (4 * bits) & 0xF); }

  // Width, sign, occupied, depth and kept of blocks that need `needed` bits for their threshold;
  // `numbers` decide drops.
  Int Widths(const Peak& peak, Int sign, Int request, Int needed, Int numbers) const {
    Int width = request, depth = Ints(0);
    Mask kept = 0;
    if (a.is_threshold) {
      const Int above = peak.exponent - request;
      const Mask below = Ints(drops ? -1 : 0) > above;
      width = Least(Greatest(needed, Ints(std::max<int32_t>(int32_t(a.least_bits), kMinBits))),
                    Ints(kMaxBits));
      if (raises) {
        Int raised = width;
        for (int32_t bits = kMinBits; bits <= kMaxBits; ++bits) {
          const Mask this_one = (width > Ints(bits - 1)) & (Ints(bits + 1) > width);
          raised = Select(this_one, Ints(Raised(bits)), raised);
        }
        width = raised;
      }
      width = Least(width, Ints(int32_t(a.most_bits)));
      Int low = Least(Ints(Raised(a.least_bits)), Ints(int32_t(a.most_bits)));
      if (drops && !a.least_bits) {
        depth = Least(Ints(-1) - above, Ints(kMaxDropDepth));
        kept = below & (ShiftRight(Ints(1 << 16), depth) > numbers);
        low = Select(kept, Ints(kept_bits), Ints(0));
        depth = Select(kept, depth, Ints(0));
      }
      width = Select(below, low, width);
    }
    width = Select(peak.occupied, width, Ints(0));
    return width | ShiftLeft<kSignedShift>(sign) |
           Select(peak.occupied, Ints(kOccupiedFlag), Ints(0)) | ShiftLeft<kDepthShift>(depth) |
           Select(kept, Ints(kKeptFlag), Ints(0));
  }

  // Exponent of the finest LSB of a block that a drop has kept: bits beyond two make it finer.
  Int KeptLsb(Int request) const { return request - Ints(kept_bits - kMinBits); }

  const QuantizeArgs& a;
  bool drops, finds_sign, raises;
  int32_t kept_bits;
};

// Blocks of one exponent and symmetric codes, planned from a peak each.
class PlainBlocks {
 public:
  static constexpr int kScaleShift = kExponentShift;

  PlainBlocks(const QuantizeArgs& args, const Shape&) : planner_(args), a_(args) {}

  Peak Load(const Place& at) const { return Peak(dynasty::Load(a_.peaks + at.index, at.lanes())); }
  static Mask Nonfinite(const Peak& peak) { return peak.nonfinite; }

  Int Widths(const Peak& peak, Int request, Int numbers) const {
    const Int sign = planner_.finds_sign ? Select(peak.negative, Ints(1), Ints(0)) : Ints(1);
    const Int above = peak.exponent - request;
    const Int over = Select(peak.Exceeds(above + Ints(1)), Ints(1), Ints(0));
    const Int needed = planner_.drops ? above + Ints(2) + over : above + Ints(1) + sign;
    return planner_.Widths(peak, sign, request, needed, numbers);
  }

  // Adds the scale exponent before the window; returns the exponent after drop scaling.
  Int Scale(const Peak& peak, Int request, const Place&, Int& plan) const {
    const Int width = plan & Ints(kBitsMask), sign = ShiftRight<kSignedShift>(plan) & Ints(1),
              depth = ShiftRight<kDepthShift>(plan) & Ints(3);
    const Int exponent = peak.exponent + depth, p = width - sign;
    Int scale = exponent + Ints(1) - p;
    if (a_.stochastic) scale = scale + Select(peak.Exceeds(p), Ints(1), Ints(0));
    if (planner_.drops)
      scale = Select((plan & Ints(kKeptFlag)) > Ints(0), Greatest(scale, planner_.KeptLsb(request)),
                     scale);
    plan = (plan & Ints(0xFF)) | ShiftLeft<kExponentShift>(scale);
    return Select(width > Ints(0), exponent, Ints(kNoExponent));
  }

  bool drops() const { return planner_.drops; }

 private:
  Planner planner_;
  const QuantizeArgs& a_;
};

// Every block that is not zero takes the largest width of its group; the unit is one group of rows.
void ShareWidths(const QuantizeArgs& a, const Shape& s, Unit unit) {
  const int64_t step_p = s.positions_innermost ? 1 : s.channel_blocks,
                step_c = s.positions_innermost ? a.positions : 1;
  for (int64_t first = 0; first < s.channel_blocks; first += a.group_channels) {
    const int64_t end = std::min(s.channel_blocks, first + a.group_channels);
    for (int64_t p = 0; p < a.positions; ++p) {
      const auto each = [&](auto visit) {
        for (int64_t r = unit.begin; r < unit.end; ++r) {
          for (int64_t c = first; c < end; ++c)
            visit(a.plans[r * s.BlocksOfRow(a) + c * step_c + p * step_p]);
        }
      };
      int32_t widest = 0;
      each([&](int32_t plan) { widest = std::max(widest, plan & kBitsMask); });
      each([&](int32_t& plan) { plan = plan & kBitsMask ? (plan & ~kBitsMask) | widest : plan; });
    }
  }
}

// The numbers that decide which blocks of a unit are kept, in the order in which the stream counts
// blocks.
class DropNumbers {
 public:
  DropNumbers(const QuantizeArgs& a, const Shape& s, Unit unit, bool wanted) {
    if (!wanted) return;
    const Stream stream(uint32_t(a.seed), uint32_t(a.rank), uint32_t(a.backward_count),
                        uint32_t(a.call_index), uint32_t(a.layer), uint32_t(kDropCode + a.role));
    const int64_t count = (unit.end - unit.begin) * s.BlocksOfRow(a);
    numbers_.resize(count + kNumbersSlack);
    first_ = unit.begin * s.BlocksOfRow(a);
    offset_ = stream.Numbers(uint64_t(first_), count, numbers_.data());
  }
  bool wanted() const { return !numbers_.empty(); }
  const uint16_t* At(int64_t block) const { return numbers_.data() + offset_ + (block - first_); }

 private:
  std::vector<uint16_t> numbers_;
  int64_t first_ = 0, offset_ = 0;
};

// Walks a unit's blocks, sixteen lanes at a time: visit(place, request, drop numbers).
template <typename Visit>
void EachLanes(const QuantizeArgs& a, const Shape& s, Unit unit, const DropNumbers& drops,
               Visit visit) {
  const int64_t length = s.RunLength(a), runs = s.BlocksOfRow(a) / length;
  const LaneSteps request(a, s, a.request_position, a.request_channel),
      logical(a, s, s.logical_position_step, s.logical_channel_step);
  for (int64_t row_block = unit.begin; row_block < unit.end; ++row_block) {
    for (int64_t run = 0; run < runs; ++run) {
      const int16_t* base = a.request + row_block * a.request_row + request.RunOffset(run, s);
      const int64_t base_of_drops = row_block * s.BlocksOfRow(a) + logical.RunOffset(run, s);
      for (int64_t first = 0; first < length; first += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, length - first);
        Int numbers = Ints(0);
        if (drops.wanted() && logical.linear && logical.step == 1) {
          numbers = Load(drops.At(base_of_drops + first), FirstLanes(count));
        } else if (drops.wanted()) {
          int32_t lanes[kLanes] = {};
          logical.Each(first, count,
                       [&](int64_t i, int64_t at) { lanes[i] = *drops.At(base_of_drops + at); });
          numbers = Load(lanes);
        }
        const int64_t index = row_block * s.BlocksOfRow(a) + run * length + first;
        // Beyond these, thresholds all ask for the same of a float32, and powers of two stay within
        // reach of two factors.
        const Int asked =
            Least(Greatest(GatherRequest(base, request, first, count), Ints(kLeastThreshold)),
                  Ints(kMostThreshold));
        visit(Place{index, row_block, run, first, count}, asked, numbers);
      }
    }
  }
}

// Where a scope's largest exponent lies; lanes of one vector share a scope but where positions
// innermost have one each.
int64_t ScopeIndex(const QuantizeArgs& a, const Shape& s, int64_t row_block, int64_t run,
                   int64_t first) {
  if (a.scope == kTensor) return 0;
  if (a.scope == kSample) return row_block;
  return row_block * a.positions + (s.positions_innermost ? first : run);
}

// What the plans of a unit amount to.
struct Planned {
  int32_t largest = kNoExponent;  // exponent
  int32_t finest = INT32_MAX;     // least scale exponent before the window, less the sign: what a
                                  // window can still raise
  bool nonfinite = false;
};

template <typename Blocks>
Planned MakePlans(const QuantizeArgs& a, const Shape& s, Unit unit) {
  const Blocks blocks(a, s);
  const bool groups = a.group_rows > 1 || a.group_channels > 1;
  Int largest = Ints(kNoExponent), finest = Ints(INT32_MAX);
  Mask bad = 0;
  const auto scale = [&](const auto& found, Int request, Int& plan, const Place& at) {
    const Mask lanes = at.lanes();
    const Int exponent = Select(lanes, blocks.Scale(found, request, at, plan), Ints(kNoExponent));
    if (a.scope == kTensor) {
      largest = Greatest(largest, exponent);
      const Mask active = Mask(lanes & ((plan & Ints(kBitsMask)) > Ints(0)));
      finest = Least(finest, Select(active,
                                    ShiftRight<Blocks::kScaleShift>(plan) -
                                        (ShiftRight<kSignedShift>(plan) & Ints(1)),
                                    finest));
      return;
    }
    int32_t* out = a.largest_exponents + ScopeIndex(a, s, at.row_block, at.run, at.first);
    if (a.scope == kRow && s.positions_innermost) {
      Store(out, Greatest(Load(out, lanes), exponent), lanes);
    } else {
      *out = std::max(*out, GreatestLane(exponent));
    }
  };
  const DropNumbers drops(a, s, unit, blocks.drops() && !a.least_bits);
  EachLanes(a, s, unit, drops, [&](const Place& at, Int request, Int numbers) {
    const auto found = blocks.Load(at);
    bad = Mask(bad | blocks.Nonfinite(found));
    Int plan = blocks.Widths(found, request, numbers);
    if (!groups) scale(found, request, plan, at);
    Store(a.plans + at.index, plan, at.lanes());
  });
  if (groups) {
    ShareWidths(a, s, unit);
    const DropNumbers none(a, s, unit, false);
    EachLanes(a, s, unit, none, [&](const Place& at, Int request, Int) {
      Int plan = Load(a.plans + at.index, at.lanes());
      scale(blocks.Load(at), request, plan, at);
      Store(a.plans + at.index, plan, at.lanes());
    });
  }
  Planned planned;
  planned.largest = GreatestLane(largest);
  planned.finest = LeastLane(finest);
  planned.nonfinite = bad != 0;
  return planned;
}

}  // namespace
}  // namespace dynasty
