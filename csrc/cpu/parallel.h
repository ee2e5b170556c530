// Teams of threads and scratch memory.
//
// Kernels are written for a team: every thread of it calls the kernel with the same arguments, the kernel splits the
// work by rank and ends with a barrier. So a single op and a program of a thousand ops run through the same code, and
// between two ops of a program there is a barrier instead of a wake-up.
#pragma once

#include <atomic>
#include <cstddef>

namespace sage {

// A buffer of at least `bytes` (64-byte aligned) that belongs to the calling thread and is kept until the thread ends.
// `slot` 0 and 1 are two independent buffers. A later call with the same slot may move it.
void* scratch(std::size_t bytes, int slot);

// Threads of the largest team.
inline constexpr int kMostThreads = 128;

// What the threads of the running team share. One pool exists a process, and one team runs at a time.
struct alignas(64) TeamState {
  struct alignas(64) Counter {
    std::atomic<int> taken{0};
  };
  Counter shares[kMostThreads];  // items of `each` already taken from each thread's share
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<unsigned> round{0};
  void* memory = nullptr;
  std::size_t memory_size = 0;

  TeamState() = default;
  TeamState(const TeamState&) = delete;
  TeamState& operator=(const TeamState&) = delete;
  ~TeamState();
};

// One thread's view of the team it works in.
class Team {
 public:
  Team(TeamState& state, int rank, int size) : rank(rank), size(size), state_(state) {}

  const int rank;
  const int size;

  // Waits for all threads of the team; what each wrote before is visible to all behind it.
  void barrier();

  // Memory of at least `bytes` (64-byte aligned) that all threads see, the same for all that ask for as much. Holds
  // nothing between kernels.
  void* shared(std::size_t bytes);

  // Runs body(item) for each item in [0, items) on some thread. A thread takes the items of its share, contiguous and
  // near-equal to the others', one by one and in order, so that it reads memory as one stream; then what is left of
  // the others' shares, so that a slow thread delays nobody. Ends with a barrier.
  template <class Body>
  void each(int items, const Body& body) {
    if (size == 1) {
      for (int i = 0; i < items; ++i) body(i);
      return;
    }
    for (int i = 0; i < size; ++i) {
      const int owner = rank + i < size ? rank + i : rank + i - size;
      const int begin = share(items, owner);
      const int count = share(items, owner + 1) - begin;
      for (int item = take(owner, count); item < count; item = take(owner, count)) body(begin + item);
    }
    barrier();
  }

  // Runs body(begin, end) on every thread over contiguous, near-equal ranges of [0, items). Ends with a barrier.
  template <class Body>
  void ranges(int items, const Body& body) {
    const int begin = share(items, rank);
    const int end = share(items, rank + 1);
    if (begin < end) body(begin, end);
    barrier();
  }

 private:
  // Where the share of a thread begins.
  int share(int items, int owner) const { return static_cast<int>(static_cast<long long>(items) * owner / size); }

  int take(int owner, int count) {
    std::atomic<int>& taken = state_.shares[owner].taken;
    // A look first: whoever comes late need not write to a line that all share.
    const int seen = taken.load(std::memory_order_relaxed);
    return seen >= count ? seen : taken.fetch_add(1, std::memory_order_relaxed);
  }

  TeamState& state_;
};

// Runs entry(context, team) on `threads` threads, the calling one among them, and returns when all are done. Teams of
// different callers run one after another.
void run_team(int threads, void (*entry)(void*, Team&), void* context);

template <class Body>
void run_team(int threads, const Body& body) {
  run_team(
      threads, [](void* context, Team& team) { (*static_cast<const Body*>(context))(team); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Below this many multiply-adds waking a second thread costs more than it brings.
inline constexpr double kSerialWork = 500000.0;

inline int thread_count(int requested, double work) { return work < kSerialWork || requested < 1 ? 1 : requested; }

}  // namespace sage
