// SPDX-License-Identifier: Apache-2.0
// The counter-based random stream: Philox4x32-10 (Salmon et al., SC'11); counter layout in
// docs/reference/numerics.md, "Random stream".
#pragma once

#include "lanes.h"

namespace dynasty {

constexpr int kNumbersPerCounter = 8;
constexpr int kCountersPerCall = 8;
constexpr int kNumbersPerCall = kNumbersPerCounter * kCountersPerCall;
// What `Numbers` may write before and behind the numbers that were asked for.
constexpr int kNumbersSlack = kNumbersPerCounter + kNumbersPerCall;

class Stream {
 public:
  Stream(uint32_t seed, uint32_t rank, uint32_t backward_count, uint32_t call_index, uint32_t layer,
         uint32_t code)
      : backward_count_(backward_count), call_index_(call_index), tail_(layer << 16 | code << 12) {
    uint32_t k0 = seed, k1 = rank;
    for (int i = 0; i < kRounds; ++i) {
      keys_[i][0] = k0;
      keys_[i][1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // Numbers of index first .. first + count - 1, from out[return value] on. `out` needs room for
  // count + kNumbersSlack.
  int64_t Numbers(uint64_t first, int64_t count, uint16_t* out) const {
    uint64_t g = first / kNumbersPerCounter;
    const uint64_t end = (first + count + kNumbersPerCounter - 1) / kNumbersPerCounter;
    for (; g + 3 * kCountersPerCall < end; g += 4 * kCountersPerCall, out += 4 * kNumbersPerCall) {
      const uint64_t counters[4] = {g, g + kCountersPerCall, g + 2 * kCountersPerCall,
                                    g + 3 * kCountersPerCall};
      uint16_t* const outs[4] = {out, out + kNumbersPerCall, out + 2 * kNumbersPerCall,
                                 out + 3 * kNumbersPerCall};
      Runs(counters, outs);
    }
    for (; g < end; g += kCountersPerCall, out += kNumbersPerCall) Runs<1>({g}, {out});
    return int64_t(first % kNumbersPerCounter);
  }

  // Eight consecutive counters from each of kRuns on, kNumbersPerCall numbers each: side by side,
  // since each round waits for the last.
  template <int kRuns>
  void Runs(const uint64_t (&first_counters)[kRuns], uint16_t* const (&outs)[kRuns]) const {
#ifdef DYNASTY_AVX512
    // Lanes in this order make the two unpacks below leave counters 0 to 3 and 4 to 7 in theirs.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i c[kRuns][4];
    for (int u = 0; u < kRuns; ++u)
      c[u][0] = _mm512_add_epi64(_mm512_set1_epi64(int64_t(first_counters[u])), order);
    Rounds(c);
    for (int u = 0; u < kRuns; ++u) {
      const __m512i a = _mm512_mask_shuffle_epi32(c[u][0], 0xAAAA, c[u][1], kLowToHigh);
      const __m512i b = _mm512_mask_shuffle_epi32(c[u][2], 0xAAAA, c[u][3], kLowToHigh);
      _mm512_storeu_si512(outs[u], _mm512_unpacklo_epi64(a, b));
      _mm512_storeu_si512(outs[u] + kNumbersPerCall / 2, _mm512_unpackhi_epi64(a, b));
    }
#else
    for (int u = 0; u < kRuns; ++u) {
      for (int j = 0; j < kCountersPerCall; ++j) {
        uint32_t words[4];
        Rounds(first_counters[u] + j, words);
        for (int k = 0; k < 8; ++k) outs[u][8 * j + k] = uint16_t(words[k / 2] >> (k % 2 * 16));
      }
    }
#endif
  }

  // Words of sixteen counters that lie `step` apart: out[k * pitch + j] holds numbers 2 k (low
  // half) and 2 k + 1 of counter j, k = 0 .. 3.
  void Columns(uint64_t first_counter, uint64_t step, uint32_t* out, int64_t pitch) const {
#ifdef DYNASTY_AVX512
    __m512i c[2][4];
    const __m512i steps = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7),
                                             _mm512_set1_epi64(int64_t(step)));
    for (int u = 0; u < 2; ++u)
      c[u][0] = _mm512_add_epi64(
          steps, _mm512_set1_epi64(int64_t(first_counter + u * kCountersPerCall * step)));
    Rounds(c);
    const __m512i low_words =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int k = 0; k < 4; ++k)
      _mm512_storeu_si512(out + k * pitch, _mm512_permutex2var_epi32(c[0][k], low_words, c[1][k]));
#else
    for (int j = 0; j < 2 * kCountersPerCall; ++j) {
      uint32_t words[4];
      Rounds(first_counter + j * step, words);
      for (int k = 0; k < 4; ++k) out[k * pitch + j] = words[k];
    }
#endif
  }

 private:
  static constexpr int kRounds = 10;
  static constexpr uint32_t kMultipliers[2] = {0xD2511F53u, 0xCD9E8D57u};

#ifdef DYNASTY_AVX512
  static constexpr _MM_PERM_ENUM kLowToHigh = _MM_PERM_ENUM(0xA0),
                                 kHighToLow = _MM_PERM_ENUM(0xF5);  // of the words of 64-bit lanes

  // From counters in c[u][0]: four words each in the low halves of 64-bit lanes; the high halves
  // hold rubbish, which no multiplication reads.
  template <int kRuns>
  void Rounds(__m512i (&c)[kRuns][4]) const {
    const __m512i m0 = _mm512_set1_epi64(kMultipliers[0]), m1 = _mm512_set1_epi64(kMultipliers[1]);
#pragma GCC unroll 4
    for (int u = 0; u < kRuns; ++u) {
      c[u][1] = _mm512_set1_epi64(backward_count_);
      c[u][2] = _mm512_set1_epi64(call_index_);
      c[u][3] = _mm512_or_si512(_mm512_set1_epi64(tail_), _mm512_srli_epi64(c[u][0], 32));
    }
    for (int i = 0; i < kRounds; ++i) {
      const __m512i k0 = _mm512_set1_epi64(keys_[i][0]), k1 = _mm512_set1_epi64(keys_[i][1]);
#pragma GCC unroll 4
      for (int u = 0; u < kRuns; ++u) {
        const __m512i p0 = _mm512_mul_epu32(c[u][0], m0), p1 = _mm512_mul_epu32(c[u][2], m1);
        c[u][0] =
            _mm512_ternarylogic_epi64(_mm512_shuffle_epi32(p1, kHighToLow), c[u][1], k0, 0x96);
        c[u][1] = p1;
        c[u][2] =
            _mm512_ternarylogic_epi64(_mm512_shuffle_epi32(p0, kHighToLow), c[u][3], k1, 0x96);
        c[u][3] = p0;
      }
    }
  }
#else
  void Rounds(uint64_t g, uint32_t (&c)[4]) const {
    c[0] = uint32_t(g);
    c[1] = backward_count_;
    c[2] = call_index_;
    c[3] = tail_ | uint32_t(g >> 32);
    for (int i = 0; i < kRounds; ++i) {
      const uint64_t p0 = uint64_t(c[0]) * kMultipliers[0], p1 = uint64_t(c[2]) * kMultipliers[1];
      const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ keys_[i][0], uint32_t(p1),
                                uint32_t(p0 >> 32) ^ c[3] ^ keys_[i][1], uint32_t(p0)};
      for (int k = 0; k < 4; ++k) c[k] = next[k];
    }
  }
#endif

  uint32_t keys_[kRounds][2];
  uint32_t backward_count_, call_index_, tail_;
};

}  // namespace dynasty
