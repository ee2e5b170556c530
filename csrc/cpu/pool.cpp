// The pool of threads behind run_team.
//
// Threads wait in a short spin first, because the next op of a step comes within microseconds, and sleep on a futex
// (std::atomic::wait) after it, so that an idle engine, torch's own threads or another program get the core.
#include <pthread.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel.h"

namespace sage {
namespace {

// Turns of the spin: about 20 microseconds between jobs, and within a team, whose members are about to arrive, longer.
constexpr int kIdleSpins = 400;
constexpr int kBarrierSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns when `value` is no longer `old`.
void wait_while(const std::atomic<unsigned>& value, unsigned old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

class Pool {
 public:
  void run(int threads, void (*entry)(void*, Team&), void* context) {
    const std::lock_guard<std::mutex> one_team(mutex_);
    while (static_cast<int>(workers_.size()) < threads - 1) {
      workers_.push_back(std::make_unique<Worker>());
      std::thread([this, worker = workers_.back().get(), rank = static_cast<int>(workers_.size())] {
        work(*worker, rank);
      }).detach();
    }
    entry_ = entry;
    context_ = context;
    threads_ = threads;
    running_.store(threads - 1, std::memory_order_relaxed);
    for (int i = 0; i < threads - 1; ++i) {
      workers_[i]->job.fetch_add(1, std::memory_order_release);
      workers_[i]->job.notify_one();
    }
    Team team(state_, 0, threads);
    entry(context, team);
    // A worker may still be on its way out of the last barrier; the next job must not overtake it.
    for (int i = 0; running_.load(std::memory_order_acquire) != 0; ++i) {
      if (i < kBarrierSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  struct alignas(64) Worker {
    std::atomic<unsigned> job{0};
  };

  void work(Worker& worker, int rank) {
    for (unsigned seen = 0;; ++seen) {
      wait_while(worker.job, seen, kIdleSpins);
      Team team(state_, rank, threads_);
      entry_(context_, team);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  TeamState state_;
  alignas(64) std::atomic<int> running_{0};
  void (*entry_)(void*, Team&) = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
};

// Never destroyed: its threads sleep in it until the process ends. A forked child has none of them and starts anew.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static std::once_flag registered;
  std::call_once(registered, [] {
    the_pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(new Pool); });
  });
  return *the_pool.load(std::memory_order_relaxed);
}

struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(data); }
};

void grow(void*& data, std::size_t& size, std::size_t bytes) {
  std::free(data);
  size = (bytes + 63) / 64 * 64;
  data = std::aligned_alloc(64, size);
  if (data == nullptr) std::abort();  // no memory for a step's activations: nothing can be computed
}

}  // namespace

void Team::barrier() {
  if (size == 1) return;
  const unsigned round = state_.round.load(std::memory_order_relaxed);
  if (state_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    state_.arrived.store(0, std::memory_order_relaxed);
    for (int i = 0; i < size; ++i) state_.shares[i].taken.store(0, std::memory_order_relaxed);
    // In one order with the look at the sleepers in notify_all, or one that falls asleep just now would be missed.
    state_.round.store(round + 1, std::memory_order_seq_cst);
    state_.round.notify_all();
    return;
  }
  wait_while(state_.round, round, kBarrierSpins);
}

void* Team::shared(std::size_t bytes) {
  if (bytes > state_.memory_size) {
    barrier();  // everybody has seen the old size
    if (rank == 0) grow(state_.memory, state_.memory_size, bytes);
    barrier();
  }
  return state_.memory;
}

void run_team(int threads, void (*entry)(void*, Team&), void* context) {
  if (threads > 1) return pool().run(threads < kMostThreads ? threads : kMostThreads, entry, context);
  thread_local TeamState alone;
  Team team(alone, 0, 1);
  entry(context, team);
}

TeamState::~TeamState() { std::free(memory); }

void* scratch(std::size_t bytes, int slot) {
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) grow(buffer.data, buffer.size, bytes);
  return buffer.data;
}

}  // namespace sage
