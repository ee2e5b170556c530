// Norms, rotary positions and gated activations: each row by itself.
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "vec.h"

namespace sage::SAGE_ISA {

void norm(const NormArgs& a, Team& team) {
  team.ranges(a.rows, [&](int first, int last) {
    for (int r = first; r < last; ++r) {
      const float* x = a.x + r * a.x_stride;
      const float* residual = a.residual == nullptr ? nullptr : a.residual + static_cast<std::ptrdiff_t>(r) * a.size;
      float* sum_out = a.new_residual == nullptr ? nullptr : a.new_residual + static_cast<std::ptrdiff_t>(r) * a.size;
      float* y = a.y + static_cast<std::ptrdiff_t>(r) * a.size;
      V16 squares = set1(0.0f);
      for (int i = 0; i < a.size; i += kLanes) {
        const int n = a.size - i < kLanes ? a.size - i : kLanes;
        V16 value = load_n(x + i, n);
        if (residual != nullptr) {
          value = value + load_n(residual + i, n);
          store_n(sum_out + i, value, n);
        }
        squares = fma(value, value, squares);
      }
      const V16 scale = set1(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(a.size) + a.eps));
      const float* in = residual != nullptr ? sum_out : x;
      for (int i = 0; i < a.size; i += kLanes) {
        const int n = a.size - i < kLanes ? a.size - i : kLanes;
        store_n(y + i, load_n(in + i, n) * scale * load_n(a.weight + i, n), n);
      }
    }
  });
}

void rotary(const RotaryArgs& a, Team& team) {
  team.ranges(a.tokens, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const float* cos = a.cos + a.positions[t] * a.half;
      const float* sin = a.sin + a.positions[t] * a.half;
      for (int h = 0; h < a.heads; ++h) {
        float* x = a.x + t * a.x_stride + static_cast<std::ptrdiff_t>(h) * a.head_dim;
        const int step = a.interleaved ? 2 : 1;
        const int other = a.interleaved ? 1 : a.half;
        for (int i = 0; i < a.half; ++i) {
          const float first = x[i * step];
          const float second = x[i * step + other];
          x[i * step] = __builtin_fmaf(first, cos[i], -(second * sin[i]));
          x[i * step + other] = __builtin_fmaf(second, cos[i], first * sin[i]);
        }
      }
    }
  });
}

void gated(const GatedArgs& a, Team& team) {
  team.ranges(a.rows, [&](int first, int last) {
    const V16 one = set1(1.0f);
    for (int r = first; r < last; ++r) {
      const float* gate = a.x + static_cast<std::ptrdiff_t>(r) * 2 * a.size;
      const float* up = gate + a.size;
      float* y = a.y + static_cast<std::ptrdiff_t>(r) * a.size;
      for (int i = 0; i < a.size; i += kLanes) {
        const int n = a.size - i < kLanes ? a.size - i : kLanes;
        const V16 g = load_n(gate + i, n);
        V16 activated;
        if (a.act == Activation::kSilu) {
          activated = g / (one + exp(set1(0.0f) - g));
        } else {  // tanh approximation of gelu (Hendrycks and Gimpel, 2016):
                  // (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z))
          const V16 inner = set1(-1.5957691216057308f) * fma(set1(0.044715f) * g * g, g, g);
          activated = g / (one + exp(inner));
        }
        store_n(y + i, activated * load_n(up + i, n), n);
      }
    }
  });
}

}  // namespace sage::SAGE_ISA
