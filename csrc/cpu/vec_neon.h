// V16 on Arm: four registers of four lanes. Included by vec.h.
//
// max and min choose as the other ISAs do (the second argument where either is a NaN), which vmaxq_f32 does not.
#pragma once

#include <arm_neon.h>

namespace sage::SAGE_ISA {

struct V16 {
  float32x4_t v[4];
};

#define SAGE_EACH(expression)                          \
  V16 out;                                             \
  for (int i = 0; i < 4; ++i) out.v[i] = (expression); \
  return out

SAGE_INLINE V16 set1(float x) { SAGE_EACH(vdupq_n_f32(x)); }
SAGE_INLINE V16 load(const float* p) { SAGE_EACH(vld1q_f32(p + 4 * i)); }
SAGE_INLINE void store(float* p, V16 a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
SAGE_INLINE V16 load_n(const float* p, int n) {
  float t[16] = {};
  std::memcpy(t, p, sizeof(float) * static_cast<std::size_t>(n));
  return load(t);
}
SAGE_INLINE void store_n(float* p, V16 a, int n) {
  float t[16];
  store(t, a);
  std::memcpy(p, t, sizeof(float) * static_cast<std::size_t>(n));
}
SAGE_INLINE V16 load_bf16(const std::uint16_t* p) {
  SAGE_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
SAGE_INLINE V16 load_bf16_pairs(const std::uint16_t* p) {
  const uint16x8x2_t columns = vld2q_u16(p);  // 0 to 7, and 8 to 15
  V16 out;
  for (int i = 0; i < 2; ++i) {
    out.v[2 * i] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(columns.val[i]), 16));
    out.v[2 * i + 1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(columns.val[i]), 16));
  }
  return out;
}
SAGE_INLINE V16 load_f16(const std::uint16_t* p) { SAGE_EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
SAGE_INLINE V16 fma(V16 a, V16 b, V16 c) { SAGE_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
SAGE_INLINE V16 operator+(V16 a, V16 b) { SAGE_EACH(vaddq_f32(a.v[i], b.v[i])); }
SAGE_INLINE V16 operator-(V16 a, V16 b) { SAGE_EACH(vsubq_f32(a.v[i], b.v[i])); }
SAGE_INLINE V16 operator*(V16 a, V16 b) { SAGE_EACH(vmulq_f32(a.v[i], b.v[i])); }
SAGE_INLINE V16 operator/(V16 a, V16 b) { SAGE_EACH(vdivq_f32(a.v[i], b.v[i])); }
SAGE_INLINE V16 max(V16 a, V16 b) { SAGE_EACH(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
SAGE_INLINE V16 min(V16 a, V16 b) { SAGE_EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
SAGE_INLINE V16 round_even(V16 a) { SAGE_EACH(vrndnq_f32(a.v[i])); }
SAGE_INLINE V16 power_of_two(V16 n) {
  SAGE_EACH(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
}
SAGE_INLINE V16 zero_where_less(V16 value, V16 a, V16 b) {
  SAGE_EACH(vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value.v[i]), vcltq_f32(a.v[i], b.v[i]))));
}

SAGE_INLINE float reduce_add(V16 a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
SAGE_INLINE float larger(float a, float b) { return a > b ? a : b; }
SAGE_INLINE float reduce_max(V16 a) {
  const auto of_two = [](float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); };
  float t[4];
  vst1q_f32(t, of_two(of_two(a.v[0], a.v[2]), of_two(a.v[1], a.v[3])));
  return larger(larger(t[0], t[2]), larger(t[1], t[3]));
}

#undef SAGE_EACH

}  // namespace sage::SAGE_ISA
