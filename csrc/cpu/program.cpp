#include "program.h"

#include <algorithm>
#include <cstdlib>

namespace sage {

struct Program::View {
  const Program& program;
  const Step& step;
  int rows;

  float* at(Slot slot) const {
    if (slot.buffer == kInput) return const_cast<float*>(step.input) + slot.column;
    if (slot.buffer == program.rows_out_ && step.rows_out != nullptr) return step.rows_out + slot.column;
    if (slot.buffer == program.samples_out_ && step.samples_out != nullptr) return step.samples_out + slot.column;
    const Buffer& buffer = program.buffers_[slot.buffer];
    const std::size_t rows = buffer.arena == 0 ? step.rows : step.num_samples;
    return program.arenas_[buffer.arena].memory + buffer.offset * rows + slot.column;
  }
  const std::int64_t* at(Index index) const { return index == Index::kIds ? step.ids : step.positions; }
};

namespace {

// Floats a cache line: buffers start at multiples of it, so that two threads never write to one line.
constexpr int kLine = 16;

std::size_t padded(int width) { return static_cast<std::size_t>((width + kLine - 1) / kLine * kLine); }

}  // namespace

Program::~Program() {
  for (Arena& arena : arenas_) std::free(arena.memory);
}

int Program::buffer(int width) {
  const int call = static_cast<int>(calls_.size());
  buffers_.push_back({width, call, call, take_ < 0 ? 0 : 1, 0});
  return static_cast<int>(buffers_.size()) - 1;
}

void Program::input(int width) { buffers_[kInput].width = width; }

void Program::use(Slot slot) { buffers_[slot.buffer].last = static_cast<int>(calls_.size()); }

void Program::gather(Index index, const void* table, Element type, Slot y) {
  use(y);
  record([=, this](const View& v, Team& team) {
    table_.gather({table, v.at(index), v.at(y), v.rows, width(y), type}, team);
  });
}

void Program::unpack(Index index, const Weight* weight, Slot y) {
  use(y);
  record([=, this](const View& v, Team& team) { table_.unpack_rows({weight, v.at(index), v.at(y), v.rows}, team); });
}

void Program::scale(Slot x, float factor, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.add({v.at(x), nullptr, v.at(y), width(x), 0, factor, v.rows, width(y)}, team);
  });
}

void Program::add(Slot a, Slot b, Slot y) {
  use(a), use(b), use(y);
  record([=, this](const View& v, Team& team) {
    table_.add({v.at(a), v.at(b), v.at(y), width(a), width(b), 1.0f, v.rows, width(y)}, team);
  });
}

void Program::linear(Slot x, const Weight* weight, const float* bias, Slot y) {
  use(x), use(y);
  work_[take_ < 0 ? 0 : 1] += static_cast<double>(weight->n) * weight->k;
  record([=, this](const View& v, Team& team) {
    table_.linear({v.at(x), weight, bias, v.at(y), width(x), width(y), v.rows}, team);
  });
}

void Program::rms_norm(Slot x, int heads, const float* weight, float eps, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.norm({v.at(x), nullptr, weight, v.at(y), nullptr, width(x), v.rows, heads, width(y) / heads, eps}, team);
  });
}

void Program::add_rms_norm(Slot x, Slot residual, const float* weight, float eps, Slot y, Slot new_residual) {
  use(x), use(residual), use(y), use(new_residual);
  record([=, this](const View& v, Team& team) {
    table_.norm({v.at(x), v.at(residual), weight, v.at(y), v.at(new_residual), width(x), v.rows, 1, width(y), eps},
                team);
  });
}

void Program::layer_norm(Slot x, const float* weight, const float* bias, float eps, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.layer_norm({v.at(x), weight, bias, v.at(y), width(x), v.rows, width(y), eps}, team);
  });
}

void Program::activate(Slot x, Activation act, bool gated, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.activate({v.at(x), v.at(y), width(x), v.rows, width(y), act, gated}, team);
  });
}

void Program::soft_cap(Slot x, float cap, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) { table_.soft_cap({v.at(x), v.at(y), v.rows, width(y), cap}, team); });
}

void Program::rotate(Slot x, int heads, int head_dim, const float* cos, const float* sin, int half, bool interleaved) {
  use(x);
  rotations_.push_back({x, heads, head_dim, cos, sin, half, interleaved, calls_.size()});
  record([=, this](const View& v, Team& team) {
    table_.rotary({v.at(x), cos, sin, v.step.positions, width(x), v.rows, heads, head_dim, half, interleaved}, team);
  });
}

void Program::store(Slot k, Slot val, const Cache& cache) {
  use(k), use(val);
  if (store_rotated(k, val, cache)) return;
  record([=, this](const View& v, Team& team) {
    table_.write_cache({v.at(k), v.at(val), cache.data, v.step.slot_mapping, width(k), width(val), v.rows,
                        cache.kv_heads, cache.head_dim, cache.block_size, cache.num_blocks, cache.type},
                       team);
  });
}

bool Program::store_rotated(Slot k, Slot val, const Cache& cache) {
  const std::size_t count = rotations_.size();
  if (count < 2 || rotations_[count - 1].call + 1 != calls_.size()) return false;
  const Rotation q = rotations_[count - 2], key = rotations_[count - 1];
  const bool together = q.call + 1 == key.call && q.cos == key.cos && q.half == key.half &&
                        q.interleaved == key.interleaved && q.head_dim == key.head_dim && key.x.buffer == k.buffer &&
                        key.x.column == k.column && key.heads == cache.kv_heads;
  if (!together) return false;
  calls_.resize(q.call);
  rotations_.clear();
  record([=, this](const View& v, Team& team) {
    table_.rotate_and_cache(
        {{v.at(q.x), q.cos, q.sin, v.step.positions, width(q.x), v.rows, q.heads, q.head_dim, q.half, q.interleaved},
         {v.at(k), v.at(val), cache.data, v.step.slot_mapping, width(k), width(val), v.rows, cache.kv_heads,
          cache.head_dim, cache.block_size, cache.num_blocks, cache.type}},
        team);
  });
  return true;
}

void Program::attention(Slot q, int heads, const Cache& cache, float scale, int window, float soft_cap, Slot y) {
  use(q), use(y);
  record([=, this](const View& v, Team& team) {
    table_.attention({.q = v.at(q),
                      .cache = cache.data,
                      .out = v.at(y),
                      .query_start_loc = v.step.query_start_loc,
                      .context_lens = v.step.context_lens,
                      .block_tables = v.step.block_tables,
                      .q_stride = width(q),
                      .requests = v.step.requests,
                      .table_width = v.step.table_width,
                      .heads = heads,
                      .kv_heads = cache.kv_heads,
                      .head_dim = cache.head_dim,
                      .block_size = cache.block_size,
                      .num_blocks = cache.num_blocks,
                      .scale = scale,
                      .window = window,
                      .soft_cap = soft_cap,
                      .type = cache.type},
                     team);
  });
}

void Program::take(Slot x, Slot y) {
  take_ = static_cast<int>(calls_.size());
  buffers_[y.buffer].arena = 1;
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.gather({v.at({x.buffer, 0}) + x.column, v.step.samples, v.at(y), v.rows, width(y), Element::kF32}, team);
  });
}

void Program::argmax(Slot x) {
  use(x);
  record([=, this](const View& v, Team& team) {
    if (v.step.best != nullptr) table_.argmax({v.at(x), v.step.best, width(x), v.rows, width(x)}, team);
  });
}

void Program::finish() {
  // First fit: a buffer takes the lowest place that no buffer alive at the same time holds. Buffers are in the order
  // of their first call.
  std::vector<const Buffer*> placed;
  for (std::size_t i = 1; i < buffers_.size(); ++i) {
    Buffer& buffer = buffers_[i];
    std::vector<const Buffer*> alive;
    for (const Buffer* other : placed) {
      if (other->arena == buffer.arena && other->last >= buffer.first && other->first <= buffer.last) {
        alive.push_back(other);
      }
    }
    std::sort(alive.begin(), alive.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
    for (const Buffer* other : alive) {
      if (buffer.offset + padded(buffer.width) <= other->offset) break;
      buffer.offset = std::max(buffer.offset, other->offset + padded(other->width));
    }
    Arena& arena = arenas_[buffer.arena];
    arena.floats_a_row = std::max(arena.floats_a_row, buffer.offset + padded(buffer.width));
    placed.push_back(&buffer);
  }
}

void Program::Arena::reserve(int rows) {
  const std::size_t needed = floats_a_row * static_cast<std::size_t>(rows) * sizeof(float);
  if (needed <= size) return;
  std::free(memory);
  size = (needed + 63) / 64 * 64;
  memory = static_cast<float*>(std::aligned_alloc(64, size));
  if (memory == nullptr) std::abort();  // no memory for a step's activations: nothing can be computed
}

void Program::run(const Step& step, int threads) {
  arenas_[0].reserve(step.rows);
  arenas_[1].reserve(step.num_samples);
  const int num_calls = static_cast<int>(calls_.size());
  const int first_part = take_ < 0 ? num_calls : take_;
  const int end = step.num_samples > 0 ? num_calls : first_part;
  const double work = work_[0] * step.rows + work_[1] * step.num_samples;
  run_team(thread_count(threads, work / (num_calls + 1)), [&](Team& team) {
    View view{*this, step, step.rows};
    for (int i = 0; i < first_part; ++i) calls_[i](view, team);
    view.rows = step.num_samples;
    for (int i = first_part; i < end; ++i) calls_[i](view, team);
  });
}

}  // namespace sage
