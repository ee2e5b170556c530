// Packing of weights in whole numbers: from codes, or from floats by symmetric rounding; and their rows as floats.
#include <cstdint>
#include <cstring>

#include "codes.h"
#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

// Puts a row's codes [shape.k] into column c of a block.
template <int kBits>
void pack_row(const Shape& shape, const std::uint8_t* codes, std::uint8_t* block, int c) {
  using C = Codes<kBits>;
  for (int k = 0; k < shape.k; k += 4 * C::kQuads, block += C::kBytes) {
    std::uint32_t words[C::kQuads];
    std::memcpy(words, codes + k, sizeof words);
    C::store_column(block, c, words);
  }
}

// Packs all blocks: codes_of(row, buffer) fills `buffer` with the codes of a row of weights, zeros behind the end.
template <int kBits, class CodesOf>
void pack_rows(const Weight& weight, void* packed, Team& team, const CodesOf& codes_of) {
  const Shape shape(weight);
  team.each((weight.n + kLanes - 1) / kLanes, [&](int block) {
    auto* codes = static_cast<std::uint8_t*>(scratch(static_cast<std::size_t>(shape.k), 0));
    std::uint8_t* out = static_cast<std::uint8_t*>(packed) + block * shape.column_bytes;
    for (int c = 0; c < kLanes; ++c) {
      const int row = block * kLanes + c;
      if (row < weight.n) {
        codes_of(shape, row, codes);
      } else {
        std::memset(codes, 0, static_cast<std::size_t>(shape.k));
      }
      pack_row<kBits>(shape, codes, out, c);
    }
  });
}

template <class E>
void to_floats(const void* source, int n, int filled, float* out) {
  const auto* in = static_cast<const typename E::T*>(source);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, E::load16(in + i));
  for (; i < n; ++i) out[i] = E::get(in[i]);
  for (; i < filled; ++i) out[i] = 0.0f;
}

// Symmetric rounding of one group: the scale is absmax / (2^(bits - 1) - 1) in half precision, a code the nearest whole
// number to weight / scale, ties to even, plus the offset.
std::uint16_t quantize_group(const float* x, int n, int bits, std::uint8_t* codes) {
  const int largest = (1 << (bits - 1)) - 1;
  const float top = bits_to_float(top_magnitude(x, n));
  const std::uint16_t scale = float_to_f16(top / static_cast<float>(largest));
  const float divisor = f16_to_float(scale);
  const V16 low = set1(static_cast<float>(-largest));
  const V16 high = set1(static_cast<float>(largest));
  for (int i = 0; i < n; i += kLanes) {
    const V16 whole = divisor > 0.0f ? load(x + i) / set1(divisor) : set1(0.0f);
    store_as_bytes(reinterpret_cast<std::int8_t*>(codes + i),
                   to_int(min(max(whole, low), high)) + set1_int(largest + 1));
  }
  return scale;
}

template <int kBits>
void unpack_as(const UnpackRowsArgs& a, Team& team) {
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
        const std::size_t at = scales + static_cast<std::size_t>(k / shape.group) * kLanes;
        const float code = static_cast<float>(Codes<kBits>::get(data, k, c) - shape.offset);
        const float value = code * f16_to_float(weight.scales[at]);
        y[k] = weight.mins == nullptr ? value : value - f16_to_float(weight.mins[at]);
      }
    }
  });
}

}  // namespace

void pack_int(const PackIntArgs& a, Team& team) {
  with_bits(a.weight->bits, [&]<int kBits>() {
    pack_rows<kBits>(*a.weight, a.packed, team, [&](const Shape& shape, int row, std::uint8_t* codes) {
      const int k = a.weight->k;
      std::memcpy(codes, a.codes + static_cast<std::ptrdiff_t>(row) * a.codes_stride, static_cast<std::size_t>(k));
      std::memset(codes + k, 0, static_cast<std::size_t>(shape.k - k));
    });
  });
}

void quantize(const QuantizeArgs& a, Team& team) {
  with_bits(a.weight->bits, [&]<int kBits>() {
    pack_rows<kBits>(*a.weight, a.packed, team, [&](const Shape& shape, int row, std::uint8_t* codes) {
      const int k = a.weight->k;
      auto* x = static_cast<float*>(scratch(sizeof(float) * static_cast<std::size_t>(shape.k), 1));
      const std::ptrdiff_t begin = static_cast<std::ptrdiff_t>(row) * a.source_stride;
      if (a.type == Element::kF32) {
        to_floats<F32>(static_cast<const float*>(a.source) + begin, k, shape.k, x);
      } else if (a.type == Element::kBF16) {
        to_floats<BF16>(static_cast<const std::uint16_t*>(a.source) + begin, k, shape.k, x);
      } else {
        to_floats<F16>(static_cast<const std::uint16_t*>(a.source) + begin, k, shape.k, x);
      }
      std::uint16_t* scales = a.scales + static_cast<std::size_t>(row / kLanes) * shape.groups * kLanes + row % kLanes;
      for (int g = 0; g < shape.groups; ++g) {
        const int first = g * shape.group;
        scales[static_cast<std::size_t>(g) * kLanes] = quantize_group(x + first, shape.group, kBits, codes + first);
      }
      std::memset(codes + k, 0, static_cast<std::size_t>(shape.k - k));
    });
  });
}

void unpack_rows_int(const UnpackRowsArgs& a, Team& team) {
  with_bits(a.weight->bits, [&]<int kBits>() { unpack_as<kBits>(a, team); });
}

}  // namespace sage::SAGE_ISA
