// How weights of 4, 5, 6 and 8 bits lie in memory.
//
// Columns come in blocks of sixteen; within a block, quads of four neighbours along k, column by column: 64 codes.
// Quads come in periods of 1 (8 bits), 2 (4 bits: low and high halves of a byte), 4 (6 bits: two such pairs, then two
// bits of four quads a byte) or 8 (5 bits: four pairs, then one bit of eight quads a byte). k is filled up with zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ivec.h"
#include "kernels.h"

namespace sage::SAGE_ISA {

inline constexpr int kQuadBytes = 64;

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

  // Stores column c of the period at p: four codes a word, a word a quad.
  SAGE_INLINE void store_column(std::uint8_t* p, int c, const std::uint32_t (&words)[kQuads]) {
    p += static_cast<std::ptrdiff_t>(c) * 4;
    if constexpr (kBits == 8) {
      std::memcpy(p, words, 4);
    } else {
      for (int i = 0; i < kPairs; ++i) {
        const std::uint32_t pair = (words[2 * i] & 0x0f0f0f0fu) | (words[2 * i + 1] & 0x0f0f0f0fu) << 4;
        std::memcpy(p + i * kQuadBytes, &pair, 4);
      }
      if constexpr (kBits == 4) return;
      constexpr int kHigh = kBits - 4;
      std::uint32_t high = 0;
      for (int q = 0; q < kQuads; ++q) high |= ((words[q] >> 4) & 0x01010101u * ((1 << kHigh) - 1)) << (kHigh * q);
      std::memcpy(p + kPairs * kQuadBytes, &high, 4);
    }
  }

  // Code of entry k of column c, p being where the block begins.
  static int get(const std::uint8_t* p, int k, int c) {
    const int q = k / 4 % kQuads;
    const int b = 4 * c + k % 4;
    p += static_cast<std::size_t>(k / (4 * kQuads)) * kBytes;
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

// Calls body.operator()<bits>().
template <class Body>
SAGE_INLINE void with_bits(int bits, const Body& body) {
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

}  // namespace sage::SAGE_ISA
