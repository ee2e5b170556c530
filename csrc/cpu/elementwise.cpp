// Norms, rotary positions and gated activations: each row by itself.
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "rotary.h"
#include "vec.h"

namespace sage::SAGE_ISA {

namespace {

SAGE_INLINE int lanes_left(int size, int i) { return size - i < kLanes ? size - i : kLanes; }

// erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
SAGE_INLINE V16 erf_of_positive(V16 x) {
  const V16 t = set1(1.0f) / fma(set1(0.3275911f), x, set1(1.0f));
  V16 p = fma(set1(1.061405429f), t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  return set1(1.0f) - p * t * exp(set1(0.0f) - x * x);
}

template <Activation kAct>
SAGE_INLINE V16 activated(V16 x) {
  const V16 one = set1(1.0f);
  if constexpr (kAct == Activation::kSilu) {
    return x / (one + exp(set1(0.0f) - x));
  } else if constexpr (kAct == Activation::kGeluTanh) {
    // Hendrycks and Gimpel, 2016: (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z))
    const V16 inner = set1(-1.5957691216057308f) * fma(set1(0.044715f) * x * x, x, x);
    return x / (one + exp(inner));
  } else {
    // x (1 + erf(x / sqrt 2)) / 2, with erf odd: max(x, 0) - |x| (1 - erf(|x| / sqrt 2)) / 2
    const V16 magnitude = max(x, set1(0.0f) - x);
    const V16 rest = one - erf_of_positive(magnitude * set1(0.70710678118654752f));
    return max(x, set1(0.0f)) - set1(0.5f) * magnitude * rest;
  }
}

template <Activation kAct>
void activate_as(const ActivationArgs& a, Team& team) {
  team.ranges(a.rows, [&](int first, int last) {
    for (int r = first; r < last; ++r) {
      const float* x = a.x + r * a.x_stride;
      float* y = a.y + static_cast<std::ptrdiff_t>(r) * a.size;
      for (int i = 0; i < a.size; i += kLanes) {
        const int n = lanes_left(a.size, i);
        const V16 value = activated<kAct>(load_n(x + i, n));
        store_n(y + i, a.gated ? value * load_n(x + a.size + i, n) : value, n);
      }
    }
  });
}

template <class E>
void gather_as(const GatherArgs& a, Team& team) {
  team.ranges(a.num_rows, [&](int first, int last) {
    for (int r = first; r < last; ++r) {
      const auto* row = static_cast<const typename E::T*>(a.table) + a.rows[r] * a.size;
      float* y = a.y + static_cast<std::ptrdiff_t>(r) * a.size;
      for (int i = 0; i < a.size; ++i) y[i] = E::get(row[i]);
    }
  });
}

}  // namespace

void norm(const NormArgs& a, Team& team) {
  team.ranges(a.rows * a.heads, [&](int first, int last) {
    for (int r = first; r < last; ++r) {
      const float* x = a.x + r / a.heads * a.x_stride + static_cast<std::ptrdiff_t>(r % a.heads) * a.size;
      const float* residual = a.residual == nullptr ? nullptr : a.residual + static_cast<std::ptrdiff_t>(r) * a.size;
      float* sum_out = a.new_residual == nullptr ? nullptr : a.new_residual + static_cast<std::ptrdiff_t>(r) * a.size;
      float* y = a.y + static_cast<std::ptrdiff_t>(r) * a.size;
      V16 squares = set1(0.0f);
      for (int i = 0; i < a.size; i += kLanes) {
        const int n = lanes_left(a.size, i);
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
        const int n = lanes_left(a.size, i);
        store_n(y + i, load_n(in + i, n) * scale * load_n(a.weight + i, n), n);
      }
    }
  });
}

void layer_norm(const LayerNormArgs& a, Team& team) {
  team.ranges(a.rows, [&](int first, int last) {
    const float size = static_cast<float>(a.size);
    for (int r = first; r < last; ++r) {
      const float* x = a.x + r * a.x_stride;
      float* y = a.y + static_cast<std::ptrdiff_t>(r) * a.size;
      V16 sum = set1(0.0f);
      for (int i = 0; i < a.size; i += kLanes) sum = sum + load_n(x + i, lanes_left(a.size, i));
      const V16 mean = set1(reduce_add(sum) / size);
      V16 squares = set1(0.0f);
      for (int i = 0; i < a.size; i += kLanes) {
        const int n = lanes_left(a.size, i);
        store_n(y + i, load_n(x + i, n) - mean, n);
        const V16 centred = load_n(y + i, n);  // zero in the lanes behind the end
        squares = fma(centred, centred, squares);
      }
      const V16 scale = set1(1.0f / std::sqrt(reduce_add(squares) / size + a.eps));
      for (int i = 0; i < a.size; i += kLanes) {
        const int n = lanes_left(a.size, i);
        V16 value = load_n(y + i, n) * scale * load_n(a.weight + i, n);
        if (a.bias != nullptr) value = value + load_n(a.bias + i, n);
        store_n(y + i, value, n);
      }
    }
  });
}

void soft_cap(const SoftCapArgs& a, Team& team) {
  const V16 cap = set1(a.cap);
  // Rows of logits are long and few: the threads share each.
  team.ranges((a.size + kLanes - 1) / kLanes, [&](int first, int last) {
    for (int r = 0; r < a.rows; ++r) {
      const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(r) * a.size;
      for (int i = first * kLanes; i < last * kLanes; i += kLanes) {
        const int n = lanes_left(a.size, i);
        if (n <= 0) break;
        store_n(a.y + row + i, cap * tanh(load_n(a.x + row + i, n) / cap), n);
      }
    }
  });
}

void add(const AddArgs& a, Team& team) {
  team.ranges(a.rows, [&](int first, int last) {
    const V16 scale = set1(a.scale);
    for (int r = first; r < last; ++r) {
      for (int i = 0; i < a.size; i += kLanes) {
        const int n = lanes_left(a.size, i);
        V16 value = load_n(a.a + r * a.a_stride + i, n) * scale;
        if (a.b != nullptr) value = value + load_n(a.b + r * a.b_stride + i, n);
        store_n(a.y + static_cast<std::ptrdiff_t>(r) * a.size + i, value, n);
      }
    }
  });
}

void gather(const GatherArgs& a, Team& team) {
  if (a.type == Element::kF32) return gather_as<F32>(a, team);
  if (a.type == Element::kBF16) return gather_as<BF16>(a, team);
  gather_as<F16>(a, team);
}

void rotary(const RotaryArgs& a, Team& team) {
  team.ranges(a.tokens, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const float* cos = a.cos + a.positions[t] * a.half;
      const float* sin = a.sin + a.positions[t] * a.half;
      for (int h = 0; h < a.heads; ++h) {
        float* x = a.x + t * a.x_stride + static_cast<std::ptrdiff_t>(h) * a.head_dim;
        rotate_head(x, x, cos, sin, a.half, a.interleaved != 0);
      }
    }
  });
}

void activate(const ActivationArgs& a, Team& team) {
  if (a.act == Activation::kSilu) return activate_as<Activation::kSilu>(a, team);
  if (a.act == Activation::kGeluTanh) return activate_as<Activation::kGeluTanh>(a, team);
  activate_as<Activation::kGelu>(a, team);
}

}  // namespace sage::SAGE_ISA
