// Runs every kernel on every instruction set this processor has and compares the results bit by bit with the plain
// ones.
//
// Buffers have exactly the size the kernels may touch, so AddressSanitizer and valgrind see what is read beyond them.
//   cmake -S . -B build/checks -DSAGELLM_CHECKS=ON && cmake --build build/checks --target compare_isas
//   build/checks/compare_isas [seed]
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"

namespace {

using sage::KernelTable;
using sage::Team;

std::mt19937 generator;
int failures = 0;
int comparisons = 0;

// Memory that begins on a cache line, as tensors do, and ends where it ends.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : count_(count) {
    data_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
    std::memset(data_.get(), 0, count * sizeof(T));
  }
  T* get() { return data_.get(); }
  std::size_t bytes() const { return count_ * sizeof(T); }
  std::size_t count() const { return count_; }
  T& operator[](std::size_t i) { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::size_t count_;
  std::unique_ptr<T, Free> data_;
};

int pick(int from, int to) { return std::uniform_int_distribution<int>(from, to)(generator); }

Buffer<float> normal(std::size_t count, float scale = 1.0f) {
  Buffer<float> out(count);
  std::normal_distribution<float> numbers(0.0f, scale);
  for (std::size_t i = 0; i < count; ++i) out[i] = numbers(generator);
  return out;
}

Buffer<std::uint16_t> normal_bf16(std::size_t count) {
  Buffer<float> numbers = normal(count);
  Buffer<std::uint16_t> out(count);
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, &numbers[i], sizeof bits);
    out[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  return out;
}

// f16 numbers from 2^-8 to 2^-6.
Buffer<std::uint16_t> scales_f16(std::size_t count) {
  Buffer<std::uint16_t> out(count);
  for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<std::uint16_t>(pick(7, 8) << 10 | pick(0, 1023));
  return out;
}

void run(int threads, const std::function<void(Team&)>& kernel) {
  sage::run_team(threads, [&](Team& team) { kernel(team); });
}

// Fills an output buffer with every table's kernel and compares it with that of the first.
void compare(const std::string& what, std::size_t bytes,
             const std::function<void(const KernelTable&, void*, int)>& fill) {
  std::vector<char> expected;
  for (int isa = 0; sage::kernel_table(isa) != nullptr; ++isa) {
    if (!sage::is_supported(isa)) continue;
    for (int threads : {1, 3}) {
      Buffer<char> out(bytes);
      fill(*sage::kernel_table(isa), out.get(), threads);
      ++comparisons;
      if (expected.empty()) {
        expected.assign(out.get(), out.get() + bytes);
      } else if (std::memcmp(expected.data(), out.get(), bytes) != 0) {
        std::size_t at = 0;
        while (expected[at] == out[at]) ++at;
        std::printf("%s on %s, %d threads: byte %zu of %zu differs\n", what.c_str(), sage::kernel_table(isa)->name,
                    threads, at, bytes);
        ++failures;
      }
    }
  }
}

int padded(int n) { return (n + 15) / 16 * 16; }

void check_linear_float() {
  const int n = pick(1, 70), k = pick(1, 150), m = pick(1, 30);
  const bool bf16 = pick(0, 1) == 1;
  Buffer<float> x = normal(static_cast<std::size_t>(m) * k), bias = normal(n);
  Buffer<float> source = normal(static_cast<std::size_t>(n) * k);
  Buffer<std::uint16_t> halves = normal_bf16(static_cast<std::size_t>(n) * k);
  const auto type = bf16 ? sage::Element::kBF16 : sage::Element::kF32;
  const auto format = bf16 ? sage::Format::kBF16 : sage::Format::kF32;
  const std::size_t packed_bytes = static_cast<std::size_t>(padded(n)) * padded(k) * (bf16 ? 2 : 4);
  compare("linear " + std::string(bf16 ? "bf16" : "f32"), sizeof(float) * m * n,
          [&](const KernelTable& table, void* out, int threads) {
            Buffer<char> packed(packed_bytes);
            const sage::PackArgs pack{
                bf16 ? static_cast<void*>(halves.get()) : source.get(), packed.get(), k, n, k, type};
            run(threads, [&](Team& team) { table.pack(pack, team); });
            const sage::Weight weight{packed.get(), nullptr, nullptr, n, k, format, 0, 0};
            const sage::LinearArgs args{x.get(), &weight, bias.get(), static_cast<float*>(out), k, n, m};
            run(threads, [&](Team& team) { table.linear(args, team); });
          });
}

void check_linear_int() {
  const int all_bits[] = {4, 5, 6, 8};
  const int bits = all_bits[pick(0, 3)];
  const int all_groups[] = {16, 32, 64, 128};
  int group = all_groups[pick(bits == 6 ? 0 : 1, 3)];
  const int n = pick(1, 70), k = group * pick(1, 4), m = pick(1, 30);
  const bool minima = pick(0, 1) == 1;
  if (bits == 8 && pick(0, 1) == 1) group = k;
  const int groups = (k + group - 1) / group;
  const int group_padded = groups == 1 ? (k + 31) / 32 * 32 : group;
  Buffer<float> x = normal(static_cast<std::size_t>(m) * k);
  Buffer<std::uint8_t> codes(static_cast<std::size_t>(n) * k);
  for (std::size_t i = 0; i < codes.count(); ++i) codes[i] = static_cast<std::uint8_t>(pick(0, (1 << bits) - 1));
  Buffer<std::uint16_t> scales = scales_f16(static_cast<std::size_t>(padded(n)) * groups);
  Buffer<std::uint16_t> mins = scales_f16(static_cast<std::size_t>(padded(n)) * groups);
  const std::size_t packed_bytes = static_cast<std::size_t>(padded(n)) * groups * group_padded * bits / 8;
  compare("linear int" + std::to_string(bits) + " groups of " + std::to_string(group), sizeof(float) * m * n,
          [&](const KernelTable& table, void* out, int threads) {
            Buffer<char> packed(packed_bytes);
            const sage::Weight weight{
                packed.get(), scales.get(), minima ? mins.get() : nullptr, n, k, sage::Format::kInt, bits, group};
            const sage::PackIntArgs pack{&weight, codes.get(), packed.get(), k};
            run(threads, [&](Team& team) { table.pack_int(pack, team); });
            const sage::LinearArgs args{x.get(), &weight, nullptr, static_cast<float*>(out), k, n, m};
            run(threads, [&](Team& team) { table.linear(args, team); });
          });
}

void check_attention() {
  const sage::Element types[] = {sage::Element::kF32, sage::Element::kBF16, sage::Element::kF16, sage::Element::kInt8};
  const sage::Element type = types[pick(0, 3)];
  const int kv_heads = pick(1, 2), heads = kv_heads * pick(1, 7), head_dim = 16 * pick(1, 8),
            block_size = 16 * pick(1, 2);
  const int requests = pick(1, 3);
  std::vector<std::int32_t> starts{0}, lens;
  int tokens = 0, longest = 0, cached = 0;
  for (int r = 0; r < requests; ++r) {
    const int new_tokens = pick(1, 20), context = new_tokens + pick(0, 700);
    tokens += new_tokens;
    starts.push_back(tokens);
    lens.push_back(context);
    cached += context;
    longest = context > longest ? context : longest;
  }
  const int width = (longest + block_size - 1) / block_size;
  const std::int64_t num_blocks = static_cast<std::int64_t>(width) * requests + 1;
  std::vector<std::int32_t> block_tables(static_cast<std::size_t>(width) * requests);
  for (std::size_t i = 0; i < block_tables.size(); ++i) block_tables[i] = static_cast<std::int32_t>(i + 1);
  std::vector<std::int64_t> slots;
  for (int r = 0; r < requests; ++r) {
    for (int t = 0; t < lens[r]; ++t) {
      slots.push_back(static_cast<std::int64_t>(block_tables[r * width + t / block_size]) * block_size +
                      t % block_size);
    }
  }
  const int entry = type == sage::Element::kInt8 ? head_dim + 4 : head_dim;
  const int item = type == sage::Element::kF32 ? 4 : type == sage::Element::kInt8 ? 1 : 2;
  const std::size_t cache_bytes = static_cast<std::size_t>(2 * num_blocks) * kv_heads * block_size * entry * item;
  const int kv_row = kv_heads * head_dim, q_row = heads * head_dim;
  Buffer<float> k = normal(static_cast<std::size_t>(cached) * kv_row),
                v = normal(static_cast<std::size_t>(cached) * kv_row);
  Buffer<float> q = normal(static_cast<std::size_t>(tokens) * q_row);
  const int window = pick(0, 2) == 0 ? pick(1, 300) : 0;
  const float soft_cap = pick(0, 2) == 0 ? 30.0f : 0.0f;
  compare("attention", sizeof(float) * tokens * q_row, [&](const KernelTable& table, void* out, int threads) {
    Buffer<char> cache(cache_bytes);
    const sage::CacheWriteArgs write{k.get(), v.get(),  cache.get(), slots.data(), kv_row,     kv_row,
                                     cached,  kv_heads, head_dim,    block_size,   num_blocks, type};
    run(threads, [&](Team& team) { table.write_cache(write, team); });
    const sage::AttentionArgs args{q.get(),       cache.get(), static_cast<float*>(out),
                                   starts.data(), lens.data(), block_tables.data(),
                                   q_row,         requests,    width,
                                   heads,         kv_heads,    head_dim,
                                   block_size,    num_blocks,  1.0f / std::sqrt(static_cast<float>(head_dim)),
                                   window,        soft_cap,    type};
    run(threads, [&](Team& team) { table.attention(args, team); });
  });
}

void check_rows() {
  const int rows = pick(1, 9), size = 16 * pick(1, 20) + pick(0, 1) * pick(1, 15);
  const std::size_t count = static_cast<std::size_t>(rows) * size;
  Buffer<float> x = normal(count, 3.0f), other = normal(count), weight = normal(size), wide = normal(2 * count, 3.0f);
  const std::size_t bytes = sizeof(float) * count;
  compare("norm", 2 * bytes, [&](const KernelTable& table, void* out, int threads) {
    auto* y = static_cast<float*>(out);
    const sage::NormArgs args{x.get(), other.get(), weight.get(), y, y + count, size, rows, 1, size, 1e-6f};
    run(threads, [&](Team& team) { table.norm(args, team); });
  });
  compare("layer_norm", bytes, [&](const KernelTable& table, void* out, int threads) {
    const sage::LayerNormArgs args{x.get(), weight.get(), weight.get(), static_cast<float*>(out),
                                   size,    rows,         size,         1e-5f};
    run(threads, [&](Team& team) { table.layer_norm(args, team); });
  });
  for (const auto act : {sage::Activation::kSilu, sage::Activation::kGeluTanh, sage::Activation::kGelu}) {
    compare("activate", bytes, [&](const KernelTable& table, void* out, int threads) {
      const sage::ActivationArgs args{wide.get(), static_cast<float*>(out), 2 * size, rows, size, act, true};
      run(threads, [&](Team& team) { table.activate(args, team); });
    });
  }
  compare("soft_cap", bytes, [&](const KernelTable& table, void* out, int threads) {
    const sage::SoftCapArgs args{x.get(), static_cast<float*>(out), rows, size, 2.5f};
    run(threads, [&](Team& team) { table.soft_cap(args, team); });
  });
  compare("argmax", sizeof(std::int64_t) * rows, [&](const KernelTable& table, void* out, int threads) {
    const sage::ArgmaxArgs args{x.get(), static_cast<std::int64_t*>(out), size, rows, size};
    run(threads, [&](Team& team) { table.argmax(args, team); });
  });
}

void check_sample() {
  const int rows = pick(1, 4), size = pick(1, 5000);
  Buffer<float> x = normal(static_cast<std::size_t>(rows) * size, 3.0f);
  Buffer<double> wanted(static_cast<std::size_t>(rows) * sage::kSampleWidth);
  std::uniform_real_distribution<double> unit(0.001, 0.999);
  for (int r = 0; r < rows; ++r) {
    double* row = wanted.get() + r * sage::kSampleWidth;
    row[0] = pick(0, 3) == 0 ? 0.0 : 2.0 * unit(generator);
    row[1] = pick(0, 1) == 0 ? 0 : pick(1, 100);
    row[2] = pick(0, 1) == 0 ? 1.0 : unit(generator);
    row[3] = pick(0, 2) == 0 ? 0.2 * unit(generator) : 0.0;
    row[4] = unit(generator);
  }
  compare("sample", sizeof(std::int64_t) * rows, [&](const KernelTable& table, void* out, int threads) {
    const sage::SampleArgs args{x.get(), wanted.get(), static_cast<std::int64_t*>(out), size, rows, size};
    run(threads, [&](Team& team) { table.sample(args, team); });
  });
}

}  // namespace

int main(int count, char** words) {
  generator.seed(count > 1 ? static_cast<unsigned>(std::atoi(words[1])) : 0);
  for (int round = 0; round < 40; ++round) {
    check_linear_float();
    check_linear_int();
    check_attention();
    check_rows();
    check_sample();
  }
  std::printf("%d results, %d differ\n", comparisons, failures);
  return failures == 0 ? 0 : 1;
}
