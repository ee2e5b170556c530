// Sixteen 32-bit sums and 64 unsigned bytes: what products of whole numbers are made of, written once for each ISA.
//
// dot4 is exact on all of them, so sums of products are the same numbers whatever the order.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace sage::SAGE_ISA {

#if defined(__AVX512BW__)

struct I16 {
  __m512i v;
};
struct U64 {
  __m512i v;
};

SAGE_INLINE I16 set1_int(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
SAGE_INLINE V16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
SAGE_INLINE I16 to_int(V16 a) { return {_mm512_cvtps_epi32(a.v)}; }
SAGE_INLINE I16 magnitude_bits(V16 a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
SAGE_INLINE I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
SAGE_INLINE I16 max_int(I16 a, I16 b) { return {_mm512_maskz_max_epi32(0xffff, a.v, b.v)}; }
SAGE_INLINE void store_int(std::int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
SAGE_INLINE __m256i sum_of_halves(I16 a) {
  return _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
}
SAGE_INLINE U64 load_bytes(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
SAGE_INLINE U64 masked(U64 a, int mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(mask)))}; }
// Bytes shifted together with their neighbours: mask the result.
template <int kBits>
SAGE_INLINE U64 shifted_right(U64 a) {
  return {_mm512_srli_epi16(a.v, kBits)};
}
template <int kBits>
SAGE_INLINE U64 shifted_left(U64 a) {
  return {_mm512_slli_epi16(a.v, kBits)};
}
SAGE_INLINE U64 operator|(U64 a, U64 b) { return {_mm512_or_si512(a.v, b.v)}; }

// sums[c] += w[4c] x[0] + w[4c + 1] x[1] + w[4c + 2] x[2] + w[4c + 3] x[3]; x in -127..127, w below 2^kBits.
template <int kBits>
SAGE_INLINE I16 dot4(I16 sums, U64 w, const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, sizeof four);
  const __m512i xs = _mm512_set1_epi32(four);
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(sums.v, w.v, xs)};
#else
  const __m512i ones = _mm512_set1_epi16(1);
  if constexpr (kBits < 8) {
    return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(_mm512_maddubs_epi16(w.v, xs), ones))};
  } else {  // maddubs would saturate: halves and rests of w by themselves
    const __m512i half = masked(shifted_right<1>(w), 0x7f).v;
    const __m512i rest = masked(w, 1).v;
    const __m512i twice = _mm512_madd_epi16(_mm512_maddubs_epi16(half, xs), _mm512_set1_epi16(2));
    const __m512i once = _mm512_madd_epi16(_mm512_maddubs_epi16(rest, xs), ones);
    return {_mm512_add_epi32(sums.v, _mm512_add_epi32(twice, once))};
  }
#endif
}

SAGE_INLINE void store_as_bytes(std::int8_t* p, I16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

#elif defined(__AVX2__)

struct I16 {
  __m256i lo, hi;
};
struct U64 {
  __m256i lo, hi;
};

SAGE_INLINE I16 set1_int(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
SAGE_INLINE V16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
SAGE_INLINE I16 to_int(V16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
SAGE_INLINE I16 magnitude_bits(V16 a) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(a.lo), mask), _mm256_and_si256(_mm256_castps_si256(a.hi), mask)};
}
SAGE_INLINE I16 operator+(I16 a, I16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
SAGE_INLINE I16 max_int(I16 a, I16 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
SAGE_INLINE void store_int(std::int32_t* p, I16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
SAGE_INLINE __m256i sum_of_halves(I16 a) { return _mm256_add_epi32(a.lo, a.hi); }
SAGE_INLINE U64 load_bytes(const std::uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
SAGE_INLINE U64 masked(U64 a, int mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
template <int kBits>
SAGE_INLINE U64 shifted_right(U64 a) {
  return {_mm256_srli_epi16(a.lo, kBits), _mm256_srli_epi16(a.hi, kBits)};
}
template <int kBits>
SAGE_INLINE U64 shifted_left(U64 a) {
  return {_mm256_slli_epi16(a.lo, kBits), _mm256_slli_epi16(a.hi, kBits)};
}
SAGE_INLINE U64 operator|(U64 a, U64 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }

template <int kBits>
SAGE_INLINE __m256i dot4_half(__m256i sums, __m256i w, __m256i xs) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (kBits < 8) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(w, xs), ones));
  } else {
    const __m256i half = _mm256_and_si256(_mm256_srli_epi16(w, 1), _mm256_set1_epi8(0x7f));
    const __m256i rest = _mm256_and_si256(w, _mm256_set1_epi8(1));
    const __m256i twice = _mm256_madd_epi16(_mm256_maddubs_epi16(half, xs), _mm256_set1_epi16(2));
    const __m256i once = _mm256_madd_epi16(_mm256_maddubs_epi16(rest, xs), ones);
    return _mm256_add_epi32(sums, _mm256_add_epi32(twice, once));
  }
}

template <int kBits>
SAGE_INLINE I16 dot4(I16 sums, U64 w, const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, sizeof four);
  const __m256i xs = _mm256_set1_epi32(four);
  return {dot4_half<kBits>(sums.lo, w.lo, xs), dot4_half<kBits>(sums.hi, w.hi, xs)};
}

SAGE_INLINE void store_as_bytes(std::int8_t* p, I16 a) {
  const __m256i byte = _mm256_set1_epi32(0xff);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.lo, byte), _mm256_and_si256(a.hi, byte));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}

#elif defined(SAGE_NEON)
}  // namespace sage::SAGE_ISA
#include "ivec_neon.h"
namespace sage::SAGE_ISA {
#else  // any machine

struct I16 {
  std::int32_t v[16];
};
struct U64 {
  std::uint8_t v[64];
};

#define SAGE_EACH_BYTE(expression)                                                 \
  U64 out;                                                                         \
  for (int i = 0; i < 64; ++i) out.v[i] = static_cast<std::uint8_t>((expression)); \
  return out

SAGE_INLINE I16 set1_int(std::int32_t x) {
  I16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = x;
  return out;
}
SAGE_INLINE V16 to_float(I16 a) {
  V16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<float>(a.v[i]);
  return out;
}
// To the nearest, ties to even: the values must fit.
SAGE_INLINE I16 to_int(V16 a) {
  I16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<std::int32_t>(__builtin_rintf(a.v[i]));
  return out;
}
// Floats without their signs, as numbers that are ordered as the floats are.
SAGE_INLINE I16 magnitude_bits(V16 a) {
  I16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<std::int32_t>(float_to_bits(a.v[i]) & 0x7fffffffu);
  return out;
}
SAGE_INLINE I16 operator+(I16 a, I16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
SAGE_INLINE I16 max_int(I16 a, I16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
SAGE_INLINE void store_int(std::int32_t* p, I16 a) { std::memcpy(p, a.v, sizeof a.v); }
SAGE_INLINE U64 load_bytes(const std::uint8_t* p) { SAGE_EACH_BYTE(p[i]); }
SAGE_INLINE U64 masked(U64 a, int mask) { SAGE_EACH_BYTE(a.v[i] & mask); }
template <int kBits>
SAGE_INLINE U64 shifted_right(U64 a) {
  SAGE_EACH_BYTE(a.v[i] >> kBits);
}
template <int kBits>
SAGE_INLINE U64 shifted_left(U64 a) {
  SAGE_EACH_BYTE(a.v[i] << kBits);
}
SAGE_INLINE U64 operator|(U64 a, U64 b) { SAGE_EACH_BYTE(a.v[i] | b.v[i]); }

template <int kBits>
SAGE_INLINE I16 dot4(I16 sums, U64 w, const std::int8_t* x) {
  for (int c = 0; c < 16; ++c) {
    for (int j = 0; j < 4; ++j) sums.v[c] += static_cast<std::int32_t>(w.v[4 * c + j]) * x[j];
  }
  return sums;
}

// The low bytes.
SAGE_INLINE void store_as_bytes(std::int8_t* p, I16 a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(a.v[i]);
}

#undef SAGE_EACH_BYTE

#endif

#if !defined(SAGE_NEON)
SAGE_INLINE std::int32_t reduce_add_int(I16 a) {
#if defined(__AVX2__)
  const __m256i eight = sum_of_halves(a);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#else
  std::int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a.v[i];
  return sum;
#endif
}
#endif

// The largest magnitude of x [k] as the bits of a float: a NaN is above infinity, which is above all others.
static inline std::uint32_t top_magnitude(const float* x, int k) {
  I16 tops[4] = {set1_int(0), set1_int(0), set1_int(0), set1_int(0)};
  int i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) tops[j] = max_int(tops[j], magnitude_bits(load(x + i + j * kLanes)));
  }
  for (; i < k; i += kLanes) tops[0] = max_int(tops[0], magnitude_bits(load_n(x + i, k - i < kLanes ? k - i : kLanes)));
  std::int32_t all[kLanes];
  store_int(all, max_int(max_int(tops[0], tops[1]), max_int(tops[2], tops[3])));
  std::int32_t top = all[0];
  for (int j = 1; j < kLanes; ++j) top = top > all[j] ? top : all[j];
  return static_cast<std::uint32_t>(top);
}

}  // namespace sage::SAGE_ISA
