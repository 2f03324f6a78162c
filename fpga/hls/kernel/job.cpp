// SPDX-License-Identifier: Apache-2.0
// Decodes a job and cuts it into output tiles and steps.
#include "dpgemm/job.h"

namespace dp {

namespace {

// Extents stay below this, so that products of a few of them stay within 64 bits and addresses within 32.
constexpr uint64_t kMaxExtent = uint64_t(1) << 24;
constexpr uint64_t kMaxProduct = uint64_t(1) << 31;

uint32_t blocks_of(uint32_t elements, uint32_t edge) {
#pragma HLS INLINE
  return (elements + edge - 1) / edge;
}

Extent read_extent(const uint32_t* words, int first) {
#pragma HLS INLINE
  Extent extent;
  AXES: for (int axis = 0; axis < kAxes; ++axis) {
    extent.size[axis] = words[first + axis];
  }
  return extent;
}

// Product of an extent; kMaxProduct or more if it is too large or an axis is zero.
uint64_t volume(const Extent& extent) {
#pragma HLS INLINE
  uint64_t product = 1;
  AXES: for (int axis = 0; axis < kAxes; ++axis) {
    if (extent.size[axis] == 0 || extent.size[axis] >= kMaxExtent || product >= kMaxProduct) return kMaxProduct;
    product *= extent.size[axis];
  }
  return product;
}

bool is_small(const Extent& extent) {
#pragma HLS INLINE
  bool result = true;
  AXES: for (int axis = 0; axis < kAxes; ++axis) {
    result &= extent.size[axis] < kMaxExtent;
  }
  return result;
}

// Whether no tap of any output position lies beyond the padding: then positions in 32 bits do not wrap into the operand.
bool keeps_inside(const Job& job) {
#pragma HLS INLINE
  bool result = true;
  AXES: for (int axis = 0; axis < kAxes; ++axis) {
    const uint64_t last_place = uint64_t(job.output.size[axis] - 1) * job.stride.size[axis];
    const uint64_t last = last_place + uint64_t(job.taps.size[axis] - 1) * job.dilation.size[axis];
    result &= last < uint64_t(job.input.size[axis]) + 2 * uint64_t(job.padding.size[axis]);
  }
  return result;
}

}  // namespace

Error decode_job(const uint32_t* memory, Job& job) {
  uint32_t words[kJobWords];
  // The first words say how many there are.
  HEAD: for (int i = 0; i <= kJobWordsJob; ++i) {
#pragma HLS PIPELINE II=1
    words[i] = memory[i];
  }
  if (words[kJobLayoutVersion] != kLayoutVersion) return Error::kLayoutVersion;
  if (words[kJobWordsJob] < uint32_t(kJobWords)) return Error::kJobMemory;
  REST: for (int i = kJobWordsJob + 1; i < kJobWords; ++i) {
#pragma HLS PIPELINE II=1
    words[i] = memory[i];
  }
  if (words[kJobGemm] > uint32_t(Gemm::kWgrad) || (words[kJobFlags] & ~(kFlagRaw | kFlagRowExponents))) return Error::kGemm;
  job.gemm = Gemm(words[kJobGemm]);
  job.is_raw = (words[kJobFlags] & kFlagRaw) != 0;
  job.has_row_exponents = (words[kJobFlags] & kFlagRowExponents) != 0;
  if (job.has_row_exponents && job.gemm != Gemm::kForward) return Error::kGemm;

  job.rows = words[kJobRows];
  job.in_channels = words[kJobInChannels];
  job.out_channels = words[kJobOutChannels];
  job.input = read_extent(words, kJobInputZ);
  job.output = read_extent(words, kJobOutputZ);
  job.taps = read_extent(words, kJobTapsZ);
  job.stride = read_extent(words, kJobStrideZ);
  job.padding = read_extent(words, kJobPaddingZ);
  job.dilation = read_extent(words, kJobDilationZ);
  job.exponent = int32_t(words[kJobExponent]);
  job.tile_begin = words[kJobTileBegin];
  job.tile_count = words[kJobTileCount];
  job.step_begin = words[kJobStepBegin];
  job.step_count = words[kJobStepCount];
  job.words_a = words[kJobWordsA];
  job.words_b = words[kJobWordsB];
  job.words_c = words[kJobWordsC];
  job.words_job = words[kJobWordsJob];

  const uint64_t input_size = volume(job.input);
  const uint64_t output_size = volume(job.output);
  const uint64_t tap_count = volume(job.taps);
  const bool has_extents = input_size < kMaxProduct && output_size < kMaxProduct && tap_count < kMaxProduct &&
                           volume(job.stride) < kMaxProduct && volume(job.dilation) < kMaxProduct && is_small(job.padding) &&
                           job.rows > 0 && job.rows < kMaxExtent && job.in_channels > 0 && job.in_channels < kMaxExtent &&
                           job.out_channels > 0 && job.out_channels < kMaxExtent;
  if (!has_extents || !keeps_inside(job)) return Error::kExtent;
  // No result and no operand has 2**31 elements or more.
  const uint64_t rows = job.rows;
  if (rows * input_size >= kMaxProduct || rows * output_size >= kMaxProduct || job.out_channels * tap_count >= kMaxProduct ||
      rows * input_size * job.in_channels >= kMaxProduct || rows * output_size * job.out_channels >= kMaxProduct ||
      job.out_channels * tap_count * job.in_channels >= kMaxProduct) {
    return Error::kExtent;
  }
  const uint64_t result = job.gemm == Gemm::kForward ? rows * output_size * job.out_channels
                          : job.gemm == Gemm::kDgrad ? rows * input_size * job.in_channels
                                                     : job.out_channels * tap_count * job.in_channels;
  if (result * (job.is_raw ? 2 : 1) > job.words_c) return Error::kExtent;
  job.input_size = uint32_t(input_size);
  job.output_size = uint32_t(output_size);
  job.tap_count = uint32_t(tap_count);
  job.row_blocks = blocks_of(job.rows, kEdge);
  job.in_blocks = blocks_of(job.in_channels, kEdge);
  job.out_blocks = blocks_of(job.out_channels, kEdge);
  const uint64_t table = job.has_row_exponents ? uint64_t(job.row_blocks) * kEdge : 0;
  if (kJobWords + table > job.words_job) return Error::kJobMemory;

  if (job.gemm == Gemm::kForward) {
    job.m_blocks = job.row_blocks * job.output_size;
    job.n_blocks = job.out_blocks;
    job.k_blocks = job.in_blocks;
  } else if (job.gemm == Gemm::kDgrad) {
    job.m_blocks = job.row_blocks * job.input_size;
    job.n_blocks = job.in_blocks;
    job.k_blocks = job.out_blocks;
  } else {
    job.m_blocks = job.out_blocks;
    job.n_blocks = job.in_blocks;
    job.k_blocks = job.row_blocks * job.output_size;
  }
  job.m_tiles = blocks_of(job.m_blocks, kTile);
  job.n_tiles = blocks_of(job.n_blocks, kTile);
  job.k_steps = blocks_of(job.k_blocks, kTile);

  const bool is_wgrad = job.gemm == Gemm::kWgrad;
  const uint64_t tiles = uint64_t(job.m_tiles) * job.n_tiles * (is_wgrad ? job.tap_count : 1);
  const uint64_t steps = uint64_t(job.k_steps) * (is_wgrad ? 1 : job.tap_count);
  if (job.tile_count == 0 || job.step_count == 0 || uint64_t(job.tile_begin) + job.tile_count > tiles ||
      uint64_t(job.step_begin) + job.step_count > steps) {
    return Error::kRange;
  }
  return Error::kNone;
}

Tile tile_at(const Job& job, uint32_t index) {
#pragma HLS INLINE
  const uint32_t m_tile = index % job.m_tiles;
  const uint32_t n_tile = index / job.m_tiles % job.n_tiles;
  Tile tile;
  tile.tap = index / job.m_tiles / job.n_tiles;
  tile.m_begin = m_tile * kTile;
  tile.n_begin = n_tile * kTile;
  tile.m_count = job.m_blocks - tile.m_begin < kTile ? job.m_blocks - tile.m_begin : kTile;
  tile.n_count = job.n_blocks - tile.n_begin < kTile ? job.n_blocks - tile.n_begin : kTile;
  return tile;
}

Step step_at(const Job& job, const Tile& tile, uint32_t index) {
#pragma HLS INLINE
  Step step;
  step.tap = job.gemm == Gemm::kWgrad ? tile.tap : index / job.k_steps;
  step.k_begin = index % job.k_steps * kTile;
  step.k_count = job.k_blocks - step.k_begin < kTile ? job.k_blocks - step.k_begin : kTile;
  return step;
}

}  // namespace dp
