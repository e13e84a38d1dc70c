// LayerNorm of one row on the CPU, and its gradient:
//
//   m = avg(x)             mean = m + avg(x - m)
//   h = (x - mean) rstd    y = h w + b    g = w dy    dx = rstd (g - avg(g) - h avg(g h))
//
// m differs from the mean by the rounding of a sum. The correction avg(x - m) is small, so its own
// rounding does not matter: the mean is rounded once, and in a constant row it is that constant, so
// that h is 0. Terms are divided before they are added, so no sum overflows. The variance is the
// mean square of x - mean, which does not cancel if the mean is large.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector_math.h"

namespace electra_fast {

// The sum of f over a row, in four chains: in one chain each addition would wait for the previous
// one.
template <class W, class F>
W sum_of(const W* x, int64_t E, F f) {
  using Vec = at::vec::Vectorized<W>;
  constexpr int64_t kChains = 4, kSize = Vec::size();
  Vec sums[kChains] = {Vec(0), Vec(0), Vec(0), Vec(0)};
  int64_t e = 0;
  for (; e + kChains * kSize <= E; e += kChains * kSize)
    for (int64_t i = 0; i < kChains; ++i) sums[i] = sums[i] + f(Vec::loadu(x + e + i * kSize));
  for (int64_t i = 0; e < E; e += kSize, ++i) {
    const int64_t n = std::min(kSize, E - e);
    sums[i] = Vec::set(sums[i], sums[i] + f(Vec::loadu(x + e, n)), n);
  }
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class W>
W refined_mean(const W* x, int64_t E) {
  using Vec = at::vec::Vectorized<W>;
  const Vec inverse_E(W(1) / E);
  const W m = sum_of(x, E, [&](Vec a) { return a * inverse_E; });
  return m + sum_of(x, E, [&](Vec a) { return (a - Vec(m)) * inverse_E; });
}

template <class W>
W average_square(const W* x, int64_t E) {
  using Vec = at::vec::Vectorized<W>;
  return sum_of(x, E, [](Vec a) { return a * a; }) / E;
}

// x becomes x - mean, unless y is the same row, which ivdep tells the compiler is safe.
template <class W>
void layer_norm(W* x, int64_t E, const W* w, const W* b, double eps, W& mean, W& rstd, W* y) {
  const W center = mean = refined_mean(x, E);
  for (int64_t e = 0; e < E; ++e) x[e] -= center;
  const W variance = average_square(x, E);
  const W scale = rstd = 1 / std::sqrt(variance + static_cast<W>(eps));
#pragma GCC ivdep
  for (int64_t e = 0; e < E; ++e) y[e] = x[e] * scale * w[e] + b[e];
}

// Add this row's terms to dw and db. dx contains g until the averages are known.
template <class W>
void layer_norm_gradient(const W* dy, const W* x, int64_t E, const W* w, W mean, W rstd, W* dw,
                         W* db, W* dx) {
  using Vec = at::vec::Vectorized<W>;
  Vec sum_g(0), sum_gh(0);
  for (int64_t e = 0; e < E; e += Vec::size()) {
    const int64_t n = std::min<int64_t>(Vec::size(), E - e);
    const auto load = [&](const W* row) { return Vec::loadu(row + e, n); };
    const Vec up = load(dy), h = (load(x) - Vec(mean)) * Vec(rstd), g = up * load(w);
    sum_g = sum_g + g;
    sum_gh = sum_gh + g * h;
    (load(dw) + up * h).store(dw + e, n);
    (load(db) + up).store(db + e, n);
    g.store(dx + e, n);
  }
  const W average_g = lane_sum(sum_g) / E, average_gh = lane_sum(sum_gh) / E;
  for (int64_t e = 0; e < E; ++e) {
    const W h = (x[e] - mean) * rstd;
    dx[e] = rstd * (dx[e] - average_g - h * average_gh);
  }
}

}  // namespace electra_fast
