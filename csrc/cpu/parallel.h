// Threads and scratch memory. The OpenMP pool is torch's: the module is imported after torch and asks for as many
// threads.
#pragma once

#include <cstddef>

namespace sage {

// A buffer of at least `bytes` (64-byte aligned) that belongs to the calling thread and is kept until the thread ends.
// `slot` 0 and 1 are two independent buffers. A later call with the same slot may move it.
void* scratch(std::size_t bytes, int slot);

// Below this many multiply-adds waking a second thread costs more than it brings.
inline constexpr double kSerialWork = 500000.0;

inline int thread_count(int requested, double work, int items) {
  int threads = work < kSerialWork ? 1 : requested;
  return threads < items ? threads : (items > 0 ? items : 1);
}

// Runs body(item) for item in [0, items); items are handed out one by one, so that a slow thread delays nobody.
template <class Body>
inline void parallel_items(int threads, int items, const Body& body) {
  if (threads <= 1) {
    for (int i = 0; i < items; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int i = 0; i < items; ++i) body(i);
}

// Runs body(begin, end) over contiguous, near-equal ranges of [0, items).
template <class Body>
inline void parallel_ranges(int threads, int items, const Body& body) {
  if (threads <= 1) {
    body(0, items);
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int t = 0; t < threads; ++t) {
    body(static_cast<int>(static_cast<long long>(items) * t / threads),
         static_cast<int>(static_cast<long long>(items) * (t + 1) / threads));
  }
}

}  // namespace sage
