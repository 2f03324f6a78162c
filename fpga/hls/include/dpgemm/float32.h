// SPDX-License-Identifier: Apache-2.0
// The one rounding: an integer times a power of two to IEEE float32.
#pragma once

#include "dpgemm/types.h"

namespace dp {

constexpr int kFloatFraction = 23;
constexpr int kFloatBias = 127;
constexpr int kFloatLeast = -149;  // exponent of the smallest subnormal
constexpr uint32_t kFloatInfinity = 0x7f800000;

// sum * 2**exponent, nearest-even, subnormals kept, Inf on overflow, +0 for zero.
inline uint32_t ToFloat32(Acc_t sum, int32_t exponent) {
  const bool is_negative = sum < 0;
  const uint64_t magnitude = is_negative ? uint64_t(-int64_t(sum)) : uint64_t(int64_t(sum));
  if (magnitude == 0) return 0;
  int top = 0;
TOP:
  for (int bit = 0; bit < kAccBits; ++bit) {
#pragma HLS UNROLL
    if ((magnitude >> bit) & 1) top = bit;
  }
  const int32_t binade = top + exponent;
  if (binade > kFloatBias) return (uint32_t(is_negative) << 31) | kFloatInfinity;

  // Exponent of the result's last place, and how many bits of the sum lie below it.
  const int32_t normal = binade - kFloatFraction;
  const int32_t last = normal < kFloatLeast ? kFloatLeast : normal;
  const int32_t dropped = last - exponent;
  uint64_t kept;
  if (dropped <= 0) {
    kept = magnitude << -dropped;
  } else if (dropped > kAccBits) {
    return 0;  // below half of the smallest subnormal
  } else {
    kept = magnitude >> dropped;
    const uint64_t half = uint64_t(1) << (dropped - 1);
    const uint64_t rest = magnitude & ((uint64_t(1) << dropped) - 1);
    if (rest > half || (rest == half && (kept & 1))) ++kept;
  }
  if (kept == 0) return 0;
  // The hidden bit of a normal number adds one to the exponent field, and so does a carry out of
  // the fraction, up to infinity.
  const uint32_t field = normal < kFloatLeast ? 0 : uint32_t(binade + kFloatBias - 1);
  return (uint32_t(is_negative) << 31) | ((field << kFloatFraction) + uint32_t(kept));
}

}  // namespace dp
