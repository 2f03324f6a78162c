// SPDX-License-Identifier: Apache-2.0
// The counter-based random stream: Philox4x32-10 (Salmon et al., SC'11); counter layout in docs/numerics.md, "Random stream".
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
  Stream(uint32_t seed, uint32_t rank, uint32_t backward_count, uint32_t call_index, uint32_t layer, uint32_t code)
      : backward_count_(backward_count), call_index_(call_index), tail_(layer << 16 | code << 12) {
    uint32_t k0 = seed, k1 = rank;
    for (int i = 0; i < kRounds; ++i) {
      keys_[i][0] = k0;
      keys_[i][1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // Numbers of index first .. first + count - 1, from out[return value] on. `out` needs room for count + kNumbersSlack.
  int64_t Numbers(uint64_t first, int64_t count, uint16_t* out) const {
    const uint64_t begin = first / kNumbersPerCounter, end = (first + count + kNumbersPerCounter - 1) / kNumbersPerCounter;
    for (uint64_t g = begin; g < end; g += kCountersPerCall, out += kNumbersPerCall) Consecutive(g, out);
    return int64_t(first % kNumbersPerCounter);
  }

  // Numbers of eight consecutive indices from each of `count` <= 8 counters that lie `step` apart: out[k * pitch + j] is number k of counter j.
  // All eight columns are written.
  void Columns(uint64_t first_counter, uint64_t step, uint16_t* out, int64_t pitch) const {
    uint64_t g[kCountersPerCall];
    for (int j = 0; j < kCountersPerCall; ++j) g[j] = first_counter + j * step;
#ifdef DYNASTY_AVX512
    __m512i words[4];
    Rounds(_mm512_loadu_si512(g), words);
    for (int k = 0; k < 4; ++k) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * k * pitch), _mm512_cvtepi64_epi16(words[k]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (2 * k + 1) * pitch), _mm512_cvtepi64_epi16(_mm512_srli_epi64(words[k], 16)));
    }
#else
    for (int j = 0; j < kCountersPerCall; ++j) {
      uint32_t words[4];
      Rounds(g[j], words);
      for (int k = 0; k < 8; ++k) out[k * pitch + j] = uint16_t(words[k / 2] >> (k % 2 * 16));
    }
#endif
  }

 private:
  static constexpr int kRounds = 10;
  static constexpr uint32_t kMultipliers[2] = {0xD2511F53u, 0xCD9E8D57u};

#ifdef DYNASTY_AVX512
  void Consecutive(uint64_t g, uint16_t* out) const {
    // Lanes in this order make the two unpacks below leave counters 0 to 3 and 4 to 7 in theirs.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i w[4];
    Rounds(_mm512_add_epi64(_mm512_set1_epi64(int64_t(g)), order), w);
    const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
    const __m512i a = _mm512_or_si512(_mm512_and_si512(w[0], low), _mm512_slli_epi64(w[1], 32));
    const __m512i b = _mm512_or_si512(_mm512_and_si512(w[2], low), _mm512_slli_epi64(w[3], 32));
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(out + kNumbersPerCall / 2, _mm512_unpackhi_epi64(a, b));
  }

  // Words of eight counters in the low halves of 64-bit lanes; the high halves hold rubbish, which no multiplication reads.
  void Rounds(__m512i g, __m512i (&c)[4]) const {
    const __m512i m0 = _mm512_set1_epi64(kMultipliers[0]), m1 = _mm512_set1_epi64(kMultipliers[1]);
    c[0] = g;
    c[1] = _mm512_set1_epi64(backward_count_);
    c[2] = _mm512_set1_epi64(call_index_);
    c[3] = _mm512_or_si512(_mm512_set1_epi64(tail_), _mm512_srli_epi64(g, 32));
    for (int i = 0; i < kRounds; ++i) {
      const __m512i p0 = _mm512_mul_epu32(c[0], m0), p1 = _mm512_mul_epu32(c[2], m1);
      c[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[1], _mm512_set1_epi64(keys_[i][0]), 0x96);
      c[1] = p1;
      c[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[3], _mm512_set1_epi64(keys_[i][1]), 0x96);
      c[3] = p0;
    }
  }
#else
  void Consecutive(uint64_t g, uint16_t* out) const {
    for (int j = 0; j < kCountersPerCall; ++j) {
      uint32_t words[4];
      Rounds(g + j, words);
      for (int k = 0; k < 8; ++k) out[8 * j + k] = uint16_t(words[k / 2] >> (k % 2 * 16));
    }
  }

  void Rounds(uint64_t g, uint32_t (&c)[4]) const {
    c[0] = uint32_t(g);
    c[1] = backward_count_;
    c[2] = call_index_;
    c[3] = tail_ | uint32_t(g >> 32);
    for (int i = 0; i < kRounds; ++i) {
      const uint64_t p0 = uint64_t(c[0]) * kMultipliers[0], p1 = uint64_t(c[2]) * kMultipliers[1];
      const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ keys_[i][0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ keys_[i][1], uint32_t(p0)};
      for (int k = 0; k < 4; ++k) c[k] = next[k];
    }
  }
#endif

  uint32_t keys_[kRounds][2];
  uint32_t backward_count_, call_index_, tail_;
};

}  // namespace dynasty
