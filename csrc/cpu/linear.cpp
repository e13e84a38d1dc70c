// A linear layer on any device, without a dispatch for each transpose and view. The products are
// ATen's or, if they are faster, those of linear.h. For the schema, the arguments and the results
// see electra_fast/ops/linear.py.

#include "linear.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/util/accumulate.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../registry.h"
#include "rows.h"
#include "scratch.h"

namespace electra_fast {
namespace {

using at::Tensor;

// The number of rows comes from the other sizes: view cannot infer it if the rows have no column.
Tensor flat(const Tensor& x) {
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return x.contiguous().view({rows, x.size(-1)});
}

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor rows = flat(x);
  if (!tiles_are_faster(rows, weight)) return at::linear(x, weight, bias);
  const Tensor b = bias ? bias->contiguous() : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return matmul(rows, Panels::of_transpose(weight.contiguous()),
                bias ? b.const_data_ptr<float>() : nullptr)
      .view(shape);
}

// dy^T x. For another dtype than that of x, cuBLAS returns its float32 sums, and so do tiles of
// bfloat16; ATen's CPU products round them to the dtype of x first.
Tensor weight_gradient(const Tensor& dy, const Tensor& x, bool tiles, at::ScalarType dtype) {
  if (tiles) return matmul_tn(dy, x);
#ifdef CPU_CAPABILITY_AVX512
  if (x.is_cpu() && x.scalar_type() == at::kBFloat16 && dtype == at::kFloat &&
      x.size(0) >= kFewestRows && multiplies_bfloat16())
    return matmul_tn_bfloat16(dy, x);
#endif
  if (dtype == x.scalar_type()) return at::mm(dy.t(), x);
  return x.is_cuda() && dtype == at::kFloat ? at::mm(dy.t(), x, dtype)
                                            : at::mm(dy.t(), x).to(dtype);
}

// The sums over the rows. ATen adds 16-bit rows in a fifth of this speed.
Tensor bias_gradient(const Tensor& rows, at::ScalarType dtype) {
  if (!rows.is_cpu() || rows.scalar_type() == dtype) return rows.sum(0, /*keepdim=*/false, dtype);
  const int64_t T = rows.size(0), N = rows.size(1);
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, rows.scalar_type(), "linear", [&] {
        using W = at::opmath_type<scalar_t>;
        const Sums sums(T, N, rows.options().dtype(c10::CppTypeToScalarType<W>::value));
        const scalar_t* from = rows.const_data_ptr<scalar_t>();
        for_blocks(T, N, [&](int64_t block, int64_t begin, int64_t end) {
          const Scratch<W> copy(N);
          for (int64_t t = begin; t < end; ++t)
            add(load_row(from + t * N, N, copy.data()), N, sums.of_block<W>(block));
        });
        return sums.total<W>(dtype);
      });
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy, const Tensor& x,
                                              const Tensor& weight, at::ScalarType dtype,
                                              bool want_dx, bool want_dweight, bool want_dbias) {
  const Tensor rows = flat(dy), empty = at::empty({0}, x.options());
  const bool tiles = tiles_are_faster(rows, weight) && dtype == at::kFloat;
  const auto dx = [&] {
    return tiles ? matmul(rows, Panels::of(weight.contiguous()), nullptr) : at::mm(rows, weight);
  };
  return {want_dx ? dx().view(x.sizes()) : empty,
          want_dweight ? weight_gradient(rows, flat(x), tiles, dtype) : empty,
          want_dbias ? bias_gradient(rows, dtype) : empty};
}

}  // namespace

ELECTRA_FAST_IMPL_STRIDED(linear_fwd, CPU, linear_fwd)
ELECTRA_FAST_IMPL_STRIDED(linear_bwd, CPU, linear_bwd)
ELECTRA_FAST_IMPL_STRIDED(linear_fwd, CUDA, linear_fwd)
ELECTRA_FAST_IMPL_STRIDED(linear_bwd, CUDA, linear_bwd)

}  // namespace electra_fast
