// SPDX-License-Identifier: Apache-2.0
// How an operand's elements and blocks lie in memory, and how its blocks are walked, sixteen at a
// time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "args.h"
#include "lanes.h"

namespace dynasty {
namespace {

// How an operand lies and is cut.
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
        flat(!positions_innermost && a.stride_position == a.channels &&
             a.channels % a.block_channels == 0 && a.scope != kRow) {}

  int64_t row_blocks, channel_blocks;
  bool positions_innermost;
  int64_t position_step, channel_step;                  // of the grid in memory, in blocks
  int64_t logical_position_step, logical_channel_step;  // of the grid as the stream counts it
  bool logical_is_memory, flat;

  // Blocks of one block row, in the order in which they are planned: [channels, positions] or
  // [positions, channels].
  int64_t BlocksOfRow(const QuantizeArgs& a) const { return channel_blocks * a.positions; }
  // One run of consecutive blocks in that order, and how many there are.
  int64_t RunLength(const QuantizeArgs& a) const {
    return positions_innermost ? a.positions : flat ? BlocksOfRow(a) : channel_blocks;
  }
};

// Where sixteen consecutive blocks of a run lie in a grid with the given steps.
struct LaneSteps {
  LaneSteps(const QuantizeArgs& a, const Shape& s, int64_t position_step, int64_t channel_step)
      : position(position_step),
        channel(channel_step),
        channel_blocks(s.channel_blocks),
        by_position(s.positions_innermost) {
    if (by_position) {
      linear = true, step = position;
    } else {
      linear = !s.flat || a.positions == 1 || position == channel * channel_blocks;
      step = channel;
    }
  }

  // Offset of the first block of run `run` in a block row.
  int64_t RunOffset(int64_t run, const Shape& s) const {
    return by_position ? run * channel : s.flat ? 0 : run * position;
  }

  // Calls visit(lane, offset within the run) for `count` blocks from `first` on.
  template <typename Visit>
  void Each(int64_t first, int64_t count, Visit visit) const {
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
  steps.Each(first, std::min<int64_t>(count, kLanes),
             [&](int64_t i, int64_t at) { lanes[i] = base[at]; });
  return Load(lanes);
}

// Row blocks begin .. end - 1: what one thread works on at a time, whole width groups, small enough
// to stay in its caches from pass to pass.
struct Unit {
  int64_t begin, end;
};

struct AbsMax {
  Int operator()(Int a, Int b) const { return Greatest(a, b); }
};
struct AnyBit {
  Int operator()(Int a, Int b) const { return a | b; }
};

const int32_t kQuadOrder[kLanes] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

// Reduces the elements of sixteen blocks, block_channels vectors one behind the other, to a lane
// for each block.
template <typename Reduce>
Int ReduceBlocks(const Int* vectors, int64_t block_channels, Reduce reduce) {
  if (block_channels == 1) return vectors[0];
  if (block_channels == 4) {
    const Int quads[4] = {vectors[0], vectors[1], vectors[2], vectors[3]};
    return Permute(ReduceQuads(quads, reduce), Load(kQuadOrder));
  }
  // Transposed, the sixteen blocks' elements lie in the lanes.
  Int columns[kLanes], total = Ints(0);
  const int64_t per_vector = kLanes / block_channels;
  if (per_vector > 1) {  // 8 channels: a vector holds two blocks, and not all vectors of a full
                         // transpose exist
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

}  // namespace
}  // namespace dynasty
