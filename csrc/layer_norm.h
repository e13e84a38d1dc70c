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

template <class W>
W refined_mean(const W* x, int64_t E) {
  using Vec = at::vec::Vectorized<W>;
  const Vec share(W(1) / E);
  const auto average_from = [&](W m) {
    const Vec from(m);
    return at::vec::map_reduce_all<W>([&](Vec a) { return (a - from) * share; },
                                      [](Vec a, Vec b) { return a + b; }, x, E);
  };
  const W m = average_from(0);
  return m + average_from(m);
}

template <class W>
W average_square(const W* x, int64_t E) {
  using Vec = at::vec::Vectorized<W>;
  return at::vec::map_reduce_all<W>([](Vec a) { return a * a; }, [](Vec a, Vec b) { return a + b; },
                                    x, E) /
         E;
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
