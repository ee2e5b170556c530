// Paged attention and the cache it reads.
//
// A row is one query token of one head. It reads its context in splits of
// kSplit tokens at fixed places and merges their softmaxes in order (online
// softmax, Milakov and Gimelshein 2018). A score is one chain of fused
// multiply-adds over the head, a sum of values one chain over the tokens. What
// a row may not see has the weight 0 exactly, so neither chunking nor the other
// rows of a tile change a bit.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "tile.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int kItemRows = 48;  // rows that share one pass over keys and values
constexpr int kKeyGroups = 4;  // groups of sixteen keys turned at once
constexpr float kNone = -__builtin_inff();

// Sixteen entries of sixteen keys, turned: out[d][key] with rows of kLanes
// floats. `keys` are their first entries.
#if defined(__AVX2__)
SAGE_INLINE __m256 load8(F32, const float* p) { return _mm256_loadu_ps(p); }
SAGE_INLINE __m256 load8(F16, const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SAGE_INLINE __m256 load8(BF16, const std::uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

template <class E>
SAGE_INLINE void turn8(const typename E::T* const* keys, int d, float* out) {
  __m256 t[8], u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) t[i] = load8(E{}, keys[i] + d);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[2 * i] = _mm256_unpacklo_ps(t[2 * i], t[2 * i + 1]);
    u[2 * i + 1] = _mm256_unpackhi_ps(t[2 * i], t[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    t[4 * i] = _mm256_shuffle_ps(u[4 * i], u[4 * i + 2], 0x44);
    t[4 * i + 1] = _mm256_shuffle_ps(u[4 * i], u[4 * i + 2], 0xee);
    t[4 * i + 2] = _mm256_shuffle_ps(u[4 * i + 1], u[4 * i + 3], 0x44);
    t[4 * i + 3] = _mm256_shuffle_ps(u[4 * i + 1], u[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * kLanes, _mm256_permute2f128_ps(t[i], t[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * kLanes, _mm256_permute2f128_ps(t[i], t[i + 4], 0x31));
  }
}

template <class E>
SAGE_INLINE void turn(const typename E::T* const* keys, int d, float* out) {
  for (int half = 0; half < kLanes; half += 8) {
    turn8<E>(keys + half, d, out + half);
    turn8<E>(keys + half, d + 8, out + 8 * kLanes + half);
  }
}
#else
template <class E>
SAGE_INLINE void turn(const typename E::T* const* keys, int d, float* out) {
  for (int i = 0; i < kLanes; ++i) {
    for (int key = 0; key < kLanes; ++key) out[i * kLanes + key] = E::get(keys[key][d + i]);
  }
}
#endif

// Up to kItemRows rows of one request and one KV head: row = token * group +
// head within the group.
template <class E>
struct Item {
  using T = typename E::T;

  const AttentionArgs& a;
  const T* keys;  // plane of the cache, first block of this KV head
  const T* values;
  const std::int32_t* table;
  int first_row = 0;
  int rows = 0;
  int group = 0;
  int kv_head = 0;
  int first_token = 0;  // of the request, in q
  int first_position = 0;

  float* q;        // [rows, head_dim]
  float* turned;   // [kKeyGroups][head_dim][kLanes]
  float* weights;  // [rows, kSplit]
  float* sums;     // [rows, head_dim]
  float* peaks;    // [rows]
  float* totals;   // [rows]
  float* decays;   // [rows]

  int position(int row) const { return first_position + (first_row + row) / group; }
  int low(int row) const {
    const int high = position(row) + 1;
    return a.window > 0 && high > a.window ? high - a.window : 0;
  }
  std::ptrdiff_t row_offset(int row, std::ptrdiff_t token_stride) const {
    const int index = first_row + row;
    return (first_token + index / group) * token_stride +
           static_cast<std::ptrdiff_t>(kv_head * group + index % group) * a.head_dim;
  }
  SAGE_MEMBER const T* entry(const T* plane, int token) const {
    const std::int64_t block = table[token / a.block_size];
    return plane + (block * a.kv_heads * a.block_size + token % a.block_size) * a.head_dim;
  }

  // Asks for kLanes entries of a plane, from `token` on and below `end`: blocks lie anywhere, so nobody else foresees
  // them.
  SAGE_MEMBER void fetch(const T* plane, int token, int end) const {
    const int stop = token + kLanes < end ? token + kLanes : end;
    for (; token < stop; ++token) {
      const auto* line = reinterpret_cast<const char*>(entry(plane, token));
      for (int b = 0; b < a.head_dim * static_cast<int>(sizeof(T)); b += 64) __builtin_prefetch(line + b, 0, 2);
    }
  }

  static std::size_t floats(int head_dim) {
    return static_cast<std::size_t>(kItemRows) * (2 * head_dim + kSplit + 3) +
           static_cast<std::size_t>(kKeyGroups) * kLanes * head_dim;
  }

  void place(float* memory) {
    const auto take = [&](int count) {
      float* start = memory;
      memory += count;
      return start;
    };
    turned = take(kKeyGroups * kLanes * a.head_dim);
    q = take(kItemRows * a.head_dim);
    sums = take(kItemRows * a.head_dim);
    weights = take(kItemRows * kSplit);
    peaks = take(kItemRows);
    totals = take(kItemRows);
    decays = take(kItemRows);
    for (int r = 0; r < rows; ++r) {
      std::memcpy(q + r * a.head_dim, a.q + row_offset(r, a.q_stride), sizeof(float) * a.head_dim);
      peaks[r] = kNone;
      totals[r] = 0.0f;
    }
    std::memset(sums, 0, sizeof(float) * rows * a.head_dim);
  }

  // weights[r][j] = q[r] . key[start + j] for j from `begin` to `end`, in whole
  // groups.
  void score(int start, int begin, int end, int last) const {
    for (int j = begin / kLanes * kLanes; j < end; j += kKeyGroups * kLanes) {
      const int groups = end - j < kKeyGroups * kLanes ? (end - j + kLanes - 1) / kLanes : kKeyGroups;
      for (int g = 0; g < groups; ++g) {
        const T* sixteen[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int token = j + g * kLanes + i;  // beyond the ends any key will do: its score is dropped
          sixteen[i] = entry(keys, start + (token < begin ? begin : token < end ? token : end - 1));
        }
        fetch(values, start + j + g * kLanes, start + end);
        fetch(keys, start + j + (g + kKeyGroups) * kLanes, last);
        float* out = turned + g * kLanes * a.head_dim;
        for (int d = 0; d < a.head_dim; d += kLanes) turn<E>(sixteen, d, out + d * kLanes);
      }
      each_tile(rows, [&](int first, int count) {
        with_rows(count, [&]<int kRows>() {
          constexpr int kWideGroups = kRows == 1 ? kKeyGroups : 1;
          int g = 0;
          for (; g + kWideGroups <= groups; g += kWideGroups) score_tile<kRows, kWideGroups>(first, j, g);
          for (; g < groups; ++g) score_tile<kRows, 1>(first, j, g);
        });
      });
    }
  }

  template <int kRows, int kGroups>
  SAGE_MEMBER void score_tile(int first, int j, int g) const {
    V16 dots[kRows][kGroups];
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kGroups; ++b) dots[r][b] = set1(0.0f);
    }
    const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(kLanes) * a.head_dim;
    multiply<F32, kRows, kGroups, 0>(dots, q + first * a.head_dim, a.head_dim, turned + g * plane, {kLanes, plane},
                                     a.head_dim);
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kGroups; ++b) store(weights + (first + r) * kSplit + j + (g + b) * kLanes, dots[r][b]);
    }
  }

  // Turns the scores of one row into weights against its new peak; what it may
  // not see gets 0.
  void soften(int row, int start, int begin, int end) const {
    float* w = weights + row * kSplit;
    const int first = begin / kLanes * kLanes;
    const int last = (end + kLanes - 1) / kLanes * kLanes;
    const int visible_begin = low(row) - start > begin ? low(row) - start : begin;
    const int visible_end = position(row) + 1 - start < end ? position(row) + 1 - start : end;
    decays[row] = 1.0f;
    if (visible_begin >= visible_end) {
      for (int j = first; j < last; j += kLanes) store(w + j, set1(0.0f));
      return;
    }
    const V16 scale = set1(a.scale);
    for (int j = first; j < last; j += kLanes) {
      V16 score = load(w + j) * scale;
      if (a.soft_cap > 0.0f) score = set1(a.soft_cap) * tanh(score / set1(a.soft_cap));
      store(w + j, score);
    }
    for (int j = first; j < visible_begin; ++j) w[j] = kNone;
    for (int j = visible_end; j < last; ++j) w[j] = kNone;
    V16 best = set1(kNone);
    for (int j = first; j < last; j += kLanes) best = max(load(w + j), best);
    const float top = reduce_max(best);
    const float peak = top > peaks[row] ? top : peaks[row];
    V16 total = set1(0.0f);
    for (int j = first; j < last; j += kLanes) {
      const V16 weight = exp(load(w + j) - set1(peak));
      store(w + j, weight);
      total = total + weight;
    }
    float lanes[kLanes];
    store(lanes, exp(set1(peaks[row] - peak)));
    decays[row] = lanes[0];
    totals[row] = totals[row] * lanes[0] + reduce_add(total);
    peaks[row] = peak;
  }

  // sums[r] = sums[r] * decay[r] + weights[r] . values
  void gather(int start, int begin, int end) const {
    each_tile(rows, [&](int first, int count) {
      with_rows(count, [&]<int kRows>() {
        constexpr int kGroups = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
        int d = 0;
        for (; d + kGroups * kLanes <= a.head_dim; d += kGroups * kLanes) {
          gather_tile<kRows, kGroups>(first, d, start, begin, end);
        }
        for (; d < a.head_dim; d += kLanes) gather_tile<kRows, 1>(first, d, start, begin, end);
      });
    });
  }

  template <int kRows, int kGroups>
  SAGE_MEMBER void gather_tile(int first, int d, int start, int begin, int end) const {
    V16 state[kRows][kGroups];
    float* out = sums + first * a.head_dim + d;
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kGroups; ++b) {
        state[r][b] = load(out + r * a.head_dim + b * kLanes) * set1(decays[first + r]);
      }
    }
    for (int j = begin; j < end;) {
      const int left = a.block_size - (start + j) % a.block_size;
      const int run = left < end - j ? left : end - j;
      multiply<E, kRows, kGroups, 0>(state, weights + first * kSplit + j, kSplit, entry(values, start + j) + d,
                                     {a.head_dim, kLanes}, run);
      j += run;
    }
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kGroups; ++b) store(out + r * a.head_dim + b * kLanes, state[r][b]);
    }
  }

  void attend() const {
    const int lowest = low(0);
    const int highest = position(rows - 1) + 1;
    for (int start = lowest / kSplit * kSplit; start < highest; start += kSplit) {
      const int begin = lowest > start ? lowest - start : 0;
      const int end = highest - start < kSplit ? highest - start : kSplit;
      score(start, begin, end, highest);
      for (int r = 0; r < rows; ++r) soften(r, start, begin, end);
      gather(start, begin, end);
    }
    for (int r = 0; r < rows; ++r) {
      const V16 total = set1(totals[r]);
      float* out = a.out + row_offset(r, static_cast<std::ptrdiff_t>(a.heads) * a.head_dim);
      for (int d = 0; d < a.head_dim; d += kLanes) store(out + d, load(sums + r * a.head_dim + d) / total);
    }
  }
};

template <class E>
void attend_item(const AttentionArgs& a, int request, int first_row, int rows, int kv_head) {
  const auto* cache = static_cast<const typename E::T*>(a.cache);
  const std::int64_t block = static_cast<std::int64_t>(a.block_size) * a.head_dim;
  const int first_token = a.query_start_loc[request];
  const int tokens = a.query_start_loc[request + 1] - first_token;
  Item<E> item{a};
  item.keys = cache + kv_head * block;
  item.values = item.keys + a.num_blocks * a.kv_heads * block;
  item.table = a.block_tables + static_cast<std::ptrdiff_t>(request) * a.table_width;
  item.first_row = first_row;
  item.rows = rows;
  item.group = a.heads / a.kv_heads;
  item.kv_head = kv_head;
  item.first_token = first_token;
  item.first_position = a.context_lens[request] - tokens;
  item.place(static_cast<float*>(scratch(Item<E>::floats(a.head_dim) * sizeof(float), 0)));
  item.attend();
}

template <class E>
void attention_as(const AttentionArgs& a, Team& team) {
  const int group = a.heads / a.kv_heads;
  const auto rows_of = [&](int r) { return (a.query_start_loc[r + 1] - a.query_start_loc[r]) * group; };
  const auto tiles_of = [&](int r) { return (rows_of(r) + kItemRows - 1) / kItemRows; };
  int tiles = 0;
  for (int r = 0; r < a.requests; ++r) {
    tiles += tiles_of(r);
  }
  const int items = tiles * a.kv_heads;
  team.each(items, [&](int index) {
    // The last tiles of a request read most; starting with them keeps the
    // threads busy to the end.
    int tile = tiles - 1 - index / a.kv_heads;
    int request = 0;
    for (; tile >= tiles_of(request); ++request) tile -= tiles_of(request);
    const int first = tile * kItemRows;
    const int left = rows_of(request) - first;
    attend_item<E>(a, request, first, left < kItemRows ? left : kItemRows, index % a.kv_heads);
  });
}

template <class E>
void write_cache_as(const CacheWriteArgs& a, Team& team) {
  auto* cache = static_cast<typename E::T*>(a.cache);
  const std::int64_t plane = a.num_blocks * a.kv_heads * a.block_size * a.head_dim;
  team.ranges(a.tokens, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const std::int64_t slot = a.slot_mapping[t];
      if (slot < 0) continue;
      for (int h = 0; h < a.kv_heads; ++h) {
        const std::int64_t place =
            ((slot / a.block_size * a.kv_heads + h) * a.block_size + slot % a.block_size) * a.head_dim;
        const float* k = a.k + t * a.k_stride + static_cast<std::ptrdiff_t>(h) * a.head_dim;
        const float* v = a.v + t * a.v_stride + static_cast<std::ptrdiff_t>(h) * a.head_dim;
        for (int d = 0; d < a.head_dim; ++d) cache[place + d] = E::put(k[d]);
        for (int d = 0; d < a.head_dim; ++d) cache[plane + place + d] = E::put(v[d]);
      }
    }
  });
}

}  // namespace

void attention(const AttentionArgs& a, Team& team) {
  if (a.type == Element::kF32) return attention_as<F32>(a, team);
  if (a.type == Element::kBF16) return attention_as<BF16>(a, team);
  attention_as<F16>(a, team);
}

void write_cache(const CacheWriteArgs& a, Team& team) {
  if (a.type == Element::kF32) return write_cache_as<F32>(a, team);
  if (a.type == Element::kBF16) return write_cache_as<BF16>(a, team);
  write_cache_as<F16>(a, team);
}

}  // namespace sage::SAGE_ISA
