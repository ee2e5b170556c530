// Paged attention.
//
// A row is one query token of one head. It reads its context in splits of kSplit tokens and segments of kSegment
// tokens, both at fixed places. Within a segment it carries a running softmax from split to split (online softmax,
// Milakov and Gimelshein 2018); segments are computed from nothing and merged in order (Dao et al. 2023), so that they
// may be computed by one thread or by many. A score is one chain over the head, a sum of values one chain over the
// tokens of a split. What a row may not see has the weight 0 exactly, so neither chunking nor the other rows of a tile
// change a bit.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "tile.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int kSegment = 8 * kSplit;
constexpr int kItemRows = 8 * kTileRows;  // rows that share a pass over keys and values
constexpr float kNone = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 0 within 2 ulp, exactly 0 below -126.
SAGE_INLINE V16 exp2_weight(V16 x) {
  const V16 n = round_even(x);
  const V16 r = x - n;
  V16 p = fma(set1(0x1.5bba14p-10f), r, set1(0x1.3cea88p-7f));
  p = fma(p, r, set1(0x1.c6b752p-5f));
  p = fma(p, r, set1(0x1.ebf9bcp-3f));
  p = fma(p, r, set1(0x1.62e42ap-1f));
  p = fma(p, r, set1(1.0f));
  return zero_where_less(times_power_of_two(p, n), x, set1(-126.0f));
}

SAGE_INLINE float exp2_weight(float x) {
  float lanes[kLanes];
  store(lanes, exp2_weight(set1(x)));
  return lanes[0];
}

// The softmax of a row over a part of its context: the weighted sum of the values, and behind it the peak of the
// scores (times log2 e) and the sum of the weights 2^(score - peak).
struct Record {
  float* sums;
  int head_dim;

  static std::ptrdiff_t floats(int head_dim) { return head_dim + kLanes; }
  SAGE_MEMBER float& peak() const { return sums[head_dim]; }
  SAGE_MEMBER float& total() const { return sums[head_dim + 1]; }

  SAGE_MEMBER void clear() const {
    std::memset(sums, 0, sizeof(float) * head_dim);
    peak() = kNone;
    total() = 0.0f;
  }

  // Takes in what follows.
  SAGE_MEMBER void merge(const Record& next) const {
    if (next.peak() == kNone) return;
    const float top = next.peak() > peak() ? next.peak() : peak();
    const float mine = exp2_weight(peak() - top);
    const float theirs = exp2_weight(next.peak() - top);
    for (int d = 0; d < head_dim; d += kLanes) {
      store(sums + d, fma(load(next.sums + d), set1(theirs), load(sums + d) * set1(mine)));
    }
    total() = __builtin_fmaf(next.total(), theirs, total() * mine);
    peak() = top;
  }

  SAGE_MEMBER void finish(float* out) const {
    const V16 all = set1(total());
    for (int d = 0; d < head_dim; d += kLanes) store(out + d, load(sums + d) / all);
  }
};

// Up to kItemRows rows of one request and one KV head; row = token * group + head within the group.
struct Item {
  int request;
  int kv_head;
  int first_row;
  int rows;
  int group;
  int first_token;     // of the request, in q
  int first_position;  // of that token
  int window;

  int position(int row) const { return first_position + (first_row + row) / group; }
  // What a row sees is [low, position].
  int low(int row) const {
    const int high = position(row) + 1;
    return window > 0 && high > window ? high - window : 0;
  }
  int end() const { return position(rows - 1) + 1; }
  int first_segment() const { return low(0) / kSegment; }
  int segments() const { return (end() - 1) / kSegment + 1 - first_segment(); }

  // Where a row starts in [tokens, heads, head_dim].
  std::ptrdiff_t offset(int row, std::ptrdiff_t token_stride, int head_dim) const {
    const int index = first_row + row;
    return (first_token + index / group) * token_stride +
           static_cast<std::ptrdiff_t>(kv_head * group + index % group) * head_dim;
  }
};

// All items of a call.
struct Items {
  const AttentionArgs& a;
  const int group;
  int tiles = 0;  // runs of up to kItemRows rows
  int count = 0;  // tiles times KV heads

  explicit Items(const AttentionArgs& a) : a(a), group(a.heads / a.kv_heads) {
    for (int r = 0; r < a.requests; ++r) tiles += tiles_of(r);
    count = tiles * a.kv_heads;
  }

  int rows_of(int request) const { return (a.query_start_loc[request + 1] - a.query_start_loc[request]) * group; }
  int tiles_of(int request) const { return (rows_of(request) + kItemRows - 1) / kItemRows; }

  Item item(int request, int tile, int kv_head) const {
    const int first = tile * kItemRows;
    const int left = rows_of(request) - first;
    const int first_token = a.query_start_loc[request];
    const int tokens = a.query_start_loc[request + 1] - first_token;
    return {request,
            kv_head,
            first,
            left < kItemRows ? left : kItemRows,
            group,
            first_token,
            a.context_lens[request] - tokens,
            a.window};
  }
  Item at(int index) const {
    int tile = index / a.kv_heads;
    int request = 0;
    for (; tile >= tiles_of(request); ++request) tile -= tiles_of(request);
    return item(request, tile, index % a.kv_heads);
  }

  // Calls body(item of KV head 0) for each tile.
  template <class Body>
  void each_tile(const Body& body) const {
    for (int r = 0; r < a.requests; ++r) {
      for (int tile = 0; tile < tiles_of(r); ++tile) body(item(r, tile, 0));
    }
  }
};

// Computes items in the calling thread's memory.
template <class E>
class Attend {
  using T = typename E::T;
  using Stored = typename E::Stored;
  using Word = typename E::Word;
  static constexpr int kSplitWords = kSplit / E::kStep;
  static constexpr int kChunks = kSplit / kLanes;

 public:
  Attend(const AttentionArgs& a, const Item& item)
      : a_(a),
        item_(item),
        order_(a),
        tiles_(item.rows),
        keys_(static_cast<const Stored*>(a.cache) + item.kv_head * order_.head),
        values_(keys_ + order_.plane),
        table_(a.block_tables + static_cast<std::ptrdiff_t>(item.request) * a.table_width) {
    const int words = a.head_dim / E::kStep;
    const std::ptrdiff_t records = kItemRows * Record::floats(a.head_dim);
    const int padded = (a.head_dim + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes;
    const std::ptrdiff_t wide = kHasScales<E> ? kSplit * a.head_dim / E::kStep : 0;
    auto* memory = static_cast<float*>(scratch(sizeof(float) * (2 * records + kTileRows * (kSplit + kSplitWords) +
                                                                kItemRows * words + 2 * (wide + padded) + kLanes),
                                               0));
    const auto take = [&](std::ptrdiff_t count) {
      float* start = memory;
      memory += count;
      return start;
    };
    wide_keys_ = reinterpret_cast<T*>(take(wide));
    wide_values_ = reinterpret_cast<T*>(take(wide));
    scores_ = take(kTileRows * kSplit);
    weights_ = reinterpret_cast<Word*>(take(kTileRows * kSplitWords));
    records_[0] = take(records);
    records_[1] = take(records);
    float* row = take(padded);
    auto* row_words = reinterpret_cast<Word*>(take(padded));
    q_ = reinterpret_cast<Word*>(take(kItemRows * words));
    decays_ = take(kLanes);
    std::memset(row, 0, sizeof(float) * padded);
    for (int t = 0; t < tiles_.count; ++t) {
      const int first = tiles_.first(t), size = tiles_.size(t);
      for (int r = 0; r < size; ++r) {
        std::memcpy(row, a.q + item.offset(first + r, a.q_stride, a.head_dim), sizeof(float) * a.head_dim);
        for (int d = 0; d < a.head_dim; d += kLanes * E::kStep) E::store_words(row_words + d / E::kStep, row + d);
        for (int w = 0; w < words; ++w) q_[first * words + w * size + r] = row_words[w];
      }
    }
  }

  // The whole item.
  void all() {
    const int first = item_.first_segment();
    segment(first, records_[0]);
    for (int i = 1; i < item_.segments(); ++i) {
      segment(first + i, records_[1]);
      for (int r = 0; r < item_.rows; ++r) record(records_[0], r).merge(record(records_[1], r));
    }
    for (int r = 0; r < item_.rows; ++r) record(records_[0], r).finish(out(r));
  }

  // One segment of it.
  void segment(int index, float* records) {
    for (int r = 0; r < item_.rows; ++r) record(records, r).clear();
    const int from = index * kSegment;
    const int until = from + kSegment < item_.end() ? from + kSegment : item_.end();
    const int lowest = item_.low(0) > from ? item_.low(0) : from;
    int start = lowest / kSplit * kSplit;
    find(keys_, start, until, next_keys_);
    for (; start < until; start += kSplit) {
      std::memcpy(split_keys_, next_keys_, sizeof split_keys_);
      find(values_, start, until, split_values_);
      find(keys_, start + kSplit, item_.end(), next_keys_);
      if constexpr (kHasScales<E>) widen(start, lowest, until);
      for (int t = 0; t < tiles_.count; ++t) {
        const int first = tiles_.first(t), size = tiles_.size(t);
        const int low = item_.low(first) - start, high = item_.position(first + size - 1) + 1 - start;
        const int begin = low > 0 ? low / kLanes * kLanes : 0;
        const int end = high < kSplit ? high : kSplit;
        if (begin >= end) continue;
        with_rows(size, [&]<int kRows>() {
          score<kRows>(first, begin, end);
          for (int r = 0; r < kRows; ++r) soften(record(records, first + r), first, r, start, begin, end);
          gather<kRows>(records + first * Record::floats(a_.head_dim), begin, end);
        });
      }
    }
  }

  float* out(int row) const {
    return a_.out + item_.offset(row, static_cast<std::ptrdiff_t>(a_.heads) * a_.head_dim, a_.head_dim);
  }

 private:
  Record record(float* records, int row) const { return {records + row * Record::floats(a_.head_dim), a_.head_dim}; }
  // Where each sixteen tokens of the split from `start` on stand in a plane. Those behind `until` get some address that
  // may be asked for.
  void find(const Stored* plane, int start, int until, const Stored* (&chunks)[kChunks]) const {
    for (int c = 0; c < kChunks; ++c) {
      const int token = start + c * kLanes;
      const int block = token / a_.block_size;
      const int offset = token - block * a_.block_size;
      chunks[c] = token >= until ? plane
                                 : plane + table_[block] * order_.block +
                                       (plane == keys_ ? order_.key(offset) : order_.value(offset));
    }
  }

  // Codes and scales of the tokens from `lowest` to `until`, as far as they are in the split from `start` on.
  void widen(int start, int lowest, int until) {
    constexpr std::ptrdiff_t kRow = E::kWidened;
    const std::ptrdiff_t size = kLanes * a_.head_dim;
    const auto each = [&](T* out, const Stored* const* chunks, std::ptrdiff_t step, const Stored* const* ahead,
                          std::ptrdiff_t ahead_step) {
      for (int c = lowest > start ? (lowest - start) / kLanes : 0; c < kChunks && start + c * kLanes < until; ++c) {
        for (int i = 0; i < a_.head_dim / E::kStep; ++i) {
          E::widen(chunks[c] + i * step, out + c * size + i * kRow);
          __builtin_prefetch(ahead[c] + i * ahead_step, 0, 2);
        }
      }
    };
    each(wide_keys_, split_keys_, order_.key_step(), split_values_, kRow);
    each(wide_values_, split_values_, kRow, next_keys_, order_.key_step());
    for (int c = 0; c < kChunks; ++c) {
      const int token = start + c * kLanes;
      const bool used = token + kLanes > lowest && token < until;
      const std::ptrdiff_t block = used ? table_[token / a_.block_size] * order_.block : 0;
      const std::ptrdiff_t place = block + order_.scales() + token % a_.block_size * sizeof(float);
      std::memcpy(key_scales_ + c * kLanes, keys_ + place, kLanes * sizeof(float));
      std::memcpy(value_scales_ + c * kLanes, values_ + place, kLanes * sizeof(float));
    }
    // Behind the tokens stands anything, and a weight of 0 does not undo a NaN.
    for (int i = until - start; i < kSplit; ++i) value_scales_[i] = 0.0f;
  }

  SAGE_MEMBER const T* key_columns(int chunk) const {
    if constexpr (kHasScales<E>)
      return wide_keys_ + chunk * kLanes * a_.head_dim;
    else
      return split_keys_[chunk];
  }
  SAGE_MEMBER const T* value_columns(int chunk) const {
    if constexpr (kHasScales<E>)
      return wide_values_ + chunk * kLanes * a_.head_dim;
    else
      return split_values_[chunk];
  }
  SAGE_MEMBER std::ptrdiff_t key_step() const { return kHasScales<E> ? kLanes * E::kStep : order_.key_step(); }

  // scores_[r][j] = log2(e) * score of row r and token start + j for the groups of sixteen from `begin` to `end`.
  template <int kRows>
  void score(int first, int begin, int end) const {
    constexpr int kGroups = tile_groups<E>(kRows);
    int j = begin;
    for (; j + (kGroups - 1) * kLanes < end; j += kGroups * kLanes) score_tile<kRows, kGroups>(first, j);
    for (; j < end; j += kLanes) score_tile<kRows, 1>(first, j);
  }

  template <int kRows, int kGroups>
  SAGE_MEMBER void score_tile(int first, int j) const {
    const T* columns[kGroups];
    const T* ahead[kGroups];  // their values: as many lines as a group of keys has steps
    V16 sums[kRows][kGroups];
#pragma GCC unroll 4
    for (int b = 0; b < kGroups; ++b) {
      columns[b] = key_columns(j / kLanes + b);
      ahead[b] = value_columns(j / kLanes + b);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][b] = set1(0.0f);
    }
    const int words = a_.head_dim / E::kStep;
    multiply<E, kRows, kGroups, kRows, 1>(sums, q_ + first * words, columns, key_step(), ahead, kLanes * E::kStep,
                                          words);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int b = 0; b < kGroups; ++b) {
        V16 score = sums[r][b] * set1(a_.scale);
        if constexpr (kHasScales<E>) score = score * load(key_scales_ + j + b * kLanes);
        if (a_.soft_cap > 0.0f) score = set1(a_.soft_cap) * tanh(score / set1(a_.soft_cap));
        store(scores_ + r * kSplit + j + b * kLanes, score * set1(kLog2E));
      }
    }
  }

  // Turns the scores of one row into weights against its new peak; what it may not see gets 0.
  void soften(const Record& record, int first, int r, int start, int begin, int end) const {
    constexpr int kWidth = kLanes * E::kStep;
    float* scores = scores_ + r * kSplit;
    Word* weights = weights_ + r * kSplitWords;
    begin = begin / kWidth * kWidth;
    const int padded = (end + kWidth - 1) / kWidth * kWidth;
    const int low = item_.low(first + r) - start > begin ? item_.low(first + r) - start : begin;
    const int position = item_.position(first + r) + 1 - start;
    const int high = position < end ? position : end;
    decays_[r] = 1.0f;
    if (low >= high) {
      std::memset(weights + begin / E::kStep, 0, sizeof(Word) * (padded - begin) / E::kStep);
      return;
    }
    for (int j = begin; j < low; ++j) scores[j] = kNone;
    for (int j = high; j < padded; ++j) scores[j] = kNone;
    V16 best = load(scores + begin);
    for (int j = begin + kLanes; j < padded; j += kLanes) best = max(load(scores + j), best);
    const float top = reduce_max(best);
    const float peak = top > record.peak() ? top : record.peak();
    V16 total = set1(0.0f);
    for (int j = begin; j < padded; j += kWidth) {
      for (int i = j; i < j + kWidth; i += kLanes) {
        V16 weight = exp2_weight(load(scores + i) - set1(peak));
        if constexpr (kHasScales<E>) {
          total = total + weight;
          weight = weight * load(value_scales_ + i);
        }
        store(scores + i, weight);
      }
      E::store_words(weights + j / E::kStep, scores + j);
    }
    if constexpr (!kHasScales<E>) {
      for (int j = begin; j < padded; j += kWidth) total = E::add(weights + j / E::kStep, total);
    }
    decays_[r] = exp2_weight(record.peak() - peak);
    record.total() = __builtin_fmaf(record.total(), decays_[r], reduce_add(total));
    record.peak() = peak;
  }

  // sums[r] = sums[r] * decay[r] + weights[r] . values of the tokens from `begin` to `end`
  template <int kRows>
  void gather(float* sums, int begin, int end) const {
    constexpr int kGroups = tile_groups<E>(kRows);
    int d = 0;
    for (; d + kGroups * kLanes <= a_.head_dim; d += kGroups * kLanes) {
      gather_tile<kRows, kGroups>(sums, d, begin, end);
    }
    for (; d < a_.head_dim; d += kLanes) gather_tile<kRows, 1>(sums, d, begin, end);
  }

  template <int kRows, int kGroups>
  SAGE_MEMBER void gather_tile(float* records, int d, int begin, int end) const {
    constexpr int kWords = kLanes / E::kStep;  // of sixteen tokens
    V16 sums[kRows][kGroups];
    float* out = records + d;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int b = 0; b < kGroups; ++b) {
        sums[r][b] = load(out + r * Record::floats(a_.head_dim) + b * kLanes) * set1(decays_[r]);
      }
    }
    for (int j = begin; j < end; j += kLanes) {
      const T* entry = value_columns(j / kLanes) + d * E::kStep;
      const T* next = entry;
      if constexpr (!kHasScales<E>) next = next_keys_[j / kLanes] + d / kLanes * kWords * key_step();
      const T* columns[kGroups];
      const T* ahead[kGroups];  // the next split's keys: as many lines as there are steps here
#pragma GCC unroll 4
      for (int b = 0; b < kGroups; ++b) {
        columns[b] = entry + b * kLanes * E::kStep;
        ahead[b] = next + (kHasScales<E> ? 0 : b * kWords * key_step());
      }
      const Word* words = weights_ + j / E::kStep;
      const int tokens = end - j < kLanes ? end - j : kLanes;
      multiply<E, kRows, kGroups, 1, kSplitWords>(sums, words, columns, order_.value_step(), ahead,
                                                  kHasScales<E> ? 0 : key_step(), tokens / E::kStep);
      if (tokens % E::kStep != 0) {
        // The last token's partner holds anything: a weight of 0 does not undo a NaN.
        alignas(64) T single[kGroups][kLanes * E::kStep] = {};
#pragma GCC unroll 4
        for (int b = 0; b < kGroups; ++b) {
          columns[b] += tokens / E::kStep * order_.value_step();
          for (int i = 0; i < kLanes; ++i) single[b][i * E::kStep] = columns[b][i * E::kStep];
          columns[b] = single[b];
        }
        multiply<E, kRows, kGroups, 1, kSplitWords>(sums, words + tokens / E::kStep, columns, 0, columns, 0, 1);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int b = 0; b < kGroups; ++b) {
        store(out + r * Record::floats(a_.head_dim) + b * kLanes, sums[r][b]);
      }
    }
  }

  const AttentionArgs& a_;
  const Item& item_;
  const Order<E> order_;
  const RowTiles tiles_;
  const Stored* keys_;  // of this KV head in the first block
  const Stored* values_;
  const std::int32_t* table_;
  float* scores_;      // [kTileRows, kSplit]
  Word* weights_;      // [kTileRows, kSplitWords]
  float* records_[2];  // [rows]
  Word* q_;            // tile by tile, [words, rows]
  float* decays_;      // [kTileRows]
  const Stored* split_keys_[kChunks];
  const Stored* split_values_[kChunks];
  const Stored* next_keys_[kChunks];  // of the next split
  T* wide_keys_;                      // [kChunks, head_dim / kStep, kLanes, kStep]: the split's codes
  T* wide_values_;                    // [kChunks, kLanes / kStep, head_dim, kStep]
  float key_scales_[kHasScales<E> ? kSplit : 1];
  float value_scales_[kHasScales<E> ? kSplit : 1];
};

// Whether a thread that took the longest item would keep the others waiting.
bool worth_cutting(const Items& items, int threads) {
  if (threads == 1) return false;
  double all = 0.0, longest = 0.0;
  items.each_tile([&](const Item& item) {
    const double work = static_cast<double>(item.rows) * (item.end() - item.low(0));
    all += work;
    if (work > longest && item.segments() > 1) longest = work;
  });
  return longest * threads * 4 > all * items.a.kv_heads;
}

// Every segment of every item by itself, then the merging.
template <class E>
void attend_in_segments(const Items& items, Team& team) {
  const AttentionArgs& a = items.a;
  int units = 0, rows = 0;
  items.each_tile([&](const Item& item) {
    units += item.segments();
    if (item.rows > rows) rows = item.rows;
  });
  const std::ptrdiff_t unit = rows * Record::floats(a.head_dim);
  auto* records = static_cast<float*>(team.shared(sizeof(float) * unit * units * a.kv_heads));
  team.each(units * a.kv_heads, [&](int index) {
    int left = index / a.kv_heads;
    items.each_tile([&](Item item) {
      if (left >= 0 && left < item.segments()) {
        item.kv_head = index % a.kv_heads;
        Attend<E>(a, item).segment(item.first_segment() + left, records + index * unit);
      }
      left -= item.segments();
    });
  });
  team.ranges(items.count, [&](int begin, int end) {
    int first = 0;  // segment of the tile
    int number = 0;
    items.each_tile([&](Item item) {
      for (item.kv_head = 0; item.kv_head < a.kv_heads; ++item.kv_head, ++number) {
        if (number < begin || number >= end) continue;
        for (int r = 0; r < item.rows; ++r) {
          const auto part = [&](int i) {
            const std::ptrdiff_t place = static_cast<std::ptrdiff_t>(first + i) * a.kv_heads + item.kv_head;
            return Record{records + place * unit + r * Record::floats(a.head_dim), a.head_dim};
          };
          for (int i = 1; i < item.segments(); ++i) part(0).merge(part(i));
          part(0).finish(a.out + item.offset(r, static_cast<std::ptrdiff_t>(a.heads) * a.head_dim, a.head_dim));
        }
      }
      first += item.segments();
    });
  });
}

template <class E>
void attention_as(const AttentionArgs& a, Team& team) {
  const Items items(a);
  if (worth_cutting(items, team.size)) return attend_in_segments<E>(items, team);
  team.each(items.count, [&](int index) {
    // The last tiles of a request read most; starting with them keeps the threads busy to the end.
    const Item item = items.at(items.count - 1 - index);
    Attend<E>(a, item).all();
  });
}

}  // namespace

void attention(const AttentionArgs& a, Team& team) {
  if (a.type == Element::kF32) return attention_as<SingleEntries<F32>>(a, team);
  if (a.type == Element::kBF16) return attention_as<PairedEntries>(a, team);
  if (a.type == Element::kInt8) return attention_as<CodeEntries>(a, team);
  attention_as<SingleEntries<F16>>(a, team);
}

}  // namespace sage::SAGE_ISA
