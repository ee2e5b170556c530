// Products with weights in floats, and `linear` of all formats.
//
// Each output element is one chain of fused multiply-adds over k, in ascending
// order; with bf16, in pairs whose second entry comes first (the order of
// vdpbf16ps), and x is rounded to bf16. Rows, threads, tiles and ISA only
// decide which elements are computed side by side, so they cannot change a bit
// of any of them.
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
  static constexpr int kEntries = 1;  // of k a step
  SAGE_INLINE Line load_line(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  SAGE_INLINE V16 word(std::uint32_t w) { return set1(bits_to_float(w)); }
  SAGE_INLINE V16 add(V16 x, Line w, V16 sums) { return fma(x, w, sums); }
  // Sixteen entries of a row of x, or those of the last `steps` steps.
  SAGE_INLINE void put(RowWords out, int step, int steps, V16 x) {
    float words[kLanes];
    store(words, x);
    out.put(step, words, steps < kLanes ? steps : kLanes);
  }
};
struct F16Steps : F32Steps {
  static constexpr int kLineBytes = 32;
  SAGE_INLINE Line load_line(const char* p) { return load_f16(reinterpret_cast<const std::uint16_t*>(p)); }
};
struct BF16Steps {
  using Line = Pairs;
  static constexpr int kLineBytes = 64;
  static constexpr int kEntries = 2;
  SAGE_INLINE Line load_line(const char* p) { return load_pairs(p); }
  SAGE_INLINE Pairs word(std::uint32_t w) { return set1_pair(w); }
  SAGE_INLINE V16 add(Pairs x, Line w, V16 sums) { return dot(x, w, sums); }
  SAGE_INLINE void put(RowWords out, int step, int steps, V16 x) {
    std::uint32_t words[kLanes / 2];
    store_bf16(words, x);
    out.put(step, words, steps < kLanes / 2 ? steps : kLanes / 2);
  }
};

template <class S>
struct Product {
  const LinearArgs& a;
  const Tiles& tiles;
  const std::uint32_t* words;
  int steps;

  static constexpr int blocks_at_once(int rows) {
#if defined(__AVX512F__)
    return rows <= 4 ? 4 : 2;
#else
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
#endif
  }

  std::size_t block_bytes() const { return static_cast<std::size_t>(steps) * S::kLineBytes; }

  template <int kRows, int kBlocks>
  SAGE_MEMBER void tile(int tile, int block) const {
    const std::uint32_t* x = words + static_cast<std::size_t>(tile) * tiles.size * steps;
    const char* w = static_cast<const char*>(a.weight->data) + block * block_bytes();
    V16 sums[kRows][kBlocks];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) sums[r][b] = set1(0.0f);
    }
    for (int s = 0; s < steps; ++s) {
      typename S::Line lines[kBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const char* p = w + b * block_bytes();
        __builtin_prefetch(p + kFetchAhead);
        lines[b] = S::load_line(p);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const auto value = S::word(x[r]);
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) sums[r][b] = S::add(value, lines[b], sums[r][b]);
      }
      x += kRows;
      w += S::kLineBytes;
    }
    store_tile<kRows, kBlocks>(a, tiles, tile, block, sums);
  }
};

template <class S>
void linear_as(const LinearArgs& a, Team& team) {
  const Tiles tiles(a.m);
  const int steps = (a.weight->k + S::kEntries - 1) / S::kEntries;
  auto* words = static_cast<std::uint32_t*>(panel_memory(tiles, team, sizeof(std::uint32_t) * tiles.words(steps)));
  each_row(tiles, team, [&](int r) {
    const RowWords out = row_words(tiles, words, steps, r);
    const float* x = a.x + r * a.x_stride;
    for (int step = 0; step < steps; step += kLanes / S::kEntries) {
      const int left = a.weight->k - step * S::kEntries;
      const V16 values = r < a.m ? load_n(x + step * S::kEntries, left < kLanes ? left : kLanes) : set1(0.0f);
      S::put(out, step, steps - step, values);
    }
  });
  const Product<S> product{a, tiles, words, steps};
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
