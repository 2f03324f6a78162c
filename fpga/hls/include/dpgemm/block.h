// SPDX-License-Identifier: Apache-2.0
// The engine: one plane pair of a block product. AND and popcount; mantissas are never multiplied.
#pragma once

#include "dpgemm/types.h"

namespace dp {

// Ones of a 4-bit field. As a table it is three LUTs a field in hardware and one load in
// simulation.
constexpr uint8_t kOnes[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};

using Field_t = std::conditional<kEdge == 4, uint8_t, uint16_t>::type;

// Row `row` of a plane, kEdge bits.
inline Field_t PlaneRow(const Plane& plane, int row) {
#pragma HLS INLINE
  constexpr int kRowsPerWord = kPlaneBits / kPlaneWords / kEdge;
  constexpr unsigned kMask = (1u << kEdge) - 1;
  return Field_t((plane.words[row / kRowsPerWord] >> (row % kRowsPerWord * kEdge)) & kMask);
}

// A plane of A or B with a field for each output (i, j) of the block product, row by row: A repeats
// its row i, B its row j.
struct Fields {
  Word_t words[kFieldWords];
};

template <Operand kOperand>
inline Fields FieldsOf(const Plane& plane) {
#pragma HLS INLINE
  Fields fields;
WORDS:
  for (int w = 0; w < kFieldWords; ++w) {
#pragma HLS UNROLL
    Word_t word = 0;
  FIELDS:
    for (int f = 0; f < kFieldsPerWord; ++f) {
#pragma HLS UNROLL
      const int output = w * kFieldsPerWord + f;
      const int row = kOperand == Operand::kA ? output / kEdge : output % kEdge;
      word |= Word_t(PlaneRow(plane, row)) << (f * kEdge);
    }
    fields.words[w] = word;
  }
  return fields;
}

inline int CountOnes(Word_t field) {
#pragma HLS INLINE
  int count = 0;
NIBBLES:
  for (int n = 0; n < kEdge; n += 4) {
#pragma HLS UNROLL
    count += kOnes[(field >> n) & 15];
  }
  return count;
}

// The sums of one block product while its planes pass, highest first (Horner): doubling is a wire,
// so no sum needs a shifter here.
struct Dot {
  Dot_t total[kEdge][kEdge];        // all pairs of the planes of A that are done
  Partial_t partial[kEdge][kEdge];  // this plane of A with the planes of B so far
};

// Adds one plane pair.
//   is_first_a, is_first_b: the top plane of A, of B
//   is_last_b: B's lowest plane, which ends a plane of A
//   negative_a: rows of A in which this plane has negative weight; negative_b: the same for all of
//   B
inline void AddPlanePair(const Fields& a, const Fields& b, bool is_first_a, bool is_first_b,
                         bool is_last_b, Rows_t negative_a, bool negative_b, Dot& dot) {
#pragma HLS INLINE
  const uint32_t rows = negative_a;
WORDS:
  for (int w = 0; w < kFieldWords; ++w) {
#pragma HLS UNROLL
    const Word_t both = a.words[w] & b.words[w];
  FIELDS:
    for (int f = 0; f < kFieldsPerWord; ++f) {
#pragma HLS UNROLL
      const int i = (w * kFieldsPerWord + f) / kEdge;
      const int j = (w * kFieldsPerWord + f) % kEdge;
      const int count = CountOnes(both >> (f * kEdge));
      const int before = is_first_b ? 0 : int(dot.partial[i][j]) * 2;
      const int partial = ((rows >> i) & 1) != negative_b ? before - count : before + count;
      dot.partial[i][j] = Partial_t(partial);
      if (is_last_b) dot.total[i][j] = (is_first_a ? 0 : int(dot.total[i][j]) * 2) + partial;
    }
  }
}

}  // namespace dp
