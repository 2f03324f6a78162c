// SPDX-License-Identifier: Apache-2.0
// Sixteen 32-bit lanes: AVX-512 where the compiler has it, else plain loops that compilers
// vectorise for what there is. Every function gives the same bits in both forms. Compiled without
// -ffast-math and with -ffp-contract=off.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && !defined(DYNASTY_PLAIN_LANES)
#define DYNASTY_AVX512 1
#include <immintrin.h>
#endif

namespace dynasty {

constexpr int kLanes = 16;

struct Bf16_t {
  uint16_t bits;
};

#ifdef DYNASTY_AVX512

struct Float {
  __m512 v;
};
struct Int {
  __m512i v;
};
// Sixteen sums.
struct Doubles {
  __m512d low, high;
};
using Mask = __mmask16;

inline Mask FirstLanes(int64_t count) {
  return count >= kLanes ? Mask(0xFFFF) : Mask((1u << count) - 1);
}

inline Float Floats(float x) {
  return {_mm512_set1_ps(x)};
}
inline Int Ints(int32_t x) {
  return {_mm512_set1_epi32(x)};
}
inline Int LaneIndex() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}

// Loads and stores of the first lanes. Whole vectors take the plain instruction: masked ones,
// stores above all, are slow on some processors.
constexpr Mask kAllLanes = 0xFFFF;

inline Float Load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline Float Load(const float* p, Mask m) {
  return m == kAllLanes ? Load(p) : Float{_mm512_maskz_loadu_ps(m, p)};
}
inline Float WidenHalves(__m256i halves) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline Float Load(const Bf16_t* p) {
  return WidenHalves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Float Load(const Bf16_t* p, Mask m) {
  return m == kAllLanes ? Load(p) : WidenHalves(_mm256_maskz_loadu_epi16(m, p));
}
inline Int Load(const int32_t* p) {
  return {_mm512_loadu_si512(p)};
}
inline Int Load(const int32_t* p, Mask m) {
  return m == kAllLanes ? Load(p) : Int{_mm512_maskz_loadu_epi32(m, p)};
}
inline Int Load(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Int Load(const int16_t* p, Mask m) {
  return {_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(m, p))};
}
inline Int Load(const uint16_t* p, Mask m) {
  return {_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p))};
}
inline Int Load(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Int Load(const uint8_t* p, Mask m) {
  return m == kAllLanes ? Load(p) : Int{_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p))};
}

inline void Store(float* p, Float x) {
  _mm512_storeu_ps(p, x.v);
}
inline void Store(float* p, Float x, Mask m) {
  m == kAllLanes ? Store(p, x) : _mm512_mask_storeu_ps(p, m, x.v);
}
inline void Store(int32_t* p, Int x) {
  _mm512_storeu_si512(p, x.v);
}
inline void Store(int32_t* p, Int x, Mask m) {
  m == kAllLanes ? Store(p, x) : _mm512_mask_storeu_epi32(p, m, x.v);
}
// The low byte and the high half of each lane, narrowed in a register.
inline void StoreBytes(uint8_t* p, Int x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
inline void StoreBytes(uint8_t* p, Int x, Mask m) {
  m == kAllLanes ? StoreBytes(p, x) : _mm_mask_storeu_epi8(p, m, _mm512_cvtepi32_epi8(x.v));
}
inline __m256i HighHalves(Int x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(x.v, 16));
}
inline void StoreHighHalves(Bf16_t* p, Int x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), HighHalves(x));
}
inline void StoreHighHalves(Bf16_t* p, Int x, Mask m) {
  m == kAllLanes ? StoreHighHalves(p, x) : _mm256_mask_storeu_epi16(p, m, HighHalves(x));
}

inline Int BitsOf(Float x) {
  return {_mm512_castps_si512(x.v)};
}
inline Float FloatOf(Int x) {
  return {_mm512_castsi512_ps(x.v)};
}
inline Float ToFloat(Int x) {
  return {_mm512_cvtepi32_ps(x.v)};
}

inline Float operator+(Float a, Float b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline Float operator-(Float a, Float b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline Float operator*(Float a, Float b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline Float operator/(Float a, Float b) {
  return {_mm512_div_ps(a.v, b.v)};
}
inline Float Least(Float a, Float b) {
  return {_mm512_min_ps(a.v, b.v)};
}
inline Float Greatest(Float a, Float b) {
  return {_mm512_max_ps(a.v, b.v)};
}
// The sign of x and the smaller of both magnitudes.
inline Float Clip(Float x, Float limit) {
  return {_mm512_range_ps(x.v, limit.v, 0x2)};
}
inline Mask Negative(Float x) {
  return _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ);
}

inline Int operator+(Int a, Int b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
inline Int operator-(Int a, Int b) {
  return {_mm512_sub_epi32(a.v, b.v)};
}
inline Int operator&(Int a, Int b) {
  return {_mm512_and_si512(a.v, b.v)};
}
inline Int operator|(Int a, Int b) {
  return {_mm512_or_si512(a.v, b.v)};
}
inline Int operator^(Int a, Int b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
inline Int Least(Int a, Int b) {
  return {_mm512_min_epi32(a.v, b.v)};
}
inline Int Greatest(Int a, Int b) {
  return {_mm512_max_epi32(a.v, b.v)};
}
template <int kBy>
inline Int ShiftLeft(Int a) {
  return {_mm512_slli_epi32(a.v, kBy)};
}
template <int kBy>
inline Int ShiftRight(Int a) {
  return {_mm512_srai_epi32(a.v, kBy)};
}
template <int kBy>
inline Int ShiftRightLogical(Int a) {
  return {_mm512_srli_epi32(a.v, kBy)};
}
inline Int ShiftLeft(Int a, Int by) {
  return {_mm512_sllv_epi32(a.v, by.v)};
}
inline Int ShiftRight(Int a, Int by) {
  return {_mm512_srav_epi32(a.v, by.v)};
}
inline Mask operator>(Int a, Int b) {
  return _mm512_cmpgt_epi32_mask(a.v, b.v);
}
inline Mask operator==(Int a, Int b) {
  return _mm512_cmpeq_epi32_mask(a.v, b.v);
}
inline Int Select(Mask m, Int a, Int b) {
  return {_mm512_mask_blend_epi32(m, b.v, a.v)};
}
inline Float Select(Mask m, Float a, Float b) {
  return {_mm512_mask_blend_ps(m, b.v, a.v)};
}
inline int32_t GreatestLane(Int a) {
  return _mm512_reduce_max_epi32(a.v);
}
inline int32_t LeastLane(Int a) {
  return _mm512_reduce_min_epi32(a.v);
}

// Lane i takes lane index[i].
inline Float Permute(Float a, Int index) {
  return {_mm512_permutexvar_ps(index.v, a.v)};
}
inline Int Permute(Int a, Int index) {
  return {_mm512_permutexvar_epi32(index.v, a.v)};
}

// floor(x * factor + (r + 0.5) * 2**-16), exactly, for |x * factor| <= 2**7: rounding down never
// passes an integer on its way down.
inline Int FloorOfSum(Float x, Float factor, Int r) {
  const __m512 u =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(r.v), _mm512_set1_ps(0x1p-16f), _mm512_set1_ps(0x1p-17f));
  const __m512 sum =
      _mm512_fmadd_round_ps(x.v, factor.v, u, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return {_mm512_cvt_roundps_epi32(sum, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}

inline void Transpose(Int (&w)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(w[i].v, w[i + 1].v);
    a[i + 1] = _mm512_unpackhi_epi32(w[i].v, w[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    w[i].v = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    w[i + 8].v = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    w[i + 4].v = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    w[i + 12].v = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

// Lane by lane, the low bytes of four vectors in one.
inline Int PackBytes(Int x0, Int x1, Int x2, Int x3) {
  const __m512i low = _mm512_set1_epi32(0xFF);
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i a = _mm512_packus_epi32(_mm512_and_si512(x0.v, low), _mm512_and_si512(x1.v, low));
  const __m512i b = _mm512_packus_epi32(_mm512_and_si512(x2.v, low), _mm512_and_si512(x3.v, low));
  return {_mm512_shuffle_epi8(_mm512_packus_epi16(a, b), order)};
}
// Lane by lane, the high halves of two vectors in one.
inline Int PackHighHalves(Int x0, Int x1) {
  return {_mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(x0.v, 16), x1.v)};
}

// Of four vectors each lane: sixteen bytes to out + lane * pitch.
inline void StoreTransposed(uint8_t* out, int64_t pitch, const Int (&q)[4]) {
  const __m512i a[4] = {
      _mm512_unpacklo_epi32(q[0].v, q[1].v), _mm512_unpackhi_epi32(q[0].v, q[1].v),
      _mm512_unpacklo_epi32(q[2].v, q[3].v), _mm512_unpackhi_epi32(q[2].v, q[3].v)};
  const __m512i lanes[4] = {_mm512_unpacklo_epi64(a[0], a[2]), _mm512_unpackhi_epi64(a[0], a[2]),
                            _mm512_unpacklo_epi64(a[1], a[3]), _mm512_unpackhi_epi64(a[1], a[3])};
  for (int j = 0; j < 4; ++j) {  // quarter i of lanes[j] is lane 4 * i + j
    uint8_t* at = out + j * pitch;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_castsi512_si128(lanes[j]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 4 * pitch),
                     _mm512_extracti32x4_epi32(lanes[j], 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 8 * pitch),
                     _mm512_extracti32x4_epi32(lanes[j], 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 12 * pitch),
                     _mm512_extracti32x4_epi32(lanes[j], 3));
  }
}
// Of eight vectors each lane: sixteen halves to out + lane * pitch.
inline void StoreTransposed(Bf16_t* out, int64_t pitch, const Int (&q)[8]) {
  __m512i a[8];
  for (int g = 0; g < 8; g += 2) {
    a[g] = _mm512_unpacklo_epi32(q[g].v, q[g + 1].v);
    a[g + 1] = _mm512_unpackhi_epi32(q[g].v, q[g + 1].v);
  }
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int j = 0; j < 4; ++j) {  // lanes 4 * i + j
    const __m512i low = j % 2 ? _mm512_unpackhi_epi64(a[j / 2], a[j / 2 + 2])
                              : _mm512_unpacklo_epi64(a[j / 2], a[j / 2 + 2]);
    const __m512i high = j % 2 ? _mm512_unpackhi_epi64(a[j / 2 + 4], a[j / 2 + 6])
                               : _mm512_unpacklo_epi64(a[j / 2 + 4], a[j / 2 + 6]);
    const __m512i first = _mm512_permutex2var_epi64(low, front, high),
                  second = _mm512_permutex2var_epi64(low, back, high);
    Bf16_t* at = out + j * pitch;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 4 * pitch),
                        _mm512_extracti64x4_epi64(first, 1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 8 * pitch), _mm512_castsi512_si256(second));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 12 * pitch),
                        _mm512_extracti64x4_epi64(second, 1));
  }
}

// Sixteen rows of sixteen halves, `pitch` halves apart -> sixteen vectors, vector c with half c of
// each row as a float.
inline void LoadTransposed(const Bf16_t* in, int64_t pitch, Float (&out)[16]) {
  __m512i r[8], a[8], b[8];
  for (int i = 0; i < 8; ++i) {  // rows i and i + 8
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i * pitch));
    r[i] = _mm512_inserti64x4(
        _mm512_castsi256_si512(low),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + (i + 8) * pitch)), 1);
  }
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // Quarters of b[j] and b[j + 4]: pairs of halves j and j + 4 of rows 0-3 | 8-11 and 4-7 | 12-15.
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13),
                back = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int j = 0; j < 4; ++j) {
    const __m512i pair = _mm512_permutex2var_epi64(b[j], front, b[j + 4]),
                  other = _mm512_permutex2var_epi64(b[j], back, b[j + 4]);
    const __m512i high = _mm512_set1_epi32(int(0xFFFF0000));
    out[2 * j].v = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    out[2 * j + 1].v = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
    out[2 * j + 8].v = _mm512_castsi512_ps(_mm512_slli_epi32(other, 16));
    out[2 * j + 9].v = _mm512_castsi512_ps(_mm512_and_si512(other, high));
  }
}

inline Doubles NoSums() {
  return {_mm512_setzero_pd(), _mm512_setzero_pd()};
}
inline Doubles operator+(Doubles a, Doubles b) {
  return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)};
}
inline void Store(double* p, Doubles x) {
  _mm512_storeu_pd(p, x.low), _mm512_storeu_pd(p + 8, x.high);
}
// sums + x * x. The square of a float is exact in a double, so that fused or not the sum is the
// same.
inline Doubles PlusSquares(Doubles sums, Float x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)),
                high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
  return {_mm512_fmadd_pd(low, low, sums.low), _mm512_fmadd_pd(high, high, sums.high)};
}

// Of four vectors, each four blocks of four lanes: the reduction of each block, block b of vector i
// in lane 4 * b + i.
template <typename Reduce>
inline Int ReduceQuads(const Int (&v)[4], Reduce reduce) {
  const Int a = reduce(Int{_mm512_unpacklo_epi32(v[0].v, v[1].v)},
                       Int{_mm512_unpackhi_epi32(v[0].v, v[1].v)});
  const Int b = reduce(Int{_mm512_unpacklo_epi32(v[2].v, v[3].v)},
                       Int{_mm512_unpackhi_epi32(v[2].v, v[3].v)});
  return reduce(Int{_mm512_unpacklo_epi64(a.v, b.v)}, Int{_mm512_unpackhi_epi64(a.v, b.v)});
}

#else  // plain loops

struct Float {
  float v[kLanes];
};
struct Int {
  int32_t v[kLanes];
};
struct Doubles {
  double v[kLanes];
};
using Mask = uint16_t;

#define DYNASTY_EACH for (int i = 0; i < kLanes; ++i)

inline Mask FirstLanes(int64_t count) {
  return count >= kLanes ? Mask(0xFFFF) : Mask((1u << count) - 1);
}
inline bool Has(Mask m, int i) {
  return m >> i & 1;
}

inline Float Floats(float x) {
  Float r;
  DYNASTY_EACH r.v[i] = x;
  return r;
}
inline Int Ints(int32_t x) {
  Int r;
  DYNASTY_EACH r.v[i] = x;
  return r;
}
inline Int LaneIndex() {
  Int r;
  DYNASTY_EACH r.v[i] = i;
  return r;
}
inline float Widen(float x) {
  return x;
}
inline float Widen(Bf16_t x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <typename T>
inline Float LoadFloats(const T* p, Mask m) {
  Float r;
  DYNASTY_EACH r.v[i] = Has(m, i) ? Widen(p[i]) : 0.0f;
  return r;
}
template <typename T>
inline Int LoadInts(const T* p, Mask m) {
  Int r;
  DYNASTY_EACH r.v[i] = Has(m, i) ? int32_t(p[i]) : 0;
  return r;
}
inline Float Load(const float* p, Mask m) {
  return LoadFloats(p, m);
}
inline Float Load(const Bf16_t* p, Mask m) {
  return LoadFloats(p, m);
}
inline Float Load(const float* p) {
  Float r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline Float Load(const Bf16_t* p) {
  Float r;
  DYNASTY_EACH r.v[i] = Widen(p[i]);
  return r;
}
inline Int Load(const int32_t* p) {
  Int r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline Int Load(const uint16_t* p) {
  Int r;
  DYNASTY_EACH r.v[i] = p[i];
  return r;
}
inline Int Load(const int32_t* p, Mask m) {
  return LoadInts(p, m);
}
inline Int Load(const int16_t* p, Mask m) {
  return LoadInts(p, m);
}
inline Int Load(const uint16_t* p, Mask m) {
  return LoadInts(p, m);
}
inline Int Load(const uint8_t* p, Mask m) {
  return LoadInts(p, m);
}

inline void Store(float* p, Float x) {
  std::memcpy(p, x.v, sizeof x.v);
}
inline void Store(float* p, Float x, Mask m) {
  DYNASTY_EACH if (Has(m, i)) p[i] = x.v[i];
}
inline void Store(int32_t* p, Int x) {
  std::memcpy(p, x.v, sizeof x.v);
}
inline void Store(int32_t* p, Int x, Mask m) {
  DYNASTY_EACH if (Has(m, i)) p[i] = x.v[i];
}
inline void StoreBytes(uint8_t* p, Int x) {
  DYNASTY_EACH p[i] = uint8_t(x.v[i]);
}
inline void StoreBytes(uint8_t* p, Int x, Mask m) {
  DYNASTY_EACH if (Has(m, i)) p[i] = uint8_t(x.v[i]);
}
inline void StoreHighHalves(Bf16_t* p, Int x) {
  DYNASTY_EACH p[i].bits = uint16_t(uint32_t(x.v[i]) >> 16);
}
inline void StoreHighHalves(Bf16_t* p, Int x, Mask m) {
  DYNASTY_EACH if (Has(m, i)) p[i].bits = uint16_t(uint32_t(x.v[i]) >> 16);
}

inline Doubles NoSums() {
  return {};
}
inline void Store(double* p, Doubles x) {
  std::memcpy(p, x.v, sizeof x.v);
}
inline Doubles PlusSquares(Doubles sums, Float x) {
  DYNASTY_EACH sums.v[i] += double(x.v[i]) * double(x.v[i]);
  return sums;
}

inline Int BitsOf(Float x) {
  Int r;
  std::memcpy(r.v, x.v, sizeof r.v);
  return r;
}
inline Float FloatOf(Int x) {
  Float r;
  std::memcpy(r.v, x.v, sizeof r.v);
  return r;
}

#define DYNASTY_UNARY(T, R, name, expression) \
  inline R name(T a) {                        \
    R r;                                      \
    DYNASTY_EACH r.v[i] = expression;         \
    return r;                                 \
  }
#define DYNASTY_BINARY(T, name, expression) \
  inline T name(T a, T b) {                 \
    T r;                                    \
    DYNASTY_EACH r.v[i] = expression;       \
    return r;                               \
  }
DYNASTY_UNARY(Int, Float, ToFloat, float(a.v[i]))
DYNASTY_BINARY(Doubles, operator+, a.v[i] + b.v[i])
DYNASTY_BINARY(Float, operator+, a.v[i] + b.v[i])
DYNASTY_BINARY(Float, operator-, a.v[i] - b.v[i])
DYNASTY_BINARY(Float, operator*, a.v[i] * b.v[i])
DYNASTY_BINARY(Float, operator/, a.v[i] / b.v[i])
DYNASTY_BINARY(Float, Least, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
DYNASTY_BINARY(Float, Greatest, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
DYNASTY_BINARY(Float, Clip, a.v[i] > b.v[i] ? b.v[i] : a.v[i] < -b.v[i] ? -b.v[i] : a.v[i])
DYNASTY_BINARY(Int, operator+, int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])))
DYNASTY_BINARY(Int, operator-, int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i])))
DYNASTY_BINARY(Int, operator&, a.v[i] & b.v[i])
DYNASTY_BINARY(Int, operator|, a.v[i] | b.v[i])
DYNASTY_BINARY(Int, operator^, a.v[i] ^ b.v[i])
DYNASTY_BINARY(Int, Least, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
DYNASTY_BINARY(Int, Greatest, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
// As AVX-512 does it: shifts of 32 and more leave zero, or the sign.
DYNASTY_BINARY(Int, ShiftLeft, uint32_t(b.v[i]) > 31 ? 0 : int32_t(uint32_t(a.v[i]) << b.v[i]))
DYNASTY_BINARY(Int, ShiftRight, a.v[i] >> (uint32_t(b.v[i]) > 31 ? 31 : b.v[i]))
template <int kBy>
DYNASTY_UNARY(Int, Int, ShiftLeft, int32_t(uint32_t(a.v[i]) << kBy))
template <int kBy>
DYNASTY_UNARY(Int, Int, ShiftRight, a.v[i] >> kBy)
template <int kBy>
DYNASTY_UNARY(Int, Int, ShiftRightLogical, int32_t(uint32_t(a.v[i]) >> kBy))
#undef DYNASTY_UNARY
#undef DYNASTY_BINARY

inline Mask Negative(Float x) {
  Mask m = 0;
  DYNASTY_EACH m |= Mask(x.v[i] < 0.0f) << i;
  return m;
}
inline Mask operator>(Int a, Int b) {
  Mask m = 0;
  DYNASTY_EACH m |= Mask(a.v[i] > b.v[i]) << i;
  return m;
}
inline Mask operator==(Int a, Int b) {
  Mask m = 0;
  DYNASTY_EACH m |= Mask(a.v[i] == b.v[i]) << i;
  return m;
}
template <typename T>
inline T Select(Mask m, T a, T b) {
  T r;
  DYNASTY_EACH r.v[i] = Has(m, i) ? a.v[i] : b.v[i];
  return r;
}
inline int32_t GreatestLane(Int a) {
  int32_t r = a.v[0];
  DYNASTY_EACH r = a.v[i] > r ? a.v[i] : r;
  return r;
}
inline int32_t LeastLane(Int a) {
  int32_t r = a.v[0];
  DYNASTY_EACH r = a.v[i] < r ? a.v[i] : r;
  return r;
}
template <typename T>
inline T Permute(T a, Int index) {
  T r;
  DYNASTY_EACH r.v[i] = a.v[index.v[i]];
  return r;
}
inline Int FloorOfSum(Float x, Float factor, Int r) {
  Int q;
  DYNASTY_EACH {
    // In units of 2**-17: floor(floor(y * 2**17) + 2 r + 1) / 2**17). Both products are exact but
    // where y is subnormal, which changes nothing.
    const float y = x.v[i] * factor.v[i] * 0x1p17f;
    int32_t low = int32_t(y);
    low -= float(low) > y;
    q.v[i] = (low + 2 * r.v[i] + 1) >> 17;
  }
  return q;
}
inline void Transpose(Int (&w)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const int32_t t = w[i].v[j];
      w[i].v[j] = w[j].v[i];
      w[j].v[i] = t;
    }
  }
}
inline Int PackBytes(Int x0, Int x1, Int x2, Int x3) {
  Int r;
  DYNASTY_EACH r.v[i] = int32_t((x0.v[i] & 0xFFu) | (x1.v[i] & 0xFFu) << 8 |
                                (x2.v[i] & 0xFFu) << 16 | (x3.v[i] & 0xFFu) << 24);
  return r;
}
inline Int PackHighHalves(Int x0, Int x1) {
  Int r;
  DYNASTY_EACH r.v[i] = int32_t(uint32_t(x0.v[i]) >> 16 | (uint32_t(x1.v[i]) & 0xFFFF0000u));
  return r;
}
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "a lane's first byte or half is its lowest");
template <typename T, int kVectors>
inline void StoreTransposed(T* out, int64_t pitch, const Int (&q)[kVectors]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kVectors; ++i)
      std::memcpy(reinterpret_cast<char*>(out + lane * pitch) + 4 * i, &q[i].v[lane], 4);
  }
}
inline void LoadTransposed(const Bf16_t* in, int64_t pitch, Float (&out)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int row = 0; row < kLanes; ++row) out[i].v[row] = Widen(in[row * pitch + i]);
  }
}
template <typename Reduce>
inline Int ReduceQuads(const Int (&v)[4], Reduce reduce) {
  Int parts[4];
  for (int e = 0; e < 4; ++e) {
    DYNASTY_EACH parts[e].v[i] = v[i % 4].v[i / 4 * 4 + e];
  }
  return reduce(reduce(parts[0], parts[1]), reduce(parts[2], parts[3]));
}
#undef DYNASTY_EACH

#endif

}  // namespace dynasty
