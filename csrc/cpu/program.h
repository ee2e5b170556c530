// A program: the kernel calls of a step, recorded once and replayed by one team, with a barrier between two calls
// instead of a trip through Python and a wake-up of the threads.
//
// What changes from step to step is in `Step`; addresses of weights and caches are fixed when a call is recorded. Rows
// of activations live in buffers of `width` floats a row. Buffers share memory as their lifetimes allow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace sage {

// What a program computes on: rows (tokens) of requests. Requests and their arrays matter to attention alone.
struct Step {
  int rows = 0;
  const std::int64_t* ids = nullptr;  // [rows]: rows of the first table or matrix that is read by index
  const std::int64_t* positions = nullptr;
  const std::int64_t* slot_mapping = nullptr;
  const std::int32_t* query_start_loc = nullptr;
  const std::int32_t* context_lens = nullptr;
  const std::int32_t* block_tables = nullptr;
  int requests = 0;
  int table_width = 0;
  const float* input = nullptr;           // rows of a program that starts from activations
  const std::int64_t* samples = nullptr;  // [num_samples] rows that `take` keeps
  int num_samples = 0;
  float* rows_out = nullptr;     // [rows, ..], what `rows_out` names; null: not wanted
  float* samples_out = nullptr;  // [num_samples, ..], what `samples_out` names; null: not wanted
  std::int64_t* best = nullptr;  // [num_samples], what `argmax` finds; null: not wanted
};

// Columns of a buffer, from `column` on.
struct Slot {
  int buffer;
  int column;
};

// The index arrays of a step.
enum class Index : int { kIds = 0, kPositions = 1 };

// One cache as the attention kernels see it.
struct Cache {
  void* data;
  std::int64_t num_blocks;
  int kv_heads;
  int head_dim;
  int block_size;
  Element type;
};

class Program {
 public:
  explicit Program(const KernelTable& table) : table_(table) {}
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  static constexpr int kInput = 0;  // the buffer of Step::input

  // Recording. Only rotate changes a buffer that is already written. Calls behind `take` work on Step::samples, and
  // don't run where there are none.
  int buffer(int width);
  void input(int width);
  void gather(Index index, const void* table, Element type, Slot y);
  void unpack(Index index, const Weight* weight, Slot y);
  void scale(Slot x, float factor, Slot y);
  void add(Slot a, Slot b, Slot y);
  void linear(Slot x, const Weight* weight, const float* bias, Slot y);
  void rms_norm(Slot x, int heads, const float* weight, float eps, Slot y);
  void add_rms_norm(Slot x, Slot residual, const float* weight, float eps, Slot y, Slot new_residual);
  void layer_norm(Slot x, const float* weight, const float* bias, float eps, Slot y);
  void activate(Slot x, Activation act, bool gated, Slot y);
  void soft_cap(Slot x, float cap, Slot y);
  void rotate(Slot x, int heads, int head_dim, const float* cos, const float* sin, int half, bool interleaved);
  // Behind the rotations of the layer's queries and keys it makes one call of the three.
  void store(Slot k, Slot v, const Cache& cache);
  void attention(Slot q, int heads, const Cache& cache, float scale, int window, float soft_cap, Slot y);
  void take(Slot x, Slot y);
  void argmax(Slot x);
  void rows_out(Slot x) { rows_out_ = x.buffer; }        // a whole buffer
  void samples_out(Slot x) { samples_out_ = x.buffer; }  // a whole buffer, behind take
  void finish();

  // Replays the program, one call at a time, on at most `threads` threads: on one where the calls are so small that
  // waiting for each other at every one of them costs more than they do, above all beside a busy program.
  void run(const Step& step, int threads);

 private:
  struct Buffer {
    int width;
    int first;           // call that writes it
    int last;            // last call that touches it
    int arena;           // 0 in front of take, 1 behind it
    std::size_t offset;  // floats a row before it in the arena, once finished
  };
  struct Arena {
    std::size_t floats_a_row = 0;
    float* memory = nullptr;
    std::size_t size = 0;

    void reserve(int rows);
  };
  struct Rotation {
    Slot x;
    int heads;
    int head_dim;
    const float* cos;
    const float* sin;
    int half;
    bool interleaved;
    std::size_t call;
  };
  struct View;  // a step with its memory
  using Call = std::function<void(const View&, Team&)>;

  void use(Slot slot);
  int width(Slot slot) const { return buffers_[slot.buffer].width; }
  void record(Call call) { calls_.push_back(std::move(call)); }
  bool store_rotated(Slot k, Slot val, const Cache& cache);

  const KernelTable& table_;
  std::vector<Buffer> buffers_ = {{0, 0, 0, 0, 0}};
  std::vector<Call> calls_;
  std::vector<Rotation> rotations_;
  double work_[2] = {0.0, 0.0};  // multiply-adds a row in the linear layers, in front of take and behind it
  int take_ = -1;                // the call that is `take`
  int rows_out_ = -1;
  int samples_out_ = -1;
  Arena arenas_[2];
};

}  // namespace sage
