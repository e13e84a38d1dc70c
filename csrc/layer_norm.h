// LayerNorm of one row on the CPU, and its gradient:
//
//   h = (x - mean) rstd    y = h w + b    g = w dy    dx = rstd (g - avg(g) - h avg(g h))
//
// The variance is the mean square of x - mean, which does not cancel where the mean is large.
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
W average(const W* x, int64_t E) {
  using Vec = at::vec::Vectorized<W>;
  return at::vec::reduce_all<W>([](Vec a, Vec b) { return a + b; }, x, E) / E;
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
  const W center = mean = average(x, E);
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
