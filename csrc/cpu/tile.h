// The inner loop of attention: a register tile of rows times groups of sixteen columns.
#pragma once

#include <cstddef>

#include "kv_cache.h"

namespace sage::SAGE_ISA {

// Rows of the largest tile.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 7;
#elif defined(__AVX2__) || defined(SAGE_NEON)
inline constexpr int kTileRows = 4;
#else
inline constexpr int kTileRows = 2;
#endif

// Groups of columns that so many rows compute side by side: their sums and columns fill the registers.
template <class E>
constexpr int tile_groups(int rows) {
#if defined(__AVX512F__)
  return sizeof(typename E::Columns) == sizeof(V16) || rows <= 2 ? 4 : 2;
#elif defined(__AVX2__) || defined(SAGE_NEON)
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
#else
  return rows < 0 ? 0 : 1;
#endif
}

// sums[r][b] += word k of row r times columns k of group b, for k = 0, 1, ... in this order. Word k of row r stands at
// words[k * kWordStep + r * kRowStep], columns k of group b at columns[b] + k * step. With every step of group b goes a
// request for the line at ahead[b] + k * ahead_step: blocks lie anywhere, so nobody else foresees them.
template <class E, int kRows, int kGroups, int kWordStep, int kRowStep>
SAGE_INLINE void multiply(V16 (&sums)[kRows][kGroups], const typename E::Word* words,
                          const typename E::T* const (&columns)[kGroups], std::ptrdiff_t step,
                          const typename E::T* const (&ahead)[kGroups], std::ptrdiff_t ahead_step, int count) {
  for (int k = 0; k < count; ++k) {
    typename E::Columns group[kGroups];
#pragma GCC unroll 4
    for (int b = 0; b < kGroups; ++b) {
      group[b] = E::columns(columns[b] + k * step);
      __builtin_prefetch(ahead[b] + k * ahead_step, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename E::Word word = words[k * kWordStep + r * kRowStep];
#pragma GCC unroll 4
      for (int b = 0; b < kGroups; ++b) sums[r][b] = E::multiply(word, group[b], sums[r][b]);
    }
  }
}

// Calls body.operator()<rows>() with the number of rows as a constant, 1 to kTileRows.
template <class Body>
SAGE_INLINE void with_rows(int rows, const Body& body) {
#define SAGE_CASE(n)                                                    \
  case n:                                                               \
    if constexpr (n <= kTileRows) return body.template operator()<n>(); \
    break
  switch (rows) {
    SAGE_CASE(1);
    SAGE_CASE(2);
    SAGE_CASE(3);
    SAGE_CASE(4);
    SAGE_CASE(5);
    SAGE_CASE(6);
    SAGE_CASE(7);
  }
#undef SAGE_CASE
}

// Near-equal tiles of at most kTileRows rows: eight rows are 4 + 4, not 7 + 1.
struct RowTiles {
  explicit RowTiles(int rows) : rows(rows), count((rows + kTileRows - 1) / kTileRows) {}
  int first(int tile) const { return rows * tile / count; }
  int size(int tile) const { return first(tile + 1) - first(tile); }

  int rows;
  int count;
};

}  // namespace sage::SAGE_ISA
