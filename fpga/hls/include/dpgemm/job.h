// SPDX-License-Identifier: Apache-2.0
// A job: what one start of the core computes, read from memory and checked.
#pragma once

#include "dpgemm/types.h"

namespace dp {

// Up to three spatial axes, the last one fastest.
struct Extent {
  uint32_t size[kAxes];
};

struct Job {
  Gemm gemm;
  bool is_raw;
  bool has_row_exponents;
  uint32_t rows;
  uint32_t in_channels;
  uint32_t out_channels;
  Extent input;
  Extent output;
  Extent taps;
  Extent stride;
  Extent padding;
  Extent dilation;
  int32_t exponent;
  uint32_t tile_begin;
  uint32_t tile_count;
  uint32_t step_begin;
  uint32_t step_count;
  uint32_t words_a;
  uint32_t words_b;
  uint32_t words_c;
  uint32_t words_job;

  // Derived.
  uint32_t row_blocks;
  uint32_t in_blocks;
  uint32_t out_blocks;
  uint32_t input_size;
  uint32_t output_size;
  uint32_t tap_count;
  uint32_t m_blocks;  // of the whole GEMM: lines (forward, dgrad) or channel blocks of E (wgrad)
  uint32_t n_blocks;
  uint32_t k_blocks;  // channel blocks of A (forward, dgrad; for each tap) or lines of E (wgrad)
  uint32_t m_tiles;
  uint32_t n_tiles;
  uint32_t k_steps;  // of one tap (forward, dgrad), or of all lines (wgrad)
};

// Reads a job's words and checks them; `job` may be used only if the result is kNone.
Error DecodeJob(const uint32_t* words, Job& job);

// The blocks of one output tile.
struct Tile {
  uint32_t tap;  // wgrad's; 0 else
  uint32_t m_begin, m_count;
  uint32_t n_begin, n_count;
};

// The blocks of one step along k.
struct Step {
  uint32_t tap;
  uint32_t k_begin, k_count;
};

Tile TileAt(const Job& job, uint32_t index);
Step StepAt(const Job& job, const Tile& tile, uint32_t index);

}  // namespace dp
