// What all products y = x W^T share: rows of x laid out for tiles, and the
// order in which tiles are computed.
//
// Weights lie in blocks of sixteen columns. A step of a product is four bytes
// of a row of x (one float, two bf16, four int8) times one line of a block, so
// that one layout serves every format: rows are cut into tiles, and a tile's
// words lie step by step, [steps][rows], which a kernel reads as one stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace sage::SAGE_ISA {

// Rows of the largest tile: with two blocks of columns their sums fill the
// registers.
#if defined(__AVX512F__)
inline constexpr int kPanelRows = 12;
#else
inline constexpr int kPanelRows = 4;
#endif

// Tiles are compiled for 1, 2, 3, 4, 6, 8, 10 and 12 rows; what is missing is
// filled with rows of zeros.
SAGE_INLINE int filled(int rows) { return rows <= 4 ? rows : (rows + 1) / 2 * 2; }

// Up to so many rows each thread converts x for itself; for more they share the
// work, at the price of a barrier.
inline constexpr int kPrivateRows = 2;

// m rows in tiles of `size`; the last tile may hold fewer.
struct Tiles {
  explicit Tiles(int m) : m(m) {
    const int fewest = (m + kPanelRows - 1) / kPanelRows;
    size = filled((m + fewest - 1) / fewest);
    count = (m + size - 1) / size;
  }

  int rows(int tile) const { return m - tile * size < size ? m - tile * size : size; }
  std::size_t words(int steps) const { return static_cast<std::size_t>(count) * size * steps; }

  int m;
  int size;
  int count;
};

// Where a row's words go: word s at first[s * stride].
struct RowWords {
  std::uint32_t* first;
  int stride;

  SAGE_MEMBER void put(int step, const void* words, int n) const {
    if (stride == 1) {
      std::memcpy(first + step, words, sizeof(std::uint32_t) * static_cast<std::size_t>(n));
      return;
    }
    for (int i = 0; i < n; ++i) {
      std::uint32_t word;
      std::memcpy(&word, static_cast<const char*>(words) + sizeof word * i, sizeof word);
      first[static_cast<std::ptrdiff_t>(step + i) * stride] = word;
    }
  }
};

// The words of row r of a panel.
SAGE_INLINE RowWords row_words(const Tiles& tiles, std::uint32_t* words, int steps, int r) {
  const int tile = r / tiles.size;
  return {words + static_cast<std::size_t>(tile) * tiles.size * steps + r % tiles.size, filled(tiles.rows(tile))};
}

// Calls body(r) for all rows of the panel, the filling ones too, before anybody
// uses them.
template <class Body>
SAGE_INLINE void each_row(const Tiles& tiles, Team& team, const Body& body) {
  const int rows = (tiles.count - 1) * tiles.size + filled(tiles.rows(tiles.count - 1));
  if (tiles.m <= kPrivateRows || team.size == 1) {
    for (int r = 0; r < rows; ++r) body(r);
    return;
  }
  team.ranges(rows, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) body(r);
  });
}

SAGE_INLINE void* panel_memory(const Tiles& tiles, Team& team, std::size_t bytes) {
  return tiles.m <= kPrivateRows || team.size == 1 ? scratch(bytes, 0) : team.shared(bytes);
}

// Calls body.operator()<rows>() with the number of rows of a tile as a
// constant.
template <class Body>
SAGE_INLINE void with_tile_rows(int rows, const Body& body) {
#define SAGE_CASE(n)                                                     \
  case n:                                                                \
    if constexpr (n <= kPanelRows) return body.template operator()<n>(); \
    break
  switch (rows) {
    SAGE_CASE(1);
    SAGE_CASE(2);
    SAGE_CASE(3);
    SAGE_CASE(4);
    SAGE_CASE(6);
    SAGE_CASE(8);
    SAGE_CASE(10);
    SAGE_CASE(12);
  }
#undef SAGE_CASE
}

// Bytes of weights that a piece may hold, so that they stay in the second-level
// cache while all rows pass.
inline constexpr std::size_t kPieceBytes = 384 * 1024;
// Rows whose words pass over a piece before the next piece of columns, and
// before another thread may take the rest.
inline constexpr int kBandTiles = 24;

// Computes all tiles: product.tile<kRows, kBlocks>(tile, block) for blocks of
// columns [block, block + kBlocks). A piece (some blocks times some tiles of
// rows) is handed to one thread; there are many, so that a thread that loses
// its core delays nobody. `block_bytes` is the size of a block's weights.
template <class Product>
void each_tile_of(const Product& product, const Tiles& tiles, int n, std::size_t block_bytes, Team& team) {
  const int blocks = (n + kLanes - 1) / kLanes;
  int size = blocks / (team.size * 16) / 4 * 4;
  const int most = tiles.count == 1 ? 64 : static_cast<int>(kPieceBytes / block_bytes) / 4 * 4;
  if (size > most) size = most;
  if (size < 4) size = 4;
  const int pieces = (blocks + size - 1) / size;
  const int bands = (tiles.count + kBandTiles - 1) / kBandTiles;
  team.each(pieces * bands, [&](int item) {
    const int first = item % pieces * size;
    const int last = first + size < blocks ? first + size : blocks;
    const int band = item / pieces;
    for (int t = tiles.count * band / bands; t < tiles.count * (band + 1) / bands; ++t) {
      with_tile_rows(filled(tiles.rows(t)), [&]<int kRows>() {
        constexpr int kBlocks = Product::blocks_at_once(kRows);
        int block = first;
        for (; block + kBlocks <= last; block += kBlocks) product.template tile<kRows, kBlocks>(t, block);
        for (; block < last; ++block) product.template tile<kRows, 1>(t, block);
      });
    }
  });
}

// Sums of a tile into y, with the bias.
template <int kRows, int kBlocks>
SAGE_INLINE void store_tile(const LinearArgs& a, const Tiles& tiles, int tile, int block,
                            const V16 (&sums)[kRows][kBlocks]) {
  const int rows = tiles.rows(tile);
  float* y = a.y + tile * tiles.size * a.y_stride;
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    const int column = (block + b) * kLanes;
    const int width = a.weight->n - column < kLanes ? a.weight->n - column : kLanes;
    const V16 bias = a.bias == nullptr ? set1(0.0f) : load_n(a.bias + column, width);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) store_n(y + r * a.y_stride + column, a.bias == nullptr ? sums[r][b] : sums[r][b] + bias, width);
    }
  }
}

}  // namespace sage::SAGE_ISA
