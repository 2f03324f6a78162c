// SPDX-License-Identifier: Apache-2.0
// The lanes: block products of one step at a time, while the next step's blocks are loaded.
#include "dpgemm/block.h"
#include "dpgemm/gemm.h"

namespace dp {

namespace {

// One lane's copy of the blocks that it needs: lanes read at different times, so they share no
// memory.
struct Lane {
  Block a[kLaneRows][kTile];     // [row of blocks][k]
  Block b[kLaneColumns][kTile];  // [column of blocks][k]
};

struct LaneSums {
  SumRow rows[kLaneRows][kLaneColumns][kEdge];
};

// For the tool's reports: all planes of all blocks of a step.
constexpr int kMostLaneCycles = kLaneRows * kLaneColumns * kTile * kMaxBits * kMaxBits;

// Rows (or columns) of a tile that belong to lane `lane` of `lanes`.
uint32_t ShareOf(uint32_t count, uint32_t lane, uint32_t lanes) {
#pragma HLS INLINE
  return (count + lanes - 1 - lane) / lanes;
}

// A block's place among the blocks of a step, in the order in which its reader sends them.
struct Cursor {
  uint32_t outer;  // row or column of the tile
  uint32_t k;
};

void AdvanceCursor(Cursor& cursor, bool k_is_slow, uint32_t outer_count, uint32_t k_count) {
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
uint32_t Fill(const Job& job, const Tile& tile, const Step& step, hls::stream<Block>& a_blocks,
              hls::stream<Block>& b_blocks, Lane lanes[kLanes]) {
  const uint32_t a_count = tile.m_count * step.k_count;
  const uint32_t b_count = tile.n_count * step.k_count;
  const uint32_t cycles = a_count > b_count ? a_count : b_count;
  Cursor a_cursor = {0, 0};
  Cursor b_cursor = {0, 0};
FILL:
  for (uint32_t n = 0; n < cycles; ++n) {
#pragma HLS PIPELINE II = 1
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile * kTile
    if (n < a_count) {
      const Block block = a_blocks.read();
    A_COPIES:
      for (int v = 0; v < kLanesN; ++v) {
#pragma HLS UNROLL
        lanes[a_cursor.outer % kLanesM * kLanesN + v].a[a_cursor.outer / kLanesM][a_cursor.k] =
            block;
      }
      AdvanceCursor(a_cursor, job.gemm == Gemm::kWgrad, tile.m_count, step.k_count);
    }
    if (n < b_count) {
      const Block block = b_blocks.read();
    B_COPIES:
      for (int u = 0; u < kLanesM; ++u) {
#pragma HLS UNROLL
        lanes[u * kLanesN + b_cursor.outer % kLanesN].b[b_cursor.outer / kLanesN][b_cursor.k] =
            block;
      }
      AdvanceCursor(b_cursor, job.gemm != Gemm::kForward, tile.n_count, step.k_count);
    }
  }
  return cycles;
}

// Where in a step a lane is: its block product, and how far that one is. Planes and sums are no
// members: alone, these numbers are held in registers by a C++ compiler too.
struct Product {
  uint32_t i, j, k;  // row of blocks, column of blocks, and place along the contraction
  int a_plane;       // planes of A and B, counted from the highest
  int b_plane;
  int age;         // cycles so far
  bool has_pairs;  // plane pairs are left
};

// A finished product on its way through the shifters into the accumulators.
struct Held {
  Dot dot;
  Shift_t shift_a[kEdge];
  Shift_t shift_b;
  Steps_t steps_a[kEdge];
  Steps_t steps_b;
  uint32_t i, j;
  int row;  // next to pass; kEdge: none
};

// Which operand goes on to its next block after a cycle. A block of A that ends takes B's with it.
enum class Ends { kNone, kBlockOfA, kBlockOfB };

// Passes one row of the held product through the multipliers of steps and the shifters.
void DrainRow(Held& held, LaneSums& sums) {
#pragma HLS INLINE
  if (held.row == kEdge) return;
  SumRow& row = sums.rows[held.i][held.j][held.row];
  const int shift = int(held.shift_a[held.row]) + int(held.shift_b);
  // 1, 3, 5 or 7 times one of these: a product of six bits, of which there are ten.
  const int steps = (2 * int(held.steps_a[held.row]) + 1) * (2 * int(held.steps_b) + 1);
COLUMNS:
  for (int c = 0; c < kEdge; ++c) {
#pragma HLS UNROLL
    row.sums[c] += Acc_t(held.dot.total[held.row][c] * ap_uint<6>(steps)) << shift;
  }
  ++held.row;
}

// Hands a finished product to the shifters.
void Hold(const Block& a, const Block& b, const Product& product, const Dot& dot, Held& held) {
#pragma HLS INLINE
  held.dot = dot;
SHIFTS:
  for (int row = 0; row < kEdge; ++row) {
#pragma HLS UNROLL
    held.shift_a[row] = a.shift[row];
    held.steps_a[row] = a.steps[row];
  }
  held.shift_b = b.shift[0];
  held.steps_b = b.steps[0];
  held.i = product.i;
  held.j = product.j;
  held.row = 0;
}

// Adds one plane pair to the product, or nothing if none is left.
void AdvancePlanes(const Block& a, const Block& b, Product& product, Fields& a_fields, Dot& dot) {
#pragma HLS INLINE
  if (!product.has_pairs) return;
  const int p = product.a_plane;
  const int q = product.b_plane;
  const bool is_last_a = p + 1 == int(a.bits);
  const bool is_last_b = q + 1 == int(b.bits);
  if (q == 0) a_fields = FieldsOf<Operand::kA>(a.planes[int(a.bits) - 1 - p]);
  const Fields b_fields = FieldsOf<Operand::kB>(b.planes[int(b.bits) - 1 - q]);
  const Rows_t negative_a = (p == 0 ? a.is_signed : Rows_t(0)) ^ a.is_negated;
  const bool negative_b = (q == 0 && b.is_signed[0]) != bool(b.is_negated[0]);
  AddPlanePair(a_fields, b_fields, p == 0, q == 0, is_last_b, negative_a, negative_b, dot);
  product.b_plane = is_last_b ? 0 : q + 1;
  product.a_plane = is_last_b ? p + 1 : p;
  product.has_pairs = !(is_last_a && is_last_b);
}

// One cycle of a product: a skipped zero block, a plane pair, or a wait for the shifters.
Ends AdvanceProduct(const Block& a, const Block& b, Product& product, Fields& a_fields, Dot& dot,
                    Held& held) {
#pragma HLS INLINE
  if (a.bits == 0) return Ends::kBlockOfA;
  if (b.bits == 0) return Ends::kBlockOfB;
  AdvancePlanes(a, b, product, a_fields, dot);
  ++product.age;
  if (product.has_pairs || product.age < kDrainCycles) return Ends::kNone;
  Hold(a, b, product, dot, held);
  return Ends::kBlockOfB;
}

// Goes on to the next product; false after a step's last one.
bool NextBlock(Ends ends, uint32_t rows, uint32_t columns, uint32_t depth, Product& product) {
#pragma HLS INLINE
  if (ends == Ends::kNone) return true;
  product.a_plane = 0;
  product.age = 0;
  product.has_pairs = true;
  if (ends == Ends::kBlockOfB && ++product.j < columns) return true;
  product.j = 0;
  if (++product.k < depth) return true;
  product.k = 0;
  return ++product.i < rows;
}

// One lane's products of a step; returns its cycles, one a trip of the loop. While a product is
// formed, the one before passes the shifters.
uint32_t RunLane(const Lane& lane, uint32_t rows, uint32_t columns, uint32_t depth,
                 LaneSums& sums) {
  Product product;
  product.i = product.j = product.k = 0;
  product.a_plane = product.b_plane = product.age = 0;
  product.has_pairs = true;
  Fields a_fields;
  Dot dot;
  Held held;
  held.row = kEdge;
  bool has_products = rows > 0 && columns > 0;
  uint32_t cycles = 0;
  int tail = 0;
CYCLES:
  while (tail < kDrainCycles) {
#pragma HLS PIPELINE II = 1
#pragma HLS LOOP_TRIPCOUNT min = kDrainCycles max = kMostLaneCycles
#pragma HLS DEPENDENCE variable = sums type = inter direction = RAW distance = kDrainCycles true
    ++cycles;
    DrainRow(held, sums);
    if (has_products) {
      const Block& a = lane.a[product.i][product.k];
      const Block& b = lane.b[product.j][product.k];
      const Ends ends = AdvanceProduct(a, b, product, a_fields, dot, held);
      has_products = NextBlock(ends, rows, columns, depth, product);
    } else {
      ++tail;
    }
  }
  return cycles;
}

// All lanes at once; returns the longest lane's cycles.
uint32_t Multiply(const Tile& tile, const Step& step, const Lane lanes[kLanes],
                  LaneSums sums[kLanes]) {
  uint32_t longest = 0;
LANES:
  for (int l = 0; l < kLanes; ++l) {
#pragma HLS UNROLL
    const uint32_t rows = ShareOf(tile.m_count, l / kLanesN, kLanesM);
    const uint32_t columns = ShareOf(tile.n_count, l % kLanesN, kLanesN);
    const uint32_t cycles = RunLane(lanes[l], rows, columns, step.k_count, sums[l]);
    longest = cycles > longest ? cycles : longest;
  }
  return longest;
}

// Sends a tile's sums, row by row of its blocks, and clears them; returns the cycles, one a row.
uint32_t Store(const Tile& tile, LaneSums sums[kLanes], hls::stream<SumRow>& rows) {
BLOCK_ROWS:
  for (uint32_t i = 0; i < tile.m_count; ++i) {
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile
  ROWS:
    for (int row = 0; row < kEdge; ++row) {
    BLOCK_COLUMNS:
      for (uint32_t j = 0; j < tile.n_count; ++j) {
#pragma HLS PIPELINE II = 1
#pragma HLS LOOP_TRIPCOUNT min = 1 max = kTile
        SumRow& source =
            sums[i % kLanesM * kLanesN + j % kLanesN].rows[i / kLanesM][j / kLanesN][row];
        rows.write(source);
      CLEAR:
        for (int c = 0; c < kEdge; ++c) {
#pragma HLS UNROLL
          source.sums[c] = 0;
        }
      }
    }
  }
  return tile.m_count * tile.n_count * kEdge;
}

void Clear(LaneSums sums[kLanes]) {
LANES:
  for (int l = 0; l < kLanes; ++l) {
#pragma HLS UNROLL
  BLOCK_ROWS:
    for (int i = 0; i < kLaneRows; ++i) {
    BLOCK_COLUMNS:
      for (int j = 0; j < kLaneColumns; ++j) {
      ROWS:
        for (int row = 0; row < kEdge; ++row) {
#pragma HLS PIPELINE II = 1
        COLUMNS:
          for (int c = 0; c < kEdge; ++c) {
#pragma HLS UNROLL
            sums[l].rows[i][j][row].sums[c] = 0;
          }
        }
      }
    }
  }
}

}  // namespace

void Compute(const Job& job, hls::stream<Block>& a_blocks, hls::stream<Block>& b_blocks,
             hls::stream<SumRow>& sums, hls::stream<uint64_t>& cycles) {
  Lane even[kLanes];
  Lane odd[kLanes];
  LaneSums lane_sums[kLanes];
#pragma HLS ARRAY_PARTITION variable = even complete dim = 1
#pragma HLS ARRAY_PARTITION variable = odd complete dim = 1
#pragma HLS ARRAY_PARTITION variable = lane_sums complete dim = 1
  Clear(lane_sums);

  uint64_t total = 0;
TILES:
  for (uint32_t t = 0; t < job.tile_count; ++t) {
    const Tile tile = TileAt(job, job.tile_begin + t);
    Step step = StepAt(job, tile, job.step_begin);
    total += Fill(job, tile, step, a_blocks, b_blocks, even);
  STEPS:
    for (uint32_t s = 0; s < job.step_count; ++s) {
      const bool has_next = s + 1 < job.step_count;
      const Step next = StepAt(job, tile, job.step_begin + s + (has_next ? 1 : 0));
      uint32_t compute_cycles = 0;
      uint32_t fill_cycles = 0;
      if (s % 2 == 0) {
        compute_cycles = Multiply(tile, step, even, lane_sums);
        if (has_next) fill_cycles = Fill(job, tile, next, a_blocks, b_blocks, odd);
      } else {
        compute_cycles = Multiply(tile, step, odd, lane_sums);
        if (has_next) fill_cycles = Fill(job, tile, next, a_blocks, b_blocks, even);
      }
      total += compute_cycles > fill_cycles ? compute_cycles : fill_cycles;
      step = next;
    }
    total += Store(tile, lane_sums, sums);
  }
  cycles.write(total);
}

}  // namespace dp
