// Rotary positions of one head (Su et al. 2021).
#pragma once

#include "vec.h"

namespace sage::SAGE_ISA {

// Rotates the first 2 * half numbers of a head: pairs (i, i + half), or (2i, 2i + 1) where `interleaved`. x and y may
// be the same; the numbers behind stay as they are in y.
SAGE_INLINE void rotate_head(const float* x, float* y, const float* cos, const float* sin, int half, bool interleaved) {
  if (interleaved) {
    for (int i = 0; i < 2 * half; i += 2) {
      const float first = x[i], second = x[i + 1];
      y[i] = __builtin_fmaf(first, cos[i / 2], -(second * sin[i / 2]));
      y[i + 1] = __builtin_fmaf(second, cos[i / 2], first * sin[i / 2]);
    }
    return;
  }
  for (int i = 0; i < half; i += kLanes) {
    const int n = half - i < kLanes ? half - i : kLanes;
    const V16 c = load_n(cos + i, n), s = load_n(sin + i, n);
    const V16 first = load_n(x + i, n), second = load_n(x + half + i, n);
    store_n(y + i, fma(first, c, second * (s * set1(-1.0f))), n);
    store_n(y + half + i, fma(second, c, first * s), n);
  }
}

}  // namespace sage::SAGE_ISA
