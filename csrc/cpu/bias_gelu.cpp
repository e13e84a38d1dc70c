// Bias and GELU on the CPU, and their gradient, each in one pass. For the schema, the arguments and
// the results see electra_fast/ops/bias_gelu.py. With a = |z|, e = exp(-a^2/2) and Mills' ratio R
// of the tail, Phi(-a) = R(a) e:
//
//   gelu(z) = max(z, 0) - a R(a) e
//   gelu'(z) = u if z <= 0, 1 - u if z > 0    u = (R(a) - a / sqrt(2 pi)) e
//
// Value and gradient need one exponential and one quotient each. Their error is a few units in the
// last place of the result, even for large negative z, where 1 + erf is 0.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <initializer_list>
#include <tuple>
#include <type_traits>

#include "../registry.h"
#include "huge_pages.h"
#include "rows.h"
#include "scratch.h"

namespace electra_fast {
namespace {

using at::Tensor;
template <class W>
using Vec = at::vec::Vectorized<W>;

// The tail is 0 from here on. A larger a is clamped to it, because infinity times 0 is NaN.
template <class W>
constexpr W kEnd = std::is_same_v<W, double> ? 40 : 13.27;

template <class W>
Vec<W> polynomial(Vec<W> x, std::initializer_list<W> coefficients) {
  Vec<W> sum(0);
  for (const W c : coefficients) sum = at::vec::fmadd(sum, x, Vec<W>(c));
  return sum;
}

// exp(-a^2/2) = 2^n 2^r, a <= kEnd, with n an integer and |r| <= 1/2. `sum` is so large that it is
// rounded to an integer, whose last bits are n + 127. A shift moves them to the bits of a float's
// exponent; an exponent of 0 gives the float 0. The polynomial's relative error is at most 1.6e-8.
template <class W>
Vec<W> bell(Vec<W> a) {
  if constexpr (std::is_same_v<W, double>) {
    return (a * a * Vec<W>(-0.5)).exp();
  } else {
    const Vec<W> square = a * a, slope(-0.72134752f), large(127 + 0x1.8p23f);
    const Vec<W> sum = at::vec::fmadd(square, slope, large);
    const Vec<W> r = at::vec::fmadd(square, slope, large - sum);
    const auto power = at::vec::cast<float>(at::vec::cast<int32_t>(sum) << Vec<int32_t>(23));
    return power * polynomial<W>(r, {1.5353362e-4f, 1.3398875e-3f, 9.618437e-3f, 5.5503324e-2f,
                                     2.4022648e-1f, 6.931472e-1f, 1.0f});
  }
}

// Phi(-a), given e = exp(-a^2/2). The quotient fits R up to kEnd with a relative error of at most
// 9e-9, by iteratively reweighted least squares. No term is negative, so nothing cancels.
template <class W>
Vec<W> tail(Vec<W> a, Vec<W> e) {
  if constexpr (std::is_same_v<W, double>) {
    return Vec<W>(0.5) * (a * Vec<W>(0.7071067811865476)).erfc();
  } else {
    return e * polynomial<W>(a, {4.015919e-3f, 3.9955206e-2f, 1.8122047e-1f, 4.355692e-1f, 0.5f}) /
           polynomial<W>(
               a, {1.0066272e-2f, 1.0016027e-1f, 4.641526e-1f, 1.1941248f, 1.6690233f, 1.0f});
  }
}

template <class W>
Vec<W> gelu(Vec<W> z) {
  const Vec<W> a = at::vec::minimum(z.abs(), Vec<W>(kEnd<W>));
  return at::vec::maximum(z, Vec<W>(0)) - a * tail(a, bell(a));
}

template <class W>
Vec<W> gelu_gradient(Vec<W> z) {
  const Vec<W> a = at::vec::minimum(z.abs(), Vec<W>(kEnd<W>)), e = bell(a);
  const Vec<W> u = tail(a, e) - a * e * Vec<W>(0.3989422804014327);  // 1 / sqrt(2 pi)
  return Vec<W>::blendv(u, Vec<W>(1) - u, z > Vec<W>(0));
}

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
