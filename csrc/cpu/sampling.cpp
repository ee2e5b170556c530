// Choosing tokens from logits, without sorting the vocabulary.
//
// The definition is sagellm_backend/reference/sampling.py. A row is looked at through the maxima of its blocks: where
// only the most probable tokens matter, the blocks below them are never read again. Tokens that matter are counted and
// weighed in bins of falling probability; only the bins in which a filter cuts or the draw falls are put in order. So
// the cost is that of one pass for the maxima and, where the filters need the sum of all weights, one with
// exponentials.
//
// Sums run over blocks, bins and tokens in one order, on one thread: results do not depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int kBlock = 256;  // columns whose maximum is taken before anybody looks where it stands
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();  // of the logits that have a probability

struct Best {
  float value;
  std::int64_t index;
};

SAGE_INLINE float block_max(const float* x, int count) {
  V16 best = set1(-kInfinity);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) best = max(load(x + i), best);
  float top = reduce_max(best);
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// Over the columns [first, last).
Best best_of(const float* row, int first, int last) {
  float top = -kInfinity;
  int block = first;
  for (int i = first; i < last; i += kBlock) {
    const float value = block_max(row + i, last - i < kBlock ? last - i : kBlock);
    if (value > top) {
      top = value;
      block = i;
    }
  }
  for (int i = block; i < last; ++i) {
    if (row[i] == top) return {top, i};
  }
  return {-kInfinity, first};  // nothing but NaN
}

// ---- drawing
// ---------------------------------------------------------------------------------------------------------

constexpr int kNucleusBlocks = 64;  // blocks searched first for a nucleus; most lie in far fewer

// One row and what is wanted of it.
struct Row {
  const float* x;
  int size;
  int blocks;
  bool is_greedy;
  bool is_ordered;  // filters that want tokens in falling order
  int top_k;        // 0 = off
  double top_p;     // 1 = off
  double uniform;
  float temperature;
  float min_p;    // the least weight that stays; 0 = off
  float* maxima;  // [blocks]
  double* sums;   // [blocks] of weights

  bool needs_sums() const { return !is_greedy && (!is_ordered || top_k == 0); }
};

// The least float that is not below `value`: comparing floats with it is comparing them with the double.
float round_up(double value) {
  const auto nearest = static_cast<float>(value);
  return nearest < value ? std::nextafterf(nearest, kInfinity) : nearest;
}

Row row_of(const SampleArgs& a, int r, float* maxima, double* sums) {
  const double* wanted = a.wanted + static_cast<std::ptrdiff_t>(r) * kSampleWidth;
  Row row{};
  row.x = a.x + r * a.x_stride;
  row.size = a.size;
  row.blocks = (a.size + kBlock - 1) / kBlock;
  row.temperature = static_cast<float>(wanted[0]);
  row.is_greedy = wanted[0] == 0.0;
  row.top_k = wanted[1] < a.size ? static_cast<int>(wanted[1]) : 0;
  row.top_p = wanted[2];
  row.min_p = round_up(wanted[3]);
  row.uniform = wanted[4];
  row.is_ordered = row.top_k > 0 || row.top_p < 1.0;
  row.maxima = maxima;
  row.sums = sums;
  return row;
}

SAGE_INLINE int block_size(const Row& row, int block) {
  return row.size - block * kBlock < kBlock ? row.size - block * kBlock : kBlock;
}

void find_maxima(const Row& row, int first, int last) {
  for (int b = first; b < last; ++b) row.maxima[b] = block_max(row.x + b * kBlock, block_size(row, b));
}

float peak_of(const Row& row) {
  float peak = -kInfinity;
  for (int b = 0; b < row.blocks; ++b) peak = row.maxima[b] > peak ? row.maxima[b] : peak;
  return peak;
}

// The first of the largest values; 0 where nothing is larger than -inf.
int first_largest(const Row& row, float peak) {
  for (int b = 0; b < row.blocks; ++b) {
    if (row.maxima[b] != peak) continue;
    for (int i = b * kBlock; i < row.size; ++i) {
      if (row.x[i] == peak) return peak == -kInfinity ? 0 : i;
    }
  }
  return 0;
}

SAGE_INLINE V16 load_or_lowest(const float* x, int count) {
  if (count >= kLanes) return load(x);
  alignas(64) float padded[kLanes];
  for (int i = 0; i < kLanes; ++i) padded[i] = i < count ? x[i] : -kInfinity;
  return load(padded);
}

// (logit - peak) / temperature. NaN becomes a logit without probability.
SAGE_INLINE V16 scaled(V16 x, V16 peak, V16 temperature) { return max((x - peak) / temperature, set1(-kInfinity)); }

void sum_weights(const Row& row, float peak, int first, int last) {
  const V16 top = set1(peak);
  const V16 temperature = set1(row.temperature);
  const V16 least = set1(row.is_ordered ? 0.0f : row.min_p);
  for (int b = first; b < last; ++b) {
    const float* x = row.x + b * kBlock;
    const int count = block_size(row, b);
    V16 even = set1(0.0f);
    V16 odd = set1(0.0f);
    for (int i = 0; i < count; i += 2 * kLanes) {
      const V16 w = exp(scaled(load_or_lowest(x + i, count - i), top, temperature));
      even = even + zero_where_less(w, w, least);
      if (i + kLanes >= count) break;
      const V16 v = exp(scaled(load_or_lowest(x + i + kLanes, count - i - kLanes), top, temperature));
      odd = odd + zero_where_less(v, v, least);
    }
    row.sums[b] = static_cast<double>(reduce_add(even + odd));
  }
}

// In order of token ids: first the block, then the token in it.
int draw_unordered(const Row& row, float peak) {
  double total = 0.0;
  for (int b = 0; b < row.blocks; ++b) total += row.sums[b];
  const double target = row.uniform * total;
  double before = 0.0;
  int block = 0;
  for (int b = 0; b < row.blocks; ++b) {
    if (row.sums[b] == 0.0) continue;
    block = b;  // the last with a weight, where rounding puts the target on the very end
    if (before + row.sums[b] > target) break;
    before += row.sums[b];
  }
  const double share = (target - before) / row.sums[block];
  alignas(64) float weights[kBlock];
  const int count = block_size(row, block);
  double inside = 0.0;
  for (int i = 0; i < count; i += kLanes) {
    const V16 x = load_or_lowest(row.x + block * kBlock + i, count - i);
    const V16 w = exp(scaled(x, set1(peak), set1(row.temperature)));
    store(weights + i, zero_where_less(w, w, set1(row.min_p)));
  }
  for (int i = 0; i < count; ++i) inside += weights[i];
  double cumulative = 0.0;
  int last = 0;
  for (int i = 0; i < count; ++i) {
    if (weights[i] == 0.0f) continue;
    last = i;
    cumulative += weights[i];
    if (cumulative > share * inside) break;
  }
  return block * kBlock + last;
}

// A token in falling order, and the tokens up to and including it.
struct Place {
  int count;
  double weight;
  int id;
};

// The tokens of a row whose logits are at least `floor`, in bins of rising probability.
class Candidates {
 public:
  Candidates(const Row& row, float peak, float floor) : row_(row), peak_(peak), floor_(floor) {
    const std::size_t places = static_cast<std::size_t>(row.blocks) * kBlock;
    auto* memory = static_cast<char*>(
        scratch(sizeof(Bin) * kBins + sizeof(Token) * places + sizeof(int) * row.blocks + sizeof(Place16) * places, 0));
    bins_ = reinterpret_cast<Bin*>(memory);
    some_ = reinterpret_cast<Token*>(bins_ + kBins);
    blocks_ = reinterpret_cast<int*>(some_ + places);
    bin_of_ = reinterpret_cast<Place16*>(blocks_ + row.blocks);
    std::fill_n(bins_, kBins, Bin{0.0, 0});
    for (int b = 0; b < row.blocks; ++b) {
      if (row.maxima[b] >= floor) take(b);
    }
    for (int b = 0; b < kBins; ++b) count_ += bins_[b].count;
  }

  int count() const { return count_; }

  // How many have a weight of at least `min_p`.
  int likely(float min_p) const {
    int count = 0;
    alignas(64) float weights[kLanes];
    for (int t = 0; t < taken_; ++t) {
      const int size = block_size(row_, blocks_[t]);
      for (int i = 0; i < size; i += kLanes) {
        const V16 values = load_or_lowest(row_.x + blocks_[t] * kBlock + i, size - i);
        store(weights, zero_where_less(weights_of(values), values, set1(floor_)));
        for (int j = 0; j < kLanes; ++j) count += weights[j] >= min_p;
      }
    }
    return count;
  }

  // The first place in falling order where enough(count, weight) holds, which once true stays true; the last place if
  // there is none. `with_equals`: the last place with the same value instead.
  template <class Enough>
  Place first(const Enough& enough, bool with_equals = false) {
    Place place{0, 0.0, 0};
    int bin = kBins - 1;
    for (; bin > kNothing; --bin) {
      const int count = place.count + bins_[bin].count;
      const double weight = place.weight + bins_[bin].weight;
      if (count == count_ || enough(count, weight)) break;
      place.count = count;
      place.weight = weight;
    }
    if (bin != ordered_) put_in_order(bin);
    for (int i = 0; i < size_; ++i) {
      place = {place.count + 1, place.weight + some_[i].weight, some_[i].id};
      if (!enough(place.count, place.weight)) continue;
      if (!with_equals || i + 1 == size_ || some_[i + 1].value != some_[i].value) break;
    }
    return place;
  }

 private:
  using Place16 = std::uint16_t;
  struct Bin {
    double weight;
    int count;
  };
  struct Token {
    float value;
    float weight;
    int id;
  };
  static constexpr int kNothing = 0;  // the bin of what is below the floor
  static constexpr int kBins = 2048;
  static constexpr float kBinsPerNat = (kBins - 8) / 88.0f;  // e^-88 is 0 for exp()

  V16 weights_of(V16 values) const { return exp(scaled(values, set1(peak_), set1(row_.temperature))); }

  void take(int block) {
    const float* x = row_.x + block * kBlock;
    const int size = block_size(row_, block);
    Place16* bin_of = bin_of_ + taken_ * kBlock;
    alignas(64) float weights[kLanes];
    alignas(64) float places[kLanes];
    for (int i = 0; i < kBlock; i += kLanes) {
      const V16 values = max(load_or_lowest(x + i, size - i), set1(-kInfinity));
      if (!(reduce_max(values) >= floor_)) {
        std::fill_n(bin_of + i, kLanes, Place16{kNothing});
        continue;
      }
      const V16 nats = scaled(values, set1(peak_), set1(row_.temperature));
      const V16 place = max(nats * set1(kBinsPerNat) + set1(kBins - 1), set1(1.0f));
      store(places, zero_where_less(place, values, set1(floor_)));
      store(weights, exp(nats));
      for (int j = 0; j < kLanes; ++j) {
        const int bin = static_cast<int>(places[j]);
        bin_of[i + j] = static_cast<Place16>(bin);
        if (bin == kNothing) continue;
        bins_[bin].weight += weights[j];
        bins_[bin].count += 1;
      }
    }
    blocks_[taken_++] = block;
  }

  // Puts the tokens of a bin into some_, in falling order, equals by rising id.
  void put_in_order(int bin) {
    constexpr int kGlance = 64;
    ordered_ = bin;
    size_ = 0;
    for (int p = 0; p < taken_ * kBlock; p += kGlance) {
      int any = 0;
      for (int i = 0; i < kGlance; ++i) any |= bin_of_[p + i] == bin;
      if (any == 0) continue;
      for (int i = p; i < p + kGlance; ++i) {
        if (bin_of_[i] != bin) continue;
        const int id = blocks_[i / kBlock] * kBlock + i % kBlock;
        some_[size_++] = {row_.x[id], 0.0f, id};
      }
    }
    alignas(64) float lanes[kLanes];
    for (int i = 0; i < size_; i += kLanes) {
      const int count = size_ - i < kLanes ? size_ - i : kLanes;
      for (int j = 0; j < kLanes; ++j) lanes[j] = j < count ? some_[i + j].value : peak_;
      store(lanes, weights_of(load(lanes)));
      for (int j = 0; j < count; ++j) some_[i + j].weight = lanes[j];
    }
    const auto before = [](const Token& a, const Token& b) {
      return a.value > b.value || (a.value == b.value && a.id < b.id);
    };
    // A bin of equals, the worst case of many tokens in one bin, comes in order.
    if (!std::is_sorted(some_, some_ + size_, before)) std::sort(some_, some_ + size_, before);
  }

  const Row& row_;
  float peak_;
  float floor_;
  Bin* bins_;        // [kBins]
  Token* some_;      // [size_] the tokens of the bin ordered_
  int* blocks_;      // [taken_] those that reach the floor
  Place16* bin_of_;  // [taken_ * kBlock]
  int taken_ = 0;
  int count_ = 0;
  int ordered_ = kNothing;
  int size_ = 0;
};

// A value that at least `count` tokens reach, a maximum of a block for each, or one below all that matter.
float reached_by(const Row& row, int count) {
  if (count > row.blocks) return kLowest;
  auto* maxima = static_cast<float*>(scratch(sizeof(float) * row.blocks, 1));
  std::copy_n(row.maxima, row.blocks, maxima);
  std::nth_element(maxima, maxima + count - 1, maxima + row.blocks, [](float a, float b) { return a > b; });
  return std::max(maxima[count - 1], kLowest);
}

// In falling order, among the tokens that top-k, top-p and min-p leave.
int draw_ordered(const Row& row, float peak) {
  float floor = reached_by(row, row.top_k > 0 ? row.top_k : kNucleusBlocks);
  for (;; floor = kLowest) {
    Candidates candidates(row, peak, floor);
    int most = candidates.count();
    double total = 0.0;  // of what top-k leaves
    if (row.top_k > 0) {
      const Place last = candidates.first([&](int count, double) { return count >= row.top_k; }, true);
      most = last.count;
      total = last.weight;
    } else {
      for (int b = 0; b < row.blocks; ++b) total += row.sums[b];
    }
    const int likely = row.min_p > 0.0f ? candidates.likely(row.min_p) : candidates.count();
    const double nucleus = row.top_p < 1.0 ? row.top_p * total : std::numeric_limits<double>::infinity();
    const int limit = likely < most ? likely : most;
    const Place end = candidates.first([&](int count, double weight) { return count >= limit || weight >= nucleus; });
    const bool is_whole = row.top_k > 0 || limit < candidates.count() || end.weight >= nucleus;
    if (!is_whole && floor > kLowest) continue;  // the nucleus reaches below the floor
    const double target = row.uniform * end.weight;
    // At the end where rounding puts the target on it, but never at a token without weight.
    return candidates
        .first([&](int count, double weight) { return weight > target || weight >= end.weight || count >= end.count; })
        .id;
  }
}

std::int64_t choose(const Row& row) {
  const float peak = peak_of(row);
  if (row.is_greedy || !(peak > -kInfinity && peak < kInfinity)) return first_largest(row, peak);
  return row.is_ordered ? draw_ordered(row, peak) : draw_unordered(row, peak);
}

}  // namespace

void argmax(const ArgmaxArgs& a, Team& team) {
  // Many rows: a row a thread. Few: the threads share each row, and the lowest of equal columns wins.
  if (a.rows >= 4 * team.size) {
    team.ranges(a.rows, [&](int begin, int end) {
      for (int r = begin; r < end; ++r) a.best[r] = best_of(a.x + r * a.x_stride, 0, a.size).index;
    });
    return;
  }
  auto* parts = static_cast<Best*>(team.shared(sizeof(Best) * static_cast<std::size_t>(team.size) * a.rows));
  const int first = static_cast<int>(static_cast<long long>(a.size) * team.rank / team.size);
  const int last = static_cast<int>(static_cast<long long>(a.size) * (team.rank + 1) / team.size);
  for (int r = 0; r < a.rows; ++r) parts[r * team.size + team.rank] = best_of(a.x + r * a.x_stride, first, last);
  team.barrier();
  if (team.rank == 0) {
    for (int r = 0; r < a.rows; ++r) {
      Best best = parts[r * team.size];
      for (int t = 1; t < team.size; ++t) {
        if (parts[r * team.size + t].value > best.value) best = parts[r * team.size + t];
      }
      a.best[r] = best.value == -kInfinity ? 0 : best.index;
    }
  }
  team.barrier();
}

void sample(const SampleArgs& a, Team& team) {
  const int blocks = (a.size + kBlock - 1) / kBlock;
  auto* sums = static_cast<double*>(team.shared((sizeof(double) + sizeof(float)) * blocks * a.rows));
  auto* maxima = reinterpret_cast<float*>(sums + static_cast<std::ptrdiff_t>(blocks) * a.rows);
  const auto row_at = [&](int r) {
    const std::ptrdiff_t start = static_cast<std::ptrdiff_t>(blocks) * r;
    return row_of(a, r, maxima + start, sums + start);
  };
  // Many rows: a row a thread. Few: the threads share the passes over each row.
  if (a.rows >= team.size) {
    team.each(a.rows, [&](int r) {
      const Row row = row_at(r);
      find_maxima(row, 0, blocks);
      if (row.needs_sums()) sum_weights(row, peak_of(row), 0, blocks);
      a.chosen[r] = choose(row);
    });
    return;
  }
  for (int r = 0; r < a.rows; ++r) {
    const Row row = row_at(r);
    team.ranges(blocks, [&](int first, int last) { find_maxima(row, first, last); });
    if (!row.needs_sums()) continue;
    team.ranges(blocks, [&](int first, int last) { sum_weights(row, peak_of(row), first, last); });
  }
  team.each(a.rows, [&](int r) { a.chosen[r] = choose(row_at(r)); });
}

}  // namespace sage::SAGE_ISA
