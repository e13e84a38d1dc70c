// The product with a layer's weights, on any device: ATen's products, called without a dispatch for
// each turn and reshape. The schema, and what arguments and results mean:
// electra_fast/ops/linear.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <optional>
#include <tuple>

#include "registry.h"

namespace electra_fast {
namespace {

using at::Tensor;

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return at::linear(x, weight, bias);
}

// cuBLAS leaves its float32 sums as they are; ATen's CPU products round them first.
Tensor product(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  if (dtype == a.scalar_type()) return at::mm(a, b);
  return a.is_cuda() && dtype == at::kFloat ? at::mm(a, b, dtype) : at::mm(a, b).to(dtype);
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy, const Tensor& x,
                                              const Tensor& weight, at::ScalarType dtype,
                                              bool want_dx, bool want_dweight, bool want_dbias) {
  const Tensor rows = dy.view({-1, dy.size(-1)}), none = at::empty({0}, x.options());
  return {want_dx ? at::mm(rows, weight).view(x.sizes()) : none,
          want_dweight ? product(rows.t(), x.view({-1, x.size(-1)}), dtype) : none,
          want_dbias ? rows.sum(0, /*keepdim=*/false, dtype) : none};
}

}  // namespace

ELECTRA_FAST_IMPL(linear_fwd, CPU, linear_fwd)
ELECTRA_FAST_IMPL(linear_bwd, CPU, linear_bwd)
ELECTRA_FAST_IMPL(linear_fwd, CUDA, linear_fwd)
ELECTRA_FAST_IMPL(linear_bwd, CUDA, linear_bwd)

}  // namespace electra_fast
