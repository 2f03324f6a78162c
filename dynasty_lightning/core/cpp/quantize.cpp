// SPDX-License-Identifier: Apache-2.0
// Block quantization of one operand in three passes: peaks of blocks, a plan for each block, elements. docs/numerics.md is the specification.
//
// Two memory orders are read natively: positions innermost (a Conv's N, C, H, W), where a lane is a position, and channels innermost
// (Linear, channels_last), where sixteen consecutive blocks are planned in the lanes of a vector and each plan is spread over its block's channels.
// Elements are always written channels innermost, which is what the bf16 GEMMs read without a reordering of their own.
#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "operand.h"
#include "processor.h"
#include "stream.h"

namespace dynasty {
namespace {

constexpr int64_t kPeakChunk = 64;      // positions of a row read at a time in the first pass
constexpr int64_t kApplyChunk = 64;     // positions whose random numbers lie in the L1 cache
constexpr int64_t kChannelChunk = 2048; // elements of a row, likewise

// A plan: bits 0-3 width, 4 signed, 5 occupied, 6-7 drop depth, 16-31 scale exponent before the window.
constexpr int kDepthShift = 6, kExponentShift = 16;
constexpr int32_t kKeptFlag = 0x100;

struct Shape {
  explicit Shape(const QuantizeArgs& a)
      : row_blocks((a.rows + a.block_rows - 1) / a.block_rows),
        channel_blocks((a.channels + a.block_channels - 1) / a.block_channels),
        positions_innermost(a.stride_position == 1 && a.stride_channel != 1),
        position_step(a.grid_channels_last ? channel_blocks : 1),
        channel_step(a.grid_channels_last ? 1 : a.positions),
        logical_position_step(a.logical_channels_last ? channel_blocks : 1),
        logical_channel_step(a.logical_channels_last ? 1 : a.positions),
        logical_is_memory(a.logical_channels_last || a.positions == 1),
        // Positions and channels in one run, where blocks do not end inside a position's channels.
        flat(!positions_innermost && a.stride_position == a.channels && a.channels % a.block_channels == 0 && a.scope != kRow) {}

  int64_t row_blocks, channel_blocks;
  bool positions_innermost;
  int64_t position_step, channel_step;                  // of the grid in memory, in blocks
  int64_t logical_position_step, logical_channel_step;  // of the grid as the stream counts it
  bool logical_is_memory, flat;

  // Blocks of one block row, in the order in which they are planned: [channels, positions] or [positions, channels].
  int64_t BlocksOfRow(const QuantizeArgs& a) const { return channel_blocks * a.positions; }
  // One run of consecutive blocks in that order, and how many there are.
  int64_t RunLength(const QuantizeArgs& a) const {
    return positions_innermost ? a.positions : flat ? BlocksOfRow(a) : channel_blocks;
  }
};

// Where sixteen consecutive blocks of a run lie in a grid with the given steps.
struct LaneSteps {
  LaneSteps(const QuantizeArgs& a, const Shape& s, int64_t position_step, int64_t channel_step)
      : position(position_step), channel(channel_step), channel_blocks(s.channel_blocks), by_position(s.positions_innermost) {
    if (by_position) {
      linear = true, step = position;
    } else {
      linear = !s.flat || a.positions == 1 || position == channel * channel_blocks;
      step = channel;
    }
  }

  // Offset of the first block of run `run` in a block row.
  int64_t RunOffset(int64_t run, const Shape& s) const { return by_position ? run * channel : s.flat ? 0 : run * position; }

  // Calls visit(lane, offset within the run) for `count` blocks from `first` on.
  template <typename Visit> void Each(int64_t first, int64_t count, Visit visit) const {
    if (linear) {
      for (int64_t i = 0; i < count; ++i) visit(i, (first + i) * step);
      return;
    }
    int64_t p = first / channel_blocks, c = first % channel_blocks;
    for (int64_t i = 0; i < count; ++i) {
      visit(i, p * position + c * channel);
      if (++c == channel_blocks) c = 0, ++p;
    }
  }

  int64_t position, channel, channel_blocks;
  bool by_position, linear;
  int64_t step;
};

Int GatherRequest(const int16_t* base, const LaneSteps& steps, int64_t first, int64_t count) {
  if (steps.linear && steps.step == 0) return Ints(*base);
  if (steps.linear && steps.step == 1) return Load(base + first, FirstLanes(count));
  int32_t lanes[kLanes] = {};
  steps.Each(first, std::min<int64_t>(count, kLanes), [&](int64_t i, int64_t at) { lanes[i] = base[at]; });
  return Load(lanes);
}

// ---------------------------------------------------------------------------------------------------------------- peaks

struct AbsMax {
  Int operator()(Int a, Int b) const { return Greatest(a, b); }
};
struct AnyBit {
  Int operator()(Int a, Int b) const { return a | b; }
};

const int32_t kQuadOrder[kLanes] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

// Reduces the elements of sixteen blocks, block_channels vectors one behind the other, to a lane for each block.
template <typename Reduce> Int ReduceBlocks(const Int* vectors, int64_t block_channels, Reduce reduce) {
  if (block_channels == 1) return vectors[0];
  if (block_channels == 4) {
    const Int quads[4] = {vectors[0], vectors[1], vectors[2], vectors[3]};
    return Permute(ReduceQuads(quads, reduce), Load(kQuadOrder));
  }
  // Transposed, the sixteen blocks' elements lie in the lanes.
  Int columns[kLanes], total = Ints(0);
  const int64_t per_vector = kLanes / block_channels;
  if (per_vector > 1) {  // 2 or 8 channels: a vector holds several blocks, and not all vectors of a full transpose exist
    int32_t lanes[kMaxBlockChannels * kLanes], out[kLanes];
    for (int64_t v = 0; v < block_channels; ++v) Store(lanes + v * kLanes, vectors[v]);
    for (int b = 0; b < kLanes; ++b) {
      int32_t value = lanes[b * block_channels];
      for (int64_t e = 1; e < block_channels; ++e) {
        const int32_t other = lanes[b * block_channels + e];
        value = std::is_same<Reduce, AbsMax>::value ? std::max(value, other) : value | other;
      }
      out[b] = value;
    }
    return Load(out);
  }
  const int64_t vectors_per_block = block_channels / kLanes;
  for (int64_t part = 0; part < vectors_per_block; ++part) {
    for (int b = 0; b < kLanes; ++b) columns[b] = vectors[b * vectors_per_block + part];
    Transpose(columns);
    for (int e = 0; e < kLanes; ++e) total = part + e ? reduce(total, columns[e]) : columns[e];
  }
  return total;
}

Int WithSign(Int magnitude, Float least) { return magnitude | Select(Negative(least), Ints(INT32_MIN), Ints(0)); }

template <typename T, bool kFindSign> void PeaksByPosition(const QuantizeArgs& a, const Shape& s, const T* x) {
#pragma omp for collapse(2) schedule(static)
  for (int64_t row_block = 0; row_block < s.row_blocks; ++row_block) {
    for (int64_t channel_block = 0; channel_block < s.channel_blocks; ++channel_block) {
      const int64_t rows = std::min(a.block_rows, a.rows - row_block * a.block_rows);
      const int64_t channels = std::min(a.block_channels, a.channels - channel_block * a.block_channels);
      const T* block = x + row_block * a.block_rows * a.stride_row + channel_block * a.block_channels * a.stride_channel;
      int32_t* peaks = a.peaks + (row_block * s.channel_blocks + channel_block) * a.positions;
      for (int64_t p = 0; p < a.positions; p += kPeakChunk) {
        const int64_t count = std::min(kPeakChunk, a.positions - p);
        Int largest[kPeakChunk / kLanes];
        Float least[kPeakChunk / kLanes];
        for (auto& v : largest) v = Ints(0);
        for (auto& v : least) v = Floats(0.0f);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < channels; ++c) {
            const T* run = block + r * a.stride_row + c * a.stride_channel + p;
            for (int v = 0; v * kLanes < count; ++v) {
              const int64_t left = count - v * kLanes;
              const Float value = left >= kLanes ? Load(run + v * kLanes) : Load(run + v * kLanes, FirstLanes(left));
              largest[v] = Greatest(largest[v], BitsOf(value) & Ints(INT32_MAX));
              if (kFindSign) least[v] = Least(value, least[v]);
            }
          }
        }
        for (int v = 0; v * kLanes < count; ++v) {
          Store(peaks + p + v * kLanes, kFindSign ? WithSign(largest[v], least[v]) : largest[v], FirstLanes(count - v * kLanes));
        }
      }
    }
  }
}

template <typename T, bool kFindSign> void PeaksByChannel(const QuantizeArgs& a, const Shape& s, const T* x) {
  const int64_t runs = s.flat ? 1 : a.positions, length = s.flat ? a.positions * a.channels : a.channels;
  const int64_t blocks = s.RunLength(a), vectors = a.block_channels;
#pragma omp for collapse(3) schedule(static)
  for (int64_t row_block = 0; row_block < s.row_blocks; ++row_block) {
    for (int64_t run = 0; run < runs; ++run) {
      for (int64_t first = 0; first < blocks; first += kLanes) {
        const int64_t rows = std::min(a.block_rows, a.rows - row_block * a.block_rows);
        const int64_t c = first * a.block_channels;
        const T* block = x + row_block * a.block_rows * a.stride_row + run * a.stride_position + c;
        Int largest[kMaxBlockChannels];
        Int flags[kMaxBlockChannels];
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t left = length - c - v * kLanes;
          Int peak = Ints(0);
          Float least = Floats(0.0f);
          if (left > 0) {
            const Mask lanes = FirstLanes(left);
            for (int64_t r = 0; r < rows; ++r) {
              const T* at = block + r * a.stride_row + v * kLanes;
              const Float value = left >= kLanes ? Load(at) : Load(at, lanes);
              peak = Greatest(peak, BitsOf(value) & Ints(INT32_MAX));
              if (kFindSign) least = Least(value, least);
            }
          }
          largest[v] = peak;
          if (kFindSign) flags[v] = Select(Negative(least), Ints(INT32_MIN), Ints(0));
        }
        Int peaks = ReduceBlocks(largest, a.block_channels, AbsMax());
        if (kFindSign) peaks = peaks | ReduceBlocks(flags, a.block_channels, AnyBit());
        Store(a.peaks + (row_block * runs + run) * blocks + first, peaks, FirstLanes(blocks - first));
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------- plan

// Exponent floor(log2 peak) and 24-bit significand of a peak, subnormals included.
struct Peak {
  explicit Peak(Int word) {
    const Int magnitude = word & Ints(INT32_MAX);
    const Mask subnormal = Ints(0x00800000) > magnitude;
    const Int normalised = Select(subnormal, BitsOf(ToFloat(magnitude)), magnitude);  // an integer below 2**23 is exact
    exponent = ShiftRight<23>(normalised) - Select(subnormal, Ints(127 + 149), Ints(127));
    significand = (normalised & Ints(0x007FFFFF)) | Ints(0x00800000);
    occupied = magnitude > Ints(0);
    finite_limit = magnitude > Ints(0x7F7FFFFF);
    negative = Ints(0) > word;
  }
  // significand * 2**-24 > 1 - 2**-p: the peak does not fit p magnitude bits of its own scale.
  Mask Exceeds(Int p) const { return significand > Ints(1 << 24) - ShiftLeft(Ints(1), Ints(24) - p); }

  Int exponent, significand;
  Mask occupied, finite_limit, negative;
};

struct Planner {
  explicit Planner(const QuantizeArgs& args)
      : a(args), drops(args.is_threshold && args.stochastic && args.role == kError), finds_sign(args.role == kActivation && !args.force_signed) {}

  Int Sign(const Peak& peak) const { return finds_sign ? Select(peak.negative, Ints(1), Ints(0)) : Ints(1); }

  // Width, sign, occupied, depth and kept; `numbers` decide drops.
  Int Widths(const Peak& peak, Int request, Int numbers) const {
    const Int sign = Sign(peak);
    Int width = request, depth = Ints(0);
    Mask kept = 0;
    if (a.is_threshold) {
      const Int above = peak.exponent - request;
      const Int over = Select(peak.Exceeds(above + Ints(1)), Ints(1), Ints(0));
      const Int needed = drops ? above + Ints(2) + over : above + Ints(1) + sign;
      const Mask below = Ints(drops ? -1 : 0) > above;
      width = Least(Greatest(needed, Ints(std::max<int32_t>(int32_t(a.least_bits), kMinBits))), Ints(int32_t(a.most_bits)));
      Int low = Ints(int32_t(a.least_bits));
      if (drops && !a.least_bits) {
        depth = Least(Ints(-1) - above, Ints(kMaxDropDepth));
        kept = below & (ShiftRight(Ints(1 << 16), depth) > numbers);
        low = Select(kept, Ints(kMinBits), Ints(0));
        depth = Select(kept, depth, Ints(0));
      }
      width = Select(below, low, width);
    }
    width = Select(peak.occupied, width, Ints(0));
    return width | ShiftLeft<4>(sign) | Select(peak.occupied, Ints(kOccupiedFlag), Ints(0)) | ShiftLeft<kDepthShift>(depth) |
           Select(kept, Ints(kKeptFlag), Ints(0));
  }

  // Adds the scale exponent before the window; returns the exponent after drop scaling.
  Int Scale(const Peak& peak, Int request, Int& plan) const {
    const Int width = plan & Ints(kBitsMask), sign = ShiftRight<4>(plan) & Ints(1), depth = ShiftRight<kDepthShift>(plan) & Ints(3);
    const Int exponent = peak.exponent + depth, p = width - sign;
    Int scale = exponent + Ints(1) - p;
    if (a.stochastic) scale = scale + Select(peak.Exceeds(p), Ints(1), Ints(0));
    if (drops) scale = Select((plan & Ints(kKeptFlag)) > Ints(0), Greatest(scale, request), scale);
    plan = (plan & Ints(0xFF)) | ShiftLeft<kExponentShift>(scale);
    return Select(width > Ints(0), exponent, Ints(kNoExponent));
  }

  const QuantizeArgs& a;
  bool drops, finds_sign;
};

// Every block that is not zero takes the largest width of its group.
void ShareWidths(const QuantizeArgs& a, const Shape& s) {
  const int64_t step_p = s.positions_innermost ? 1 : s.channel_blocks, step_c = s.positions_innermost ? a.positions : 1;
  const int64_t groups = (s.row_blocks + a.group_rows - 1) / a.group_rows;
#pragma omp for schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row_end = std::min(s.row_blocks, (group + 1) * a.group_rows);
    for (int64_t first = 0; first < s.channel_blocks; first += a.group_channels) {
      const int64_t channel_end = std::min(s.channel_blocks, first + a.group_channels);
      for (int64_t p = 0; p < a.positions; ++p) {
        int32_t widest = 0;
        for (int64_t r = group * a.group_rows; r < row_end; ++r) {
          for (int64_t c = first; c < channel_end; ++c) {
            widest = std::max(widest, a.plans[r * s.BlocksOfRow(a) + c * step_c + p * step_p] & kBitsMask);
          }
        }
        for (int64_t r = group * a.group_rows; r < row_end; ++r) {
          for (int64_t c = first; c < channel_end; ++c) {
            int32_t& plan = a.plans[r * s.BlocksOfRow(a) + c * step_c + p * step_p];
            if (plan & kBitsMask) plan = (plan & ~kBitsMask) | widest;
          }
        }
      }
    }
  }
}

void DropNumbers(const QuantizeArgs& a, const Shape& s) {
  constexpr int64_t kChunk = 4096;
  const Stream stream(uint32_t(a.seed), uint32_t(a.rank), uint32_t(a.backward_count), uint32_t(a.call_index), uint32_t(a.layer),
                      uint32_t(8 + a.role));
  const int64_t blocks = s.row_blocks * s.BlocksOfRow(a);
#pragma omp for schedule(static)
  for (int64_t first = 0; first < blocks; first += kChunk) {
    // Whole calls only: the last one may write up to kNumbersPerCall beyond.
    stream.Numbers(uint64_t(first), std::min(kChunk, blocks - first), a.drops + first);
  }
}

// Walks all blocks, sixteen lanes at a time: visit(index in plan order, run, first, count, request, drop numbers).
template <typename Visit> void EachLanes(const QuantizeArgs& a, const Shape& s, bool drops, Visit visit) {
  const int64_t length = s.RunLength(a), runs = s.BlocksOfRow(a) / length;
  const LaneSteps request(a, s, a.request_position, a.request_channel), logical(a, s, s.logical_position_step, s.logical_channel_step);
#pragma omp for collapse(2) schedule(static)
  for (int64_t row_block = 0; row_block < s.row_blocks; ++row_block) {
    for (int64_t run = 0; run < runs; ++run) {
      const int16_t* base = a.request + row_block * a.request_row + request.RunOffset(run, s);
      const int64_t base_of_drops = row_block * s.BlocksOfRow(a) + logical.RunOffset(run, s);
      for (int64_t first = 0; first < length; first += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, length - first);
        Int numbers = Ints(0);
        if (drops && logical.linear && logical.step == 1) {
          numbers = Load(a.drops + base_of_drops + first, FirstLanes(count));
        } else if (drops) {
          int32_t lanes[kLanes] = {};
          logical.Each(first, count, [&](int64_t i, int64_t at) { lanes[i] = a.drops[base_of_drops + at]; });
          numbers = Load(lanes);
        }
        const int64_t index = row_block * s.BlocksOfRow(a) + run * length + first;
        visit(index, row_block, run, first, count, GatherRequest(base, request, first, count), numbers);
      }
    }
  }
}

// Where a scope's largest exponent lies; lanes of one vector share a scope but where positions innermost have one each.
int64_t ScopeIndex(const QuantizeArgs& a, const Shape& s, int64_t row_block, int64_t run, int64_t first) {
  if (a.scope == kTensor) return 0;
  if (a.scope == kSample) return row_block;
  return row_block * a.positions + (s.positions_innermost ? first : run);
}

void MakePlans(const QuantizeArgs& a, const Shape& s, int32_t* largest_of_thread, bool* nonfinite) {
  const Planner planner(a);
  const bool drops = planner.drops && !a.least_bits, groups = a.group_rows * a.group_channels > 1;
  if (drops) DropNumbers(a, s);
  Int largest = Ints(kNoExponent);
  Mask bad = 0;
  const auto note = [&](Int exponent, int64_t count, int64_t row_block, int64_t run, int64_t first) {
    exponent = Select(FirstLanes(count), exponent, Ints(kNoExponent));
    if (a.scope == kTensor) {
      largest = Greatest(largest, exponent);
      return;
    }
    int32_t* out = a.largest_exponents + ScopeIndex(a, s, row_block, run, first);
    if (a.scope == kRow && s.positions_innermost) {
      Store(out, Greatest(Load(out, FirstLanes(count)), exponent), FirstLanes(count));
    } else {
      *out = std::max(*out, GreatestLane(exponent));
    }
  };
  EachLanes(a, s, drops, [&](int64_t index, int64_t row_block, int64_t run, int64_t first, int64_t count, Int request, Int numbers) {
    const Peak peak(Load(a.peaks + index, FirstLanes(count)));
    bad = Mask(bad | peak.finite_limit);
    Int plan = planner.Widths(peak, request, numbers);
    if (!groups) note(planner.Scale(peak, request, plan), count, row_block, run, first);
    Store(a.plans + index, plan, FirstLanes(count));
  });
  if (groups) {
    ShareWidths(a, s);
    EachLanes(a, s, false, [&](int64_t index, int64_t row_block, int64_t run, int64_t first, int64_t count, Int request, Int) {
      Int plan = Load(a.plans + index, FirstLanes(count));
      note(planner.Scale(Peak(Load(a.peaks + index, FirstLanes(count))), request, plan), count, row_block, run, first);
      Store(a.plans + index, plan, FirstLanes(count));
    });
  }
  *largest_of_thread = GreatestLane(largest);
  *nonfinite = bad != 0;
}

// ------------------------------------------------------------------------------------------------------------- elements

// What the elements of sixteen blocks need, a lane for each block.
struct Factors {
  Factors() = default;
  Factors(Int plan_word, Int largest_exponent) : plan(plan_word), largest(largest_exponent) {
    const Int width = plan & Ints(kBitsMask), sign = ShiftRight<4>(plan) & Ints(1), depth = ShiftRight<kDepthShift>(plan) & Ints(3);
    active = width > Ints(0);
    scale_exponent = Greatest(ShiftRight<kExponentShift>(plan), largest - Ints(kWindow + 7) + sign);
    shift = Select(active, depth - scale_exponent, Ints(0));
    scale_exponent = Select(active, scale_exponent, Ints(0));
    extreme = Mask((Ints(-126) > shift) | (shift > Ints(126)) | (Ints(-126) > scale_exponent) | (scale_exponent > Ints(126)));
    factor = Select(active, PowerOfTwo(shift), Floats(0.0f));
    unit = PowerOfTwo(scale_exponent);
    limit = ToFloat(ShiftLeft(Ints(1), width - sign) - Ints(1));
    limit = Select(active, limit, Floats(0.0f));
  }
  static Float PowerOfTwo(Int exponent) { return FloatOf(ShiftLeft<23>(exponent + Ints(127))); }

  // One factor cannot hold every power of two: two halves, as the pure-torch path has them.
  void Split() {
    const Int half = ShiftRight<1>(shift);
    factor = PowerOfTwo(half);
    second = Select(active, PowerOfTwo(shift - half), Floats(0.0f));
  }

  // Header and exponent once it is known which blocks kept an element.
  void Finish(Int any, Int& header, Int& exponent) const {
    const Mask kept = Mask(active & ~(any == Ints(0)));
    header = Select(kept, plan & Ints(kBitsMask | kSignedFlag), Ints(0)) | (plan & Ints(kOccupiedFlag));
    exponent = Select(kept, scale_exponent - largest, Ints(0));
  }

  Int plan, largest, scale_exponent, shift;
  Mask active, extreme;
  Float factor, second, unit, limit;
};

// Sixteen elements: the bits of their dequantized values, whose low halves are zero, and their mantissas, of which the low bytes count.
struct Elements {
  Int value, mantissa;
};

template <bool kStochastic, bool kExtreme> inline Elements Quantized(Float x, Float factor, Float second, Float unit, Float limit, Int numbers) {
  if (kStochastic) {
    if (kExtreme) x = x * factor, factor = second;
    const Int q = FloorOfSum(x, factor, numbers);
    return {BitsOf(ToFloat(q) * unit), q};
  }
  Float y = x * factor;
  if (kExtreme) y = y * second;
  y = Clip(y, limit);
  // Adding 1.5 * 2**23 leaves the integer, rounded to nearest-even, in the low bits.
  const Float magic = Floats(0x1.8p23f), t = y + magic;
  return {BitsOf((t - magic) * unit), BitsOf(t)};
}

Stream ElementStream(const QuantizeArgs& a) {
  return Stream(uint32_t(a.seed), uint32_t(a.rank), uint32_t(a.backward_count), uint32_t(a.call_index), uint32_t(a.layer), uint32_t(a.role));
}

void StoreElements(const QuantizeArgs& a, int64_t at, const Elements& e, int64_t count) {
  const Mask lanes = FirstLanes(count);
  StoreBytes(a.codes + at, e.mantissa, lanes);
  if (a.values) StoreHighHalves(reinterpret_cast<Bf16_t*>(a.values) + at, e.value, lanes);
}

// Sixteen channels of up to sixteen positions: four channels of a position in a lane of `mantissas`, two in one of `values`.
void StoreTile(const QuantizeArgs& a, int64_t at, const Int (&values)[8], const Int (&mantissas)[4], int64_t count, int64_t channels) {
  Bf16_t* out = reinterpret_cast<Bf16_t*>(a.values);
  if (count == kLanes && channels == kLanes) {
    StoreTransposed(a.codes + at, a.channels, mantissas);
    if (out) StoreTransposed(out + at, a.channels, values);
    return;
  }
  uint8_t codes[kLanes][kLanes];
  Bf16_t halves[kLanes][kLanes];
  StoreTransposed(codes[0], kLanes, mantissas);
  if (out) StoreTransposed(halves[0], kLanes, values);
  for (int64_t i = 0; i < count; ++i, at += a.channels) {
    std::copy(codes[i], codes[i] + channels, a.codes + at);
    if (out) std::copy(halves[i], halves[i] + channels, out + at);
  }
}

void StoreHeaders(const QuantizeArgs& a, const LaneSteps& grid, int64_t base, int64_t first, int64_t count, Int header, Int exponent) {
  const Mask lanes = FirstLanes(count);
  if (grid.linear && grid.step == 1) {
    StoreBytes(a.headers + base + first, header, lanes);
    StoreBytes(reinterpret_cast<uint8_t*>(a.relative_exponents) + base + first, exponent, lanes);
    return;
  }
  int32_t h[kLanes], e[kLanes];
  Store(h, header);
  Store(e, exponent);
  grid.Each(first, count, [&](int64_t i, int64_t at) {
    a.headers[base + at] = uint8_t(h[i]);
    a.relative_exponents[base + at] = int8_t(e[i]);
  });
}

// One row's tile of sixteen channels and up to sixteen positions; factors and any are those of the span's blocks.
template <typename T, bool kStochastic, bool kExtreme>
void TileByPosition(const QuantizeArgs& a, const T* run, int64_t at, int64_t count, int64_t channels, int64_t first_channel, int block_shift,
                    const Factors* factors, Int* any, const uint16_t* numbers, int64_t pitch, bool prefetch) {
  const Mask lanes = FirstLanes(count);
  const auto quantized = [&](int64_t c) {
    const Factors& f = factors[(first_channel + c) >> block_shift];
    const T* from = run + c * a.stride_channel;
    // Into the second cache, for the next chunk: prefetchers do not follow as many runs, and planes of 4 KiB share a set of the first.
    if (prefetch) __builtin_prefetch(from + kApplyChunk, 0, 2);
    const Int r16 = kStochastic ? Load(numbers + c * pitch) : Ints(0);
    return Quantized<kStochastic, kExtreme>(Load(from, lanes), f.factor, f.second, f.unit, f.limit, r16);
  };
  // Packed as they come, so that all of the tile stays in registers.
  Int values[8], mantissas[4];
  if (channels == kLanes && block_shift >= 2) {
#pragma GCC unroll 4
    for (int64_t g = 0; g < 4; ++g) {
      const Elements e0 = quantized(4 * g), e1 = quantized(4 * g + 1), e2 = quantized(4 * g + 2), e3 = quantized(4 * g + 3);
      values[2 * g] = PackHighHalves(e0.value, e1.value);
      values[2 * g + 1] = PackHighHalves(e2.value, e3.value);
      mantissas[g] = PackBytes(e0.mantissa, e1.mantissa, e2.mantissa, e3.mantissa);
      any[(first_channel + 4 * g) >> block_shift] = any[(first_channel + 4 * g) >> block_shift] | mantissas[g];
    }
  } else {
    Elements e[kLanes];
    for (int64_t c = 0; c < kLanes; ++c) {
      e[c] = c < channels ? quantized(c) : Elements{Ints(0), Ints(0)};
      if (c < channels) any[(first_channel + c) >> block_shift] = any[(first_channel + c) >> block_shift] | (e[c].mantissa & Ints(0xFF));
    }
    for (int g = 0; g < 4; ++g) {
      values[2 * g] = PackHighHalves(e[4 * g].value, e[4 * g + 1].value);
      values[2 * g + 1] = PackHighHalves(e[4 * g + 2].value, e[4 * g + 3].value);
      mantissas[g] = PackBytes(e[4 * g].mantissa, e[4 * g + 1].mantissa, e[4 * g + 2].mantissa, e[4 * g + 3].mantissa);
    }
  }
  StoreTile(a, at, values, mantissas, count, channels);
}

// Numbers of `runs` runs of `count` indices that begin `step` indices apart, each from out + run * pitch on.
void NumbersByPosition(const Stream& stream, uint64_t first, int64_t step, int64_t runs, int64_t count, uint16_t* out, int64_t pitch) {
  int64_t run = 0;
  if (first % kNumbersPerCounter == 0 && step % kNumbersPerCounter == 0 && count <= kNumbersPerCall) {
    for (; run + 4 <= runs; run += 4) {
      uint64_t counters[4];
      uint16_t* outs[4];
      for (int u = 0; u < 4; ++u) counters[u] = (first + (run + u) * step) / kNumbersPerCounter, outs[u] = out + (run + u) * pitch;
      stream.Runs<4>(counters, outs);
    }
  }
  for (; run < runs; ++run) {
    const int64_t offset = stream.Numbers(first + run * step, count, out + run * pitch);
    if (offset) std::memmove(out + run * pitch, out + run * pitch + offset, count * sizeof(uint16_t));
  }
}

template <typename T, bool kStochastic> void ElementsByPosition(const QuantizeArgs& a, const Shape& s, const T* x, bool* extreme) {
  const Stream stream = ElementStream(a);
  const int64_t span = std::max<int64_t>(kLanes, a.block_channels), blocks = span / a.block_channels;
  const int64_t pitch = kApplyChunk + kNumbersSlack;
  const int block_shift = __builtin_ctzll(uint64_t(a.block_channels));
  std::vector<uint16_t> numbers(kStochastic ? a.block_rows * span * pitch + kLanes : 0);
  const LaneSteps grid(a, s, s.position_step, s.channel_step);
#pragma omp for collapse(2) schedule(static)
  for (int64_t row_block = 0; row_block < s.row_blocks; ++row_block) {
    for (int64_t chunk = 0; chunk < a.positions; chunk += kApplyChunk) {
      const int64_t row = row_block * a.block_rows, rows = std::min(a.block_rows, a.rows - row);
      const int64_t chunk_end = std::min(a.positions, chunk + kApplyChunk);
      for (int64_t channel = 0; channel < a.channels; channel += span) {
        if (kStochastic) {
          const int64_t runs = std::min(span, a.channels - channel);
          for (int64_t r = 0; r < rows; ++r) {
            NumbersByPosition(stream, uint64_t(((row + r) * a.channels + channel) * a.positions + chunk), a.positions, runs, chunk_end - chunk,
                              numbers.data() + r * span * pitch, pitch);
          }
        }
        const int64_t first_block = channel / a.block_channels, here = std::min(blocks, s.channel_blocks - first_block);
        Factors factors[kApplyChunk / kLanes][kLanes];
        Int any[kApplyChunk / kLanes][kLanes];
        Mask beyond = 0;
        for (int64_t p = chunk, i = 0; p < chunk_end; p += kLanes, ++i) {
          const Mask lanes = FirstLanes(chunk_end - p);
          const Int largest = a.scope == kRow ? Load(a.largest_exponents + row_block * a.positions + p, lanes)
                                              : Ints(a.largest_exponents[a.scope == kSample ? row_block : 0]);
          for (int64_t b = 0; b < here; ++b) {
            factors[i][b] = Factors(Load(a.plans + (row_block * s.channel_blocks + first_block + b) * a.positions + p, lanes), largest);
            beyond = Mask(beyond | factors[i][b].extreme);
            any[i][b] = Ints(0);
          }
        }
        if (beyond) {
          *extreme = true;
          for (int64_t p = chunk, i = 0; p < chunk_end; p += kLanes, ++i) {
            for (int64_t b = 0; b < here; ++b) factors[i][b].Split();
          }
        }
        // Row by row through all of the chunk's positions: more runs of memory at a time than this are more than prefetchers follow.
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < span && channel + c < a.channels; c += kLanes) {
            const int64_t channels = std::min<int64_t>(kLanes, a.channels - channel - c);
            const T* from = x + (row + r) * a.stride_row + (channel + c) * a.stride_channel;
            for (int64_t p = chunk, i = 0; p < chunk_end; p += kLanes, ++i) {
              const int64_t count = std::min<int64_t>(kLanes, chunk_end - p), at = ((row + r) * a.positions + p) * a.channels + channel + c;
              const uint16_t* tile = kStochastic ? numbers.data() + (r * span + c) * pitch + (p - chunk) : nullptr;
              if (beyond) {
                TileByPosition<T, kStochastic, true>(a, from + p, at, count, channels, c, block_shift, factors[i], any[i], tile, pitch, chunk_end < a.positions);
              } else {
                TileByPosition<T, kStochastic, false>(a, from + p, at, count, channels, c, block_shift, factors[i], any[i], tile, pitch, chunk_end < a.positions);
              }
            }
          }
        }
        for (int64_t p = chunk, i = 0; p < chunk_end; p += kLanes, ++i) {
          for (int64_t b = 0; b < here; ++b) {
            Int header, exponent;
            factors[i][b].Finish(any[i][b], header, exponent);
            const int64_t base = row_block * s.BlocksOfRow(a) + (first_block + b) * s.channel_step;
            StoreHeaders(a, grid, base, p, std::min<int64_t>(kLanes, chunk_end - p), header, exponent);
          }
        }
      }
    }
  }
}

// How the numbers of a chunk lie where channels are innermost.
enum class Order {
  kElements,  // as the elements, 16 bits each
  kPairs,     // [positions / 2][channels], two positions in 32 bits
};

// Sixteen blocks of a run: `length` elements are left in it from here on, the first of which is element `first` of the chunk.
template <typename T, bool kStochastic, bool kExtreme, Order kOrder>
Int LanesByChannel(const QuantizeArgs& a, const T* x, int64_t at, int64_t rows, int64_t length, const Factors& f, const Int* spread,
                   const uint16_t* numbers, int64_t pitch, int64_t first) {
  Int any[kMaxBlockChannels];
  const bool pairs = kStochastic && kOrder == Order::kPairs;
  int64_t p = pairs ? first / a.channels : 0, c = pairs ? first % a.channels : 0;
  for (int64_t v = 0; v < a.block_channels; ++v) {
    any[v] = Ints(0);
    const int64_t left = length - v * kLanes;
    if (left <= 0) continue;
    const Mask lanes = FirstLanes(left);
    const Float factor = Permute(f.factor, spread[v]), unit = Permute(f.unit, spread[v]);
    const Float limit = kStochastic ? unit : Permute(f.limit, spread[v]);
    const Float second = kExtreme ? Permute(f.second, spread[v]) : factor;
    const uint16_t* from_numbers = numbers + (pairs ? 2 * (p / 2 * a.channels + c) : first + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      Int r16 = Ints(0);
      if (pairs) {
        const Int words = Load(reinterpret_cast<const int32_t*>(from_numbers + r * pitch));
        r16 = p % 2 ? ShiftRightLogical<16>(words) : words & Ints(0xFFFF);
      } else if (kStochastic) {
        r16 = Load(from_numbers + r * pitch);
      }
      const Elements e = Quantized<kStochastic, kExtreme>(Load(x + r * a.stride_row + v * kLanes, lanes), factor, second, unit, limit, r16);
      any[v] = any[v] | (e.mantissa & Ints(0xFF));
      StoreElements(a, at + r * a.positions * a.channels + v * kLanes, e, left);
    }
    if (pairs && (c += kLanes) == a.channels) c = 0, ++p;
  }
  return ReduceBlocks(any, a.block_channels, AnyBit());
}

// Random numbers of one row for positions first .. first + positions - 1 where the stream counts positions innermost but memory does not.
void NumbersByChannel(const QuantizeArgs& a, const Stream& stream, int64_t row, int64_t first, int64_t positions, Order order, uint16_t* out,
                      uint16_t* scratch) {
  if (order == Order::kPairs) {
    for (int64_t c = 0; c < a.channels; c += kLanes) {
      for (int64_t p = 0; p < positions; p += kNumbersPerCounter) {
        const uint64_t counter = uint64_t((row * a.channels + c) * a.positions + first + p) / kNumbersPerCounter;
        stream.Columns(counter, uint64_t(a.positions / kNumbersPerCounter), reinterpret_cast<uint32_t*>(out) + p / 2 * a.channels + c, a.channels);
      }
    }
    return;
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const int64_t offset = stream.Numbers(uint64_t((row * a.channels + c) * a.positions + first), positions, scratch);
    for (int64_t p = 0; p < positions; ++p) out[p * a.channels + c] = scratch[offset + p];
  }
}

template <typename T, bool kStochastic, Order kOrder> void ElementsByChannel(const QuantizeArgs& a, const Shape& s, const T* x, bool* extreme) {
  const Stream stream = ElementStream(a);
  const int64_t block = a.block_channels, unit = kLanes * block;
  // A chunk is a number of positions, or of elements where positions do not matter.
  const bool transposed = kStochastic && !s.logical_is_memory, by_elements = s.flat && !transposed;
  const int64_t total = by_elements ? a.positions * a.channels : a.positions;
  int64_t chunk = by_elements ? std::max(unit, kChannelChunk / unit * unit) : std::max<int64_t>(1, kChannelChunk / a.channels);
  if (!by_elements) chunk = (chunk + kNumbersPerCounter - 1) / kNumbersPerCounter * kNumbersPerCounter;
  const int64_t row_numbers = (by_elements ? chunk : chunk * a.channels) + kNumbersSlack + kLanes * kMaxBlockChannels;
  std::vector<uint16_t> numbers(kStochastic ? a.block_rows * row_numbers : 0), scratch(transposed ? chunk + kNumbersSlack : 0);
  const LaneSteps grid(a, s, s.position_step, s.channel_step);
  Int spread[kMaxBlockChannels];
  for (int64_t v = 0; v < block; ++v) {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = int32_t((v * kLanes + i) / block);
    spread[v] = Load(lanes);
  }
#pragma omp for collapse(2) schedule(static)
  for (int64_t row_block = 0; row_block < s.row_blocks; ++row_block) {
    for (int64_t start = 0; start < total; start += chunk) {
      const int64_t row = row_block * a.block_rows, rows = std::min(a.block_rows, a.rows - row);
      const int64_t here = std::min(chunk, total - start);
      // Runs of elements in this chunk: one where positions and channels are one run, else one a position.
      const int64_t pieces = s.flat ? 1 : here;
      const int64_t length = by_elements ? here : s.flat ? here * a.channels : a.channels;
      const int64_t element = by_elements ? start : start * a.channels;  // of the row, channels innermost
      for (int64_t r = 0; kStochastic && r < rows; ++r) {
        uint16_t* out = numbers.data() + r * row_numbers;
        if (transposed) {
          NumbersByChannel(a, stream, row + r, start, here, kOrder, out, scratch.data());
        } else {
          const int64_t offset = stream.Numbers(uint64_t((row + r) * a.positions * a.channels + element), pieces * length, out);
          if (offset) std::memmove(out, out + offset, pieces * length * sizeof(uint16_t));
        }
      }
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t run = s.flat ? 0 : start + piece;
        const int64_t first_block = s.flat ? element / block : 0, blocks = (length + block - 1) / block;
        const T* from = x + row * a.stride_row + (s.flat ? element : run * a.stride_position);
        const int64_t at = row * a.positions * a.channels + element + piece * a.channels;
        const int64_t plan = row_block * s.BlocksOfRow(a) + (s.flat ? 0 : run * s.channel_blocks);
        const int64_t grid_base = row_block * s.BlocksOfRow(a) + grid.RunOffset(run, s);
        const int64_t scope = a.scope == kTensor ? 0 : a.scope == kSample ? row_block : row_block * a.positions + run;
        const Int largest = Ints(a.largest_exponents[scope]);
        for (int64_t b = 0; b < blocks; b += kLanes) {
          const int64_t count = std::min<int64_t>(kLanes, blocks - b), left = length - b * block, first = piece * a.channels + b * block;
          Factors factors(Load(a.plans + plan + first_block + b, FirstLanes(count)), largest);
          Int any;
          if (factors.extreme) {
            *extreme = true;
            factors.Split();
            any = LanesByChannel<T, kStochastic, true, kOrder>(a, from + b * block, at + b * block, rows, left, factors, spread, numbers.data(), row_numbers, first);
          } else {
            any = LanesByChannel<T, kStochastic, false, kOrder>(a, from + b * block, at + b * block, rows, left, factors, spread, numbers.data(), row_numbers, first);
          }
          Int header, exponent;
          factors.Finish(any, header, exponent);
          StoreHeaders(a, grid, grid_base, first_block + b, count, header, exponent);
        }
      }
    }
  }
}

template <typename T> int Quantize(const QuantizeArgs& a) {
  const Shape s(a);
  const T* x = static_cast<const T*>(a.x);
  const bool find_sign = a.role == kActivation && !a.force_signed;
  if (a.scope != kTensor) {
    const int64_t scopes = s.row_blocks * (a.scope == kRow ? a.positions : 1);
    std::fill(a.largest_exponents, a.largest_exponents + scopes, kNoExponent);
  }
  bool nonfinite = false, extreme = false;
  int32_t largest = kNoExponent;
#pragma omp parallel num_threads(int(a.threads)) reduction(|| : nonfinite) reduction(max : largest)
  {
    const DefaultRounding rounding;
    if (s.positions_innermost) {
      find_sign ? PeaksByPosition<T, true>(a, s, x) : PeaksByPosition<T, false>(a, s, x);
    } else {
      find_sign ? PeaksByChannel<T, true>(a, s, x) : PeaksByChannel<T, false>(a, s, x);
    }
    MakePlans(a, s, &largest, &nonfinite);
  }
  if (nonfinite) return kNonfinite;
  if (a.scope == kTensor) a.largest_exponents[0] = largest;
#pragma omp parallel num_threads(int(a.threads)) reduction(|| : extreme)
  {
    const DefaultRounding rounding;
    if (s.positions_innermost) {
      a.stochastic ? ElementsByPosition<T, true>(a, s, x, &extreme) : ElementsByPosition<T, false>(a, s, x, &extreme);
    } else {
      if (!a.stochastic) {
        ElementsByChannel<T, false, Order::kElements>(a, s, x, &extreme);
      } else if (!s.logical_is_memory && a.channels % kLanes == 0 && a.positions % kNumbersPerCounter == 0) {
        ElementsByChannel<T, true, Order::kPairs>(a, s, x, &extreme);
      } else {
        ElementsByChannel<T, true, Order::kElements>(a, s, x, &extreme);
      }
    }
  }
  return extreme ? kValuesNotWritten : kDone;
}

bool Sound(const QuantizeArgs& a) {
  const bool blocks = a.block_rows >= 1 && (a.block_channels == 1 || a.block_channels == 2 || a.block_channels == 4 || a.block_channels == 8 ||
                                            a.block_channels == 16 || a.block_channels == 32);
  const bool pointers = a.x && a.request && a.peaks && a.plans && a.largest_exponents && a.codes && a.relative_exponents && a.headers;
  const bool strides = a.stride_position == 1 || a.stride_channel == 1;
  return blocks && pointers && strides && a.rows >= 1 && a.positions >= 1 && a.channels >= 1 && a.group_rows >= 1 && a.group_channels >= 1 &&
         a.threads >= 1 && a.role >= kActivation && a.role <= kError && a.scope >= kTensor && a.scope <= kRow &&
         (a.scope == kTensor || a.block_rows == 1) && a.most_bits >= kMinBits && a.most_bits <= 8 && a.least_bits >= 0 &&
         (a.drops || !(a.is_threshold && a.stochastic && a.role == kError && !a.least_bits));
}

}  // namespace

extern "C" int dynasty_quantize(const QuantizeArgs* args) {
  if (!args || !Sound(*args)) return kBadArguments;
  return args->x_is_bfloat16 ? Quantize<Bf16_t>(*args) : Quantize<float>(*args);
}

extern "C" void dynasty_stream_numbers(const int64_t* position_and_code, int64_t count, uint16_t* out) {
  uint32_t word[6];
  for (int i = 0; i < 6; ++i) word[i] = uint32_t(position_and_code[i]);
  const Stream stream(word[0], word[1], word[2], word[3], word[4], word[5]);
  uint16_t buffer[kNumbersPerCall + kNumbersSlack];
  for (int64_t first = 0; first < count; first += kNumbersPerCall) {
    stream.Numbers(uint64_t(first), std::min<int64_t>(kNumbersPerCall, count - first), buffer);
    std::copy(buffer, buffer + std::min<int64_t>(kNumbersPerCall, count - first), out + first);
  }
}

}  // namespace dynasty
