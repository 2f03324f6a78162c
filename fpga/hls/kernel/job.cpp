// SPDX-License-Identifier: Apache-2.0
// Decodes a job and cuts it into output tiles and steps.
#include "dpgemm/job.h"

namespace dp {

namespace {

// Extents stay below this, so that products of a few of them stay within 64 bits and addresses
// within 32.
constexpr uint64_t kMaxExtent = uint64_t(1) << 24;
constexpr uint64_t kMaxProduct = uint64_t(1) << 31;

uint32_t BlocksOf(uint32_t elements, uint32_t edge) {
#pragma HLS INLINE
  return (elements + edge - 1) / edge;
}

Extent ReadExtent(const uint32_t* words, int first) {
#pragma HLS INLINE
  Extent extent;
AXES:
  for (int axis = 0; axis < kAxes; ++axis) {
    extent.size[axis] = words[first + axis];
  }
  return extent;
}

// Product of an extent; kMaxProduct or more if it is too large or an axis is zero.
uint64_t Volume(const Extent& extent) {
#pragma HLS INLINE
  uint64_t product = 1;
AXES:
  for (int axis = 0; axis < kAxes; ++axis) {
    if (extent.size[axis] == 0 || extent.size[axis] >= kMaxExtent || product >= kMaxProduct)
      return kMaxProduct;
    product *= extent.size[axis];
  }
  return product;
}

bool IsSmall(const Extent& extent) {
#pragma HLS INLINE
  bool result = true;
AXES:
  for (int axis = 0; axis < kAxes; ++axis) {
    result &= extent.size[axis] < kMaxExtent;
  }
  return result;
}

// Whether no tap of any output position lies beyond the padding: then positions in 32 bits do not
// wrap into the operand.
bool KeepsInside(const Job& job) {
#pragma HLS INLINE
  bool result = true;
AXES:
  for (int axis = 0; axis < kAxes; ++axis) {
    const uint64_t last_place = uint64_t(job.output.size[axis] - 1) * job.stride.size[axis];
    const uint64_t last = last_place + uint64_t(job.taps.size[axis] - 1) * job.dilation.size[axis];
    result &= last < uint64_t(job.input.size[axis]) + 2 * uint64_t(job.padding.size[axis]);
  }
  return result;
}

// A job's words as the host wrote them, but for those that DecodeGemm reads.
void DecodeWords(const uint32_t words[kJobWords], Job& job) {
#pragma HLS INLINE
  job.rows = words[kJobRows];
  job.in_channels = words[kJobInChannels];
  job.out_channels = words[kJobOutChannels];
  job.input = ReadExtent(words, kJobInputZ);
  job.output = ReadExtent(words, kJobOutputZ);
  job.taps = ReadExtent(words, kJobTapsZ);
  job.stride = ReadExtent(words, kJobStrideZ);
  job.padding = ReadExtent(words, kJobPaddingZ);
  job.dilation = ReadExtent(words, kJobDilationZ);
  job.exponent = int32_t(words[kJobExponent]);
  job.tile_begin = words[kJobTileBegin];
  job.tile_count = words[kJobTileCount];
  job.step_begin = words[kJobStepBegin];
  job.step_count = words[kJobStepCount];
  job.words_a = words[kJobWordsA];
  job.words_b = words[kJobWordsB];
  job.words_c = words[kJobWordsC];
  job.words_job = words[kJobWordsJob];
}

// Which GEMM, and its flags.
Error DecodeGemm(const uint32_t words[kJobWords], Job& job) {
#pragma HLS INLINE
  const uint32_t gemm = words[kJobGemm];
  const uint32_t flags = words[kJobFlags];
  if (gemm > uint32_t(Gemm::kWgrad) || (flags & ~(kFlagRaw | kFlagRowExponents))) {
    return Error::kGemm;
  }
  job.gemm = Gemm(gemm);
  job.is_raw = (flags & kFlagRaw) != 0;
  job.has_row_exponents = (flags & kFlagRowExponents) != 0;
  if (job.has_row_exponents && job.gemm != Gemm::kForward) return Error::kGemm;
  return Error::kNone;
}

bool IsExtent(uint32_t count) {
#pragma HLS INLINE
  return count > 0 && count < kMaxExtent;
}

// Sizes of the operands, none of which, nor the result, has 2**31 elements or more.
Error DeriveSizes(Job& job) {
#pragma HLS INLINE
  const uint64_t input_size = Volume(job.input);
  const uint64_t output_size = Volume(job.output);
  const uint64_t tap_count = Volume(job.taps);
  const bool has_extents = input_size < kMaxProduct && output_size < kMaxProduct &&
                           tap_count < kMaxProduct && Volume(job.stride) < kMaxProduct &&
                           Volume(job.dilation) < kMaxProduct && IsSmall(job.padding) &&
                           IsExtent(job.rows) && IsExtent(job.in_channels) &&
                           IsExtent(job.out_channels);
  if (!has_extents || !KeepsInside(job)) return Error::kExtent;
  const uint64_t x_lines = job.rows * input_size;
  const uint64_t e_lines = job.rows * output_size;
  const uint64_t w_lines = job.out_channels * tap_count;
  if (x_lines >= kMaxProduct || e_lines >= kMaxProduct || w_lines >= kMaxProduct) {
    return Error::kExtent;
  }
  const uint64_t x = x_lines * job.in_channels;
  const uint64_t e = e_lines * job.out_channels;
  const uint64_t w = w_lines * job.in_channels;
  if (x >= kMaxProduct || e >= kMaxProduct || w >= kMaxProduct) return Error::kExtent;
  const uint64_t result = job.gemm == Gemm::kForward ? e : job.gemm == Gemm::kDgrad ? x : w;
  if (result * (job.is_raw ? 2 : 1) > job.words_c) return Error::kExtent;
  job.input_size = uint32_t(input_size);
  job.output_size = uint32_t(output_size);
  job.tap_count = uint32_t(tap_count);
  return Error::kNone;
}

// Blocks, tiles and steps of the whole GEMM.
void DeriveTiles(Job& job) {
#pragma HLS INLINE
  job.row_blocks = BlocksOf(job.rows, kEdge);
  job.in_blocks = BlocksOf(job.in_channels, kEdge);
  job.out_blocks = BlocksOf(job.out_channels, kEdge);
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
  job.m_tiles = BlocksOf(job.m_blocks, kTile);
  job.n_tiles = BlocksOf(job.n_blocks, kTile);
  job.k_steps = BlocksOf(job.k_blocks, kTile);
}

// Whether the job's tiles and steps are the GEMM's.
bool IsInRange(const Job& job) {
#pragma HLS INLINE
  const bool is_wgrad = job.gemm == Gemm::kWgrad;
  const uint64_t tiles = uint64_t(job.m_tiles) * job.n_tiles * (is_wgrad ? job.tap_count : 1);
  const uint64_t steps = uint64_t(job.k_steps) * (is_wgrad ? 1 : job.tap_count);
  return job.tile_count > 0 && job.step_count > 0 &&
         uint64_t(job.tile_begin) + job.tile_count <= tiles &&
         uint64_t(job.step_begin) + job.step_count <= steps;
}

}  // namespace

Error DecodeJob(const uint32_t* memory, Job& job) {
  uint32_t words[kJobWords];
// The first words hold how many there are.
HEAD:
  for (int i = 0; i <= kJobWordsJob; ++i) {
#pragma HLS PIPELINE II = 1
    words[i] = memory[i];
  }
  if (words[kJobLayoutVersion] != kLayoutVersion) return Error::kLayoutVersion;
  if (words[kJobWordsJob] < uint32_t(kJobWords)) return Error::kJobMemory;
REST:
  for (int i = kJobWordsJob + 1; i < kJobWords; ++i) {
#pragma HLS PIPELINE II = 1
    words[i] = memory[i];
  }
  Error error = DecodeGemm(words, job);
  if (error != Error::kNone) return error;
  DecodeWords(words, job);
  error = DeriveSizes(job);
  if (error != Error::kNone) return error;
  DeriveTiles(job);
  const uint64_t table = job.has_row_exponents ? uint64_t(job.row_blocks) * kEdge : 0;
  if (kJobWords + table > job.words_job) return Error::kJobMemory;
  return IsInRange(job) ? Error::kNone : Error::kRange;
}

Tile TileAt(const Job& job, uint32_t index) {
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

Step StepAt(const Job& job, const Tile& tile, uint32_t index) {
#pragma HLS INLINE
  Step step;
  step.tap = job.gemm == Gemm::kWgrad ? tile.tap : index / job.k_steps;
  step.k_begin = index % job.k_steps * kTile;
  step.k_count = job.k_blocks - step.k_begin < kTile ? job.k_blocks - step.k_begin : kTile;
  return step;
}

}  // namespace dp
