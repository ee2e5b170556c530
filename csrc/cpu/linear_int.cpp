// Products with weights in whole numbers of 4, 5, 6 or 8 bits.
//
// A row of x is turned into bytes with one scale (absmax / 127, LLM.int8's
// vector-wise scheme: Dettmers et al. 2022, arXiv:2208.07339); within a group
// of neighbours along k, products are summed exactly. Then, group by group in
// ascending order: y = fma(scale, sum, y), and with minima y = fma(-min, sum of
// x, y); at the end y * scale of the row. Weights are stored unsigned because
// the processors' byte products want one unsigned side: the offset is taken off
// by starting a group's sum at -offset * (sum of x).
//
// Packed: columns in groups of sixteen; within, quads of four neighbours along
// k, column by column: 64 codes. Quads come in periods of 1 (8 bits), 2 (4
// bits: low and high halves of a byte), 4 (6 bits: two such pairs, then two
// bits of four quads a byte) or 8 (5 bits: four pairs, then one bit of eight
// quads a byte).
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ivec.h"
#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int kQuadBytes = 64;
constexpr int kFetchAhead = 2048;
template <int kBits>
struct Codes {
  static constexpr int kQuads = kBits == 8 ? 1 : kBits == 4 ? 2 : kBits == 6 ? 4 : 8;
  static constexpr int kPairs = kBits == 8 ? 0 : kQuads / 2;
  static constexpr int kBytes = kQuadBytes * kQuads * kBits / 8;

  // The quads of the period at p.
  SAGE_INLINE void load(const std::uint8_t* p, U64 (&quads)[kQuads]) {
    if constexpr (kBits == 8) {
      quads[0] = load_bytes(p);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        const U64 pair = load_bytes(p + i * kQuadBytes);
        quads[2 * i] = masked(pair, 0x0f);
        quads[2 * i + 1] = masked(shifted_right<4>(pair), 0x0f);
      }
      if constexpr (kBits == 6) {
        const U64 high = load_bytes(p + kPairs * kQuadBytes);
        quads[0] = quads[0] | masked(shifted_left<4>(high), 0x30);
        quads[1] = quads[1] | masked(shifted_left<2>(high), 0x30);
        quads[2] = quads[2] | masked(high, 0x30);
        quads[3] = quads[3] | masked(shifted_right<2>(high), 0x30);
      }
      if constexpr (kBits == 5) {
        const U64 high = load_bytes(p + kPairs * kQuadBytes);
        quads[0] = quads[0] | masked(shifted_left<4>(high), 0x10);
        quads[1] = quads[1] | masked(shifted_left<3>(high), 0x10);
        quads[2] = quads[2] | masked(shifted_left<2>(high), 0x10);
        quads[3] = quads[3] | masked(shifted_left<1>(high), 0x10);
        quads[4] = quads[4] | masked(high, 0x10);
        quads[5] = quads[5] | masked(shifted_right<1>(high), 0x10);
        quads[6] = quads[6] | masked(shifted_right<2>(high), 0x10);
        quads[7] = quads[7] | masked(shifted_right<3>(high), 0x10);
      }
    }
  }

  // Where code (quad q, byte b of it) of a period goes.
  static void put(std::uint8_t* p, int q, int b, int code) {
    if constexpr (kBits == 8) {
      p[b] = static_cast<std::uint8_t>(code);
    } else {
      p[q / 2 * kQuadBytes + b] |= static_cast<std::uint8_t>((code & 15) << (4 * (q % 2)));
      if constexpr (kBits == 6) p[kPairs * kQuadBytes + b] |= static_cast<std::uint8_t>((code >> 4) << (2 * q));
      if constexpr (kBits == 5) p[kPairs * kQuadBytes + b] |= static_cast<std::uint8_t>((code >> 4) << q);
    }
  }

  static int get(const std::uint8_t* p, int q, int b) {
    if constexpr (kBits == 8) return p[b];
    const int low = (p[q / 2 * kQuadBytes + b] >> (4 * (q % 2))) & 15;
    if constexpr (kBits == 6) return low | ((p[kPairs * kQuadBytes + b] >> (2 * q)) & 3) << 4;
    if constexpr (kBits == 5) return low | ((p[kPairs * kQuadBytes + b] >> q) & 1) << 4;
    return low;
  }
};

// Sizes that follow from a weight's shape.
struct Shape {
  explicit Shape(const Weight& w)
      : groups(w.group >= w.k ? 1 : (w.k + w.group - 1) / w.group),
        group(groups == 1 ? (w.k + 31) / 32 * 32 : w.group),
        k(groups * group),
        column_bytes(static_cast<std::size_t>(k) * kLanes * w.bits / 8),
        offset(w.mins == nullptr ? 1 << (w.bits - 1) : 0) {}

  int groups;
  int group;                 // summands of a group
  int k;                     // summands with padding: x is zero there
  std::size_t column_bytes;  // of sixteen columns
  int offset;
};

// Rows of x in bytes, four a word, with what each group adds besides its
// products.
struct Bytes {
  std::uint32_t* words;   // see product.h; steps are quads
  std::uint32_t* starts;  // laid out alike, steps are groups: where a group's
                          // sum starts, -offset * sum of its codes
  std::uint32_t* sums;    // alike: the sum of a group's codes as a float; only with minima
  float* scales;          // [rows]
  int steps;

  Bytes(const Tiles& tiles, const Shape& shape, bool minima, Team& team) : steps(shape.k / 4) {
    const std::size_t all[] = {lines(tiles.words(steps)), lines(tiles.words(shape.groups)),
                               minima ? lines(tiles.words(shape.groups)) : 0, lines(tiles.words(1))};
    words = static_cast<std::uint32_t*>(
        panel_memory(tiles, team, sizeof(std::uint32_t) * (all[0] + all[1] + all[2] + all[3])));
    starts = words + all[0];
    sums = starts + all[1];
    scales = reinterpret_cast<float*>(sums + all[2]);
  }

  // Words, in whole cache lines.
  static std::size_t lines(std::size_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
};

// Row r of x, [k], in bytes; a row of zeros where x is null.
void quantize_row(const Tiles& tiles, const Shape& shape, const Bytes& bytes, bool minima, const float* x, int k,
                  int r) {
  V16 peak = set1(0.0f);
  V16 rest = set1(0.0f);  // NaN as soon as x has a NaN or an infinity: then the whole row is
  for (int i = 0; x != nullptr && i < k; i += kLanes) {
    const V16 value = load_n(x + i, k - i < kLanes ? k - i : kLanes);
    peak = max(max(value, set1(0.0f) - value), peak);
    rest = fma(value, set1(0.0f), rest);
  }
  const float top = reduce_max(peak);
  const float nothing = reduce_add(rest);
  const bool zero = !(top > 1e-30f) || nothing != 0.0f;
  bytes.scales[r] = zero ? nothing : top / 127.0f;
  const V16 inverse = set1(zero ? 0.0f : 127.0f / top);
  const RowWords words = row_words(tiles, bytes.words, bytes.steps, r);
  const RowWords starts = row_words(tiles, bytes.starts, shape.groups, r);
  const RowWords sums = row_words(tiles, bytes.sums, shape.groups, r);
  for (int g = 0; g < shape.groups; ++g) {
    V16 sum = set1(0.0f);
    for (int i = g * shape.group; i < (g + 1) * shape.group; i += kLanes) {
      const int n = zero || i > k ? 0 : k - i < kLanes ? k - i : kLanes;
      const V16 codes = round_even(load_n(x + i, n) * inverse);
      std::int8_t out[kLanes];
      store_as_bytes(out, codes);
      words.put(i / 4, out, kLanes / 4);
      sum = sum + codes;
    }
    const float total = reduce_add(sum);  // exact: a whole number below 2^24
    const std::int32_t start = -shape.offset * static_cast<std::int32_t>(total);
    starts.put(g, &start, 1);
    if (minima) sums.put(g, &total, 1);
  }
}

template <int kBits>
struct Product {
  using C = Codes<kBits>;

  const LinearArgs& a;
  const Tiles& tiles;
  const Shape& shape;
  const Bytes& x;

  static constexpr int blocks_at_once(int rows) {
    return kPanelRows > 4 && (rows == 2 || rows == 3) ? 2 : 1;  // sums in flight hide what a product takes
  }

  template <int kRows, int kBlocks>
  SAGE_MEMBER void tile(int tile, int block) const {
    const Weight& weight = *a.weight;
    const auto* data = static_cast<const std::uint8_t*>(weight.data) + block * shape.column_bytes;
    const std::size_t scale_step = static_cast<std::size_t>(shape.groups) * kLanes;
    const std::uint16_t* scales = weight.scales + block * scale_step;
    const std::uint16_t* mins = weight.mins == nullptr ? nullptr : weight.mins + block * scale_step;
    const std::size_t before = static_cast<std::size_t>(tile) * tiles.size;
    const std::uint32_t* words = x.words + before * x.steps;
    const std::uint32_t* starts = x.starts + before * shape.groups;
    const std::uint32_t* sums = x.sums + before * shape.groups;
    const int periods = shape.group / (4 * C::kQuads);
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
        const I16 start = set1_int(static_cast<std::int32_t>(starts[r]));
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) dots[r][b] = start;
      }
      starts += kRows;
      for (int p = 0; p < periods; ++p) {
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
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r) {
            const auto* four = reinterpret_cast<const std::int8_t*>(words + q * kRows + r);
#pragma GCC unroll 4
            for (int b = 0; b < kBlocks; ++b) dots[r][b] = dot4<kBits>(dots[r][b], quads[b][q], four);
          }
        }
        words += C::kQuads * kRows;
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const V16 scale = load_f16(scales + b * scale_step + g * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) total[r][b] = fma(scale, to_float(dots[r][b]), total[r][b]);
        if (mins == nullptr) continue;
        const V16 minimum = set1(0.0f) - load_f16(mins + b * scale_step + g * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) total[r][b] = fma(minimum, set1(bits_to_float(sums[r])), total[r][b]);
      }
      sums += kRows;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const V16 scale = set1(r < tiles.rows(tile) ? x.scales[before + r] : 0.0f);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) total[r][b] = total[r][b] * scale;
    }
    store_tile<kRows, kBlocks>(a, tiles, tile, block, total);
  }
};

template <int kBits>
void pack_as(const PackIntArgs& a, Team& team) {
  using C = Codes<kBits>;
  const Shape shape(*a.weight);
  const Weight& weight = *a.weight;
  const int blocks = (weight.n + kLanes - 1) / kLanes;
  team.each(blocks, [&](int block) {
    std::uint8_t* out = static_cast<std::uint8_t*>(a.packed) + block * shape.column_bytes;
    std::memset(out, 0, shape.column_bytes);
    for (int c = 0; c < kLanes; ++c) {
      const int row = block * kLanes + c;
      if (row >= weight.n) break;
      const std::uint8_t* in = a.codes + static_cast<std::ptrdiff_t>(row) * a.codes_stride;
      for (int k = 0; k < weight.k; ++k) {
        C::put(out + k / (4 * C::kQuads) * C::kBytes, k / 4 % C::kQuads, 4 * c + k % 4, in[k]);
      }
    }
  });
}

template <int kBits>
void unpack_as(const UnpackRowsArgs& a, Team& team) {
  using C = Codes<kBits>;
  const Weight& weight = *a.weight;
  const Shape shape(weight);
  team.ranges(a.num_rows, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const std::int64_t block = a.rows[i] / kLanes;
      const int c = static_cast<int>(a.rows[i] % kLanes);
      const auto* data = static_cast<const std::uint8_t*>(weight.data) + block * shape.column_bytes;
      const std::size_t scales = static_cast<std::size_t>(block) * shape.groups * kLanes + c;
      float* y = a.y + static_cast<std::size_t>(i) * weight.k;
      for (int k = 0; k < weight.k; ++k) {
        const int code = C::get(data + k / (4 * C::kQuads) * C::kBytes, k / 4 % C::kQuads, 4 * c + k % 4);
        const std::size_t at = scales + static_cast<std::size_t>(k / shape.group) * kLanes;
        const float value = static_cast<float>(code - shape.offset) * f16_to_float(weight.scales[at]);
        y[k] = weight.mins == nullptr ? value : value - f16_to_float(weight.mins[at]);
      }
    }
  });
}

template <class Body>
void with_bits(int bits, const Body& body) {
  switch (bits) {
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    case 6:
      return body.template operator()<6>();
    default:
      return body.template operator()<8>();
  }
}

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

void pack_int(const PackIntArgs& a, Team& team) {
  with_bits(a.weight->bits, [&]<int kBits>() { pack_as<kBits>(a, team); });
}

void unpack_rows_int(const UnpackRowsArgs& a, Team& team) {
  with_bits(a.weight->bits, [&]<int kBits>() { unpack_as<kBits>(a, team); });
}

}  // namespace sage::SAGE_ISA
