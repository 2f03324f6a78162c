// SPDX-License-Identifier: Apache-2.0
// Types of the core, and every rule that ties them to the configuration. The same in synthesis and
// simulation.
#pragma once

#include <ap_int.h>
#include <hls_stream.h>

#include <cstdint>
#include <type_traits>

#include "dpgemm/config.h"
#include "dpgemm/registers.h"

namespace dp {

constexpr int kPlaneBits = kEdge * kEdge;
constexpr int kPlaneWords = kPlaneBits <= 64 ? 1 : kPlaneBits / 64;
constexpr int kPlanesPerWord = kPlaneBits <= 64 ? 64 / kPlaneBits : 1;
constexpr int kFieldsPerWord = 64 / kEdge;  // rows of kEdge bits in a 64-bit word
constexpr int kFieldWords =
    kEdge * kEdge / kFieldsPerWord;  // words that hold a field for each output of a block product
constexpr int kMaxHeaders = kTile * kEdge;  // of one segment, with row exponents
constexpr int kMaxSegmentWords =
    (kMaxHeaders + kHeadersPerWord - 1) / kHeadersPerWord +
    (kTile * kMaxBits * kPlaneWords + kPlanesPerWord - 1) / kPlanesPerWord;
constexpr int kCosimWords = 1 << 16;  // words of each port that the vendor tool co-simulates
constexpr int kDrainCycles = kEdge;   // kEdge outputs share a shifter

// Rows and columns of blocks that one lane computes.
constexpr int kLaneRows = kTile / kLanesM;
constexpr int kLaneColumns = kTile / kLanesN;
constexpr int kLanes = kLanesM * kLanesN;

// Bits of one block product's sums: kEdge products of two unsigned 8-bit mantissas, and a sign.
constexpr int kDotBits = 2 * kMaxBits + 5 + 1;

static_assert(kEdge == 4 || kEdge == 8 || kEdge == 16, "block edges are 4, 8 or 16");
static_assert(kMinBits == 2 && kMaxBits == 8,
              "the packed form and the engine are made for widths of 2 to 8 bits");
static_assert(kTile >= 1 && kTile <= 64, "a tile has 1 to 64 blocks a side");
static_assert(kTile % kLanesM == 0 && kTile % kLanesN == 0, "lanes divide the tile");
static_assert(kStreamDepth >= 2 && kStreamDepth <= 1024, "streams hold 2 to 1024 blocks");
static_assert(kBurstWords >= 2 && kBurstWords <= 256, "AXI bursts have 2 to 256 words");
static_assert(kEngine == 1, "this source is the bit-plane engine");
static_assert(kShiftBits == kHeaderShiftBits, "a header keeps the shift in bits 5 to 9");
static_assert(kHeadersPerWord * kHeaderBits == 64, "headers fill a word");
static_assert(kMaxBits < (1 << kHeaderWidthBits), "a header holds every width");
static_assert(kAccBits == 48, "the host bounds sums for a 48-bit accumulator");
static_assert(kGroupRows % kEdge == 0 && kGroupChannels % kEdge == 0,
              "a width group is made of whole blocks");
static_assert((1 << (kDotBits - 2 * kMaxBits - 1)) >= kEdge, "a block product's sums fit Dot_t");
static_assert(kEdge * ((1 << kMaxBits) - 1) < (1 << 15), "a plane's sums fit Partial_t");
static_assert(kMaxSegmentWords < (1 << kDirectoryLengthBits),
              "a directory word keeps a segment's length in 16 bits");
static_assert(kFieldWords * kFieldsPerWord == kPlaneBits, "one field an output");

using Word_t = uint64_t;  // what the ports of A and B move
using PlaneWord_t = std::conditional<kPlaneBits == 16, uint16_t, uint64_t>::type;
using Rows_t = ap_uint<kEdge>;  // one flag a row
using Bits_t = ap_uint<4>;
using Shift_t = ap_uint<kShiftBits>;
using Steps_t = ap_uint<kHeaderStepsBits>;  // n: a mantissa is 2n + 1 times its code
using Dot_t = ap_int<kDotBits>;
using Partial_t = int16_t;  // kEdge mantissas of B, each times one bit of A: a plain type, because
                            // it is all that changes in every cycle
using Acc_t = ap_int<kAccBits>;

// Bits [at, at + bits) of a word.
inline uint32_t FieldAt(Word_t word, int at, int bits) {
#pragma HLS INLINE
  return uint32_t(word >> at) & uint32_t((Word_t(1) << bits) - 1);
}

// A block's (or row's) header.
inline uint32_t MakeHeader(uint32_t width, bool is_signed, uint32_t shift, bool is_negated,
                           uint32_t steps) {
#pragma HLS INLINE
  return width << kHeaderWidthAt | uint32_t(is_signed) << kHeaderSignedAt |
         shift << kHeaderShiftAt | uint32_t(is_negated) << kHeaderNegatedAt |
         steps << kHeaderStepsAt;
}

// The sides of a product.
enum class Operand { kA, kB };

// One bit of each element of a block: bit i * kEdge + c belongs to row i, column c.
struct Plane {
  PlaneWord_t words[kPlaneWords];
};

// A block as the readers hand it on: contraction runs along the columns of its planes.
struct Block {
  Plane planes[kMaxBits];
  Bits_t bits;           // planes that count; 0: a zero block
  Rows_t is_signed;      // rows whose top plane has negative weight
  Rows_t is_negated;     // rows whose planes are those of their negatives
  Shift_t shift[kEdge];  // exponent of each row above the operand's (or the row's) base
  Steps_t steps[kEdge];  // what each row's codes are multiplied by
};

// One row of sums of an output block.
struct SumRow {
  Acc_t sums[kEdge];
};

// What a reader did.
struct ReadStatus {
  uint32_t words;
  Error error;
};

}  // namespace dp
