// Products of activations with packed weights on the CPU, for inference. For the layout of the
// weights see `pack` in electra_fast/ops/encoder_layer.py.
//
// Per row r and column n, in float32 or bfloat16:   y = a_r w_n + b_n
// In int8, a row is quantised to x = s (q - z) with q in 0 ... 255, a column to w = t p:
//   y = s_r (t_n (q_r p_n) - z_r (t_n sum(p_n))) + b_n
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../host_device.h"
#include "rows.h"
#include "vector_math.h"

namespace electra_fast {

constexpr int64_t kChunkRows = 64;  // rows whose activations stay in the L2 cache
constexpr int64_t kRowStep = 16;    // rows of a product are padded to a multiple: a kernel is
                                    // compiled for each number of rows
// Multiplications per task that outweigh the cost of waking a thread.
constexpr int64_t kProductGrain = 1 << 21;

// The weights of one linear layer: panels [P, K', C', p] and, per column, the bias and if
// quantised t and t sum(p).
template <class T, bool quantised>
struct PackedLinear {
  static constexpr int64_t kPack = 4 / sizeof(T);  // rows that an instruction reads together
  const T* panels;
  const float *bias, *scale = nullptr, *shift = nullptr;
  int64_t P, K, C, N;  // K: padded

  PackedLinear(const at::Tensor& weights, const at::Tensor& columns)
      : panels(static_cast<const T*>(weights.const_data_ptr())),
        bias(columns.const_data_ptr<float>()),
        P(weights.size(0)),
        K(weights.size(1) * kPack),
        C(weights.size(2)),
        N(columns.size(1)) {
    TORCH_CHECK_VALUE(weights.dim() == 4 && weights.size(3) == kPack && P * C >= N &&
                          columns.size(0) == (quantised ? 3 : 1),
                      "encoder_layer: weights must be packed by electra_fast, got shapes ",
                      weights.sizes(), " and ", columns.sizes());
    if (quantised) scale = bias + N, shift = scale + N;
  }
};

// Up to kChunkRows rows of activations, converted to the operand of a product.
template <class T, bool quantised>
class Activations {
  using Sum = std::conditional_t<sizeof(T) == 1, int32_t, float>;
  using Operand = std::conditional_t<sizeof(T) == 1, uint8_t, T>;
  static constexpr bool kVnni = sizeof(T) < 4;

 public:
  // Load n rows of K elements for weights with `depth` rows. `whole` says that rows up to the next
  // multiple of kRowStep can be read too.
  template <class From>
  void load(const From* from, int64_t n, int64_t K, int64_t depth, bool whole = false) {
    rows_ = n, padded_ = round_up(n, kRowStep), depth_ = depth;
    if constexpr (std::is_same_v<From, T> && !quantised) {
      if (K == depth && (whole || n == padded_)) {
        operand_ = from;
        return;
      }
    }
    copy_.resize(std::max<size_t>(copy_.size(), padded_ * depth));
    operand_ = copy_.data();
    for (int64_t r = 0; r < n; ++r) {
      Operand* to = copy_.data() + r * depth;
      if constexpr (quantised) {
        row_.resize(std::max<size_t>(row_.size(), K));
        quantise(load_row(from + r * K, K, row_.data()), K, r, to);
      } else {
        at::vec::convert(from + r * K, to, K);
      }
      std::fill(to + K, to + depth, Operand(0));
    }
    std::fill(copy_.data() + n * depth, copy_.data() + padded_ * depth, Operand(0));
  }

  // Call use(r, n, count, y) with `count` results y of row r from column n on.
  template <class Use>
  void multiply(const PackedLinear<T, quantised>& w, const Use& use) const {
    const int64_t cost = std::max<int64_t>(1, padded_ * w.K * w.C);
    at::parallel_for(0, w.P, ceil_div(kProductGrain, cost), [&](int64_t begin, int64_t end) {
      const auto sums = std::make_unique_for_overwrite<Sum[]>(padded_ * w.C);
      const auto y = std::make_unique_for_overwrite<float[]>(w.C);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * w.C, count = std::min(w.C, w.N - first);
        at::native::cpublas::brgemm(padded_, w.C, w.K, depth_, w.C, w.C, /*add_C=*/false, operand_,
                                    w.panels + first * w.K, sums.get(), kVnni);
        for (int64_t r = 0; r < rows_; ++r) {
          finish(w, r, first, count, sums.get() + r * w.C, y.get());
          use(r, first, count, y.get());
        }
      }
      if (kVnni) at::native::cpublas::brgemm_release();
    });
  }

 private:
  // x = s (q - z), 0 included so that it is exact. A row that is not finite becomes NaN.
  void quantise(const float* x, int64_t K, int64_t r, Operand* to) {
    using V = at::vec::Vectorized<float>;
    V low(0), high(0);
    for (int64_t k = 0; k < K; k += V::size()) {
      const V v = V::loadu(x + k, std::min<int64_t>(V::size(), K - k));
      low = at::vec::minimum(low, v), high = at::vec::maximum(high, v);
    }
    const float least = -lane_max(low.neg()), range = lane_max(high) - least;
    const float s = range / 255, inverse = s > std::numeric_limits<float>::min() ? 1 / s : 0;
    const float z = std::nearbyint(-least * inverse);
    scale_[r] = std::isfinite(range) ? s : std::numeric_limits<float>::quiet_NaN(), zero_[r] = z;
    for (int64_t k = 0; k < K; ++k) {
      const float q = std::min(std::max(std::nearbyint(x[k] * inverse) + z, 0.0f), 255.0f);
      to[k] = static_cast<Operand>(static_cast<int32_t>(q));
    }
  }

  void finish(const PackedLinear<T, quantised>& w, int64_t r, int64_t first, int64_t count,
              const Sum* sums, float* y) const {
    const float* bias = w.bias + first;
    if constexpr (quantised) {
      const float s = scale_[r], zs = s * zero_[r];
      const float *scale = w.scale + first, *shift = w.shift + first;
      for (int64_t i = 0; i < count; ++i) y[i] = s * scale[i] * sums[i] - zs * shift[i] + bias[i];
    } else {
      for (int64_t i = 0; i < count; ++i) y[i] = sums[i] + bias[i];
    }
  }

  const Operand* operand_ = nullptr;
  int64_t rows_ = 0, padded_ = 0, depth_ = 0;
  std::vector<Operand> copy_;
  std::vector<float> row_;
  float scale_[kChunkRows], zero_[kChunkRows];
};

}  // namespace electra_fast
