// SPDX-License-Identifier: Apache-2.0
// The lanes: block products of one step at a time, while the next step's blocks are loaded.
#include "dpgemm/block.h"
#include "dpgemm/gemm.h"

namespace dp {

namespace {

// One lane's copy of the blocks that it needs: lanes read at different times, so they share no memory.
struct Lane {
  Block a[kLaneRows][kTile];     // [row of blocks][k]
  Block b[kLaneColumns][kTile];  // [column of blocks][k]
};

struct LaneSums {
  SumRow rows[kLaneRows][kLaneColumns][kEdge];
};

// Rows (or columns) of a tile that belong to lane `lane` of `lanes`.
uint32_t share(uint32_t count, uint32_t lane, uint32_t lanes) {
#pragma HLS INLINE
  return (count + lanes - 1 - lane) / lanes;
}

// A block's place among the blocks of a step, in the order in which its reader sends them.
struct Cursor {
  uint32_t outer;  // row or column of the tile
  uint32_t k;
};

void advance_cursor(Cursor& cursor, bool k_is_slow, uint32_t outer_count, uint32_t k_count) {
#pragma HLS INLINE
  if (k_is_slow) {
    if (++cursor.outer == outer_count) {
      cursor.outer = 0;
      ++cursor.k;
    }
  } else if (++cursor.k == k_count) {
    cursor.k = 0;
    ++cursor.outer;
  }
}

// Loads a step's blocks, one of A and one of B a cycle; returns the cycles.
uint32_t fill(const Job& job, const Tile& tile, const Step& step, hls::stream<Block>& a_blocks, hls::stream<Block>& b_blocks,
              Lane lanes[kLanes]) {
  const uint32_t a_count = tile.m_count * step.k_count;
  const uint32_t b_count = tile.n_count * step.k_count;
  const uint32_t cycles = a_count > b_count ? a_count : b_count;
  Cursor a_cursor = {0, 0};
  Cursor b_cursor = {0, 0};
  FILL: for (uint32_t n = 0; n < cycles; ++n) {
#pragma HLS PIPELINE II=1
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile*kTile
    if (n < a_count) {
      const Block block = a_blocks.read();
      A_COPIES: for (int v = 0; v < kLanesN; ++v) {
#pragma HLS UNROLL
        lanes[a_cursor.outer % kLanesM * kLanesN + v].a[a_cursor.outer / kLanesM][a_cursor.k] = block;
      }
      advance_cursor(a_cursor, job.gemm == Gemm::kWgrad, tile.m_count, step.k_count);
    }
    if (n < b_count) {
      const Block block = b_blocks.read();
      B_COPIES: for (int u = 0; u < kLanesM; ++u) {
#pragma HLS UNROLL
        lanes[u * kLanesN + b_cursor.outer % kLanesN].b[b_cursor.outer / kLanesN][b_cursor.k] = block;
      }
      advance_cursor(b_cursor, job.gemm != Gemm::kForward, tile.n_count, step.k_count);
    }
  }
  return cycles;
}

// One lane's products of a step; returns its cycles. Each trip of the loop is a cycle: a skipped zero block, a plane pair, or a wait for the
// shifters. Meanwhile the sums of the product before pass the shifters, one row a cycle, into the accumulators.
uint32_t run_lane(const Lane& lane, uint32_t rows, uint32_t columns, uint32_t depth, LaneSums& sums) {
  uint32_t i = 0, j = 0, k = 0;
  int p = 0, q = 0;          // planes of A and B, counted from the highest
  int age = 0;               // cycles of this product so far
  bool has_pairs = true;     // plane pairs of this product are left
  bool has_products = rows > 0 && columns > 0;

  Fields a_fields;
  Dot dot;
  Dot held;                  // finished product, on its way through the shifters
  Shift_t held_shift_a[kEdge];
  Shift_t held_shift_b = 0;
  uint32_t held_i = 0, held_j = 0;
  int held_row = kEdge;      // next row to pass; kEdge: none

  uint32_t cycles = 0;
  int tail = 0;
  CYCLES: while (tail < kDrainCycles) {
#pragma HLS PIPELINE II=1
#pragma HLS LOOP_TRIPCOUNT min=kDrainCycles max=kLaneRows*kLaneColumns*kTile*kMaxBits*kMaxBits
#pragma HLS DEPENDENCE variable=sums type=inter direction=RAW distance=kDrainCycles true
    ++cycles;
    if (held_row < kEdge) {
      SumRow& row = sums.rows[held_i][held_j][held_row];
      const int shift = int(held_shift_a[held_row]) + int(held_shift_b);
      COLUMNS: for (int c = 0; c < kEdge; ++c) {
#pragma HLS UNROLL
        row.sums[c] += Acc_t(held.total[held_row][c]) << shift;
      }
      ++held_row;
    }
    if (!has_products) {
      ++tail;
      continue;
    }

    const Block& a = lane.a[i][k];
    const Block& b = lane.b[j][k];
    bool next_block_of_a = false;
    bool next_block_of_b = false;
    if (a.bits == 0) {
      next_block_of_a = true;
    } else if (b.bits == 0) {
      next_block_of_b = true;
    } else {
      if (has_pairs) {
        const bool is_last_a = p == int(a.bits) - 1;
        const bool is_last_b = q == int(b.bits) - 1;
        if (q == 0) a_fields = fields_of<Operand::kA>(a.planes[int(a.bits) - 1 - p]);
        const Fields b_fields = fields_of<Operand::kB>(b.planes[int(b.bits) - 1 - q]);
        const Rows_t negative_a = p == 0 ? a.is_signed : Rows_t(0);
        const bool negative_b = q == 0 && b.is_signed[0];
        add_plane_pair(a_fields, b_fields, p == 0, q == 0, is_last_b, negative_a, negative_b, dot);
        q = is_last_b ? 0 : q + 1;
        if (is_last_b) ++p;
        has_pairs = !(is_last_a && is_last_b);
      }
      ++age;
      if (!has_pairs && age >= kDrainCycles) {
        held = dot;
        SHIFTS: for (int row = 0; row < kEdge; ++row) {
#pragma HLS UNROLL
          held_shift_a[row] = a.shift[row];
        }
        held_shift_b = b.shift[0];
        held_i = i;
        held_j = j;
        held_row = 0;
        next_block_of_b = true;
      }
    }
    if (next_block_of_a || next_block_of_b) {
      p = 0;
      age = 0;
      has_pairs = true;
      if (next_block_of_a || ++j == columns) {
        j = 0;
        if (++k == depth) {
          k = 0;
          has_products = ++i < rows;
        }
      }
    }
  }
  return cycles;
}

// All lanes at once; returns the longest lane's cycles.
uint32_t multiply(const Tile& tile, const Step& step, const Lane lanes[kLanes], LaneSums sums[kLanes]) {
  uint32_t longest = 0;
  LANES: for (int l = 0; l < kLanes; ++l) {
#pragma HLS UNROLL
    const uint32_t rows = share(tile.m_count, l / kLanesN, kLanesM);
    const uint32_t columns = share(tile.n_count, l % kLanesN, kLanesN);
    const uint32_t cycles = run_lane(lanes[l], rows, columns, step.k_count, sums[l]);
    longest = cycles > longest ? cycles : longest;
  }
  return longest;
}

// Sends a tile's sums, row by row of its blocks, and clears them; returns the cycles, one a row.
uint32_t store(const Tile& tile, LaneSums sums[kLanes], hls::stream<SumRow>& rows) {
  BLOCK_ROWS: for (uint32_t i = 0; i < tile.m_count; ++i) {
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile
    ROWS: for (int row = 0; row < kEdge; ++row) {
      BLOCK_COLUMNS: for (uint32_t j = 0; j < tile.n_count; ++j) {
#pragma HLS PIPELINE II=1
#pragma HLS LOOP_TRIPCOUNT min=1 max=kTile
        SumRow& source = sums[i % kLanesM * kLanesN + j % kLanesN].rows[i / kLanesM][j / kLanesN][row];
        rows.write(source);
        CLEAR: for (int c = 0; c < kEdge; ++c) {
#pragma HLS UNROLL
          source.sums[c] = 0;
        }
      }
    }
  }
  return tile.m_count * tile.n_count * kEdge;
}

void clear(LaneSums sums[kLanes]) {
  LANES: for (int l = 0; l < kLanes; ++l) {
#pragma HLS UNROLL
    BLOCK_ROWS: for (int i = 0; i < kLaneRows; ++i) {
      BLOCK_COLUMNS: for (int j = 0; j < kLaneColumns; ++j) {
        ROWS: for (int row = 0; row < kEdge; ++row) {
#pragma HLS PIPELINE II=1
          COLUMNS: for (int c = 0; c < kEdge; ++c) {
#pragma HLS UNROLL
            sums[l].rows[i][j][row].sums[c] = 0;
          }
        }
      }
    }
  }
}

}  // namespace

void compute(const Job& job, hls::stream<Block>& a_blocks, hls::stream<Block>& b_blocks, hls::stream<SumRow>& sums,
             hls::stream<uint64_t>& cycles) {
  Lane even[kLanes];
  Lane odd[kLanes];
  LaneSums lane_sums[kLanes];
#pragma HLS ARRAY_PARTITION variable=even complete dim=1
#pragma HLS ARRAY_PARTITION variable=odd complete dim=1
#pragma HLS ARRAY_PARTITION variable=lane_sums complete dim=1
  clear(lane_sums);

  uint64_t total = 0;
  TILES: for (uint32_t t = 0; t < job.tile_count; ++t) {
    const Tile tile = tile_at(job, job.tile_begin + t);
    Step step = step_at(job, tile, job.step_begin);
    total += fill(job, tile, step, a_blocks, b_blocks, even);
    STEPS: for (uint32_t s = 0; s < job.step_count; ++s) {
      const bool has_next = s + 1 < job.step_count;
      const Step next = step_at(job, tile, job.step_begin + s + (has_next ? 1 : 0));
      uint32_t compute_cycles = 0;
      uint32_t fill_cycles = 0;
      if (s % 2 == 0) {
        compute_cycles = multiply(tile, step, even, lane_sums);
        if (has_next) fill_cycles = fill(job, tile, next, a_blocks, b_blocks, odd);
      } else {
        compute_cycles = multiply(tile, step, odd, lane_sums);
        if (has_next) fill_cycles = fill(job, tile, next, a_blocks, b_blocks, even);
      }
      total += compute_cycles > fill_cycles ? compute_cycles : fill_cycles;
      step = next;
    }
    total += store(tile, lane_sums, sums);
  }
  cycles.write(total);
}

}  // namespace dp
