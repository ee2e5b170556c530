// V16: sixteen float lanes, written once for each ISA; every kernel is written
// once against it.
//
// All ISAs give the same bits: fma is exact everywhere, sums across lanes
// follow one tree, exp is our own polynomial.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && !defined(SAGE_PLAIN)
#define SAGE_NEON 1
#endif

#ifndef SAGE_ISA
#error "SAGE_ISA names the namespace of this build of the kernels"
#endif

#define SAGE_INLINE static inline __attribute__((always_inline))
#define SAGE_MEMBER inline __attribute__((always_inline))  // for members that use `this`

namespace sage::SAGE_ISA {

// ---- storage formats, scalar
// -------------------------------------------------------------------------------------

SAGE_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SAGE_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SAGE_INLINE float bf16_to_float(std::uint16_t h) { return bits_to_float(static_cast<std::uint32_t>(h) << 16); }

// Round to nearest even, as torch does.
SAGE_INLINE std::uint16_t float_to_bf16(float value) {
  const std::uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

SAGE_INLINE float f16_to_float(std::uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Scaling by a power of two is exact and turns half subnormals into normal
  // floats.
  const float value = bits_to_float(magnitude << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(value));
#endif
}

SAGE_INLINE std::uint16_t float_to_f16(float value) {
#if defined(__F16C__)
  return static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 leaves the
                                  // rounded mantissa in the low bits
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
#endif
}

// ---- V16
// -----------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

struct V16 {
  __m512 v;
};

SAGE_INLINE V16 set1(float x) { return {_mm512_set1_ps(x)}; }
SAGE_INLINE V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
SAGE_INLINE void store(float* p, V16 a) { _mm512_storeu_ps(p, a.v); }
SAGE_INLINE V16 load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p)};
}
SAGE_INLINE void store_n(float* p, V16 a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), a.v);
}
SAGE_INLINE V16 load_bf16(const std::uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
SAGE_INLINE V16 load_bf16_pairs(const std::uint16_t* p) {
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i amount = _mm512_mask_set1_epi32(_mm512_setzero_si512(), 0x00ff, 16);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_sllv_epi32(twice, amount), high))};
}
SAGE_INLINE V16 load_f16(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
SAGE_INLINE V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SAGE_INLINE V16 operator+(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
SAGE_INLINE V16 operator-(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
SAGE_INLINE V16 operator*(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
SAGE_INLINE V16 operator/(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
SAGE_INLINE V16 max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
SAGE_INLINE V16 min(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
SAGE_INLINE V16 round_even(V16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
SAGE_INLINE V16 power_of_two(V16 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
SAGE_INLINE V16 zero_where_less(V16 value, V16 a, V16 b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), value.v)};
}
SAGE_INLINE __m256 low(V16 a) { return _mm512_castps512_ps256(a.v); }
SAGE_INLINE __m256 high(V16 a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }
SAGE_INLINE V16 join(__m256 lo, __m256 hi) {
  return {_mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(lo)), _mm256_castps_pd(hi), 1))};
}

#elif defined(__AVX2__)

struct V16 {
  __m256 lo, hi;
};

SAGE_INLINE V16 join(__m256 lo, __m256 hi) { return {lo, hi}; }
SAGE_INLINE __m256 low(V16 a) { return a.lo; }
SAGE_INLINE __m256 high(V16 a) { return a.hi; }
SAGE_INLINE V16 set1(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
SAGE_INLINE V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SAGE_INLINE void store(float* p, V16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
SAGE_INLINE V16 load_n(const float* p, int n) {
  alignas(32) float t[16] = {};
  std::memcpy(t, p, sizeof(float) * static_cast<std::size_t>(n));
  return load(t);
}
SAGE_INLINE void store_n(float* p, V16 a, int n) {
  alignas(32) float t[16];
  store(t, a);
  std::memcpy(p, t, sizeof(float) * static_cast<std::size_t>(n));
}
SAGE_INLINE V16 load_bf16(const std::uint16_t* p) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))};
}
// One load, one shift and one mask give sixteen columns in order: that is why
// weights are stored in pairs (i, i + 8).
SAGE_INLINE V16 load_bf16_pairs(const std::uint16_t* p) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_and_si256(w, mask))};
}
SAGE_INLINE V16 load_f16(const std::uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
SAGE_INLINE V16 fma(V16 a, V16 b, V16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SAGE_INLINE V16 operator+(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
SAGE_INLINE V16 operator-(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
SAGE_INLINE V16 operator*(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
SAGE_INLINE V16 operator/(V16 a, V16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
SAGE_INLINE V16 max(V16 a, V16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
SAGE_INLINE V16 min(V16 a, V16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
SAGE_INLINE V16 round_even(V16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SAGE_INLINE __m256 power_of_two_8(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
SAGE_INLINE V16 power_of_two(V16 n) { return {power_of_two_8(n.lo), power_of_two_8(n.hi)}; }
SAGE_INLINE V16 zero_where_less(V16 value, V16 a, V16 b) {
  return {_mm256_and_ps(value.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ)),
          _mm256_and_ps(value.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ))};
}

#elif defined(SAGE_NEON)
}  // namespace sage::SAGE_ISA
#include "vec_neon.h"
namespace sage::SAGE_ISA {
#else  // any machine: loops the compiler may turn into its own vectors

struct V16 {
  float v[16];
};

#define SAGE_EACH(expression)                           \
  V16 out;                                              \
  for (int i = 0; i < 16; ++i) out.v[i] = (expression); \
  return out

SAGE_INLINE V16 set1(float x) { SAGE_EACH(x); }
SAGE_INLINE V16 load(const float* p) { SAGE_EACH(p[i]); }
SAGE_INLINE void store(float* p, V16 a) { std::memcpy(p, a.v, sizeof a.v); }
SAGE_INLINE V16 load_n(const float* p, int n) { SAGE_EACH(i < n ? p[i] : 0.0f); }
SAGE_INLINE void store_n(float* p, V16 a, int n) { std::memcpy(p, a.v, sizeof(float) * static_cast<std::size_t>(n)); }
SAGE_INLINE V16 load_bf16(const std::uint16_t* p) { SAGE_EACH(bf16_to_float(p[i])); }
SAGE_INLINE V16 load_bf16_pairs(const std::uint16_t* p) { SAGE_EACH(bf16_to_float(p[i < 8 ? 2 * i : 2 * i - 15])); }
SAGE_INLINE V16 load_f16(const std::uint16_t* p) { SAGE_EACH(f16_to_float(p[i])); }
SAGE_INLINE V16 fma(V16 a, V16 b, V16 c) { SAGE_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
SAGE_INLINE V16 operator+(V16 a, V16 b) { SAGE_EACH(a.v[i] + b.v[i]); }
SAGE_INLINE V16 operator-(V16 a, V16 b) { SAGE_EACH(a.v[i] - b.v[i]); }
SAGE_INLINE V16 operator*(V16 a, V16 b) { SAGE_EACH(a.v[i] * b.v[i]); }
SAGE_INLINE V16 operator/(V16 a, V16 b) { SAGE_EACH(a.v[i] / b.v[i]); }
SAGE_INLINE V16 max(V16 a, V16 b) { SAGE_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
SAGE_INLINE V16 min(V16 a, V16 b) { SAGE_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
SAGE_INLINE V16 round_even(V16 a) { SAGE_EACH(__builtin_rintf(a.v[i])); }
SAGE_INLINE V16 power_of_two(V16 n) {
  SAGE_EACH(bits_to_float(static_cast<std::uint32_t>(static_cast<std::int32_t>(n.v[i]) + 127) << 23));
}
SAGE_INLINE V16 zero_where_less(V16 value, V16 a, V16 b) { SAGE_EACH(a.v[i] < b.v[i] ? 0.0f : value.v[i]); }

#undef SAGE_EACH

#endif

// ---- the same for all ISAs
// -----------------------------------------------------------------------------------------

// Sums lanes i and i+8, then i and i+4, i+2, i+1: the one order of every sum
// across lanes.
#if !defined(SAGE_NEON)
SAGE_INLINE float reduce_add(V16 a) {
#if defined(__AVX2__)
  const __m256 eight = _mm256_add_ps(low(a), high(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float t[8];
  for (int i = 0; i < 8; ++i) t[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) t[i] += t[i + 4];
  return (t[0] + t[2]) + (t[1] + t[3]);
#endif
}

SAGE_INLINE float reduce_max(V16 a) {
#if defined(__AVX2__)
  const __m256 eight = _mm256_max_ps(low(a), high(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float t[8];
  for (int i = 0; i < 8; ++i) t[i] = a.v[i] > a.v[i + 8] ? a.v[i] : a.v[i + 8];
  for (int i = 0; i < 4; ++i) t[i] = t[i] > t[i + 4] ? t[i] : t[i + 4];
  for (int i = 0; i < 2; ++i) t[i] = t[i] > t[i + 2] ? t[i] : t[i + 2];
  return t[0] > t[1] ? t[0] : t[1];
#endif
}
#endif

// a * 2^n for whole n: exact where the result is normal.
SAGE_INLINE V16 times_power_of_two(V16 a, V16 n) {
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(a.v, n.v)};
#else
  return a * power_of_two(max(n, set1(-126.0f)));
#endif
}

// e^x within 2 ulp (Cephes' polynomial); exactly 0 below -87.33, infinite
// above 88.37, NaN stays NaN.
SAGE_INLINE V16 exp(V16 x) {
  const V16 lowest = set1(-87.33654f);
  const V16 clamped = min(set1(89.0f), max(lowest, x));
  const V16 n = round_even(clamped * set1(1.44269504088896341f));
  V16 r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  V16 p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  return zero_where_less(p * power_of_two(n), x, lowest);
}

// tanh through exp: absolute error below 2e-7.
SAGE_INLINE V16 tanh(V16 x) {
  const V16 one = set1(1.0f);
  return one - set1(2.0f) / (exp(x + x) + one);
}

// ---- element types of weights and caches
// -----------------------------------------------------------------------------

struct F32 {
  using T = float;
  SAGE_INLINE V16 load16(const T* p) { return load(p); }
  SAGE_INLINE float get(T x) { return x; }
  SAGE_INLINE T put(float x) { return x; }
};
struct BF16 {
  using T = std::uint16_t;
  SAGE_INLINE V16 load16(const T* p) { return load_bf16(p); }
  SAGE_INLINE float get(T x) { return bf16_to_float(x); }
  SAGE_INLINE T put(float x) { return float_to_bf16(x); }
};
// bf16 as packed weights hold it: place 2i is column i, place 2i + 1 is column
// i + 8.
struct BF16Pairs {
  using T = std::uint16_t;
  SAGE_INLINE V16 load16(const T* p) { return load_bf16_pairs(p); }
};
struct F16 {
  using T = std::uint16_t;
  SAGE_INLINE V16 load16(const T* p) { return load_f16(p); }
  SAGE_INLINE float get(T x) { return f16_to_float(x); }
  SAGE_INLINE T put(float x) { return float_to_f16(x); }
};

}  // namespace sage::SAGE_ISA
