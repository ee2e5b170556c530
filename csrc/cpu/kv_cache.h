// How the kernels order the entries of the cache [2, num_blocks, kv_heads, block_size, head_dim].
//
// Blocks and heads lie where the shape says; within one (block, head) the numbers stand in the order in which products
// read them. Keys are the columns of a score: dimensions follow each other, sixteen keys side by side. Values are rows
// of a weighted sum: tokens follow each other, sixteen dimensions side by side. A type whose products take pairs of
// numbers (kStep = 2) keeps two neighbouring dimensions of a key, and a dimension of two neighbouring tokens' values,
// next to each other. The order is the same on all ISAs; block_size and head_dim are multiples of 16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "pairs.h"
#include "vec.h"

namespace sage::SAGE_ISA {

// A step of a product is one word of a row times sixteen columns; `multiply` adds it to sixteen sums.
template <class E>
struct SingleEntries {
  using T = typename E::T;
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
        head(static_cast<std::ptrdiff_t>(a.block_size) * a.head_dim),
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
};

}  // namespace sage::SAGE_ISA
