// Packing: weights as the products read them, and rows of packed weights as floats.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace sage::SAGE_ISA {

void unpack_rows_int(const UnpackRowsArgs& a, Team& team);

namespace {

// Neighbours along k that lie side by side, column by column.
template <class E>
constexpr int kEntries = 1;
template <>
constexpr int kEntries<BF16> = 2;

// Subnormal bf16 count as zero, as they do for vdpbf16ps.
template <class E>
SAGE_INLINE typename E::T kept(typename E::T x) {
  if constexpr (kEntries<E> == 2) return (x & 0x7f80) == 0 ? x & 0x8000 : x;
  return x;
}

// Place of (k, column) in a block of sixteen columns.
template <class E>
SAGE_INLINE std::size_t place(int k, int column) {
  constexpr int n = kEntries<E>;
  return (static_cast<std::size_t>(k / n) * kLanes + column) * n + k % n;
}

// Entries of a block: k is filled up with zeros to what the products take in one go.
inline std::size_t block_size(int k) { return static_cast<std::size_t>((k + kLanes - 1) / kLanes * kLanes) * kLanes; }

template <class E>
void pack_as(const PackArgs& a, Team& team) {
  using T = typename E::T;
  constexpr int n = kEntries<E>;
  const auto* source = static_cast<const T*>(a.source);
  auto* packed = static_cast<T*>(a.packed);
  const int filled = (a.k + kLanes - 1) / kLanes * kLanes;
  team.each((a.n + kLanes - 1) / kLanes, [&](int block) {
    T* out = packed + block * block_size(a.k);
    // Sixteen entries of all columns at a time: what is written stays in the first-level cache.
    for (int begin = 0; begin < filled; begin += kLanes, out += kLanes * kLanes) {
      const int here = a.k - begin < kLanes ? a.k - begin : kLanes;
      for (int c = 0; c < kLanes; ++c) {
        const std::ptrdiff_t row = block * kLanes + c;
        T in[kLanes] = {};
        if (row < a.n) std::memcpy(in, source + row * a.source_stride + begin, sizeof(T) * here);
        for (int k = 0; k < kLanes; ++k) in[k] = kept<E>(in[k]);
        for (int k = 0; k < kLanes; k += n) std::memcpy(out + place<E>(k, c), in + k, sizeof(T) * n);
      }
    }
  });
}

template <class E>
void unpack_rows_as(const UnpackRowsArgs& a, Team& team) {
  const auto* packed = static_cast<const typename E::T*>(a.weight->data);
  const int k_all = a.weight->k;
  team.ranges(a.num_rows, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const std::int64_t row = a.rows[i];
      const auto* block = packed + static_cast<std::size_t>(row / kLanes) * block_size(k_all);
      float* y = a.y + static_cast<std::size_t>(i) * k_all;
      for (int k = 0; k < k_all; ++k) y[k] = E::get(block[place<E>(k, static_cast<int>(row % kLanes))]);
    }
  });
}

}  // namespace

void pack(const PackArgs& a, Team& team) {
  if (a.type == Element::kF32) return pack_as<F32>(a, team);
  if (a.type == Element::kBF16) return pack_as<BF16>(a, team);
  pack_as<F16>(a, team);
}

void unpack_rows(const UnpackRowsArgs& a, Team& team) {
  if (a.weight->format == Format::kInt) return unpack_rows_int(a, team);
  if (a.weight->format == Format::kF32) return unpack_rows_as<F32>(a, team);
  if (a.weight->format == Format::kBF16) return unpack_rows_as<BF16>(a, team);
  unpack_rows_as<F16>(a, team);
}

}  // namespace sage::SAGE_ISA
