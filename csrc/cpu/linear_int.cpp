// Products with weights in whole numbers of 4, 5, 6 or 8 bits.
//
// A row of x is turned into bytes with one scale (absmax / 127, LLM.int8's vector-wise scheme: Dettmers et al. 2022,
// arXiv:2208.07339); within a group of neighbours along k, products are summed exactly. Then, group by group in
// ascending order: y = fma(scale, sum, y), and with minima y = fma(-min, sum of x, y); at the end y * scale of the row.
// Weights are stored unsigned because the processors' byte products want one unsigned side: the offset is taken off by
// starting a group's sum at -offset * (sum of x).
#include <cstdint>
#include <cstring>

#include "codes.h"
#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int kFetchAhead = 2048;

// Rows of x in bytes, with what each group adds besides its products.
struct Bytes {
  Panel codes;    // int8, chunks of sixteen
  Panel starts;   // int32, a chunk a group: where its sum starts, -offset * sum of its codes
  Panel sums;     // float, alike: the sum of its codes; only with minima
  float* scales;  // [rows]

  Bytes(const Tiles& tiles, const Shape& shape, bool minima, Team& team)
      : codes{nullptr, shape.k / kLanes, kLanes}, starts{nullptr, shape.groups, 4}, sums{nullptr, shape.groups, 4} {
    const std::size_t codes_size = Panel::size(tiles, codes.chunks, codes.bytes);
    const std::size_t starts_size = Panel::size(tiles, starts.chunks, starts.bytes);
    const std::size_t sums_size = minima ? starts_size : 0;
    codes.data = panel_memory(tiles, team,
                              codes_size + starts_size + sums_size + sizeof(float) * static_cast<std::size_t>(tiles.m));
    starts.data = codes.data + codes_size;
    sums.data = starts.data + starts_size;
    scales = reinterpret_cast<float*>(sums.data + sums_size);
  }
};

// Puts row r of x, [k], into the panels; zeros where it is one of the rows that only fill a tile.
void quantize_row(const Tiles& tiles, const Shape& shape, const Bytes& bytes, bool minima, const float* x, int k,
                  int r) {
  const std::uint32_t bits = r < tiles.m ? top_magnitude(x, k) : 0;
  const bool finite = bits < 0x7f800000u;
  const float top = finite ? bits_to_float(bits) : 0.0f;
  const bool zero = !(top > 1e-30f);  // smaller scales would not fit a float
  if (r < tiles.m) bytes.scales[r] = !finite ? bits_to_float(0x7fc00000u) : zero ? 0.0f : top / 127.0f;
  const V16 inverse = set1(zero ? 0.0f : 127.0f / top);
  std::ptrdiff_t stride, group_stride;
  char* out = bytes.codes.row(tiles, r, stride);
  char* starts = bytes.starts.row(tiles, r, group_stride);
  char* sums = bytes.sums.row(tiles, r, group_stride);
  for (int g = 0; g < shape.groups; ++g) {
    I16 sum = set1_int(0);
    for (int i = g * shape.group; i < (g + 1) * shape.group; i += kLanes, out += stride) {
      const int n = zero || i >= k ? 0 : k - i < kLanes ? k - i : kLanes;
      const I16 codes = to_int(load_n(x + i, n) * inverse);
      store_as_bytes(reinterpret_cast<std::int8_t*>(out), codes);
      sum = sum + codes;
    }
    const std::int32_t total = reduce_add_int(sum);
    const std::int32_t start = -shape.offset * total;
    const float sum_of_codes = static_cast<float>(total);  // exact: below 2^24
    std::memcpy(starts + g * group_stride, &start, sizeof start);
    if (minima) std::memcpy(sums + g * group_stride, &sum_of_codes, sizeof sum_of_codes);
  }
}

template <int kBits>
struct Product {
  using C = Codes<kBits>;

  const LinearArgs& a;
  const Tiles& tiles;
  const Shape& shape;
  const Bytes& x;

  static constexpr int kLeastPiece = 2;
  static constexpr int blocks_at_once(int) { return 1; }  // one stream of weights: what rows there are fills the time

  template <int kRows, int kBlocks>
  SAGE_MEMBER void tile(int tile, int block) const {
    const Weight& weight = *a.weight;
    const auto* data = static_cast<const std::uint8_t*>(weight.data) + block * shape.column_bytes;
    const std::size_t scale_step = static_cast<std::size_t>(shape.groups) * kLanes;
    const std::uint16_t* scales = weight.scales + block * scale_step;
    const std::uint16_t* mins = weight.mins == nullptr ? nullptr : weight.mins + block * scale_step;
    const auto* codes = reinterpret_cast<const std::int8_t*>(x.codes.tile(tiles, tile));
    const auto* starts = reinterpret_cast<const std::int32_t*>(x.starts.tile(tiles, tile));
    const auto* sums = reinterpret_cast<const float*>(x.sums.tile(tiles, tile));
    constexpr int kUnit = C::kQuads < 4 ? 4 : C::kQuads;  // quads computed in one go: whole chunks, whole periods
    const int units = shape.group / (4 * kUnit);
    V16 total[kRows][kBlocks];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) total[r][b] = set1(0.0f);
    }
    for (int g = 0; g < shape.groups; ++g) {
      I16 dots[kRows][kBlocks];
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const I16 start = set1_int(starts[r]);
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) dots[r][b] = start;
      }
      starts += kRows;
      for (int u = 0; u < units; ++u) {
#pragma GCC unroll 4
        for (int p = 0; p < kUnit; p += C::kQuads) {
          U64 quads[kBlocks][C::kQuads];
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; ++b) {
            const std::uint8_t* at = data + b * shape.column_bytes;
#pragma GCC unroll 8
            for (int i = 0; i < C::kBytes; i += kQuadBytes) __builtin_prefetch(at + i + kFetchAhead);
            C::load(at, quads[b]);
          }
          data += C::kBytes;
#pragma GCC unroll 8
          for (int q = 0; q < C::kQuads; ++q) {
            const std::int8_t* fours = codes + (p + q) / 4 * kRows * kLanes + (p + q) % 4 * 4;
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
              for (int b = 0; b < kBlocks; ++b) {
                dots[r][b] = dot4<kBits>(dots[r][b], quads[b][q], fours + r * kLanes);
              }
            }
          }
        }
        codes += 4 * kUnit * kRows;
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const V16 scale = load_f16(scales + b * scale_step + g * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) total[r][b] = fma(scale, to_float(dots[r][b]), total[r][b]);
        if (mins == nullptr) continue;
        const V16 minimum = set1(0.0f) - load_f16(mins + b * scale_step + g * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) total[r][b] = fma(minimum, set1(sums[r]), total[r][b]);
      }
      sums += kRows;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const V16 scale = set1(r < tiles.rows(tile) ? x.scales[tile * tiles.size + r] : 0.0f);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) total[r][b] = total[r][b] * scale;
    }
    store_tile<kRows, kBlocks>(a, tiles, tile, block, total);
  }
};

}  // namespace

void linear_int(const LinearArgs& a, Team& team) {
  const Shape shape(*a.weight);
  const bool minima = a.weight->mins != nullptr;
  const Tiles tiles(a.m);
  const Bytes x(tiles, shape, minima, team);
  each_row(tiles, team, [&](int r) {
    quantize_row(tiles, shape, x, minima, r < a.m ? a.x + r * a.x_stride : nullptr, a.weight->k, r);
  });
  with_bits(a.weight->bits, [&]<int kBits>() {
    const Product<kBits> product{a, tiles, shape, x};
    each_tile_of(product, tiles, a.weight->n, shape.column_bytes, team);
  });
}

}  // namespace sage::SAGE_ISA
