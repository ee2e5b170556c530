// Products with weights in whole numbers of 4, 5, 6 or 8 bits.
//
// A row of x is turned into bytes with one scale (absmax / 127, LLM.int8's vector-wise scheme: Dettmers et al. 2022,
// arXiv:2208.07339); within a group of neighbours along k, products are summed exactly. Then, group by group in
// ascending order: y = fma(scale, sum, y), and with minima y = fma(-min, sum of x, y); at the end y * scale of the row.
// Weights are stored unsigned because the processors' byte products want one unsigned side: the offset is taken off by
// starting a group's sum at -offset * (sum of x).
//
// Packed: columns in groups of sixteen; within, quads of four neighbours along k, column by column: 64 codes. Quads
// come in periods of 1 (8 bits), 2 (4 bits: low and high halves of a byte), 4 (6 bits: two such pairs, then two bits of
// four quads a byte) or 8 (5 bits: four pairs, then one bit of eight quads a byte).
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ivec.h"
#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int kQuadBytes = 64;
constexpr int kPrivateRows = 2;  // up to so many rows every thread quantises for itself
#if defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 1;  // nothing stays in registers anyway
#endif

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

// Rows of x in bytes.
struct Bytes {
  std::int8_t* codes;  // [rows][k]
  std::int32_t* sums;  // [rows][groups]: of the codes
  float* scales;       // [rows]

  static std::size_t size(const Shape& shape, int rows) {
    return static_cast<std::size_t>(rows) * (shape.k + sizeof(std::int32_t) * shape.groups + sizeof(float)) + 192;
  }

  Bytes(void* memory, const Shape& shape, int rows) {
    codes = static_cast<std::int8_t*>(memory);
    std::size_t used = (static_cast<std::size_t>(rows) * shape.k + 63) / 64 * 64;
    sums = reinterpret_cast<std::int32_t*>(codes + used);
    used += (static_cast<std::size_t>(rows) * shape.groups * sizeof(std::int32_t) + 63) / 64 * 64;
    scales = reinterpret_cast<float*>(codes + used);
  }

  void quantize(const Shape& shape, const float* x, int k, int row) const {
    V16 peak = set1(0.0f);
    V16 rest = set1(0.0f);  // NaN as soon as x has a NaN or an infinity: then the whole row is
    for (int i = 0; i < k; i += kLanes) {
      const V16 value = load_n(x + i, k - i < kLanes ? k - i : kLanes);
      peak = max(max(value, set1(0.0f) - value), peak);
      rest = fma(value, set1(0.0f), rest);
    }
    const float top = reduce_max(peak);
    const float nothing = reduce_add(rest);
    std::int8_t* out = codes + static_cast<std::size_t>(row) * shape.k;
    std::int32_t* out_sums = sums + static_cast<std::size_t>(row) * shape.groups;
    if (!(top > 1e-30f) || nothing != 0.0f) {
      scales[row] = nothing;
      std::memset(out, 0, shape.k);
      std::memset(out_sums, 0, sizeof(std::int32_t) * shape.groups);
      return;
    }
    scales[row] = top / 127.0f;
    const V16 inverse = set1(127.0f / top);
    for (int i = 0; i < shape.k; i += kLanes) {
      const int n = k - i < kLanes ? (k - i > 0 ? k - i : 0) : kLanes;
      store_as_bytes(out + i, round_even(load_n(x + i, n) * inverse));
    }
    for (int g = 0; g < shape.groups; ++g) {
      std::int32_t sum = 0;
      for (int i = g * shape.group; i < (g + 1) * shape.group; ++i) sum += out[i];
      out_sums[g] = sum;
    }
  }
};

SAGE_INLINE V16 load_scale(const std::uint16_t* p) { return load_f16(p); }

template <int kBits>
struct Product {
  using C = Codes<kBits>;

  const LinearArgs& a;
  const Shape& shape;
  const Bytes& x;

  // Rows [row, row + kRows) times columns of the groups of sixteen [block, block + kBlocks).
  template <int kRows, int kBlocks, bool kGrouped, bool kMins, bool kAhead>
  SAGE_MEMBER void tile(int row, int block) const {
    const Weight& weight = *a.weight;
    const auto* data = static_cast<const std::uint8_t*>(weight.data) + block * shape.column_bytes;
    const std::size_t scale_step = static_cast<std::size_t>(shape.groups) * kLanes;
    const std::uint16_t* scales = weight.scales + block * scale_step;
    const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * shape.k;
    const std::int32_t* sums = x.sums + static_cast<std::size_t>(row) * shape.groups;
    const int periods = shape.group / (4 * C::kQuads);
    V16 total[kRows][kBlocks];
    if constexpr (kGrouped) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) total[r][b] = set1(0.0f);
      }
    }
    const int groups = kGrouped ? shape.groups : 1;
    for (int g = 0; g < groups; ++g) {
      I16 dots[kRows][kBlocks];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const I16 start = set1_int(-shape.offset * sums[static_cast<std::size_t>(r) * shape.groups + g]);
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) dots[r][b] = start;
      }
      for (int p = 0; p < periods; ++p) {
        U64 quads[kBlocks][C::kQuads];
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) {
          const std::uint8_t* at = data + b * shape.column_bytes;
          if constexpr (kAhead) {
#pragma GCC unroll 8
            for (int i = 0; i < C::kBytes; i += kQuadBytes) __builtin_prefetch(at + i + 2048);
          }
          C::load(at, quads[b]);
        }
        data += C::kBytes;
#pragma GCC unroll 8
        for (int q = 0; q < C::kQuads; ++q) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const std::int8_t* four = codes + static_cast<std::size_t>(r) * shape.k + 4 * q;
#pragma GCC unroll 4
            for (int b = 0; b < kBlocks; ++b) dots[r][b] = dot4<kBits>(dots[r][b], quads[b][q], four);
          }
        }
        codes += 4 * C::kQuads;
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const V16 scale = load_scale(scales + b * scale_step + g * kLanes);
        V16 minimum;
        if constexpr (kMins) {
          minimum = set1(0.0f) - load_scale(weight.mins + block * scale_step + b * scale_step + g * kLanes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          V16 sum = kGrouped ? total[r][b] : set1(0.0f);
          sum = fma(scale, to_float(dots[r][b]), sum);
          if constexpr (kMins) {
            const float codes_sum = static_cast<float>(sums[static_cast<std::size_t>(r) * shape.groups + g]);
            sum = fma(minimum, set1(codes_sum), sum);
          }
          total[r][b] = sum;
        }
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const int first = (block + b) * kLanes;
      const int width = weight.n - first < kLanes ? weight.n - first : kLanes;
      const V16 bias = a.bias == nullptr ? set1(0.0f) : load_n(a.bias + first, width);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        V16 value = total[r][b] * set1(x.scales[row + r]);
        if (a.bias != nullptr) value = value + bias;
        store_n(a.y + (row + r) * a.y_stride + first, value, width);
      }
    }
  }

  template <int kBlocks, bool kGrouped, bool kMins, bool kAhead>
  SAGE_MEMBER void rows(int row, int count, int block) const {
    if (count == kTileRows) return tile<kTileRows, kBlocks, kGrouped, kMins, kAhead>(row, block);
    if constexpr (kTileRows > 1) {
      switch (count) {
        case 1:
          return tile<1, kBlocks, kGrouped, kMins, kAhead>(row, block);
        case 2:
          return tile<2, kBlocks, kGrouped, kMins, kAhead>(row, block);
        case 3:
          return tile<3, kBlocks, kGrouped, kMins, kAhead>(row, block);
        case 4:
          return tile<4, kBlocks, kGrouped, kMins, kAhead>(row, block);
        default:
          return tile<5, kBlocks, kGrouped, kMins, kAhead>(row, block);
      }
    }
  }

  // All rows for the groups of columns [first, last): their weights stay in the second-level cache.
  template <bool kGrouped, bool kMins>
  void columns(int first, int last) const {
#if defined(__AVX512BW__)
    constexpr int kWide = 2;
#else
    constexpr int kWide = 1;
#endif
    const int tiles = (a.m + kTileRows - 1) / kTileRows;
    const auto each_tile = [&](const auto& body) {
      for (int t = 0; t < tiles; ++t) {
        const int row = static_cast<int>(static_cast<long long>(a.m) * t / tiles);
        body(row, static_cast<int>(static_cast<long long>(a.m) * (t + 1) / tiles) - row, t == 0);
      }
    };
    int block = first;
    if (a.m > kTileRows) {
      for (; block + kWide <= last; block += kWide) {
        each_tile([&](int row, int count, bool) { rows<kWide, kGrouped, kMins, false>(row, count, block); });
      }
    }
    for (; block < last; ++block) {
      each_tile([&](int row, int count, bool first_tile) {
        if (first_tile) return rows<1, kGrouped, kMins, true>(row, count, block);
        rows<1, kGrouped, kMins, false>(row, count, block);
      });
    }
  }
};

// Groups of columns handed to a thread at once: many pieces, so that a thread that loses its core delays nobody.
int piece_size(int blocks, int threads) {
  const int pieces = threads * 16;
  const int size = (blocks + pieces - 1) / pieces;
  return (size + 3) / 4 * 4;
}

template <int kBits>
void linear_as(const LinearArgs& a, const Shape& shape, const Bytes& x, Team& team) {
  const Product<kBits> product{a, shape, x};
  const int blocks = (a.weight->n + kLanes - 1) / kLanes;
  const int size = piece_size(blocks, team.size);
  team.each((blocks + size - 1) / size, [&](int piece) {
    const int first = piece * size;
    const int last = first + size < blocks ? first + size : blocks;
    if (a.weight->mins != nullptr) return product.template columns<true, true>(first, last);
    if (shape.groups > 1) return product.template columns<true, false>(first, last);
    product.template columns<false, false>(first, last);
  });
}

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
  const bool is_private = a.m <= kPrivateRows;
  const std::size_t size = Bytes::size(shape, a.m);
  const Bytes x(is_private ? scratch(size, 0) : team.shared(size), shape, a.m);
  const auto quantize = [&](int begin, int end) {
    for (int r = begin; r < end; ++r) x.quantize(shape, a.x + r * a.x_stride, a.weight->k, r);
  };
  if (is_private) {
    quantize(0, a.m);
  } else {
    team.ranges(a.m, quantize);
  }
  with_bits(a.weight->bits, [&]<int kBits>() { linear_as<kBits>(a, shape, x, team); });
}

void pack_int(const PackIntArgs& a, Team& team) {
  with_bits(a.weight->bits, [&]<int kBits>() { pack_as<kBits>(a, team); });
}

void unpack_rows_int(const UnpackRowsArgs& a, Team& team) {
  with_bits(a.weight->bits, [&]<int kBits>() { unpack_as<kBits>(a, team); });
}

}  // namespace sage::SAGE_ISA
