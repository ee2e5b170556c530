// Writing keys and values to the cache, alone and together with the rotation of queries and keys.
#include "kv_cache.h"

#include <cstdint>
#include <cstring>

#include "kv_cache.h"
#include "parallel.h"
#include "rotary.h"

namespace sage::SAGE_ISA {
namespace {

template <class E>
struct Writer {
  explicit Writer(const CacheWriteArgs& a) : a(a), order(a), cache(static_cast<Stored*>(a.cache)) {}

  void key(int token, int head) const { key(token, head, a.k + token * a.k_stride + at(head)); }
  void key(int token, int head, const float* in) const {
    Stored* out = place(token, head);
    if (out == nullptr) return;
    put(in, out, offset(token), out + order.key(offset(token)),
        [&](int d) { return d / E::kStep * order.key_step() + d % E::kStep; });
  }
  void value(int token, int head) const {
    Stored* out = place(token, head);
    if (out == nullptr) return;
    out += order.plane;
    put(a.v + token * a.v_stride + at(head), out, offset(token), out + order.value(offset(token)),
        [](int d) { return d * E::kStep; });
  }

 private:
  using Stored = typename E::Stored;

  // Number d goes to out[where(d)].
  template <class Where>
  SAGE_MEMBER void put(const float* in, Stored* block, int offset, Stored* out, const Where& where) const {
    if constexpr (kHasScales<E>) {
      V16 peak = set1(0.0f);
      for (int d = 0; d < a.head_dim; d += kLanes) {
        const V16 x = load(in + d);
        peak = max(peak, max(x, set1(0.0f) - x));
      }
      const float scale = reduce_max(peak) / 127.0f;
      std::memcpy(block + order.scales() + offset * sizeof scale, &scale, sizeof scale);
      for (int d = 0; d < a.head_dim; d += kLanes) {
        float codes[kLanes];
        store(codes, round_even(min(max(load(in + d) / set1(scale), set1(-127.0f)), set1(127.0f))));
        for (int i = 0; i < kLanes; ++i) out[where(d + i)] = static_cast<Stored>(scale > 0.0f ? codes[i] : 0.0f);
      }
    } else {
      for (int d = 0; d < a.head_dim; ++d) out[where(d)] = E::put(in[d]);
    }
  }

  std::ptrdiff_t at(int head) const { return static_cast<std::ptrdiff_t>(head) * a.head_dim; }
  int offset(int token) const { return static_cast<int>(a.slot_mapping[token] % a.block_size); }
  Stored* place(int token, int head) const {
    const std::int64_t slot = a.slot_mapping[token];
    return slot < 0 ? nullptr : cache + slot / a.block_size * order.block + head * order.head;
  }

  const CacheWriteArgs& a;
  const Order<E> order;
  Stored* cache;
};

template <class E>
void write_cache_as(const CacheWriteArgs& a, Team& team) {
  const Writer<E> writer(a);
  team.ranges(a.tokens, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      for (int h = 0; h < a.kv_heads; ++h) {
        writer.key(t, h);
        writer.value(t, h);
      }
    }
  });
}

template <class E>
void rotate_and_cache_as(const RotateAndCacheArgs& a, Team& team) {
  const Writer<E> writer(a.kv);
  const RotaryArgs& q = a.q;
  const int heads = q.heads + 2 * a.kv.kv_heads;  // of queries, keys and values
  team.ranges(q.tokens * heads, [&](int begin, int end) {
    auto* key = static_cast<float*>(scratch(sizeof(float) * q.head_dim, 0));
    for (int i = begin; i < end; ++i) {
      const int token = i / heads, head = i % heads;
      const float* cos = q.cos + q.positions[token] * q.half;
      const float* sin = q.sin + q.positions[token] * q.half;
      if (head < q.heads) {
        float* x = q.x + token * q.x_stride + static_cast<std::ptrdiff_t>(head) * q.head_dim;
        rotate_head(x, x, cos, sin, q.half, q.interleaved != 0);
      } else if (head < q.heads + a.kv.kv_heads) {
        const int kv_head = head - q.heads;
        const float* x = a.kv.k + token * a.kv.k_stride + static_cast<std::ptrdiff_t>(kv_head) * q.head_dim;
        std::memcpy(key, x, sizeof(float) * q.head_dim);
        rotate_head(x, key, cos, sin, q.half, q.interleaved != 0);
        writer.key(token, kv_head, key);
      } else {
        writer.value(token, head - q.heads - a.kv.kv_heads);
      }
    }
  });
}

}  // namespace

void write_cache(const CacheWriteArgs& a, Team& team) {
  if (a.type == Element::kF32) return write_cache_as<SingleEntries<F32>>(a, team);
  if (a.type == Element::kBF16) return write_cache_as<PairedEntries>(a, team);
  if (a.type == Element::kInt8) return write_cache_as<CodeEntries>(a, team);
  write_cache_as<SingleEntries<F16>>(a, team);
}

void rotate_and_cache(const RotateAndCacheArgs& a, Team& team) {
  if (a.kv.type == Element::kF32) return rotate_and_cache_as<SingleEntries<F32>>(a, team);
  if (a.kv.type == Element::kBF16) return rotate_and_cache_as<PairedEntries>(a, team);
  if (a.kv.type == Element::kInt8) return rotate_and_cache_as<CodeEntries>(a, team);
  rotate_and_cache_as<SingleEntries<F16>>(a, team);
}

}  // namespace sage::SAGE_ISA
