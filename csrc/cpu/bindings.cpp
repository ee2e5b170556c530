// The Python module: raw pointers and integers in, the GIL released. `cpu/native.py` is its only caller and checks all
// shapes, types and strides; see there and in `_native.pyi` for what the arguments mean.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "program.h"

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

void pack_int(int isa, Address codes, std::ptrdiff_t stride, const sage::Weight& weight, int threads) {
  run(table(isa).pack_int, static_cast<double>(weight.n) * weight.k, threads,
      {&weight, at<std::uint8_t>(codes), const_cast<void*>(weight.data), stride});
}

void quantize(int isa, Address source, std::ptrdiff_t stride, int type, const sage::Weight& weight, int threads) {
  run(table(isa).quantize, static_cast<double>(weight.n) * weight.k, threads,
      {&weight, at<void>(source), const_cast<void*>(weight.data), const_cast<std::uint16_t*>(weight.scales), stride,
       static_cast<sage::Element>(type)});
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
          std::ptrdiff_t x_stride, int rows, int heads, int size, float eps, int threads) {
  run(table(isa).norm, static_cast<double>(rows) * heads * size, threads,
      {at<float>(x), at<float>(residual), at<float>(weight), at<float>(y), at<float>(new_residual), x_stride, rows,
       heads, size, eps});
}

void rotary(int isa, Address x, Address cos, Address sin, Address positions, std::ptrdiff_t x_stride, int tokens,
            int heads, int head_dim, int half, int interleaved, int threads) {
  run(table(isa).rotary, static_cast<double>(tokens) * heads * head_dim, threads,
      {at<float>(x), at<float>(cos), at<float>(sin), at<std::int64_t>(positions), x_stride, tokens, heads, head_dim,
       half, interleaved});
}

void layer_norm(int isa, Address x, Address weight, Address bias, Address y, std::ptrdiff_t x_stride, int rows,
                int size, float eps, int threads) {
  run(table(isa).layer_norm, static_cast<double>(rows) * size, threads,
      {at<float>(x), at<float>(weight), at<float>(bias), at<float>(y), x_stride, rows, size, eps});
}

void soft_cap(int isa, Address x, Address y, int rows, int size, float cap, int threads) {
  run(table(isa).soft_cap, 8.0 * rows * size, threads, {at<float>(x), at<float>(y), rows, size, cap});
}

void activate(int isa, Address x, Address y, std::ptrdiff_t x_stride, int rows, int size, int act, bool gated,
              int threads) {
  run(table(isa).activate, 8.0 * rows * size, threads,
      {at<float>(x), at<float>(y), x_stride, rows, size, static_cast<sage::Activation>(act), gated});
}

void sample(int isa, Address x, Address wanted, Address chosen, std::ptrdiff_t x_stride, int rows, int size,
            int threads) {
  run(table(isa).sample, 4.0 * rows * size, threads,
      {at<float>(x), at<double>(wanted), at<std::int64_t>(chosen), x_stride, rows, size});
}

// ---- programs -------------------------------------------------------------------------------------------------------

using sage::Program;
using Pair = std::pair<int, int>;                                          // buffer, column
using CacheShape = std::tuple<Address, std::int64_t, int, int, int, int>;  // the fields of sage::Cache

sage::Slot slot(Pair pair) { return {pair.first, pair.second}; }

sage::Cache cache_of(const CacheShape& c) {
  const auto& [data, num_blocks, kv_heads, head_dim, block_size, type] = c;
  return {at<void>(data), num_blocks, kv_heads, head_dim, block_size, static_cast<sage::Element>(type)};
}

void bind_program(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def("__init__", [](Program* self, int isa) { new (self) Program(table(isa)); })
      .def("buffer", &Program::buffer)
      .def("input", &Program::input)
      .def("gather",
           [](Program& p, int index, Address rows, int type, Pair y) {
             p.gather(static_cast<sage::Index>(index), at<void>(rows), static_cast<sage::Element>(type), slot(y));
           })
      .def("unpack", [](Program& p, int index, const sage::Weight& weight,
                        Pair y) { p.unpack(static_cast<sage::Index>(index), &weight, slot(y)); })
      .def("scale", [](Program& p, Pair x, float factor, Pair y) { p.scale(slot(x), factor, slot(y)); })
      .def("add", [](Program& p, Pair a, Pair b, Pair y) { p.add(slot(a), slot(b), slot(y)); })
      .def("linear", [](Program& p, Pair x, const sage::Weight& weight, Address bias,
                        Pair y) { p.linear(slot(x), &weight, at<float>(bias), slot(y)); })
      .def("rms_norm", [](Program& p, Pair x, int heads, Address weight, float eps,
                          Pair y) { p.rms_norm(slot(x), heads, at<float>(weight), eps, slot(y)); })
      .def("add_rms_norm",
           [](Program& p, Pair x, Pair residual, Address weight, float eps, Pair y, Pair new_residual) {
             p.add_rms_norm(slot(x), slot(residual), at<float>(weight), eps, slot(y), slot(new_residual));
           })
      .def("layer_norm", [](Program& p, Pair x, Address weight, Address bias, float eps,
                            Pair y) { p.layer_norm(slot(x), at<float>(weight), at<float>(bias), eps, slot(y)); })
      .def("activate", [](Program& p, Pair x, int act, bool gated,
                          Pair y) { p.activate(slot(x), static_cast<sage::Activation>(act), gated, slot(y)); })
      .def("soft_cap", [](Program& p, Pair x, float cap, Pair y) { p.soft_cap(slot(x), cap, slot(y)); })
      .def("rotate",
           [](Program& p, Pair x, int heads, int head_dim, Address cos, Address sin, int half, bool interleaved) {
             p.rotate(slot(x), heads, head_dim, at<float>(cos), at<float>(sin), half, interleaved);
           })
      .def("store", [](Program& p, Pair k, Pair v, const CacheShape& c) { p.store(slot(k), slot(v), cache_of(c)); })
      .def("attention", [](Program& p, Pair q, int heads, const CacheShape& c, float scale, int window, float soft_cap,
                           Pair y) { p.attention(slot(q), heads, cache_of(c), scale, window, soft_cap, slot(y)); })
      .def("take", [](Program& p, Pair x, Pair y) { p.take(slot(x), slot(y)); })
      .def("argmax", [](Program& p, Pair x) { p.argmax(slot(x)); })
      .def("rows_out", [](Program& p, Pair x) { p.rows_out(slot(x)); })
      .def("samples_out", [](Program& p, Pair x) { p.samples_out(slot(x)); })
      .def("finish", &Program::finish)
      .def(
          "run_rows",
          [](Program& p, int rows, Address input, Address output, int threads) {
            p.run({.rows = rows, .input = at<float>(input), .rows_out = at<float>(output)}, threads);
          },
          Release())
      .def(
          "run",
          [](Program& p, int rows, Address ids, Address positions, Address slot_mapping, Address query_start_loc,
             Address context_lens, Address block_tables, int requests, int table_width, Address samples,
             int num_samples, Address rows_out, Address samples_out, Address best, int threads) {
            p.run({.rows = rows,
                   .ids = at<std::int64_t>(ids),
                   .positions = at<std::int64_t>(positions),
                   .slot_mapping = at<std::int64_t>(slot_mapping),
                   .query_start_loc = at<std::int32_t>(query_start_loc),
                   .context_lens = at<std::int32_t>(context_lens),
                   .block_tables = at<std::int32_t>(block_tables),
                   .requests = requests,
                   .table_width = table_width,
                   .samples = at<std::int64_t>(samples),
                   .num_samples = num_samples,
                   .rows_out = at<float>(rows_out),
                   .samples_out = at<float>(samples_out),
                   .best = at<std::int64_t>(best)},
                  threads);
          },
          Release());
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
  bind_program(m);
  m.def("pack", pack, Release());
  m.def("pack_int", pack_int, Release());
  m.def("quantize", quantize, Release());
  m.def("linear", linear, Release());
  m.def("unpack_rows", unpack_rows, Release());
  m.def("attention", attention, Release());
  m.def("write_cache", write_cache, Release());
  m.def("norm", norm, Release());
  m.def("rotary", rotary, Release());
  m.def("layer_norm", layer_norm, Release());
  m.def("soft_cap", soft_cap, Release());
  m.def("activate", activate, Release());
  m.def("sample", sample, Release());
}
