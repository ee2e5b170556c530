// The Python module: raw pointers and integers in, the GIL released. `cpu/native.py` is its only caller and checks all
// shapes, types and strides; see there and in `_native.pyi` for what the arguments mean.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace nb = nanobind;
using Address = std::uintptr_t;
using Release = nb::call_guard<nb::gil_scoped_release>;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: the whole point of this module
}

// Runs one op on as many threads as its work is worth.
template <class Args>
void run(void (*kernel)(const Args&, sage::Team&), double work, int threads, const std::type_identity_t<Args>& args) {
  sage::run_team(sage::thread_count(threads, work), [&](sage::Team& team) { kernel(args, team); });
}

const sage::KernelTable& table(int isa) { return *sage::kernel_table(isa); }

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (int i = 0; sage::kernel_table(i) != nullptr && sage::is_supported(i); ++i)
    names.emplace_back(sage::kernel_table(i)->name);
  return names;
}

double work_of(const sage::AttentionArgs& a) {
  double work = 0.0;
  for (int r = 0; r < a.requests; ++r) {
    work += static_cast<double>(a.query_start_loc[r + 1] - a.query_start_loc[r]) * a.context_lens[r];
  }
  return work * a.heads * a.head_dim;
}

void pack(int isa, Address source, Address packed, std::ptrdiff_t stride, int n, int k, int type, int threads) {
  run(table(isa).pack, static_cast<double>(n) * k, threads,
      {at<void>(source), at<void>(packed), stride, n, k, static_cast<sage::Element>(type)});
}

void linear(int isa, Address x, const sage::Weight& weight, Address bias, Address y, std::ptrdiff_t x_stride, int m,
            int threads) {
  run(table(isa).linear, static_cast<double>(m) * weight.n * weight.k, threads,
      {at<float>(x), &weight, at<float>(bias), at<float>(y), x_stride, weight.n, m});
}

void unpack_rows(int isa, const sage::Weight& weight, Address rows, Address y, int num_rows, int threads) {
  run(table(isa).unpack_rows, static_cast<double>(num_rows) * weight.k, threads,
      {&weight, at<std::int64_t>(rows), at<float>(y), num_rows});
}

void attention(int isa, Address q, Address cache, Address out, Address query_start_loc, Address context_lens,
               Address block_tables, std::ptrdiff_t q_stride, int requests, int table_width, int heads, int kv_heads,
               int head_dim, int block_size, std::int64_t num_blocks, float scale, int window, float soft_cap, int type,
               int threads) {
  const sage::AttentionArgs args = {at<float>(q),
                                    at<void>(cache),
                                    at<float>(out),
                                    at<std::int32_t>(query_start_loc),
                                    at<std::int32_t>(context_lens),
                                    at<std::int32_t>(block_tables),
                                    q_stride,
                                    requests,
                                    table_width,
                                    heads,
                                    kv_heads,
                                    head_dim,
                                    block_size,
                                    num_blocks,
                                    scale,
                                    window,
                                    soft_cap,
                                    static_cast<sage::Element>(type)};
  run(table(isa).attention, work_of(args), threads, args);
}

void write_cache(int isa, Address k, Address v, Address cache, Address slot_mapping, std::ptrdiff_t k_stride,
                 std::ptrdiff_t v_stride, int tokens, int kv_heads, int head_dim, int block_size,
                 std::int64_t num_blocks, int type, int threads) {
  run(table(isa).write_cache, static_cast<double>(tokens) * kv_heads * head_dim, threads,
      {at<float>(k), at<float>(v), at<void>(cache), at<std::int64_t>(slot_mapping), k_stride, v_stride, tokens,
       kv_heads, head_dim, block_size, num_blocks, static_cast<sage::Element>(type)});
}

void norm(int isa, Address x, Address residual, Address weight, Address y, Address new_residual,
          std::ptrdiff_t x_stride, int rows, int size, float eps, int threads) {
  run(table(isa).norm, static_cast<double>(rows) * size, threads,
      {at<float>(x), at<float>(residual), at<float>(weight), at<float>(y), at<float>(new_residual), x_stride, rows,
       size, eps});
}

void rotary(int isa, Address x, Address cos, Address sin, Address positions, std::ptrdiff_t x_stride, int tokens,
            int heads, int head_dim, int half, int interleaved, int threads) {
  run(table(isa).rotary, static_cast<double>(tokens) * heads * head_dim, threads,
      {at<float>(x), at<float>(cos), at<float>(sin), at<std::int64_t>(positions), x_stride, tokens, heads, head_dim,
       half, interleaved});
}

void gated(int isa, Address x, Address y, int rows, int size, int act, int threads) {
  run(table(isa).gated, 8.0 * rows * size, threads,
      {at<float>(x), at<float>(y), rows, size, static_cast<sage::Activation>(act)});
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels. Call them through sagellm_backend.cpu.native.";
  m.def("supported_isas", supported);
  nb::class_<sage::Weight>(m, "Weight")
      .def(
          "__init__",
          [](sage::Weight* self, Address data, Address scales, Address mins, int n, int k, int format, int bits,
             int group) {
            new (self) sage::Weight{at<void>(data),
                                    at<std::uint16_t>(scales),
                                    at<std::uint16_t>(mins),
                                    n,
                                    k,
                                    static_cast<sage::Format>(format),
                                    bits,
                                    group};
          },
          nb::arg("data"), nb::arg("scales") = 0, nb::arg("mins") = 0, nb::kw_only(), nb::arg("n"), nb::arg("k"),
          nb::arg("format"), nb::arg("bits") = 0, nb::arg("group") = 0);
  m.def("has_fast_fma", [](int isa) { return table(isa).fast_fma; });
  m.def("pack", pack, Release());
  m.def("linear", linear, Release());
  m.def("unpack_rows", unpack_rows, Release());
  m.def("attention", attention, Release());
  m.def("write_cache", write_cache, Release());
  m.def("norm", norm, Release());
  m.def("rotary", rotary, Release());
  m.def("gated", gated, Release());
}
