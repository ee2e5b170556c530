// The one inner loop of all matrix products: a register tile of rows times groups of sixteen columns.
#pragma once

#include <cstddef>

#include "vec.h"

namespace sage::SAGE_ISA {

// Rows of the largest tile. With it the sums, one row of weights and one value fill the sixteen registers of AVX2.
inline constexpr int kTileRows = 6;

// Where the sixteen-column groups of the right-hand matrix stand: entry k of group b starts at b * group + k * step.
struct Layout {
  std::ptrdiff_t step;
  std::ptrdiff_t group;
};

// sums[r][b] += x[r * x_stride + k] * w(k, b) for k = 0, 1, ... in this order.
// kAhead > 0 fetches that many bytes ahead of the reads: for a w that comes from memory and is used once.
template <class W, int kRows, int kGroups, int kAhead>
SAGE_INLINE void multiply(V16 (&sums)[kRows][kGroups], const float* x, std::ptrdiff_t x_stride, const typename W::T* w,
                          Layout layout, int count) {
  for (int k = 0; k < count; ++k) {
    V16 columns[kGroups];
#pragma GCC unroll 8
    for (int b = 0; b < kGroups; ++b) {
      const typename W::T* p = w + b * layout.group + k * layout.step;
      if constexpr (kAhead > 0) __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
      columns[b] = W::load16(p);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V16 value = set1(x[r * x_stride + k]);
#pragma GCC unroll 8
      for (int b = 0; b < kGroups; ++b) sums[r][b] = fma(value, columns[b], sums[r][b]);
    }
  }
}

// Calls body.operator()<rows>() with the number of rows as a constant, 1 to kTileRows.
template <class Body>
SAGE_INLINE void with_rows(int rows, const Body& body) {
  switch (rows) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    default:
      return body.template operator()<kTileRows>();
  }
}

// Cuts `rows` into near-equal tiles of at most kTileRows (seven rows are 4 + 3, not 6 + 1) and calls body(first,
// count).
template <class Body>
SAGE_INLINE void each_tile(int rows, const Body& body) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int t = 0; t < tiles; ++t) {
    const int first = rows * t / tiles;
    body(first, rows * (t + 1) / tiles - first);
  }
}

}  // namespace sage::SAGE_ISA
