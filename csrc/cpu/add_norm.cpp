// Dropout, residual and LayerNorm on the CPU, and their gradient, each in one pass. For the schema,
// the arguments and the results see electra_fast/ops/add_norm.py.
//
//   z = drop(x) + residual    y = LayerNorm(z)    dresidual = dz    dx = drop(dz)
//
// The backward pass computes z again. The bits do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../registry.h"
#include "dropout.h"
#include "huge_pages.h"
#include "layer_norm.h"
#include "rows.h"

namespace electra_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// z, one token at a time, in a buffer of the calling thread. One loop reads both terms: 1.3 times
// as fast as one loop per term if they are not in a cache.
template <class T>
class DroppedSum {
 public:
  using W = at::opmath_type<T>;

  DroppedSum(const Tensor& x, const MaybeTensor& residual, const Dropout& dropout)
      : x_(x.const_data_ptr<T>()),
        residual_(residual ? residual->const_data_ptr<T>() : nullptr),
        E_(x.size(-1)),
        dropout_(dropout) {}

  W* z(int64_t t) {
    if (dropout_.active()) dropout_.factors(t, factor_.data());
    const W* x = load_row(x_ + t * E_, E_, x_copy_.data());
    const W* residual = residual_copy_.data();
    if (residual_) residual = load_row(residual_ + t * E_, E_, residual_copy_.data());
    for (int64_t e = 0; e < E_; ++e) z_[e] = dropped(x[e], factor_[e]) + residual[e];
    return z_.data();
  }

  // Apply to a row the dropout of the last z.
  void drop(const W* from, W* to) const {
#pragma GCC ivdep  // `to` may be the same row as `from`
    for (int64_t e = 0; e < E_; ++e) to[e] = dropped(from[e], factor_[e]);
  }

 private:
  const T *x_, *residual_;
  int64_t E_;
  const Dropout& dropout_;
  // Without a residual its copy remains 0, without dropout all factors remain 1.
  std::vector<W> z_ = std::vector<W>(E_), x_copy_ = z_, residual_copy_ = z_;
  std::vector<W> factor_ = std::vector<W>(std::max(E_, dropout_.padded_columns()), 1);
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const MaybeTensor& residual,
                                           const Tensor& weight, const Tensor& bias, double eps,
                                           const Dropout& dropout) {
  using W = at::opmath_type<T>;
  const int64_t E = x.size(-1);
  constexpr at::ScalarType kWide = c10::CppTypeToScalarType<W>::value;
  const Tensor y = huge_empty_like(x),
               mean = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(kWide));
  const Tensor rstd = at::empty(mean.sizes(), mean.options());
  const Tensor w = as(weight, kWide), b = as(bias, kWide);
  const W *ws = w.const_data_ptr<W>(), *bs = b.const_data_ptr<W>();
  W *means = mean.mutable_data_ptr<W>(), *rstds = rstd.mutable_data_ptr<W>();
  T* results = y.mutable_data_ptr<T>();
  for_rows(mean.numel(), E, [&](int64_t begin, int64_t end) {
    DroppedSum<T> sum(x, residual, dropout);
    for (int64_t t = begin; t < end; ++t) {
      W *z = sum.z(t), *row = result_row(results + t * E, z);
      layer_norm(z, E, ws, bs, eps, means[t], rstds[t], row);
      store_row(row, E, results + t * E);
    }
  });
  return {y, mean, rstd};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x,
                                                    const MaybeTensor& residual,
                                                    const Tensor& weight, const Tensor& mean,
                                                    const Tensor& rstd, const Dropout& dropout) {
  using W = at::opmath_type<T>;
  const int64_t E = x.size(-1), rows = mean.numel();
  const bool two = residual && dropout.active();  // without dropout dx is dresidual too
  const Tensor dx = huge_empty_like(x),
               dresidual = two ? huge_empty_like(x) : at::empty({0}, x.options());
  const Tensor w = as(weight, mean.scalar_type());
  const Sums dweight(rows, E, mean.options()), dbias(rows, E, mean.options());
  const W *ws = w.const_data_ptr<W>(), *means = mean.const_data_ptr<W>();
  const W* rstds = rstd.const_data_ptr<W>();
  const T* upstream = dy.const_data_ptr<T>();
  T *of_x = dx.mutable_data_ptr<T>(), *of_z = two ? dresidual.mutable_data_ptr<T>() : of_x;
  for_blocks(rows, E, [&](int64_t block, int64_t begin, int64_t end) {
    DroppedSum<T> sum(x, residual, dropout);
    std::vector<W> dy_copy(E), dz_copy(E);
    W *dw = dweight.of_block<W>(block), *db = dbias.of_block<W>(block);
    for (int64_t offset = begin * E, t = begin; t < end; ++t, offset += E) {
      const W* row = load_row(upstream + offset, E, dy_copy.data());
      W* dz = result_row(of_z + offset, dz_copy.data());
      layer_norm_gradient(row, sum.z(t), E, ws, means[t], rstds[t], dw, db, dz);
      store_row(dz, E, of_z + offset);
      if (!dropout.active()) continue;
      W* kept = result_row(of_x + offset, dy_copy.data());
      sum.drop(dz, kept);
      store_row(kept, E, of_x + offset);
    }
  });
  const at::ScalarType dtype = weight.scalar_type();
  return {dx, dresidual, dweight.total<W>(dtype), dbias.total<W>(dtype)};
}

std::tuple<Tensor, Tensor, Tensor> add_norm_fwd_cpu(const Tensor& x, const MaybeTensor& residual,
                                                    const Tensor& weight, const Tensor& bias,
                                                    double eps, double p, const MaybeTensor& rng,
                                                    int64_t dropout_stream) {
  const Dropout dropout(p, rng, dropout_stream, x.size(-1));
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "add_norm",
      [&] { return forward<scalar_t>(x, residual, weight, bias, eps, dropout); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_bwd_cpu(const Tensor& dy, const Tensor& x,
                                                            const MaybeTensor& residual,
                                                            const Tensor& weight,
                                                            const Tensor& mean, const Tensor& rstd,
                                                            double p, const MaybeTensor& rng,
                                                            int64_t dropout_stream) {
  const Dropout dropout(p, rng, dropout_stream, x.size(-1));
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "add_norm",
      [&] { return backward<scalar_t>(dy, x, residual, weight, mean, rstd, dropout); });
}

}  // namespace

ELECTRA_FAST_IMPL(add_norm_fwd, CPU, add_norm_fwd_cpu)
ELECTRA_FAST_IMPL(add_norm_bwd, CPU, add_norm_bwd_cpu)

}  // namespace electra_fast
