// SPDX-License-Identifier: Apache-2.0
// First pass: the largest magnitude of each block, and for X whether an element is negative, in the
// sign bit.
#pragma once

#include <algorithm>

#include "shape.h"

namespace dynasty {
namespace {

constexpr int64_t kPeakChunk = 256;  // positions of a row read at a time

Int WithSign(Int magnitude, Float least) {
  return magnitude | Select(Negative(least), Ints(INT32_MIN), Ints(0));
}

template <typename T, bool kFindSign>
void PeaksByPosition(const QuantizeArgs& a, const Shape& s, Unit unit, const T* x) {
  for (int64_t row_block = unit.begin; row_block < unit.end; ++row_block) {
    for (int64_t channel_block = 0; channel_block < s.channel_blocks; ++channel_block) {
      const int64_t rows = std::min(a.block_rows, a.rows - row_block * a.block_rows);
      const int64_t channels =
          std::min(a.block_channels, a.channels - channel_block * a.block_channels);
      const T* block = x + row_block * a.block_rows * a.stride_row +
                       channel_block * a.block_channels * a.stride_channel;
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
              const Float value = left >= kLanes ? Load(run + v * kLanes)
                                                 : Load(run + v * kLanes, FirstLanes(left));
              largest[v] = Greatest(largest[v], BitsOf(value) & Ints(INT32_MAX));
              if (kFindSign) least[v] = Least(value, least[v]);
            }
          }
        }
        for (int v = 0; v * kLanes < count; ++v) {
          Store(peaks + p + v * kLanes, kFindSign ? WithSign(largest[v], least[v]) : largest[v],
                FirstLanes(count - v * kLanes));
        }
      }
    }
  }
}

template <typename T, bool kFindSign>
void PeaksByChannel(const QuantizeArgs& a, const Shape& s, Unit unit, const T* x) {
  const int64_t runs = s.flat ? 1 : a.positions,
                length = s.flat ? a.positions * a.channels : a.channels;
  const int64_t blocks = s.RunLength(a), vectors = a.block_channels;
  for (int64_t row_block = unit.begin; row_block < unit.end; ++row_block) {
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
        Store(a.peaks + (row_block * runs + run) * blocks + first, peaks,
              FirstLanes(blocks - first));
      }
    }
  }
}

// The largest element and the largest magnitude below zero of each block, neither below 0, as bits:
// two planes of `peaks`, `count` apart.
template <typename T>
void EndsByPosition(const QuantizeArgs& a, const Shape& s, Unit unit, const T* x, int64_t count) {
  for (int64_t row_block = unit.begin; row_block < unit.end; ++row_block) {
    for (int64_t channel_block = 0; channel_block < s.channel_blocks; ++channel_block) {
      const int64_t rows = std::min(a.block_rows, a.rows - row_block * a.block_rows);
      const int64_t channels =
          std::min(a.block_channels, a.channels - channel_block * a.block_channels);
      const T* block = x + row_block * a.block_rows * a.stride_row +
                       channel_block * a.block_channels * a.stride_channel;
      int32_t* peaks = a.peaks + (row_block * s.channel_blocks + channel_block) * a.positions;
      for (int64_t p = 0; p < a.positions; p += kLanes) {
        const Mask lanes = FirstLanes(a.positions - p);
        Int high = Ints(0), low = Ints(0);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < channels; ++c) {
            const Int bits =
                BitsOf(Load(block + r * a.stride_row + c * a.stride_channel + p, lanes));
            high = Greatest(high, bits);
            low = Greatest(low, bits ^ Ints(INT32_MIN));
          }
        }
        Store(peaks + p, high, lanes);
        Store(peaks + count + p, low, lanes);
      }
    }
  }
}

template <typename T>
void EndsByChannel(const QuantizeArgs& a, const Shape& s, Unit unit, const T* x, int64_t count) {
  const int64_t runs = s.flat ? 1 : a.positions,
                length = s.flat ? a.positions * a.channels : a.channels;
  const int64_t blocks = s.RunLength(a);
  for (int64_t row_block = unit.begin; row_block < unit.end; ++row_block) {
    const int64_t rows = std::min(a.block_rows, a.rows - row_block * a.block_rows);
    for (int64_t run = 0; run < runs; ++run) {
      for (int64_t first = 0; first < blocks; first += kLanes) {
        const int64_t c = first * a.block_channels;
        const T* block = x + row_block * a.block_rows * a.stride_row + run * a.stride_position + c;
        Int high[kMaxBlockChannels], low[kMaxBlockChannels];
        for (int64_t v = 0; v < a.block_channels; ++v) {
          const Mask lanes = FirstLanes(std::max<int64_t>(0, length - c - v * kLanes));
          high[v] = low[v] = Ints(0);
          for (int64_t r = 0; lanes && r < rows; ++r) {
            const Int bits = BitsOf(Load(block + r * a.stride_row + v * kLanes, lanes));
            high[v] = Greatest(high[v], bits);
            low[v] = Greatest(low[v], bits ^ Ints(INT32_MIN));
          }
        }
        int32_t* peaks = a.peaks + (row_block * runs + run) * blocks + first;
        const Mask lanes = FirstLanes(blocks - first);
        Store(peaks, ReduceBlocks(high, a.block_channels, AbsMax()), lanes);
        Store(peaks + count, ReduceBlocks(low, a.block_channels, AbsMax()), lanes);
      }
    }
  }
}

template <typename T>
void FindEnds(const QuantizeArgs& a, const Shape& s, Unit unit, const T* x) {
  const int64_t count = s.row_blocks * s.BlocksOfRow(a);
  s.positions_innermost ? EndsByPosition<T>(a, s, unit, x, count)
                        : EndsByChannel<T>(a, s, unit, x, count);
}

template <typename T>
void FindPeaks(const QuantizeArgs& a, const Shape& s, Unit unit, const T* x) {
  const bool find_sign = a.role == kActivation && !a.force_signed;
  if (s.positions_innermost) {
    find_sign ? PeaksByPosition<T, true>(a, s, unit, x) : PeaksByPosition<T, false>(a, s, unit, x);
  } else {
    find_sign ? PeaksByChannel<T, true>(a, s, unit, x) : PeaksByChannel<T, false>(a, s, unit, x);
  }
}

}  // namespace
}  // namespace dynasty
