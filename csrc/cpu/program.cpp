#include "program.h"

#include <algorithm>
#include <cstdlib>

namespace sage {

struct Program::View {
  const Program& program;
  const Step& step;

  float* at(Slot slot) const {
    const Buffer& buffer = program.buffers_[slot.buffer];
    if (slot.buffer == kInput) return const_cast<float*>(step.input) + slot.column;
    if (slot.buffer == program.output_.buffer) return step.output + slot.column;
    return program.memory_ + buffer.offset * static_cast<std::size_t>(step.rows) + slot.column;
  }
  const std::int64_t* at(Index index) const { return index == Index::kIds ? step.ids : step.positions; }
};

namespace {

// Floats a cache line: buffers start at multiples of it, so that two threads never write to one line.
constexpr int kLine = 16;

std::size_t padded(int width) { return static_cast<std::size_t>((width + kLine - 1) / kLine * kLine); }

}  // namespace

Program::~Program() { std::free(memory_); }

int Program::buffer(int width) {
  buffers_.push_back({width, static_cast<int>(calls_.size()), static_cast<int>(calls_.size()), 0});
  return static_cast<int>(buffers_.size()) - 1;
}

void Program::input(int width) { buffers_[kInput].width = width; }

void Program::use(Slot slot) { buffers_[slot.buffer].last = static_cast<int>(calls_.size()); }

void Program::gather(Index index, const void* table, Element type, Slot y) {
  use(y);
  record([=, this](const View& v, Team& team) {
    table_.gather({table, v.at(index), v.at(y), v.step.rows, width(y), type}, team);
  });
}

void Program::unpack(Index index, const Weight* weight, Slot y) {
  use(y);
  record(
      [=, this](const View& v, Team& team) { table_.unpack_rows({weight, v.at(index), v.at(y), v.step.rows}, team); });
}

void Program::scale(Slot x, float factor, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.add({v.at(x), nullptr, v.at(y), width(x), 0, factor, v.step.rows, width(y)}, team);
  });
}

void Program::add(Slot a, Slot b, Slot y) {
  use(a), use(b), use(y);
  record([=, this](const View& v, Team& team) {
    table_.add({v.at(a), v.at(b), v.at(y), width(a), width(b), 1.0f, v.step.rows, width(y)}, team);
  });
}

void Program::linear(Slot x, const Weight* weight, const float* bias, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.linear({v.at(x), weight, bias, v.at(y), width(x), width(y), v.step.rows}, team);
  });
}

void Program::rms_norm(Slot x, int heads, const float* weight, float eps, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.norm({v.at(x), nullptr, weight, v.at(y), nullptr, width(x), v.step.rows, heads, width(y) / heads, eps},
                team);
  });
}

void Program::add_rms_norm(Slot x, Slot residual, const float* weight, float eps, Slot y, Slot new_residual) {
  use(x), use(residual), use(y), use(new_residual);
  record([=, this](const View& v, Team& team) {
    table_.norm({v.at(x), v.at(residual), weight, v.at(y), v.at(new_residual), width(x), v.step.rows, 1, width(y), eps},
                team);
  });
}

void Program::layer_norm(Slot x, const float* weight, const float* bias, float eps, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.layer_norm({v.at(x), weight, bias, v.at(y), width(x), v.step.rows, width(y), eps}, team);
  });
}

void Program::activate(Slot x, Activation act, bool gated, Slot y) {
  use(x), use(y);
  record([=, this](const View& v, Team& team) {
    table_.activate({v.at(x), v.at(y), width(x), v.step.rows, width(y), act, gated}, team);
  });
}

void Program::soft_cap(Slot x, float cap, Slot y) {
  use(x), use(y);
  record(
      [=, this](const View& v, Team& team) { table_.soft_cap({v.at(x), v.at(y), v.step.rows, width(y), cap}, team); });
}

void Program::rotate(Slot x, int heads, int head_dim, const float* cos, const float* sin, int half, bool interleaved) {
  use(x);
  record([=, this](const View& v, Team& team) {
    table_.rotary({v.at(x), cos, sin, v.step.positions, width(x), v.step.rows, heads, head_dim, half, interleaved},
                  team);
  });
}

void Program::store(Slot k, Slot val, const Cache& cache) {
  use(k), use(val);
  record([=, this](const View& v, Team& team) {
    table_.write_cache({v.at(k), v.at(val), cache.data, v.step.slot_mapping, width(k), width(val), v.step.rows,
                        cache.kv_heads, cache.head_dim, cache.block_size, cache.num_blocks, cache.type},
                       team);
  });
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

void Program::finish(Slot output) {
  output_ = output;
  // First fit: a buffer takes the lowest place that no buffer alive at the same time holds. Buffers are in the order
  // of their first call.
  std::vector<const Buffer*> placed;
  for (std::size_t i = 1; i < buffers_.size(); ++i) {
    Buffer& buffer = buffers_[i];
    if (static_cast<int>(i) == output_.buffer) continue;
    std::vector<const Buffer*> alive;
    for (const Buffer* other : placed) {
      if (other->last >= buffer.first && other->first <= buffer.last) alive.push_back(other);
    }
    std::sort(alive.begin(), alive.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
    for (const Buffer* other : alive) {
      if (buffer.offset + padded(buffer.width) <= other->offset) break;
      buffer.offset = std::max(buffer.offset, other->offset + padded(other->width));
    }
    floats_a_row_ = std::max(floats_a_row_, buffer.offset + padded(buffer.width));
    placed.push_back(&buffer);
  }
}

void Program::run(const Step& step, int threads) {
  const std::size_t needed = floats_a_row_ * static_cast<std::size_t>(step.rows) * sizeof(float);
  if (needed > memory_size_) {
    std::free(memory_);
    memory_size_ = (needed + 63) / 64 * 64;
    memory_ = static_cast<float*>(std::aligned_alloc(64, memory_size_));
    if (memory_ == nullptr) std::abort();  // no memory for a step's activations: nothing can be computed
  }
  const View view{*this, step};
  run_team(threads, [&](Team& team) {
    for (const Call& call : calls_) call(view, team);
  });
}

}  // namespace sage
