// Products with weights in floats, and `linear` of all formats.
//
// Each output element is one chain of fused multiply-adds over k, in ascending order; with bf16, in pairs whose second
// entry comes first (the order of vdpbf16ps), and x is rounded to bf16. Rows, threads, tiles and ISA only decide which
// elements are computed side by side, so they cannot change a bit of any of them.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "pairs.h"
#include "parallel.h"
#include "product.h"
#include "vec.h"

namespace sage::SAGE_ISA {

void linear_int(const LinearArgs& a, Team& team);

namespace {

constexpr int kFetchAhead = 2048;

// How a format computes: a line holds sixteen columns of one step.
struct F32Steps {
  using Line = V16;
  static constexpr int kLineBytes = 64;
  static constexpr int kSteps = kLanes;  // for sixteen entries of k
  SAGE_INLINE Line load_line(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  SAGE_INLINE V16 load_step(const char* x) {
    float value;
    std::memcpy(&value, x, sizeof value);
    return set1(value);
  }
  SAGE_INLINE V16 add(V16 x, Line w, V16 sums) { return fma(x, w, sums); }
  SAGE_INLINE void put(char* out, V16 x) { store(reinterpret_cast<float*>(out), x); }
};
struct F16Steps : F32Steps {
  static constexpr int kLineBytes = 32;
  SAGE_INLINE Line load_line(const char* p) { return load_f16(reinterpret_cast<const std::uint16_t*>(p)); }
};
struct BF16Steps {
  using Line = Pairs;
  static constexpr int kLineBytes = 64;
  static constexpr int kSteps = kLanes / 2;
  SAGE_INLINE Line load_line(const char* p) { return load_pairs(p); }
  SAGE_INLINE Pairs load_step(const char* x) {
    std::uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return set1_pair(pair);
  }
  SAGE_INLINE V16 add(Pairs x, Line w, V16 sums) { return dot(x, w, sums); }
  SAGE_INLINE void put(char* out, V16 x) { store_bf16(out, x); }
};

template <class S>
struct Product {
  const LinearArgs& a;
  const Tiles& tiles;
  const Panel& panel;

  static constexpr int kLeastPiece = 4;
  static constexpr int kStepBytes = 4;
  static constexpr int kChunkBytes = S::kSteps * kStepBytes;

  static constexpr int blocks_at_once(int rows) {
    if (kPanelRows > 4) return rows <= 4 ? 4 : 2;
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
  }

  std::size_t block_bytes() const { return static_cast<std::size_t>(panel.chunks) * S::kSteps * S::kLineBytes; }

  template <int kRows, int kBlocks>
  SAGE_MEMBER void tile(int tile, int block) const {
    const char* x = panel.tile(tiles, tile);
    const char* w = static_cast<const char*>(a.weight->data) + block * block_bytes();
    V16 sums[kRows][kBlocks];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) sums[r][b] = set1(0.0f);
    }
    for (int chunk = 0; chunk < panel.chunks; ++chunk) {
#pragma GCC unroll 8
      for (int s = 0; s < S::kSteps; ++s) {
        typename S::Line lines[kBlocks];
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) {
          const char* p = w + b * block_bytes() + s * S::kLineBytes;
          __builtin_prefetch(p + kFetchAhead);
          lines[b] = S::load_line(p);
        }
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const auto value = S::load_step(x + r * kChunkBytes + s * kStepBytes);
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; ++b) sums[r][b] = S::add(value, lines[b], sums[r][b]);
        }
      }
      x += kRows * kChunkBytes;
      w += S::kSteps * S::kLineBytes;
    }
    store_tile<kRows, kBlocks>(a, tiles, tile, block, sums);
  }
};

template <class S>
void linear_as(const LinearArgs& a, Team& team) {
  const Tiles tiles(a.m);
  const int k = a.weight->k;
  const int chunks = (k + kLanes - 1) / kLanes;
  constexpr int kBytes = Product<S>::kChunkBytes;
  const Panel panel{panel_memory(tiles, team, Panel::size(tiles, chunks, kBytes)), chunks, kBytes};
  each_row(tiles, team, [&](int r) {
    std::ptrdiff_t stride;
    char* out = panel.row(tiles, r, stride);
    const float* x = a.x + r * a.x_stride;
    for (int i = 0; i < k; i += kLanes, out += stride) {
      S::put(out, r < a.m ? load_n(x + i, k - i < kLanes ? k - i : kLanes) : set1(0.0f));
    }
  });
  const Product<S> product{a, tiles, panel};
  each_tile_of(product, tiles, a.weight->n, product.block_bytes(), team);
}

}  // namespace

void linear(const LinearArgs& a, Team& team) {
  if (a.m == 0) return;
  switch (a.weight->format) {
    case Format::kF32:
      return linear_as<F32Steps>(a, team);
    case Format::kBF16:
      return linear_as<BF16Steps>(a, team);
    case Format::kF16:
      return linear_as<F16Steps>(a, team);
    case Format::kInt:
      return linear_int(a, team);
  }
}

}  // namespace sage::SAGE_ISA
