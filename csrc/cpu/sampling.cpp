// Choosing tokens from logits.
#include <cstdint>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int kBlock = 256;  // columns whose maximum is taken before anybody looks where it stands

struct Best {
  float value;
  std::int64_t index;
};

SAGE_INLINE float block_max(const float* x, int count) {
  V16 best = set1(-__builtin_inff());
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) best = max(load(x + i), best);
  float top = reduce_max(best);
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// Over the columns [first, last).
Best best_of(const float* row, int first, int last) {
  float top = -__builtin_inff();
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
  return {-__builtin_inff(), first};  // nothing but NaN
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
      a.best[r] = best.value == -__builtin_inff() ? 0 : best.index;
    }
  }
  team.barrier();
}

}  // namespace sage::SAGE_ISA
