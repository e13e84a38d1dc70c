// Functions of a vector register on the CPU: exp(x) for x <= 0, and reductions over its lanes.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace electra_fast {

// Accurate to 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2. `sum` is so large that it
// is rounded to an integer, whose last bits are n + 127. A shift moves them to the bits of a
// float's exponent; below -87.7 that is 0, which gives the float 0. This takes a third of the time
// of a rounding instruction and a comparison, and Sleef's exp is a function call.
template <class Vec>
Vec exponential(Vec x) {
  if constexpr (std::is_same_v<typename Vec::value_type, double>) {
    return x.exp();
  } else {
    const Vec least = at::vec::maximum(x, Vec(-88.0f)), large(127 + 0x1.8p23f);
    const Vec sum = at::vec::fmadd(least, Vec(1.44269504f), large), n = sum - large;
    const Vec high = at::vec::fmadd(n, Vec(-0.693359375f), least);
    const Vec r = at::vec::fmadd(n, Vec(2.12194440e-4f), high);
    Vec p = at::vec::fmadd(r, Vec(1.38888889e-3f), Vec(8.33333333e-3f));
    for (const float c : {4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f})
      p = at::vec::fmadd(p, r, Vec(c));
    const auto bits = at::vec::cast<int32_t>(sum) << at::vec::Vectorized<int32_t>(23);
    return p * at::vec::cast<float>(bits);
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
