// LayerNorm of one row on the CPU, and its gradient:
//
//   m = avg(x)             mean = m + avg(x - m)
//   h = (x - mean) rstd    y = h w + b    g = w dy    dx = rstd (g - avg(g) - h avg(g h))
//
// m is a sum's rounding away from the mean. What it lacks is small, and so is what rounding it
// changes: the mean is rounded once, and that of a constant row is the constant, whose h is 0.
// Terms are divided before they are added, so no sum overflows. The variance is the mean square
// of x - mean, which does not cancel where the mean is large.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace electra_fast {

template <class W>
W total(at::vec::Vectorized<W> x) {
  using Vec = at::vec::Vectorized<W>;
  return at::vec::vec_reduce_all<W>([](Vec a, Vec b) { return a + b; }, x);
}

// The sum of f over a row, in four chains: in one, each addition would wait for the last.
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
  return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class W>
W refined_mean(const W* x, int64_t E) {
  using Vec = at::vec::Vectorized<W>;
  const Vec share(W(1) / E);
  const W m = sum_of(x, E, [&](Vec a) { return a * share; });
  return m + sum_of(x, E, [&](Vec a) { return (a - Vec(m)) * share; });
}

template <class W>
W average_square(const W* x, int64_t E) {
  using Vec = at::vec::Vectorized<W>;
  return sum_of(x, E, [](Vec a) { return a * a; }) / E;
}

// x becomes x - mean, or y, which may be the same row: `ivdep`, since the compiler cannot know.
template <class W>
void layer_norm(W* x, int64_t E, const W* w, const W* b, double eps, W& mean, W& rstd, W* y) {
  const W center = mean = refined_mean(x, E);
  for (int64_t e = 0; e < E; ++e) x[e] -= center;
  const W variance = average_square(x, E);
  const W scale = rstd = 1 / std::sqrt(variance + static_cast<W>(eps));
#pragma GCC ivdep
  for (int64_t e = 0; e < E; ++e) y[e] = x[e] * scale * w[e] + b[e];
}

// dw and db grow by the row's part. dx holds g until the averages are known.
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
  const W along_one = total(sum_g) / E, along_h = total(sum_gh) / E;
  for (int64_t e = 0; e < E; ++e) {
    const W h = (x[e] - mean) * rstd;
    dx[e] = rstd * (dx[e] - along_one - h * along_h);
  }
}

}  // namespace electra_fast
