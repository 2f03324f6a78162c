// SPDX-License-Identifier: Apache-2.0
// Convolution by addresses: which position of an operand a tap reads.
#pragma once

#include "dpgemm/job.h"

namespace dp {

// A row block and a position.
struct Place {
  uint32_t row_block;
  uint32_t position[kAxes];
};

inline uint32_t FlatPosition(const uint32_t position[kAxes], const Extent& extent) {
#pragma HLS INLINE
  return (position[0] * extent.size[1] + position[1]) * extent.size[2] + position[2];
}

// Line number -> row block and position; lines count positions fastest.
inline Place PlaceOf(uint32_t line, const Extent& extent) {
  Place place;
AXES:
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    place.position[axis] = line % extent.size[axis];
    line /= extent.size[axis];
  }
  place.row_block = line;
  return place;
}

// The next line.
inline void Advance(Place& place, const Extent& extent) {
#pragma HLS INLINE
  bool carry = true;
AXES:
  for (int axis = kAxes - 1; axis >= 0; --axis) {
#pragma HLS UNROLL
    if (carry) {
      carry = ++place.position[axis] == extent.size[axis];
      if (carry) place.position[axis] = 0;
    }
  }
  if (carry) ++place.row_block;
}

// Position of X that output position `output` reads at tap `tap`; false if it lies in the padding.
inline bool InputPosition(const Job& job, const uint32_t output[kAxes], const uint32_t tap[kAxes],
                          uint32_t input[kAxes]) {
#pragma HLS INLINE
  bool is_inside = true;
AXES:
  for (int axis = 0; axis < kAxes; ++axis) {
#pragma HLS UNROLL
    const uint32_t padded =
        output[axis] * job.stride.size[axis] + tap[axis] * job.dilation.size[axis];
    // In front of the image it wraps to a number beyond any size.
    input[axis] = padded - job.padding.size[axis];
    is_inside &= input[axis] < job.input.size[axis];
  }
  return is_inside;
}

// Position of E that reads input position `input` at tap `tap`; false if none does.
inline bool OutputPosition(const Job& job, const uint32_t input[kAxes], const uint32_t tap[kAxes],
                           uint32_t output[kAxes]) {
#pragma HLS INLINE
  bool is_inside = true;
AXES:
  for (int axis = 0; axis < kAxes; ++axis) {
#pragma HLS UNROLL
    const uint32_t padded = input[axis] + job.padding.size[axis];
    const uint32_t ahead = tap[axis] * job.dilation.size[axis];
    const uint32_t strided = padded - ahead;
    output[axis] = strided / job.stride.size[axis];
    is_inside &= padded >= ahead && strided % job.stride.size[axis] == 0 &&
                 output[axis] < job.output.size[axis];
  }
  return is_inside;
}

}  // namespace dp
