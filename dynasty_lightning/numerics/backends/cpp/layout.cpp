// SPDX-License-Identifier: Apache-2.0
// What happens around the GEMMs: codes back to bfloat16, and bfloat16 results to float32 in the
// layer's memory order.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "args.h"
#include "processor.h"
#include "stream.h"

namespace dynasty {
namespace {

// Units of a row of blocks as [positions][channels of a vector's worth of lanes]:
// 2**scale_exponent, negative where the codes are, with the last bit set where the block is
// unsigned.
void Units(const DequantizeArgs& a, int64_t row_block, int64_t channel_blocks, int64_t first,
           int64_t count, float* units) {
  for (int64_t c = 0; c < channel_blocks; ++c) {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at =
          row_block * channel_blocks * a.positions +
          (a.grid_channels_last ? (first + p) * channel_blocks + c : c * a.positions + first + p);
      const uint32_t bits = uint32_t(a.relative_exponents[at] + a.largest_exponent + 127) << 23 |
                            (a.headers[at] & kNegatedFlag ? 0x80000000u : 0u) |
                            (a.headers[at] & kSignedFlag ? 0u : 1u);
      std::memcpy(units + p * channel_blocks + c, &bits, sizeof bits);
    }
  }
}

inline Int Values(const uint8_t* codes, Float unit, Mask lanes) {
  const Int low = Load(codes, lanes), is_unsigned = BitsOf(unit) & Ints(1);
  // A signed byte above 127 stands for itself less 256.
  const Int q = low - (ShiftLeft<1>(low & Ints(0x80)) & (is_unsigned - Ints(1)));
  const Int flip = ShiftRight<31>(BitsOf(unit));  // as integers: a zero has no sign
  return BitsOf(ToFloat((q ^ flip) - flip) * FloatOf(BitsOf(unit) & Ints(INT32_MAX - 1)));
}

void Dequantize(const DequantizeArgs& a) {
  const int64_t row_blocks = (a.rows + a.block_rows - 1) / a.block_rows;
  const int64_t channel_blocks = (a.channels + a.block_channels - 1) / a.block_channels;
  const bool flat = a.channels % a.block_channels == 0;
  const int64_t chunk = std::max<int64_t>(1, 4096 / a.channels);
  Int spread[kMaxBlockChannels];
  for (int64_t v = 0; v < a.block_channels; ++v) {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = int32_t((v * kLanes + i) / a.block_channels);
    spread[v] = Load(lanes);
  }
  Bf16_t* values = reinterpret_cast<Bf16_t*>(a.values);
#pragma omp parallel num_threads(int(a.threads))
  {
    const DefaultRounding rounding;
    std::vector<float> units(chunk * channel_blocks + kLanes);
#pragma omp for collapse(2) schedule(static)
    for (int64_t row_block = 0; row_block < row_blocks; ++row_block) {
      for (int64_t first = 0; first < a.positions; first += chunk) {
        const int64_t here = std::min(chunk, a.positions - first);
        Units(a, row_block, channel_blocks, first, here, units.data());
        const int64_t rows = std::min(a.block_rows, a.rows - row_block * a.block_rows);
        const int64_t pieces = flat ? 1 : here, length = flat ? here * a.channels : a.channels;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t at = (row_block * a.block_rows * a.positions + first + piece) * a.channels;
          for (int64_t c = 0; c < length; c += kLanes * a.block_channels) {
            const Float unit = Load(units.data() + piece * channel_blocks + c / a.block_channels);
            for (int64_t v = 0; v < a.block_channels; ++v) {
              const int64_t left = length - c - v * kLanes;
              if (left <= 0) break;
              const Float spread_unit = Permute(unit, spread[v]);
              for (int64_t r = 0; r < rows; ++r) {
                const int64_t to = at + r * a.positions * a.channels + c + v * kLanes;
                if (left >= kLanes) {
                  StoreHighHalves(values + to, Values(a.codes + to, spread_unit, Mask(0xFFFF)));
                } else {
                  StoreHighHalves(values + to, Values(a.codes + to, spread_unit, FirstLanes(left)),
                                  FirstLanes(left));
                }
              }
            }
          }
        }
      }
    }
  }
}

void Widen(const WidenArgs& a) {
  const Bf16_t* values = reinterpret_cast<const Bf16_t*>(a.values);
  if (a.channels_last || a.positions == 1) {
    const int64_t rows = a.rows * a.positions;
    const bool flat = !a.bias;
    const int64_t length = flat ? 4096 : a.channels,
                  lines = flat ? (rows * a.channels + length - 1) / length : rows;
#pragma omp parallel for num_threads(int(a.threads)) schedule(static)
    for (int64_t line = 0; line < lines; ++line) {
      const DefaultRounding rounding;
      const int64_t end = flat ? std::min(length, rows * a.channels - line * length) : length;
      for (int64_t c = 0; c < end; c += kLanes) {
        const Mask lanes = FirstLanes(end - c);
        Float value = Load(values + line * length + c, lanes);
        if (a.bias) value = value + Load(a.bias + c, lanes);
        Store(a.out + line * length + c, value, lanes);
      }
    }
    return;
  }
  const int64_t tiles = (a.positions + kLanes - 1) / kLanes;
#pragma omp parallel for collapse(2) num_threads(int(a.threads)) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const DefaultRounding rounding;
      const int64_t p = tile * kLanes, count = std::min<int64_t>(kLanes, a.positions - p);
      for (int64_t c = 0; c < a.channels; c += kLanes) {
        const int64_t channels = std::min<int64_t>(kLanes, a.channels - c);
        const Bf16_t* from = values + (row * a.positions + p) * a.channels + c;
        Float columns[kLanes];
        if (count == kLanes && channels == kLanes) {
          LoadTransposed(from, a.channels, columns);
        } else {
          Bf16_t square[kLanes][kLanes] = {};
          for (int64_t i = 0; i < count; ++i)
            std::copy(from + i * a.channels, from + i * a.channels + channels, square[i]);
          LoadTransposed(square[0], kLanes, columns);
        }
        for (int64_t i = 0; i < channels; ++i) {
          const Float value = a.bias ? columns[i] + Floats(a.bias[c + i]) : columns[i];
          Store(a.out + (row * a.channels + c + i) * a.positions + p, value, FirstLanes(count));
        }
      }
    }
  }
}

}  // namespace

// Whether lanes hold a block's row.
static bool SoundBlocks(const DequantizeArgs& a) {
  const int64_t channels = a.block_channels;
  return a.block_rows >= 1 && channels >= 1 && channels <= kMaxBlockChannels &&
         (channels & (channels - 1)) == 0;
}

extern "C" int dynasty_dequantize(const DequantizeArgs* args) {
  if (!args || !args->codes || !args->relative_exponents || args->largest_exponent < -100 ||
      args->largest_exponent > 120 || !args->headers || !args->values || args->rows < 1 ||
      args->positions < 1 || args->channels < 1 || args->threads < 1 || !SoundBlocks(*args)) {
    return kBadArguments;
  }
  Dequantize(*args);
  return kDone;
}

extern "C" int dynasty_widen(const WidenArgs* args) {
  if (!args || !args->values || !args->out || args->rows < 1 || args->positions < 1 ||
      args->channels < 1 || args->threads < 1) {
    return kBadArguments;
  }
  Widen(*args);
  return kDone;
}

}  // namespace dynasty
