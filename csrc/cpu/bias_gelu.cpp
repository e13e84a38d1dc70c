// Bias and GELU on the CPU, and their gradient, each in one pass. For the schema, the arguments and
// the results see electra_fast/ops/bias_gelu.py, for the function gelu.h.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <tuple>

#include "../registry.h"
#include "gelu.h"
#include "huge_pages.h"
#include "rows.h"
#include "scratch.h"

namespace electra_fast {
namespace {

using at::Tensor;

template <class T>
Tensor forward(const Tensor& x, const Tensor& bias) {
  using W = at::opmath_type<T>;
  const int64_t F = x.size(-1);
  const Tensor y = huge_empty_like(x);
  const Tensor wide = as(bias, c10::CppTypeToScalarType<W>::value);
  const T* from = x.const_data_ptr<T>();
  const W* b = wide.const_data_ptr<W>();
  T* to = y.mutable_data_ptr<T>();
  for_rows(rows_of(x), F, [&](int64_t begin, int64_t end) {
    const Scratch<W> copy(F);
    for (int64_t offset = begin * F; offset < end * F; offset += F) {
      const W* row = load_row(from + offset, F, copy.data());
      W* result = result_row(to + offset, copy.data());
      at::vec::map2<W>([](Vec<W> x, Vec<W> b) { return gelu(x + b); }, result, row, b, F);
      store_row(result, F, to + offset);
    }
  });
  return y;
}

template <class T>
std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& bias) {
  using W = at::opmath_type<T>;
  const int64_t F = x.size(-1), rows = rows_of(x);
  const Tensor dx = huge_empty_like(x);
  const Tensor wide = as(bias, c10::CppTypeToScalarType<W>::value);
  const Sums dbias(rows, F, wide.options());
  const T *from = x.const_data_ptr<T>(), *upstream = dy.const_data_ptr<T>();
  const W* b = wide.const_data_ptr<W>();
  T* to = dx.mutable_data_ptr<T>();
  for_blocks(rows, F, [&](int64_t block, int64_t begin, int64_t end) {
    const Scratch<W> x_copy(F), dy_copy(F);
    for (int64_t offset = begin * F; offset < end * F; offset += F) {
      const W* row = load_row(from + offset, F, x_copy.data());
      const W* up = load_row(upstream + offset, F, dy_copy.data());
      W* result = result_row(to + offset, x_copy.data());
      at::vec::map3<W>([](Vec<W> dy, Vec<W> x, Vec<W> b) { return dy * gelu_gradient(x + b); },
                       result, up, row, b, F);
      add(result, F, dbias.of_block<W>(block));
      store_row(result, F, to + offset);
    }
  });
  return {dx, dbias.total<W>(bias.scalar_type())};
}

Tensor bias_gelu_fwd_cpu(const Tensor& x, const Tensor& bias) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "bias_gelu",
                                         [&] { return forward<scalar_t>(x, bias); });
}

std::tuple<Tensor, Tensor> bias_gelu_bwd_cpu(const Tensor& dy, const Tensor& x,
                                             const Tensor& bias) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "bias_gelu",
                                         [&] { return backward<scalar_t>(dy, x, bias); });
}

}  // namespace

ELECTRA_FAST_IMPL(bias_gelu_fwd, CPU, bias_gelu_fwd_cpu)
ELECTRA_FAST_IMPL(bias_gelu_bwd, CPU, bias_gelu_bwd_cpu)

}  // namespace electra_fast
