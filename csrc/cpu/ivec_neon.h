// I16 and U64 on Arm; with the dot-product instructions (Armv8.2) where the build has them. Included by ivec.h.
#pragma once

#include <arm_neon.h>

namespace sage::SAGE_ISA {

struct I16 {
  int32x4_t v[4];
};
struct U64 {
  uint8x16_t v[4];
};

#define SAGE_EACH(type, expression)                    \
  type out;                                            \
  for (int i = 0; i < 4; ++i) out.v[i] = (expression); \
  return out

SAGE_INLINE I16 set1_int(std::int32_t x) { SAGE_EACH(I16, vdupq_n_s32(x)); }
SAGE_INLINE V16 to_float(I16 a) { SAGE_EACH(V16, vcvtq_f32_s32(a.v[i])); }
SAGE_INLINE I16 to_int(V16 a) { SAGE_EACH(I16, vcvtnq_s32_f32(a.v[i])); }
SAGE_INLINE I16 magnitude_bits(V16 a) { SAGE_EACH(I16, vreinterpretq_s32_f32(vabsq_f32(a.v[i]))); }
SAGE_INLINE I16 operator+(I16 a, I16 b) { SAGE_EACH(I16, vaddq_s32(a.v[i], b.v[i])); }
SAGE_INLINE I16 max_int(I16 a, I16 b) { SAGE_EACH(I16, vmaxq_s32(a.v[i], b.v[i])); }
SAGE_INLINE void store_int(std::int32_t* p, I16 a) {
  for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]);
}
SAGE_INLINE U64 load_bytes(const std::uint8_t* p) { SAGE_EACH(U64, vld1q_u8(p + 16 * i)); }
SAGE_INLINE U64 masked(U64 a, int mask) {
  SAGE_EACH(U64, vandq_u8(a.v[i], vdupq_n_u8(static_cast<std::uint8_t>(mask))));
}
template <int kBits>
SAGE_INLINE U64 shifted_right(U64 a) {
  SAGE_EACH(U64, vshrq_n_u8(a.v[i], kBits));
}
template <int kBits>
SAGE_INLINE U64 shifted_left(U64 a) {
  SAGE_EACH(U64, vshlq_n_u8(a.v[i], kBits));
}
SAGE_INLINE U64 operator|(U64 a, U64 b) { SAGE_EACH(U64, vorrq_u8(a.v[i], b.v[i])); }

// sums + the sums of four neighbouring products.
SAGE_INLINE int32x4_t dot4_signed(int32x4_t sums, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sums, w, x);
#else
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
  const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, x));
  return vaddq_s32(sums, vpaddq_s32(low, high));
#endif
}

template <int kBits>
SAGE_INLINE I16 dot4(I16 sums, U64 w, const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, sizeof four);
  const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
  if constexpr (kBits < 8) {
    SAGE_EACH(I16, dot4_signed(sums.v[i], vreinterpretq_s8_u8(w.v[i]), xs));
  } else {  // w = (w - 128) + 128, and the first is signed
    const int32x4_t offset = vdupq_n_s32(128 * (x[0] + x[1] + x[2] + x[3]));
    const uint8x16_t top = vdupq_n_u8(0x80);
    SAGE_EACH(I16, dot4_signed(vaddq_s32(sums.v[i], offset), vreinterpretq_s8_u8(veorq_u8(w.v[i], top)), xs));
  }
}

// The low bytes.
SAGE_INLINE void store_as_bytes(std::int8_t* p, I16 a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

SAGE_INLINE std::int32_t reduce_add_int(I16 a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}

#undef SAGE_EACH

}  // namespace sage::SAGE_ISA
