// SPDX-License-Identifier: Apache-2.0
// Second moments for the sensitivity analysis. Every sum has one order whatever the memory order
// and the number of threads. In double: it holds the square of every float32, whose own range ends
// at 1.8e19 and 1e-23 for squares.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "args.h"
#include "lanes.h"
#include "processor.h"

namespace dynasty {
namespace {

template <typename T>
void MeansByPosition(const MeanSquaresArgs& a, int64_t groups, int64_t channel_blocks) {
  const T* x = static_cast<const T*>(a.x);
#pragma omp for collapse(2) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t block = 0; block < channel_blocks; ++block) {
      const int64_t first_row = group * a.group_rows,
                    last_row = std::min(a.rows, first_row + a.group_rows);
      const int64_t first = block * a.block_channels,
                    last = std::min(a.channels, first + a.block_channels);
      const double count = double((last_row - first_row) * (last - first));
      for (int64_t p = 0; p < a.positions; p += kLanes) {
        const Mask lanes = FirstLanes(a.positions - p);
        Doubles total = NoSums();
        for (int64_t c = first; c < last; ++c) {
          Doubles sum = NoSums();
          for (int64_t r = first_row; r < last_row; ++r)
            sum = PlusSquares(sum, Load(x + r * a.stride_row + c * a.stride_channel + p, lanes));
          total = total + sum;
        }
        double sums[kLanes];
        Store(sums, total);
        const int64_t step = a.grid_channels_last ? channel_blocks : 1;
        double* out = a.out + group * channel_blocks * a.positions +
                      (a.grid_channels_last ? p * channel_blocks + block : block * a.positions + p);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, a.positions - p); ++i)
          out[i * step] = sums[i] / count;
      }
    }
  }
}

// Several vectors side by side, so that one addition does not wait for the last.
constexpr int64_t kVectors = 4;

// `sums` of the squares of each of `here` channels over the rows from `first` to `last`; the
// others' are zero.
template <typename T>
void SumsOfRows(const MeanSquaresArgs& a, const T* x, int64_t first, int64_t last, int64_t here,
                double* sums) {
  Doubles sum[kVectors];
  for (auto& s : sum) s = NoSums();
  if (here == kVectors * kLanes) {  // with no mask and in registers
    for (int64_t r = first; r < last; ++r) {
      for (int64_t v = 0; v < kVectors; ++v)
        sum[v] = PlusSquares(sum[v], Load(x + r * a.stride_row + v * kLanes));
    }
  } else {
    for (int64_t v = 0; v * kLanes < here; ++v) {
      const Mask lanes = FirstLanes(here - v * kLanes);
      for (int64_t r = first; r < last; ++r)
        sum[v] = PlusSquares(sum[v], Load(x + r * a.stride_row + v * kLanes, lanes));
    }
  }
  for (int64_t v = 0; v < kVectors; ++v) Store(sums + v * kLanes, sum[v]);
}

template <typename T>
void MeansByChannel(const MeanSquaresArgs& a, int64_t groups, int64_t channel_blocks) {
  const T* x = static_cast<const T*>(a.x);
  constexpr int64_t chunk = kVectors * kLanes;
  static_assert(chunk % kMaxBlockChannels == 0, "a chunk is whole blocks");
#pragma omp for collapse(2) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t p = 0; p < a.positions; ++p) {
      const int64_t first_row = group * a.group_rows,
                    last_row = std::min(a.rows, first_row + a.group_rows);
      for (int64_t start = 0; start < a.channels; start += chunk) {
        const int64_t here = std::min(chunk, a.channels - start);
        double sums[chunk];
        SumsOfRows(a, x + p * a.stride_position + start, first_row, last_row, here, sums);
        for (int64_t c = 0; c < here; c += a.block_channels) {
          const int64_t end = std::min(here, c + a.block_channels),
                        block = (start + c) / a.block_channels;
          double total = 0.0;
          for (int64_t i = c; i < end; ++i) total += sums[i];
          const int64_t at =
              a.grid_channels_last ? p * channel_blocks + block : block * a.positions + p;
          a.out[group * channel_blocks * a.positions + at] =
              total / double((last_row - first_row) * (end - c));
        }
      }
    }
  }
}

template <typename T>
void Means(const MeanSquaresArgs& a) {
  const int64_t groups = (a.rows + a.group_rows - 1) / a.group_rows,
                channel_blocks = (a.channels + a.block_channels - 1) / a.block_channels;
#pragma omp parallel num_threads(int(a.threads))
  {
    const DefaultRounding rounding;
    if (a.stride_position == 1 && a.stride_channel != 1) {
      MeansByPosition<T>(a, groups, channel_blocks);
    } else {
      MeansByChannel<T>(a, groups, channel_blocks);
    }
  }
}

}  // namespace

extern "C" int dynasty_mean_squares(const MeanSquaresArgs* args) {
  if (!args || !args->x || !args->out || args->rows < 1 || args->positions < 1 ||
      args->channels < 1 || args->group_rows < 1 || args->block_channels < 1 ||
      args->block_channels > kMaxBlockChannels || args->threads < 1 ||
      (args->stride_position != 1 && args->stride_channel != 1)) {
    return kBadArguments;
  }
  args->x_is_bfloat16 ? Means<Bf16_t>(*args) : Means<float>(*args);
  return kDone;
}

}  // namespace dynasty
