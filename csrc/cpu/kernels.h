// The seam between the bindings and the kernels: plain argument structs and one table of function pointers an ISA.
//
// A kernel is called by every thread of a team with the same arguments and returns when the whole team is done.
//
// Law of every kernel: the value of an output element depends only on its own row's inputs, computed in one fixed
// order. Batch size, chunking, thread count and ISA change no bit (exact fused multiply-add everywhere, one summation
// order).
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace sage {

// Columns of a packed weight block, keys of a score block and lanes of a vector: the one width everything is cut into.
inline constexpr int kLanes = 16;
// Context tokens whose softmax is computed in one piece; pieces are merged in order.
inline constexpr int kSplit = 256;

enum class Element : int { kF32 = 0, kBF16 = 1, kF16 = 2, kInt8 = 3 };  // kInt8: of caches, see kv_cache.h

// How a packed matrix is stored; the first three are elements as they are.
enum class Format : int { kF32 = 0, kBF16 = 1, kF16 = 2, kInt = 3 };

// A matrix [n, k] packed for the kernels; the memory belongs to the caller.
struct Weight {
  // f32, f16: [ceil(n / 16)][K][16], bf16: [ceil(n / 16)][K / 2][16][2], K = k rounded up to 16, zeros where nothing
  // is; kInt: see codes.h
  const void* data;
  const std::uint16_t* scales;  // kInt: f16, [ceil(n / 16)][groups][16]
  const std::uint16_t* mins;    // kInt: f16, subtracted, as scales; or null
  int n;
  int k;
  Format format;
  int bits;   // kInt: of a weight
  int group;  // kInt: neighbours along k that share a scale
};

// y = x W^T + bias.
struct LinearArgs {
  const float* x;  // [m, k], row stride x_stride
  const Weight* weight;
  const float* bias;  // [n] or null
  float* y;           // [m, n], row stride y_stride
  std::ptrdiff_t x_stride;
  std::ptrdiff_t y_stride;
  int m;
};

struct PackArgs {
  const void* source;  // [n, k], row stride source_stride, elements of `type`
  void* packed;        // see Weight::data
  std::ptrdiff_t source_stride;
  int n;
  int k;
  Element type;
};

struct PackIntArgs {
  const Weight* weight;       // the shape of what is packed; its addresses are not read
  const std::uint8_t* codes;  // [n, k], row stride codes_stride
  void* packed;
  std::ptrdiff_t codes_stride;
};

// Symmetric rounding of floats to codes and scales, packed: bits, n, k and group are the weight's, and it has no
// minima.
struct QuantizeArgs {
  const Weight* weight;  // the shape of what is packed; its addresses are not read
  const void* source;    // [n, k], row stride source_stride, elements of `type`
  void* packed;
  std::uint16_t* scales;  // f16, [ceil(n / 16)][groups][16]; those of missing rows are not written
  std::ptrdiff_t source_stride;
  Element type;
};

// Rows of a packed matrix as floats: the embedding of tokens.
struct UnpackRowsArgs {
  const Weight* weight;
  const std::int64_t* rows;  // [num_rows]
  float* y;                  // [num_rows, k]
  int num_rows;
};

// Causal attention over the paged cache [2, num_blocks, kv_heads, block_size, head_dim] in the order of kv_cache.h;
// head_dim and block_size are multiples of 16.
struct AttentionArgs {
  const float* q;  // [tokens, heads, head_dim], token stride q_stride
  const void* cache;
  float* out;                           // [tokens, heads, head_dim]
  const std::int32_t* query_start_loc;  // [requests + 1]
  const std::int32_t* context_lens;     // [requests]: tokens visible after this step
  const std::int32_t* block_tables;     // [requests, table_width]
  std::ptrdiff_t q_stride;
  int requests;
  int table_width;
  int heads;
  int kv_heads;
  int head_dim;
  int block_size;
  std::int64_t num_blocks;
  float scale;
  int window;      // tokens a query sees, itself included; 0 = all
  float soft_cap;  // 0 = none
  Element type;
};

struct CacheWriteArgs {
  const float* k;  // [tokens, kv_heads, head_dim], token stride k_stride
  const float* v;
  void* cache;
  const std::int64_t* slot_mapping;  // [tokens]; negative = not written
  std::ptrdiff_t k_stride;
  std::ptrdiff_t v_stride;
  int tokens;
  int kv_heads;
  int head_dim;
  int block_size;
  std::int64_t num_blocks;
  Element type;
};

// y = rms(x [+ residual]) * weight; new_residual = x + residual where residual is given (then heads is 1).
struct NormArgs {
  const float* x;         // [rows, heads, size], row stride x_stride
  const float* residual;  // [rows, size] or null
  const float* weight;    // [size]
  float* y;               // [rows, heads, size]
  float* new_residual;    // null exactly when residual is null
  std::ptrdiff_t x_stride;
  int rows;
  int heads;
  int size;
  float eps;
};

// y = (x - mean) / sqrt(variance + eps) * weight + bias.
struct LayerNormArgs {
  const float* x;       // [rows, size], row stride x_stride
  const float* weight;  // [size]
  const float* bias;    // [size] or null
  float* y;             // [rows, size]
  std::ptrdiff_t x_stride;
  int rows;
  int size;
  float eps;
};

// Rotates in place the first 2 * half entries of each head.
struct RotaryArgs {
  float* x;          // [tokens, heads, head_dim], token stride x_stride
  const float* cos;  // [positions, half]
  const float* sin;
  const std::int64_t* positions;  // [tokens]
  std::ptrdiff_t x_stride;
  int tokens;
  int heads;
  int head_dim;
  int half;
  int interleaved;  // 1: pairs (2i, 2i+1); 0: pairs (i, i + half)
};

// Rotates queries in place and writes rotated keys, and values, to the cache; kv.k itself stays as it is.
struct RotateAndCacheArgs {
  RotaryArgs q;
  CacheWriteArgs kv;
};

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// y[:, i] = act(x[:, i]), times x[:, size + i] where gated.
struct ActivationArgs {
  const float* x;  // [rows, size or 2 * size], row stride x_stride
  float* y;        // [rows, size]
  std::ptrdiff_t x_stride;
  int rows;
  int size;
  Activation act;
  bool gated;
};

// y = cap * tanh(x / cap).
struct SoftCapArgs {
  const float* x;  // [rows, size]
  float* y;
  int rows;
  int size;
  float cap;
};

// y = a * scale + b; without b: y = a * scale.
struct AddArgs {
  const float* a;  // [rows, size], row strides as named
  const float* b;  // or null
  float* y;        // [rows, size]
  std::ptrdiff_t a_stride;
  std::ptrdiff_t b_stride;
  float scale;
  int rows;
  int size;
};

// Rows of a plain table as floats.
struct GatherArgs {
  const void* table;         // [.., size]
  const std::int64_t* rows;  // [num_rows]
  float* y;                  // [num_rows, size]
  int num_rows;
  int size;
  Element type;
};

// The first of the largest values of each row; NaN is never chosen, but in rows of nothing else, which give 0.
struct ArgmaxArgs {
  const float* x;      // [rows, size], row stride x_stride
  std::int64_t* best;  // [rows]
  std::ptrdiff_t x_stride;
  int rows;
  int size;
};

// Numbers that say how a row's token is chosen: temperature (0 = the first of the largest values), top_k (0 = off),
// top_p (1 = off), min_p (0 = off), a uniform number in (0, 1).
inline constexpr int kSampleWidth = 5;

// A token for each row; see sagellm_backend/reference/sampling.py. NaN is never chosen but in rows of nothing else.
struct SampleArgs {
  const float* x;        // [rows, size], row stride x_stride
  const double* wanted;  // [rows, kSampleWidth]
  std::int64_t* chosen;  // [rows]
  std::ptrdiff_t x_stride;
  int rows;
  int size;
};

struct KernelTable {
  const char* name;
  bool fast_fma;  // false: fused multiply-adds are library calls; right, but slower than torch
  void (*pack)(const PackArgs&, Team&);
  void (*pack_int)(const PackIntArgs&, Team&);
  void (*quantize)(const QuantizeArgs&, Team&);
  void (*unpack_rows)(const UnpackRowsArgs&, Team&);
  void (*linear)(const LinearArgs&, Team&);
  void (*attention)(const AttentionArgs&, Team&);
  void (*write_cache)(const CacheWriteArgs&, Team&);
  void (*norm)(const NormArgs&, Team&);
  void (*rotary)(const RotaryArgs&, Team&);
  void (*rotate_and_cache)(const RotateAndCacheArgs&, Team&);
  void (*layer_norm)(const LayerNormArgs&, Team&);
  void (*activate)(const ActivationArgs&, Team&);
  void (*soft_cap)(const SoftCapArgs&, Team&);
  void (*add)(const AddArgs&, Team&);
  void (*argmax)(const ArgmaxArgs&, Team&);
  void (*sample)(const SampleArgs&, Team&);
  void (*gather)(const GatherArgs&, Team&);
};

}  // namespace sage
