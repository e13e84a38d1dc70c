// GELU in its erf form on the CPU, and its derivative. With a = |z|, e = exp(-a^2/2) and Mills'
// ratio R of the tail, Phi(-a) = R(a) e:
//
//   gelu(z) = max(z, 0) - a R(a) e
//   gelu'(z) = u if z <= 0, 1 - u if z > 0    u = (R(a) - a / sqrt(2 pi)) e
//
// Each needs one exponential and one quotient. The error is a few units in the last place of the
// result, even for large negative z, where 1 + erf is 0.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace electra_fast {

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

}  // namespace electra_fast
