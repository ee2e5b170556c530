// How the kernels order the entries of the cache [2, num_blocks, kv_heads, block_size, head_dim].
//
// Blocks and heads lie where the shape says; within one (block, head) the numbers stand in the order in which products
// read them. Keys are the columns of a score: dimensions follow each other, sixteen keys side by side. Values are rows
// of a weighted sum: tokens follow each other, sixteen dimensions side by side. A type whose products take pairs of
// numbers (kStep = 2) keeps two neighbouring dimensions of a key, and a dimension of two neighbouring tokens' values,
// next to each other. The order is the same on all ISAs; block_size and head_dim are multiples of 16.
//
// An int8 cache has the order of bf16. Its last dimension is four bytes longer: behind the codes of a (block, head)
// follow the float32 scales of its tokens. A number is scale * code, scale = the largest magnitude / 127.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "pairs.h"
#include "vec.h"

namespace sage::SAGE_ISA {

// A step of a product is one word of a row times sixteen columns; `multiply` adds it to sixteen sums.
template <class E>
struct SingleEntries {
  using T = typename E::T;  // as products read it
  using Stored = T;
  using Word = float;  // of a row: a number
  using Columns = V16;
  static constexpr int kStep = 1;

  SAGE_INLINE T put(float x) { return E::put(x); }
  SAGE_INLINE Columns columns(const T* p) { return E::load16(p); }
  SAGE_INLINE V16 multiply(Word word, Columns columns, V16 sums) { return fma(set1(word), columns, sums); }
  // Sixteen words of a row from 16 * kStep floats.
  SAGE_INLINE void store_words(Word* words, const float* x) { store(words, load(x)); }
  // The numbers of sixteen words added to sixteen sums.
  SAGE_INLINE V16 add(const Word* words, V16 sums) { return sums + load(words); }
};

struct PairedEntries {
  using T = std::uint16_t;
  using Stored = T;
  using Word = std::uint32_t;  // of a row: two bf16
  using Columns = Pairs;
  static constexpr int kStep = 2;

  SAGE_INLINE T put(float x) { return float_to_bf16(x); }
  SAGE_INLINE Columns columns(const T* p) { return load_pairs(p); }
  SAGE_INLINE V16 multiply(Word word, Columns columns, V16 sums) { return dot(set1_pair(word), columns, sums); }
  SAGE_INLINE void store_words(Word* words, const float* x) {
    store_bf16(words, load(x));
    store_bf16(words + kLanes / 2, load(x + kLanes));
  }
  SAGE_INLINE V16 add(const Word* words, V16 sums) { return dot(load_pairs(words), set1_pair(0x3f803f80u), sums); }
};

// Codes become bf16, which holds them exactly, before they are multiplied.
struct CodeEntries : PairedEntries {
  using Stored = std::int8_t;

  static constexpr int kWidened = 2 * kLanes;  // codes at once
  SAGE_INLINE void widen(const Stored* codes, T* out) {
#if defined(__AVX512BF16__)
    const auto* halves = reinterpret_cast<const __m128i*>(codes);
    const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves)));
    const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1)));
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(out, &both, sizeof both);
#else
    for (int i = 0; i < kWidened; ++i) out[i] = static_cast<T>(float_to_bits(static_cast<float>(codes[i])) >> 16);
#endif
  }
};

template <class E>
inline constexpr bool kHasScales = !std::is_same_v<typename E::T, typename E::Stored>;

// Places of the numbers of one (block, head), and of the (block, head)s.
template <class E>
struct Order {
  int block_size;
  int head_dim;
  std::ptrdiff_t head;   // between two heads of a block
  std::ptrdiff_t block;  // between two blocks
  std::ptrdiff_t plane;  // between keys and values

  template <class Args>
  explicit Order(const Args& a)
      : block_size(a.block_size),
        head_dim(a.head_dim),
        head(static_cast<std::ptrdiff_t>(a.block_size) * (a.head_dim + (kHasScales<E> ? sizeof(float) : 0))),
        block(head * a.kv_heads),
        plane(block * a.num_blocks) {}

  // Dimension 0 of a key; the next kStep dimensions follow, then key_step() leads to the dimensions after them.
  SAGE_MEMBER std::ptrdiff_t key(int token) const { return static_cast<std::ptrdiff_t>(token) * E::kStep; }
  SAGE_MEMBER std::ptrdiff_t key_step() const { return static_cast<std::ptrdiff_t>(block_size) * E::kStep; }
  // Dimension 0 of a value; the next dimension is kStep further.
  SAGE_MEMBER std::ptrdiff_t value(int token) const {
    return static_cast<std::ptrdiff_t>(token / E::kStep) * E::kStep * head_dim + token % E::kStep;
  }
  SAGE_MEMBER std::ptrdiff_t value_step() const { return static_cast<std::ptrdiff_t>(head_dim) * E::kStep; }
  // Where the scales of a (block, head) start.
  SAGE_MEMBER std::ptrdiff_t scales() const { return static_cast<std::ptrdiff_t>(block_size) * head_dim; }
};

}  // namespace sage::SAGE_ISA
