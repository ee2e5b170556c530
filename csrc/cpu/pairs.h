// Sixteen pairs of bf16: what products of bf16 are made of, written once for each ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace sage::SAGE_ISA {

#if defined(__AVX512BF16__)

struct Pairs {
  __m512bh v;
};

SAGE_INLINE Pairs load_pairs(const void* p) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))}; }
SAGE_INLINE Pairs set1_pair(std::uint32_t pair) {
  return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)))};
}
SAGE_INLINE V16 dot(Pairs a, Pairs b, V16 sums) { return {_mm512_dpbf16_ps(sums.v, a.v, b.v)}; }
SAGE_INLINE void store_bf16(void* p, V16 a) {
  const __m256bh h = _mm512_cvtneps_pbh(a.v);
  std::memcpy(p, &h, sizeof h);
}

#else

struct Pairs {
  V16 even, odd;
};

#if defined(__AVX512F__)
SAGE_INLINE Pairs halves(__m512i pairs) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
}
SAGE_INLINE Pairs load_pairs(const void* p) { return halves(_mm512_loadu_si512(p)); }
#elif defined(__AVX2__)
SAGE_INLINE Pairs load_pairs(const void* p) {
  const __m256i a = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(static_cast<const __m256i*>(p) + 1);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))}};
}
#elif defined(SAGE_NEON)
SAGE_INLINE Pairs load_pairs(const void* p) {
  Pairs out;
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t pairs = vld1q_u32(static_cast<const std::uint32_t*>(p) + 4 * i);
    out.even.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    out.odd.v[i] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
  }
  return out;
}
#else
SAGE_INLINE Pairs load_pairs(const void* p) {
  Pairs out;
  for (int i = 0; i < kLanes; ++i) {
    std::uint32_t pair;
    std::memcpy(&pair, static_cast<const char*>(p) + sizeof pair * i, sizeof pair);
    out.even.v[i] = bits_to_float(pair << 16);
    out.odd.v[i] = bits_to_float(pair & 0xffff0000u);
  }
  return out;
}
#endif
SAGE_INLINE Pairs set1_pair(std::uint32_t pair) {
  return {set1(bits_to_float(pair << 16)), set1(bits_to_float(pair & 0xffff0000u))};
}
// The order of vdpbf16ps, which rounds twice: the second entry of a pair first.
SAGE_INLINE V16 dot(Pairs a, Pairs b, V16 sums) { return fma(a.even, b.even, fma(a.odd, b.odd, sums)); }
// Rounded to nearest even, subnormals to zero, as vcvtneps2bf16 does.
SAGE_INLINE void store_bf16(void* p, V16 a) {
  float values[kLanes];
  std::uint16_t halves[kLanes];
  store(values, zero_where_less(a, max(a, set1(0.0f) - a), set1(0x1p-126f)));
  for (int i = 0; i < kLanes; ++i) halves[i] = float_to_bf16(values[i]);
  std::memcpy(p, halves, sizeof halves);
}

#endif

}  // namespace sage::SAGE_ISA
