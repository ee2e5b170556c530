// What all products y = x W^T share: rows of x laid out for tiles, and the order in which tiles are computed.
//
// Weights lie in blocks of sixteen columns. A step of a product is four bytes of a row of x (one float, two bf16, four
// int8) times one line of a block. Rows are cut into tiles, and a tile's rows lie chunk by chunk, [k / 16][rows][16],
// which a kernel reads as one stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace sage::SAGE_ISA {

// Rows of the largest tile: with two blocks of columns their sums fill the registers.
#if defined(__AVX512F__)
inline constexpr int kPanelRows = 12;
#else
inline constexpr int kPanelRows = 4;
#endif

// Tiles are compiled for 1, 2, 3, 4, 6, 8, 10 and 12 rows; what is missing is filled with rows of zeros.
SAGE_INLINE int filled(int rows) { return rows <= 4 ? rows : (rows + 1) / 2 * 2; }

// Up to so many rows each thread converts x for itself; for more they share the work, at the price of a barrier.
inline constexpr int kPrivateRows = 2;

// m rows in tiles of `size`; the last tile may hold fewer.
struct Tiles {
  explicit Tiles(int m) : m(m) {
    const int fewest = (m + kPanelRows - 1) / kPanelRows;
    size = filled((m + fewest - 1) / fewest);
    count = (m + size - 1) / size;
    filled_rows = (count - 1) * size + filled(rows(count - 1));
  }

  int rows(int tile) const { return m - tile * size < size ? m - tile * size : size; }

  int m;
  int size;
  int count;
  int filled_rows;  // of all tiles
};

// Entries of all rows, `bytes` for each `chunks` times: [tile][chunk][row of the tile][bytes].
struct Panel {
  char* data;
  int chunks;
  int bytes;

  static std::size_t size(const Tiles& tiles, int chunks, int bytes) {
    return (static_cast<std::size_t>(tiles.filled_rows) * chunks * bytes + 63) / 64 * 64;
  }

  const char* tile(const Tiles& tiles, int t) const {
    return data + static_cast<std::size_t>(t) * tiles.size * chunks * bytes;
  }

  // Where row r has chunk 0; chunk c is `stride` bytes times c further.
  char* row(const Tiles& tiles, int r, std::ptrdiff_t& stride) const {
    const int t = r / tiles.size;
    stride = static_cast<std::ptrdiff_t>(filled(tiles.rows(t))) * bytes;
    return const_cast<char*>(tile(tiles, t)) + r % tiles.size * bytes;
  }
};

SAGE_INLINE bool is_private(const Tiles& tiles, const Team& team) { return tiles.m <= kPrivateRows || team.size == 1; }

// Memory for panels: a thread's own, or one that the team shares.
SAGE_INLINE char* panel_memory(const Tiles& tiles, Team& team, std::size_t bytes) {
  return static_cast<char*>(is_private(tiles, team) ? scratch(bytes, 0) : team.shared(bytes));
}

// Calls body(r) for all rows of the panels, the filling ones too, before anybody reads them.
template <class Body>
SAGE_INLINE void each_row(const Tiles& tiles, Team& team, const Body& body) {
  if (is_private(tiles, team)) {
    for (int r = 0; r < tiles.filled_rows; ++r) body(r);
    return;
  }
  team.ranges(tiles.filled_rows, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) body(r);
  });
}

// Calls body.operator()<rows>() with the number of rows of a tile as a constant.
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

// Bytes of weights that a piece may hold, so that they stay in the second-level cache while rows pass.
inline constexpr std::size_t kPieceBytes = 384 * 1024;
// Tiles of rows that pass over a piece in one go: another thread may take the next ones.
inline constexpr int kBandTiles = 24;

// Computes all tiles: product.tile<kRows, kBlocks>(tile, block) for blocks of columns [block, block + kBlocks). A piece
// (some blocks times some tiles of rows) is handed to one thread; there are many, so that a thread that loses its core
// delays nobody. `block_bytes` is the size of a block's weights.
template <class Product>
void each_tile_of(const Product& product, const Tiles& tiles, int n, std::size_t block_bytes, Team& team) {
  const int blocks = (n + kLanes - 1) / kLanes;
  constexpr int kLeast = Product::kLeastPiece;
  int size = blocks / (team.size * 16);
  const int most = tiles.count == 1 ? 64 : static_cast<int>(kPieceBytes / block_bytes);
  if (size > most) size = most;
  size = size < kLeast ? kLeast : size / kLeast * kLeast;
  const int pieces = (blocks + size - 1) / size;
  const int bands = (tiles.count + kBandTiles - 1) / kBandTiles;
  team.each(pieces * bands, [&](int item) {
    const int first = item / bands * size;
    const int last = first + size < blocks ? first + size : blocks;
    const int band = item % bands;
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
