// The product with a layer's weights, on any device: products without a dispatch for each turn and
// reshape, ATen's or, where it is worth it, tiles of our own. The schema, and what arguments and
// results mean: electra_fast/ops/linear.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/util/accumulate.h>

#include <optional>
#include <tuple>
#include <vector>

#include "linear_cpu.h"
#include "registry.h"

namespace electra_fast {
namespace {

using at::Tensor;

// Rows may have no column, from which their number does not follow.
Tensor flat(const Tensor& x) {
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return x.contiguous().view({rows, x.size(-1)});
}

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor rows = flat(x);
  if (!worth_tiles(rows, weight)) return at::linear(x, weight, bias);
  const Tensor b = bias ? bias->contiguous() : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return rows_times(rows, turned(weight.contiguous()), bias ? b.const_data_ptr<float>() : nullptr)
      .view(shape);
}

// dy^T x. cuBLAS leaves its float32 sums as they are; ATen's CPU products round them first. Of the
// tiles' two factors the narrower is turned.
Tensor weight_gradient(const Tensor& dy, const Tensor& x, bool tiles, at::ScalarType dtype) {
  if (tiles) return x.size(1) < dy.size(1) ? turned(columns_times(x, dy)) : columns_times(dy, x);
  if (dtype == x.scalar_type()) return at::mm(dy.t(), x);
  return x.is_cuda() && dtype == at::kFloat ? at::mm(dy.t(), x, dtype)
                                            : at::mm(dy.t(), x).to(dtype);
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy, const Tensor& x,
                                              const Tensor& weight, at::ScalarType dtype,
                                              bool want_dx, bool want_dweight, bool want_dbias) {
  const Tensor rows = flat(dy), none = at::empty({0}, x.options());
  const bool tiles = worth_tiles(rows, weight) && dtype == at::kFloat;
  const auto dx = [&] {
    return tiles ? rows_times(rows, weight.contiguous(), nullptr) : at::mm(rows, weight);
  };
  return {want_dx ? dx().view(x.sizes()) : none,
          want_dweight ? weight_gradient(rows, flat(x), tiles, dtype) : none,
          want_dbias ? rows.sum(0, /*keepdim=*/false, dtype) : none};
}

}  // namespace

ELECTRA_FAST_IMPL_STRIDED(linear_fwd, CPU, linear_fwd)
ELECTRA_FAST_IMPL_STRIDED(linear_bwd, CPU, linear_bwd)
ELECTRA_FAST_IMPL_STRIDED(linear_fwd, CUDA, linear_fwd)
ELECTRA_FAST_IMPL_STRIDED(linear_bwd, CUDA, linear_bwd)

}  // namespace electra_fast
