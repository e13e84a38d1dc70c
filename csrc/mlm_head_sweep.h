// The sweep of the generator's head on the CPU. Rows of weight 0 are left out first; then, a chunk
// of rows at a time:
//   sweep     tiles of logits; of each row and block of tokens the maximum and the sum of
//             exponentials; with a gradient wanted the exponentials stay, in 32 MB
//   finish    a row's log-sum-exp from its blocks, its loss and its sample
//   gradient  w (softmax - onehot) from the exponentials, and its products with table and x
//
// Tiles are of fixed size, each is one thread's, and partial sums are added in a fixed order: all
// results are the same bits for any number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "exponential.h"
#include "inverse_cdf.h"
#include "tile.h"

namespace electra_fast {

using at::Tensor;

constexpr int64_t kRows = 64;              // of a product's tile, whose columns are a block
constexpr int64_t kChunkBytes = 32 << 20;  // of exponentials: about a last-level cache
constexpr int64_t kSegments = 16;          // partial sums of dx, whatever the threads
constexpr int64_t kTaskRows = 1024;        // of a tile that one task sweeps

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }

struct Want {
  bool gradient = false, dx = false, dtable = false;
};

// The used slots, and what each of them contributes to the results.
struct Slots {
  std::vector<int64_t> m, target;
  // In units of the largest one, if that is below 1: the reciprocal of the sum is then finite.
  std::vector<double> weight;
  double unit = 0;
  std::vector<double> nll;
  // log-sum-exp = top + rest: of large logits the sum loses the rest.
  std::vector<double> top, rest;
  std::vector<int64_t> sample;
  std::vector<char> correct;

  Slots(const Tensor& targets, const Tensor& weights, int64_t V) {
    const Tensor ids = targets.to(at::kLong);
    const int64_t* id = ids.const_data_ptr<int64_t>();
    const float* w = weights.const_data_ptr<float>();
    for (int64_t i = 0; i < targets.numel(); ++i) {
      if (w[i] == 0) continue;
      TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < V, "mlm_head: targets must be in [0, ", V, "), got ",
                        id[i], " at [", i,
                        "]; electra_fast.check_batch finds such ids before training");
      m.push_back(i), target.push_back(id[i]), weight.push_back(w[i]);
      unit = std::max(unit, std::abs(weight.back()));
    }
    unit = unit > 0 ? std::min(unit, 1.0) : 1;
    for (double& w : weight) w /= unit;
    nll.resize(size()), top.resize(size()), rest.resize(size());
    sample.resize(size()), correct.resize(size());
  }
  int64_t size() const { return static_cast<int64_t>(m.size()); }
};

// Memory of PyTorch's allocator behind a plain pointer, nullptr where there is none.
template <class V>
struct Buffer {
  Tensor tensor;
  V* data = nullptr;

  Buffer() = default;
  Buffer(const Tensor& t) : tensor(t), data(t.mutable_data_ptr<V>()) {}
  V& operator[](int64_t i) const { return data[i]; }
};

template <class T>
class Head {
 public:
  using W = typename Types<T>::wide;
  using Operand = typename Types<T>::operand;
  using Vec = at::vec::Vectorized<W>;

  Head(const Tensor& x, const Tensor& table, const Tensor& bias, Slots& slots, Draw draw, Want want)
      : E(x.size(1)),
        V(table.size(0)),
        K(round_up(E, kPair<Operand>)),
        tiles(ceil_div(V, kBlock)),
        x_(x.const_data_ptr<T>()),
        table_(table.const_data_ptr<T>()),
        slots(slots),
        draw(draw),
        want(want),
        wide(x.options().dtype(c10::CppTypeToScalarType<W>::value)) {
    rows = round_up(slots.size(), kRows);
    chunk = rows;
    if (want.gradient) {
      const int64_t row_bytes = tiles * kBlock * static_cast<int64_t>(sizeof(W));
      const int64_t fit = kChunkBytes / row_bytes / kRows * kRows;
      chunk = std::min(rows, std::clamp(fit, kRows, 4 * kRows));
      exponentials = at::empty({tiles, chunk, kBlock}, wide);
      dbias = at::zeros({tiles * kBlock}, wide.dtype(at::kDouble));
    }
    maxima = at::empty({chunk, tiles}, wide);
    sums = at::empty({chunk, tiles}, wide);
    if (draw.temperature != 1) tempered = at::empty({chunk, tiles}, wide);
    pack(bias);
  }

  void run() {
    for (int64_t first = 0; first < rows; first += chunk) {
      const int64_t count = std::min(chunk, rows - first);
      sweep(first, count);
      finish(first, std::min(count, slots.size() - first));
      if (want.gradient) gradient(first, count);
    }
  }

  // Of the loss: divided by the sum of the weights, unused rows 0.
  std::tuple<Tensor, Tensor, Tensor> gradients(int64_t M, double total) const {
    const W scale = total == 0 ? 0 : static_cast<W>(1 / total);
    const Tensor dx = want.dx ? at::zeros({M, E}, wide) : at::empty({0}, wide);
    for (int64_t i = 0; want.dx && i < slots.size(); ++i) {
      const W* from = dx_rows.data + i * E;
      W* to = dx.mutable_data_ptr<W>() + slots.m[i] * E;
      for (int64_t e = 0; e < E; ++e) to[e] = from[e] * scale;
    }
    const Tensor dtable = want.dtable ? at::zeros({V, E}, wide) : at::empty({0}, wide);
    at::parallel_for(0, dtable_tiles.data ? tiles : 0, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t v = t * kBlock, n = std::min(kBlock, V - v);
        const W* from = dtable_tiles.data + t * E * kBlock;
        W* to = dtable.mutable_data_ptr<W>() + v * E;
        for (int64_t i0 = 0; i0 < n; i0 += 16) {  // a transpose, in strips that the caches hold
          for (int64_t e = 0; e < E; ++e) {
            for (int64_t i = i0; i < std::min(i0 + 16, n); ++i)
              to[i * E + e] = from[e * kBlock + i] * scale;
          }
        }
      }
    });
    return {dx, dtable, at::mul(dbias.tensor.slice(0, 0, V), scale).to(wide.dtype())};
  }

 private:
  // Pad what the products read to whole tiles: zero rows of x, and tokens of logit -inf.
  void pack(const Tensor& bias) {
    const auto operand = wide.dtype(c10::CppTypeToScalarType<Operand>::value);
    packed_x = at::zeros({rows, K}, operand);
    packed_table = at::zeros({tiles, K, kBlock}, operand);
    packed_bias = at::full({tiles * kBlock}, -std::numeric_limits<double>::infinity(), wide);
    packed_bias.tensor.slice(0, 0, V).copy_(bias);
    for (int64_t i = 0; i < slots.size(); ++i) {
      const T* row = x_ + slots.m[i] * E;
      std::copy(row, row + E, packed_x.data + i * K);
    }
    at::parallel_for(0, rows > 0 ? tiles : 0, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t v = t * kBlock;
        transpose(table_ + v * E, std::min(kBlock, V - v), E, E, packed_table.data + t * K * kBlock,
                  kBlock);
      }
    });
    target_logit.resize(rows), target_leads.resize(rows);
  }

  W* tile_of_exponentials(int64_t t) const { return exponentials.data + t * chunk * kBlock; }

  void sweep(int64_t first, int64_t count) {
    const int64_t tasks = ceil_div(count, kTaskRows);
    at::parallel_for(0, tiles * tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<W> scratch(want.gradient ? 0 : kRows * kBlock);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t t = task / tasks, from = task % tasks * kTaskRows;
        for (int64_t r = from; r < std::min(from + kTaskRows, count); r += kRows) {
          W* c = want.gradient ? tile_of_exponentials(t) + r * kBlock : scratch.data();
          product(kRows, kBlock, K, packed_x.data + (first + r) * K, K,
                  packed_table.data + t * K * kBlock, kBlock, c, kBlock, false);
          const int64_t used = std::min(kRows, slots.size() - first - r);
          for (int64_t i = 0; i < used; ++i) reduce(c + i * kBlock, first, r + i, t);
        }
      }
      if (sizeof(Operand) == 2) at::native::cpublas::brgemm_release();
    });
  }

  // Add the bias to a row of a tile, note its maximum and sum, leave the exponentials.
  void reduce(W* c, int64_t first, int64_t r, int64_t t) {
    const W* b = packed_bias.data + t * kBlock;
    Vec top(-std::numeric_limits<W>::infinity());
    for (int64_t i = 0; i < kBlock; i += Vec::size()) {
      const Vec logit = Vec::loadu(c + i) + Vec::loadu(b + i);
      logit.store(c + i);
      top = at::vec::maximum(top, logit);  // NaN stays
    }
    const W maximum = highest(top);
    const int64_t slot = first + r, y = slots.target[slot] - t * kBlock;
    if (y >= 0 && y < kBlock) {  // it leads if none before it has as much and none behind it more
      target_logit[slot] = c[y];
      target_leads[slot] = c[y] == maximum && std::find(c, c + y, maximum) == c + y;
    }
    // A block without any probability has the sum 0, not exp(-inf + inf).
    const Vec down(std::max(maximum, std::numeric_limits<W>::lowest()));
    const int64_t at = r * tiles + t;
    maxima[at] = maximum;
    if (tempered.data) {
      // Its product with a difference of 0 is 0, and with one of -inf -inf.
      const double least = std::numeric_limits<W>::min(), most = std::numeric_limits<W>::max();
      const Vec inverse(static_cast<W>(std::clamp(1 / draw.temperature, least, most)));
      tempered[at] =
          sum_of_exponentials<false>(c, [&](Vec logit) { return (logit - down) * inverse; });
    }
    sums[at] = sum_of_exponentials<true>(c, [&](Vec logit) { return logit - down; });
  }

  template <bool keep, class Argument>
  static W sum_of_exponentials(W* c, Argument argument) {
    Vec sum(0);
    for (int64_t i = 0; i < kBlock; i += Vec::size()) {
      const Vec e = exponential(argument(Vec::loadu(c + i)));
      if (keep) e.store(c + i);
      sum = sum + e;
    }
    return total(sum);
  }

  void finish(int64_t first, int64_t count) {
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) finish_row(first + r, r);
    });
  }

  void finish_row(int64_t slot, int64_t r) {
    const W* m = maxima.data + r * tiles;
    const W* s = sums.data + r * tiles;
    const std::vector<double> tops(m, m + tiles);
    const Masses all(tops, {s, s + tiles}, 1);
    slots.top[slot] = all.top, slots.rest[slot] = std::log(all.total);
    slots.nll[slot] = all.top - target_logit[slot] + slots.rest[slot];
    const int64_t j = slots.target[slot] / kBlock;
    slots.correct[slot] =
        target_leads[slot] && target_logit[slot] == all.top && std::find(m, m + j, m[j]) == m + j;
    if (tempered.data) s = tempered.data + r * tiles;
    slots.sample[slot] = draw.sample(slots.m[slot], slots.target[slot], tops, {s, s + tiles},
                                     [&](int64_t block) { return logits_of(slot, block); });
  }

  std::vector<double> logits_of(int64_t slot, int64_t block) const {
    const int64_t v0 = block * kBlock;
    std::vector<double> logits(std::min(kBlock, V - v0));
    const T* row = x_ + slots.m[slot] * E;
    for (size_t i = 0; i < logits.size(); ++i) {
      using VecT = at::vec::Vectorized<at::vec::vec_scalar_t<T>>;
      const auto dot = at::vec::map2_reduce_all<T>([](VecT a, VecT b) { return a * b; },
                                                   [](VecT a, VecT b) { return a + b; }, row,
                                                   table_ + (v0 + i) * E, E);
      logits[i] = static_cast<W>(dot) + packed_bias[v0 + i];
    }
    return logits;
  }

  void gradient(int64_t first, int64_t count) {
    const int64_t segments = std::min(kSegments, tiles);
    const Buffer<W> partial(at::empty({want.dx ? segments : 0, count, E}, wide));
    const Buffer<W> x_transposed(at::zeros({E, count}, wide));
    if (first == 0 && want.dx) dx_rows = at::empty({rows, E}, wide);
    if (first == 0 && want.dtable) dtable_tiles = at::empty({tiles, E, kBlock}, wide);
    if (want.dtable) {
      for (int64_t i = 0; i < std::min(count, slots.size() - first); ++i) {
        const T* row = x_ + slots.m[first + i] * E;
        W* column = x_transposed.data + i;
        for (int64_t e = 0; e < E; ++e) column[e * count] = static_cast<W>(row[e]);
      }
    }
    at::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
      std::vector<W> padded(want.dx ? kBlock * E : 0);
      for (int64_t segment = begin; segment < end; ++segment) {
        const int64_t t0 = segment * tiles / segments, t1 = (segment + 1) * tiles / segments;
        for (int64_t t = t0; t < t1; ++t) {
          W* p = tile_of_exponentials(t);
          difference(p, first, count, t);
          if (want.dx) {
            const W* rows_of_table = table_rows(t, padded.data());
            W* sum = partial.data + segment * count * E;
            for (int64_t r = 0; r < count; r += kRows)
              product(kRows, E, kBlock, p + r * kBlock, kBlock, rows_of_table, E, sum + r * E, E,
                      t > t0);
          }
          if (want.dtable)
            product(E, kBlock, count, x_transposed.data, count, p, kBlock,
                    dtable_tiles.data + t * E * kBlock, kBlock, first > 0);
        }
      }
    });
    if (!want.dx) return;
    at::parallel_for(0, count * E, 8192, [&](int64_t begin, int64_t end) {
      W* sum = dx_rows.data + first * E;
      const W* part = partial.data;
      std::copy(part + begin, part + end, sum + begin);
      for (int64_t segment = 1; segment < segments; ++segment)
        for (int64_t i = begin; i < end; ++i) sum[i] += part[segment * count * E + i];
    });
  }

  // w (softmax - onehot(target)) of a tile, in place of its exponentials, and its sum over the
  // rows: of kRows in W, of those in float64, since thousands of float32 additions lose five
  // digits.
  void difference(W* p, int64_t first, int64_t count, int64_t t) {
    const int64_t used = std::min(count, slots.size() - first);
    for (int64_t r0 = 0; r0 < used; r0 += kRows) {
      W column_sum[kBlock] = {};
      for (int64_t r = r0; r < std::min(r0 + kRows, used); ++r, p += kBlock) {
        const int64_t slot = first + r, y = slots.target[slot] - t * kBlock;
        const W w = static_cast<W>(slots.weight[slot]);
        const W down = static_cast<W>(maxima[r * tiles + t] - slots.top[slot] - slots.rest[slot]);
        const Vec factor(w * std::exp(down));
        for (int64_t i = 0; i < kBlock; i += Vec::size()) {
          const Vec d = Vec::loadu(p + i) * factor;
          d.store(p + i);
          (Vec::loadu(column_sum + i) + d).store(column_sum + i);
        }
        if (y >= 0 && y < kBlock) p[y] -= w, column_sum[y] -= w;
      }
      for (int64_t i = 0; i < kBlock; ++i) dbias[t * kBlock + i] += column_sum[i];
    }
    std::fill(p, p + (count - used) * kBlock, W(0));
  }

  // The rows [kBlock, E] of the table that a tile has, those past its end 0.
  const W* table_rows(int64_t t, W* padded) const {
    const int64_t v = t * kBlock, n = std::min(kBlock, V - v);
    if constexpr (std::is_same_v<T, W>) {
      if (n == kBlock) return table_ + v * E;
    }
    std::fill(std::copy(table_ + v * E, table_ + (v + n) * E, padded), padded + kBlock * E, W(0));
    return padded;
  }

  const int64_t E, V, K, tiles;
  int64_t rows, chunk;  // all rows, padded, and those that are worked on together
  const T *x_, *table_;
  Slots& slots;
  const Draw draw;
  const Want want;
  const at::TensorOptions wide;
  Buffer<Operand> packed_x, packed_table;  // [rows, K], [tiles, K, kBlock]
  Buffer<W> packed_bias;                   // [tiles * kBlock]
  Buffer<W> maxima, sums, tempered;        // [chunk, tiles]
  Buffer<W> exponentials;                  // [tiles, chunk, kBlock]
  Buffer<W> dx_rows, dtable_tiles;         // [rows, E], [tiles, E, kBlock]
  Buffer<double> dbias;                    // [tiles * kBlock]
  std::vector<W> target_logit;
  std::vector<char> target_leads;
};

}  // namespace electra_fast
