// SPDX-License-Identifier: Apache-2.0
// Third pass: window, mantissas, bfloat16 values, headers.
//
// Elements are always written channels innermost, which is what the bf16 GEMMs read without a
// reordering of their own.
#pragma once

#include <algorithm>
#include <memory>

#include "plan.h"
#include "shape.h"
#include "stream.h"

namespace dynasty {
namespace {

constexpr int64_t kApplyChunk = 64;      // positions whose random numbers lie in the L1 cache
constexpr int64_t kChannelChunk = 2048;  // elements of a row, likewise

// What the elements of sixteen blocks need, a lane for each block.
template <bool kFine>
struct Factors {
  Factors() = default;
  Factors(Int plan_word, Int largest_exponent) : plan(plan_word), largest(largest_exponent) {
    const Int width = plan & Ints(kBitsMask), sign = ShiftRight<kSignedShift>(plan) & Ints(1),
              depth = ShiftRight<kDepthShift>(plan) & Ints(3);
    active = width > Ints(0);
    const Int floor = largest - Ints(kWindow + 7) + sign;
    scale_exponent =
        Greatest(ShiftRight<kExponentShift>(plan), kFine ? ShiftLeft<kStepBits>(floor) : floor);
    if (kFine) {
      // Quarter steps j of 0 to 3 are 1, 5, 3 and 7 times a power of two.
      const Int j = scale_exponent & Ints(kSteps - 1);
      const Mask none = j == Ints(0), two = j == Ints(2);
      scale_exponent = ShiftRight<kStepBits>(scale_exponent) -
                       Select(none, Ints(0), Select(two, Ints(1), Ints(2)));
      steps = ToFloat(Select(none, Ints(1), Select(two, Ints(3), Ints(kSteps) + j)));
    }
    shift = Select(active, depth - scale_exponent, Ints(0));
    scale_exponent = Select(active, scale_exponent, Ints(0));
    extreme = Mask((Ints(-126) > shift) | (shift > Ints(126)) | (Ints(-126) > scale_exponent) |
                   (scale_exponent > Ints(kFine ? 123 : 126)));
    factor = Select(active, PowerOfTwo(shift), Floats(0.0f));
    unit = kFine ? PowerOfTwo(scale_exponent) * steps : PowerOfTwo(scale_exponent);
    const Int whole = ShiftLeft(Ints(1), width - sign) - Ints(1),
              negated = ShiftRight<kNegatedShift>(plan) & Ints(1),
              split = ShiftRight<kSplitShift>(plan) & sign;
    limit = Select(active, ToFloat(whole + negated), Floats(0.0f));
    least = Select(active, ToFloat(Ints(0) - whole - (split & (Ints(1) - negated))), Floats(0.0f));
    flip = Ints(0) - negated;
  }
  static Float PowerOfTwo(Int exponent) { return FloatOf(ShiftLeft<23>(exponent + Ints(127))); }

  // One factor cannot hold every power of two: two halves, as the pure-torch path has them.
  void Split() {
    const Int half = ShiftRight<1>(shift);
    factor = PowerOfTwo(half);
    second = Select(active, PowerOfTwo(shift - half), Floats(0.0f));
  }

  // What elements read of it, each block's on its elements' lanes.
  template <bool kStochastic, bool kExtreme>
  Factors Spread(Int lanes) const {
    Factors spread;
    spread.factor = Permute(factor, lanes), spread.unit = Permute(unit, lanes);
    if (kExtreme) spread.second = Permute(second, lanes);
    if (!kStochastic) spread.limit = Permute(limit, lanes);
    if (kFine && !kStochastic) spread.least = Permute(least, lanes);
    if (kFine) spread.flip = Permute(flip, lanes), spread.steps = Permute(steps, lanes);
    return spread;
  }

  // Header and exponent once it is known which blocks kept an element.
  void Finish(Int any, Int& header, Int& exponent) const {
    const Mask kept = Mask(active & ~(any == Ints(0)));
    Int flags = plan & Ints(kBitsMask | kSignedFlag);
    if (kFine) flags = flags | (flip & Ints(kNegatedFlag));
    header = Select(kept, flags, Ints(0)) | (plan & Ints(kOccupiedFlag));
    exponent = Select(kept, scale_exponent - largest, Ints(0));
  }

  Int plan, largest, scale_exponent, shift, flip;
  Mask active, extreme;
  Float factor, second, unit, limit, least, steps;
};

// Sixteen elements: the bits of their dequantized values, whose low halves are zero, and their
// mantissas, of which the low bytes count.
struct Elements {
  Int value, mantissa;
};

template <bool kStochastic, bool kExtreme, bool kFine>
inline Elements Quantized(Float x, const Factors<kFine>& f, Int numbers) {
  // Adding 1.5 * 2**23 leaves the integer, rounded to nearest-even, in the low bits.
  const Float magic = Floats(0x1.8p23f);
  if (!kFine) {
    if (kStochastic) {
      if (kExtreme) x = x * f.factor;
      const Int q = FloorOfSum(x, kExtreme ? f.second : f.factor, numbers);
      return {BitsOf(ToFloat(q) * f.unit), q};
    }
    Float y = x * f.factor;
    if (kExtreme) y = y * f.second;
    const Float t = Clip(y, f.limit) + magic;
    return {BitsOf((t - magic) * f.unit), BitsOf(t)};
  }
  Float y = x * f.factor;
  if (kExtreme) y = y * f.second;
  y = y / f.steps;
  y = kStochastic ? ToFloat(FloorOfSum(y, Floats(1.0f), numbers))
                  : Least(Greatest(y, f.least), f.limit) + magic - magic;
  const Int mantissa = BitsOf(y * f.steps + magic);
  return {BitsOf(y * f.unit), (mantissa ^ f.flip) - f.flip};
}

// Uninitialised: a unit's buffer is as large as the unit, and filling it with zeros would be one
// more pass.
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(size ? new uint16_t[size] : nullptr) {}
  uint16_t* get() const { return data_.get(); }

 private:
  std::unique_ptr<uint16_t[]> data_;
};

Stream ElementStream(const QuantizeArgs& a) {
  return Stream(uint32_t(a.seed), uint32_t(a.rank), uint32_t(a.backward_count),
                uint32_t(a.call_index), uint32_t(a.layer), uint32_t(a.role));
}

void StoreElements(const QuantizeArgs& a, int64_t at, const Elements& e, int64_t count) {
  const Mask lanes = FirstLanes(count);
  StoreBytes(a.codes + at, e.mantissa, lanes);
  if (a.values) StoreHighHalves(reinterpret_cast<Bf16_t*>(a.values) + at, e.value, lanes);
}

// Sixteen channels of up to sixteen positions: four channels of a position in a lane of
// `mantissas`, two in one of `values`.
void StoreTile(const QuantizeArgs& a, int64_t at, const Int (&values)[8], const Int (&mantissas)[4],
               int64_t count, int64_t channels) {
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

void StoreHeaders(const QuantizeArgs& a, const LaneSteps& grid, int64_t base, int64_t first,
                  int64_t count, Int header, Int exponent) {
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

// One row's tile of sixteen channels and up to sixteen positions; factors and any are those of the
// span's blocks.
template <typename T, bool kStochastic, bool kExtreme, bool kFine>
void TileByPosition(const QuantizeArgs& a, const T* run, int64_t at, int64_t count,
                    int64_t channels, int64_t first_channel, int block_shift,
                    const Factors<kFine>* factors, Int* any, const uint16_t* numbers, int64_t pitch,
                    bool prefetch) {
  const Mask lanes = FirstLanes(count);
  const auto quantized = [&](int64_t c) {
    const Factors<kFine>& f = factors[(first_channel + c) >> block_shift];
    const T* from = run + c * a.stride_channel;
    // Into the second cache, for the next chunk: prefetchers do not follow as many runs, and planes
    // of 4 KiB share a set of the first.
    if (prefetch) __builtin_prefetch(from + kApplyChunk, 0, 2);
    const Int r16 = kStochastic ? Load(numbers + c * pitch) : Ints(0);
    return Quantized<kStochastic, kExtreme, kFine>(Load(from, lanes), f, r16);
  };
  // Packed as they come, so that all of the tile stays in registers.
  Int values[8], mantissas[4];
  if (channels == kLanes && block_shift >= 2) {
#pragma GCC unroll 4
    for (int64_t g = 0; g < 4; ++g) {
      const Elements e0 = quantized(4 * g), e1 = quantized(4 * g + 1), e2 = quantized(4 * g + 2),
                     e3 = quantized(4 * g + 3);
      values[2 * g] = PackHighHalves(e0.value, e1.value);
      values[2 * g + 1] = PackHighHalves(e2.value, e3.value);
      mantissas[g] = PackBytes(e0.mantissa, e1.mantissa, e2.mantissa, e3.mantissa);
      Int* of_block = any + ((first_channel + 4 * g) >> block_shift);
      of_block[0] = of_block[0] | mantissas[g];
    }
  } else {
    Elements e[kLanes];
    for (int64_t c = 0; c < kLanes; ++c) {
      e[c] = c < channels ? quantized(c) : Elements{Ints(0), Ints(0)};
      if (c < channels)
        any[(first_channel + c) >> block_shift] =
            any[(first_channel + c) >> block_shift] | (e[c].mantissa & Ints(0xFF));
    }
    for (int g = 0; g < 4; ++g) {
      values[2 * g] = PackHighHalves(e[4 * g].value, e[4 * g + 1].value);
      values[2 * g + 1] = PackHighHalves(e[4 * g + 2].value, e[4 * g + 3].value);
      mantissas[g] = PackBytes(e[4 * g].mantissa, e[4 * g + 1].mantissa, e[4 * g + 2].mantissa,
                               e[4 * g + 3].mantissa);
    }
  }
  StoreTile(a, at, values, mantissas, count, channels);
}

// Numbers of `runs` runs of `count` indices that begin `step` indices apart, each from out + run *
// pitch on.
void NumbersByPosition(const Stream& stream, uint64_t first, int64_t step, int64_t runs,
                       int64_t count, uint16_t* out, int64_t pitch) {
  int64_t run = 0;
  if (first % kNumbersPerCounter == 0 && step % kNumbersPerCounter == 0 &&
      count <= kNumbersPerCall) {
    for (; run + 4 <= runs; run += 4) {
      uint64_t counters[4];
      uint16_t* outs[4];
      for (int u = 0; u < 4; ++u)
        counters[u] = (first + (run + u) * step) / kNumbersPerCounter,
        outs[u] = out + (run + u) * pitch;
      stream.Runs<4>(counters, outs);
    }
  }
  for (; run < runs; ++run) {
    const int64_t offset = stream.Numbers(first + run * step, count, out + run * pitch);
    if (offset)
      std::memmove(out + run * pitch, out + run * pitch + offset, count * sizeof(uint16_t));
  }
}

template <typename T, bool kStochastic, bool kFine>
void ElementsByPosition(const QuantizeArgs& a, const Shape& s, Unit unit, int32_t tensor_largest,
                        const T* x, bool* extreme) {
  const Stream stream = ElementStream(a);
  const int64_t span = std::max<int64_t>(kLanes, a.block_channels),
                blocks = span / a.block_channels;
  const int64_t pitch = kApplyChunk + kNumbersSlack;
  const int block_shift = __builtin_ctzll(uint64_t(a.block_channels));
  const Buffer numbers(kStochastic ? a.block_rows * span * pitch + kLanes : 0);
  const LaneSteps grid(a, s, s.position_step, s.channel_step);
  for (int64_t row_block = unit.begin; row_block < unit.end; ++row_block) {
    for (int64_t chunk = 0; chunk < a.positions; chunk += kApplyChunk) {
      const int64_t row = row_block * a.block_rows, rows = std::min(a.block_rows, a.rows - row);
      const int64_t chunk_end = std::min(a.positions, chunk + kApplyChunk);
      for (int64_t channel = 0; channel < a.channels; channel += span) {
        if (kStochastic) {
          const int64_t runs = std::min(span, a.channels - channel);
          for (int64_t r = 0; r < rows; ++r) {
            NumbersByPosition(
                stream, uint64_t(((row + r) * a.channels + channel) * a.positions + chunk),
                a.positions, runs, chunk_end - chunk, numbers.get() + r * span * pitch, pitch);
          }
        }
        const int64_t first_block = channel / a.block_channels,
                      here = std::min(blocks, s.channel_blocks - first_block);
        Factors<kFine> factors[kApplyChunk / kLanes][kLanes];
        Int any[kApplyChunk / kLanes][kLanes];
        Mask beyond = 0;
        for (int64_t p = chunk, i = 0; p < chunk_end; p += kLanes, ++i) {
          const Mask lanes = FirstLanes(chunk_end - p);
          const Int largest =
              a.scope == kRow
                  ? Load(a.largest_exponents + row_block * a.positions + p, lanes)
                  : Ints(a.scope == kSample ? a.largest_exponents[row_block] : tensor_largest);
          for (int64_t b = 0; b < here; ++b) {
            factors[i][b] = Factors<kFine>(
                Load(a.plans + (row_block * s.channel_blocks + first_block + b) * a.positions + p,
                     lanes),
                largest);
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
        // Row by row through all of the chunk's positions: more runs of memory at a time than this
        // are more than prefetchers follow.
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < span && channel + c < a.channels; c += kLanes) {
            const int64_t channels = std::min<int64_t>(kLanes, a.channels - channel - c);
            const T* from = x + (row + r) * a.stride_row + (channel + c) * a.stride_channel;
            for (int64_t p = chunk, i = 0; p < chunk_end; p += kLanes, ++i) {
              const int64_t count = std::min<int64_t>(kLanes, chunk_end - p),
                            at = ((row + r) * a.positions + p) * a.channels + channel + c;
              const uint16_t* tile =
                  kStochastic ? numbers.get() + (r * span + c) * pitch + (p - chunk) : nullptr;
              if (beyond) {
                TileByPosition<T, kStochastic, true, kFine>(a, from + p, at, count, channels, c,
                                                            block_shift, factors[i], any[i], tile,
                                                            pitch, chunk_end < a.positions);
              } else {
                TileByPosition<T, kStochastic, false, kFine>(a, from + p, at, count, channels, c,
                                                             block_shift, factors[i], any[i], tile,
                                                             pitch, chunk_end < a.positions);
              }
            }
          }
        }
        for (int64_t p = chunk, i = 0; p < chunk_end; p += kLanes, ++i) {
          for (int64_t b = 0; b < here; ++b) {
            Int header, exponent;
            factors[i][b].Finish(any[i][b], header, exponent);
            const int64_t base = row_block * s.BlocksOfRow(a) + (first_block + b) * s.channel_step;
            StoreHeaders(a, grid, base, p, std::min<int64_t>(kLanes, chunk_end - p), header,
                         exponent);
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

// Sixteen blocks of a run: `length` elements are left in it from here on, the first of which is
// element `first` of the chunk.
template <typename T, bool kStochastic, bool kExtreme, bool kFine, Order kOrder>
Int LanesByChannel(const QuantizeArgs& a, const T* x, int64_t at, int64_t rows, int64_t length,
                   const Factors<kFine>& f, const Int* spread, const uint16_t* numbers,
                   int64_t pitch, int64_t first) {
  Int any[kMaxBlockChannels];
  const bool pairs = kStochastic && kOrder == Order::kPairs;
  int64_t p = pairs ? first / a.channels : 0, c = pairs ? first % a.channels : 0;
  for (int64_t v = 0; v < a.block_channels; ++v) {
    any[v] = Ints(0);
    const int64_t left = length - v * kLanes;
    if (left <= 0) continue;
    const Mask lanes = FirstLanes(left);
    const Factors<kFine> here = f.template Spread<kStochastic, kExtreme>(spread[v]);
    const uint16_t* from_numbers =
        numbers + (pairs ? 2 * (p / 2 * a.channels + c) : first + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      Int r16 = Ints(0);
      if (pairs) {
        const Int words = Load(reinterpret_cast<const int32_t*>(from_numbers + r * pitch));
        r16 = p % 2 ? ShiftRightLogical<16>(words) : words & Ints(0xFFFF);
      } else if (kStochastic) {
        r16 = Load(from_numbers + r * pitch);
      }
      const Elements e = Quantized<kStochastic, kExtreme, kFine>(
          Load(x + r * a.stride_row + v * kLanes, lanes), here, r16);
      any[v] = any[v] | (e.mantissa & Ints(0xFF));
      StoreElements(a, at + r * a.positions * a.channels + v * kLanes, e, left);
    }
    if (pairs && (c += kLanes) == a.channels) c = 0, ++p;
  }
  return ReduceBlocks(any, a.block_channels, AnyBit());
}

// Random numbers of one row for positions first .. first + positions - 1 where the stream counts
// positions innermost but memory does not.
void NumbersByChannel(const QuantizeArgs& a, const Stream& stream, int64_t row, int64_t first,
                      int64_t positions, Order order, uint16_t* out, uint16_t* scratch) {
  if (order == Order::kPairs) {
    for (int64_t c = 0; c < a.channels; c += kLanes) {
      for (int64_t p = 0; p < positions; p += kNumbersPerCounter) {
        const uint64_t counter =
            uint64_t((row * a.channels + c) * a.positions + first + p) / kNumbersPerCounter;
        stream.Columns(counter, uint64_t(a.positions / kNumbersPerCounter),
                       reinterpret_cast<uint32_t*>(out) + p / 2 * a.channels + c, a.channels);
      }
    }
    return;
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const int64_t offset =
        stream.Numbers(uint64_t((row * a.channels + c) * a.positions + first), positions, scratch);
    for (int64_t p = 0; p < positions; ++p) out[p * a.channels + c] = scratch[offset + p];
  }
}

template <typename T, bool kStochastic, bool kFine, Order kOrder>
void ElementsByChannel(const QuantizeArgs& a, const Shape& s, Unit unit, int32_t tensor_largest,
                       const T* x, bool* extreme) {
  const Stream stream = ElementStream(a);
  const int64_t block = a.block_channels, step = kLanes * block;
  // A chunk is a number of positions, or of elements where positions do not matter.
  const bool transposed = kStochastic && !s.logical_is_memory, by_elements = s.flat && !transposed;
  const int64_t total = by_elements ? a.positions * a.channels : a.positions;
  int64_t chunk = by_elements ? std::max(step, kChannelChunk / step * step)
                              : std::max<int64_t>(1, kChannelChunk / a.channels);
  if (!by_elements)
    chunk = (chunk + kNumbersPerCounter - 1) / kNumbersPerCounter * kNumbersPerCounter;
  const int64_t row_numbers =
      (by_elements ? chunk : chunk * a.channels) + kNumbersSlack + kLanes * kMaxBlockChannels;
  const Buffer numbers(kStochastic ? a.block_rows * row_numbers : 0),
      scratch(transposed ? chunk + kNumbersSlack : 0);
  const LaneSteps grid(a, s, s.position_step, s.channel_step);
  Int spread[kMaxBlockChannels];
  for (int64_t v = 0; v < block; ++v) {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = int32_t((v * kLanes + i) / block);
    spread[v] = Load(lanes);
  }
  for (int64_t row_block = unit.begin; row_block < unit.end; ++row_block) {
    for (int64_t start = 0; start < total; start += chunk) {
      const int64_t row = row_block * a.block_rows, rows = std::min(a.block_rows, a.rows - row);
      const int64_t here = std::min(chunk, total - start);
      // Runs of elements in this chunk: one where positions and channels are one run, else one a
      // position.
      const int64_t pieces = s.flat ? 1 : here;
      const int64_t length = by_elements ? here : s.flat ? here * a.channels : a.channels;
      const int64_t element =
          by_elements ? start : start * a.channels;  // of the row, channels innermost
      for (int64_t r = 0; kStochastic && r < rows; ++r) {
        uint16_t* out = numbers.get() + r * row_numbers;
        if (transposed) {
          NumbersByChannel(a, stream, row + r, start, here, kOrder, out, scratch.get());
        } else {
          const int64_t offset = stream.Numbers(
              uint64_t((row + r) * a.positions * a.channels + element), pieces * length, out);
          if (offset) std::memmove(out, out + offset, pieces * length * sizeof(uint16_t));
        }
      }
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t run = s.flat ? 0 : start + piece;
        const int64_t first_block = s.flat ? element / block : 0,
                      blocks = (length + block - 1) / block;
        const T* from = x + row * a.stride_row + (s.flat ? element : run * a.stride_position);
        const int64_t at = row * a.positions * a.channels + element + piece * a.channels;
        const int64_t plan = row_block * s.BlocksOfRow(a) + (s.flat ? 0 : run * s.channel_blocks);
        const int64_t grid_base = row_block * s.BlocksOfRow(a) + grid.RunOffset(run, s);
        const int64_t scope = a.scope == kSample ? row_block : row_block * a.positions + run;
        const Int largest = Ints(a.scope == kTensor ? tensor_largest : a.largest_exponents[scope]);
        for (int64_t b = 0; b < blocks; b += kLanes) {
          const int64_t count = std::min<int64_t>(kLanes, blocks - b), left = length - b * block,
                        first = piece * a.channels + b * block;
          Factors<kFine> factors(Load(a.plans + plan + first_block + b, FirstLanes(count)),
                                 largest);
          Int any;
          if (factors.extreme) {
            *extreme = true;
            factors.Split();
            any = LanesByChannel<T, kStochastic, true, kFine, kOrder>(
                a, from + b * block, at + b * block, rows, left, factors, spread, numbers.get(),
                row_numbers, first);
          } else {
            any = LanesByChannel<T, kStochastic, false, kFine, kOrder>(
                a, from + b * block, at + b * block, rows, left, factors, spread, numbers.get(),
                row_numbers, first);
          }
          Int header, exponent;
          factors.Finish(any, header, exponent);
          StoreHeaders(a, grid, grid_base, first_block + b, count, header, exponent);
        }
      }
    }
  }
}

// The elements of a unit, given the largest exponent of the tensor where that is the scope. Sets
// *extreme where values could not be written.
template <typename T, bool kFine>
void WriteElements(const QuantizeArgs& a, const Shape& s, Unit unit, int32_t tensor_largest,
                   const T* x, bool* extreme) {
  if (s.positions_innermost) {
    a.stochastic ? ElementsByPosition<T, true, kFine>(a, s, unit, tensor_largest, x, extreme)
                 : ElementsByPosition<T, false, kFine>(a, s, unit, tensor_largest, x, extreme);
  } else if (!a.stochastic) {
    ElementsByChannel<T, false, kFine, Order::kElements>(a, s, unit, tensor_largest, x, extreme);
  } else if (!s.logical_is_memory && a.channels % kLanes == 0 &&
             a.positions % kNumbersPerCounter == 0) {
    ElementsByChannel<T, true, kFine, Order::kPairs>(a, s, unit, tensor_largest, x, extreme);
  } else {
    ElementsByChannel<T, true, kFine, Order::kElements>(a, s, unit, tensor_largest, x, extreme);
  }
}

// Relative exponents of a unit that were counted from `from` are counted from `to`.
void Rebase(const QuantizeArgs& a, const Shape& s, Unit unit, int32_t from, int32_t to) {
  for (int64_t i = unit.begin * s.BlocksOfRow(a); i < unit.end * s.BlocksOfRow(a); ++i) {
    a.relative_exponents[i] =
        int8_t(a.headers[i] & kBitsMask ? a.relative_exponents[i] + from - to : 0);
  }
}

}  // namespace
}  // namespace dynasty
