// Packed linear layers: pack_weight and y = x W^T + bias.
//
// Each output element is one chain of fused multiply-adds over k, in ascending order. Rows, threads, tiles and ISA only
// decide which elements are computed side by side, so they cannot change a bit of any of them.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "tile.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

// Summands computed before the next tile of rows: a group's slice of them (16 KiB) stays in the first-level cache.
constexpr int kChunkBytes = 16 * 1024;
// Rows of x whose slice of kChunk columns (256 KiB) stays in the second-level cache.
constexpr int kPanelBytes = 256 * 1024;
// Up to so many rows the weights are read once, in order, as they lie in memory.
constexpr int kStreamRows = 48;
constexpr int kFetchAhead = 1024;
#if defined(__AVX512F__)
constexpr int kWide = 2;  // twice the registers, each holding a whole group
#else
constexpr int kWide = 1;
#endif

// Place of column c within a packed group of sixteen; bf16 is stored in pairs, see load_bf16_pairs.
inline int packed_place(Element type, int c) {
  if (type != Element::kBF16) return c;
  return c < 8 ? 2 * c : 2 * (c - 8) + 1;
}

template <class T>
void pack_as(const PackArgs& a, Team& team) {
  const auto* source = static_cast<const T*>(a.source);
  auto* packed = static_cast<T*>(a.packed);
  const int blocks = (a.n + kLanes - 1) / kLanes;
  team.each(blocks, [&](int block) {
    T* out = packed + static_cast<std::size_t>(block) * a.k * kLanes;
    for (int c = 0; c < kLanes; ++c) {
      const int row = block * kLanes + c;
      const int place = packed_place(a.type, c);
      const T* in = source + static_cast<std::ptrdiff_t>(row) * a.source_stride;
      for (int k = 0; k < a.k; ++k) out[static_cast<std::size_t>(k) * kLanes + place] = row < a.n ? in[k] : T(0);
    }
  });
}

inline Element as_element(Format format) { return static_cast<Element>(format); }

template <class E>
void unpack_rows_as(const UnpackRowsArgs& a, Team& team) {
  const auto* packed = static_cast<const typename E::T*>(a.weight->data);
  team.ranges(a.num_rows, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const std::int64_t row = a.rows[i];
      const auto* block = packed + static_cast<std::size_t>(row / kLanes) * a.weight->k * kLanes;
      const int place = packed_place(as_element(a.weight->format), static_cast<int>(row % kLanes));
      float* y = a.y + static_cast<std::size_t>(i) * a.weight->k;
      for (int k = 0; k < a.weight->k; ++k) y[k] = E::get(block[static_cast<std::size_t>(k) * kLanes + place]);
    }
  });
}

// One call's view of a product: W is the packed element type.
template <class W>
struct Product {
  using T = typename W::T;

  static constexpr int kChunk = kChunkBytes / (kLanes * static_cast<int>(sizeof(T)));
  static constexpr int kPanelRows = kPanelBytes / (kChunk * static_cast<int>(sizeof(float))) / kTileRows * kTileRows;

  // Groups that two rows compute side by side; an element type that needs converting takes registers for it.
  static constexpr int kSpare = sizeof(T) == sizeof(float) ? 3 : 2;

  const LinearArgs& a;

  // Rows [row, row + kRows), groups [block, block + kGroups), summands [k, k + count).
  template <int kRows, int kGroups, int kAhead>
  SAGE_MEMBER void tile(int row, int block, int k, int count) const {
    const std::ptrdiff_t group = static_cast<std::ptrdiff_t>(a.weight->k) * kLanes;
    const T* w = static_cast<const T*>(a.weight->data) + block * group + static_cast<std::ptrdiff_t>(k) * kLanes;
    float* y = a.y + row * a.y_stride + static_cast<std::ptrdiff_t>(block) * kLanes;
    const int columns = a.weight->n - block * kLanes;  // a ragged last group stands alone: see rows()
    const int width = columns < kLanes ? columns : kLanes;
    V16 sums[kRows][kGroups];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int b = 0; b < kGroups; ++b) {
        sums[r][b] = k == 0 ? set1(0.0f) : load_part(y + r * a.y_stride + b * kLanes, width);
      }
    }
    multiply<W, kRows, kGroups, kAhead>(sums, a.x + row * a.x_stride + k, a.x_stride, w, {kLanes, group}, count);
    const bool add_bias = a.bias != nullptr && k + count == a.weight->k;
#pragma GCC unroll 8
    for (int b = 0; b < kGroups; ++b) {
      const V16 bias = add_bias ? load_part(a.bias + (block + b) * kLanes, width) : set1(0.0f);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        store_part(y + r * a.y_stride + b * kLanes, add_bias ? sums[r][b] + bias : sums[r][b], width);
      }
    }
  }

  // All groups [first, last) for kRows rows, kGroups side by side so that enough sums are in flight.
  template <int kRows, int kGroups>
  void rows(int row, int first, int last, int k, int count) const {
    const int whole = a.weight->n / kLanes;  // groups without a ragged edge
    const int end = last < whole ? last : whole;
    int block = first;
    for (; block + kGroups <= end; block += kGroups) tile<kRows, kGroups, kFetchAhead>(row, block, k, count);
    for (; block < last; ++block) tile<kRows, 1, kFetchAhead>(row, block, k, count);
  }

  // Groups [block, block + kGroups) for many rows: their slice of the weights stays in the first-level cache.
  template <int kGroups, int kAhead>
  void column(int row, int num_rows, int block, int k, int count) const {
    each_tile(num_rows, [&](int first, int tile_rows) {
      with_rows(tile_rows, [&]<int kRows>() { tile<kRows, kGroups, kAhead>(row + first, block, k, count); });
    });
  }

  void few_rows(int first, int last) const {
    if (a.m == 1) return rows<1, 4 * kWide>(0, first, last, 0, a.weight->k);
    if (a.m == 2) return rows<2, kSpare * kWide>(0, first, last, 0, a.weight->k);
    if (a.m == 3) return rows<3, (kSpare - 1) * kWide>(0, first, last, 0, a.weight->k);
    if (a.m == 4) return rows<4, kWide>(0, first, last, 0, a.weight->k);
    if (a.m == 5) return rows<5, kWide>(0, first, last, 0, a.weight->k);
    rows<6, kWide>(0, first, last, 0, a.weight->k);
  }

  // Weights stream past once, group by group.
  void some_rows(int first, int last) const {
    each_column(first, last, [&]<int kGroups>(int block) {
      each_chunk([&](int k, int count) { column<kGroups, kFetchAhead>(0, a.m, block, k, count); });
    });
  }

  // A panel of x stays in the second-level cache while a slice of all weights passes.
  void many_rows(int first, int last) const {
    for (int row = 0; row < a.m; row += kPanelRows) {
      const int num_rows = a.m - row < kPanelRows ? a.m - row : kPanelRows;
      each_chunk([&](int k, int count) {
        each_column(first, last, [&]<int kGroups>(int block) { column<kGroups, 0>(row, num_rows, block, k, count); });
      });
    }
  }

  // Calls body.operator()<groups>(block) for all groups [first, last), kWide at a time; a ragged one stands alone.
  template <class Body>
  void each_column(int first, int last, const Body& body) const {
    const int whole = a.weight->n / kLanes;
    const int end = last < whole ? last : whole;
    int block = first;
    for (; block + kWide <= end; block += kWide) body.template operator()<kWide>(block);
    for (; block < last; ++block) body.template operator()<1>(block);
  }

  template <class Body>
  SAGE_MEMBER void each_chunk(const Body& body) const {
    for (int k = 0; k < a.weight->k; k += kChunk) body(k, a.weight->k - k < kChunk ? a.weight->k - k : kChunk);
  }

  SAGE_MEMBER V16 load_part(const float* p, int width) const { return width == kLanes ? load(p) : load_n(p, width); }
  SAGE_MEMBER void store_part(float* p, V16 value, int width) const {
    if (width == kLanes) return store(p, value);
    store_n(p, value, width);
  }
};

// Groups handed to a thread at once. Several pieces a thread where there is enough to do: when another program takes a
// core, the other threads do its share. A piece holds whole sets of the groups that a single row computes side by side.
int piece_size(int blocks, int threads) {
  const int pieces = blocks >= threads * 32 ? threads * 8 : threads;
  const int set = 4 * kWide;
  return ((blocks + pieces - 1) / pieces + set - 1) / set * set;
}

template <class W>
void linear_as(const LinearArgs& a, Team& team) {
  const Product<W> product{a};
  const int blocks = (a.weight->n + kLanes - 1) / kLanes;
  const int size = piece_size(blocks, team.size);
  team.each((blocks + size - 1) / size, [&](int piece) {
    const int first = piece * size;
    const int last = first + size < blocks ? first + size : blocks;
    if (a.m <= kTileRows) return product.few_rows(first, last);
    if (a.m <= kStreamRows) return product.some_rows(first, last);
    product.many_rows(first, last);
  });
}

}  // namespace

void pack(const PackArgs& a, Team& team) {
  if (a.type == Element::kF32) return pack_as<float>(a, team);
  pack_as<std::uint16_t>(a, team);
}

void unpack_rows_int(const UnpackRowsArgs& a, Team& team);
void linear_int(const LinearArgs& a, Team& team);

void unpack_rows(const UnpackRowsArgs& a, Team& team) {
  if (a.weight->format == Format::kInt) return unpack_rows_int(a, team);
  if (a.weight->format == Format::kF32) return unpack_rows_as<F32>(a, team);
  if (a.weight->format == Format::kBF16) return unpack_rows_as<BF16>(a, team);
  unpack_rows_as<F16>(a, team);
}

void linear(const LinearArgs& a, Team& team) {
  if (a.m == 0) return;
  if (a.weight->format == Format::kInt) return linear_int(a, team);
  if (a.weight->format == Format::kF32) return linear_as<F32>(a, team);
  if (a.weight->format == Format::kBF16) return linear_as<BF16Pairs>(a, team);
  linear_as<F16>(a, team);
}

}  // namespace sage::SAGE_ISA
