// The sweep over the vocabulary of the generator's head on the CPU. Slots of weight 0 are left out.
// The others are rows, and a chunk of rows passes three stages:
//   sweep     compute tiles of logits; store the maximum and the sum of exponentials of each row
//             and block of tokens and, if a gradient is wanted, the exponentials, in 32 MB
//   finish    compute a row's log-sum-exp from its blocks, its loss and its sample
//   gradient  compute w (softmax - onehot) from the exponentials, and its products with table and x
//
// Tiles have a fixed size, one thread computes a tile, and partial sums are added in a fixed order:
// the bits do not depend on the number of threads.
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

#include "../host_device.h"
#include "inverse_cdf.h"
#include "tile.h"
#include "vector_math.h"

namespace electra_fast {

using at::Tensor;

constexpr int64_t kRows = 64;              // rows of a product's tile; its columns are a block
constexpr int64_t kChunkBytes = 32 << 20;  // exponentials of a chunk: about a last-level cache
constexpr int64_t kSegments = 16;          // partial sums of dx, for any number of threads
constexpr int64_t kTaskRows = 1024;        // rows that one task sweeps

struct Want {
  bool gradient = false, dx = false, dtable = false;
};

// The slots whose weight is not 0, and their results.
struct Slots {
  std::vector<int64_t> m, target;
  // In units of the largest |weight| if that is below 1, so that the reciprocal of the sum is
  // finite.
  std::vector<double> weight;
  double unit = 0;
  std::vector<double> nll;
  // Two terms of the log-sum-exp: if the logits are large, their sum rounds log_sum away.
  std::vector<double> max_logit, log_sum;
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
    nll.resize(size()), max_logit.resize(size()), log_sum.resize(size());
    sample.resize(size()), correct.resize(size());
  }
  int64_t size() const { return static_cast<int64_t>(m.size()); }
};

// A plain pointer to the memory of a tensor, or null if there is none.
template <class V>
struct Buffer {
  Tensor tensor;
  V* data = nullptr;

  Buffer() = default;
  Buffer(const Tensor& t) : tensor(t), data(t.mutable_data_ptr<V>()) {}
  V& operator[](int64_t i) const { return data[i]; }
};

template <class T>
class MlmHead {
 public:
  using W = typename Types<T>::wide;
  using Operand = typename Types<T>::operand;
  using Vec = at::vec::Vectorized<W>;

  MlmHead(const Tensor& x, const Tensor& table, const Tensor& bias, Slots& slots,
          const Sampler& sampler, Want want)
      : E(x.size(1)),
        V(table.size(0)),
        K(round_up(E, kPair<Operand>)),
        tiles(ceil_div(V, kBlock)),
        x_(x.const_data_ptr<T>()),
        table_(table.const_data_ptr<T>()),
        slots(slots),
        sampler(sampler),
        want(want),
        wide(x.options().dtype(c10::CppTypeToScalarType<W>::value)) {
    rows = round_up(slots.size(), kRows);
    chunk = rows;
    if (want.gradient) {
      const int64_t row_bytes = tiles * kBlock * static_cast<int64_t>(sizeof(W));
      const int64_t fitting_rows = kChunkBytes / row_bytes / kRows * kRows;
      chunk = std::min(rows, std::clamp(fitting_rows, kRows, 4 * kRows));
      exponentials = at::empty({tiles, chunk, kBlock}, wide);
      dbias = at::zeros({tiles * kBlock}, wide.dtype(at::kDouble));
    }
    maxima = at::empty({chunk, tiles}, wide);
    sums = at::empty({chunk, tiles}, wide);
    if (sampler.temperature != 1) tempered = at::empty({chunk, tiles}, wide);
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

  // The gradients of the loss: divided by the sum of the weights, and 0 for slots of weight 0.
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
        for (int64_t i0 = 0; i0 < n; i0 += 16) {  // transpose in strips that fit the caches
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
  // Pad the operands of products to whole tiles, with zero rows of x and with tokens of logit -inf.
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
    target_logit.resize(rows), target_is_max.resize(rows);
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

  // Add the bias to a row of a tile, store its maximum and sum, and replace it by the exponentials.
  void reduce(W* c, int64_t first, int64_t r, int64_t t) {
    const W* b = packed_bias.data + t * kBlock;
    Vec max(-std::numeric_limits<W>::infinity());
    for (int64_t i = 0; i < kBlock; i += Vec::size()) {
      const Vec logit = Vec::loadu(c + i) + Vec::loadu(b + i);
      logit.store(c + i);
      max = at::vec::maximum(max, logit);  // propagates NaN
    }
    const W maximum = lane_max(max);
    const int64_t slot = first + r, y = slots.target[slot] - t * kBlock;
    if (y >= 0 && y < kBlock) {  // like argmax, the first of equal maxima counts
      target_logit[slot] = c[y];
      target_is_max[slot] = c[y] == maximum && std::find(c, c + y, maximum) == c + y;
    }
    // If all logits of a block are -inf, its sum is 0 and not exp(-inf + inf).
    const Vec shift(std::max(maximum, std::numeric_limits<W>::lowest()));
    const int64_t index = r * tiles + t;
    maxima[index] = maximum;
    if (tempered.data) {
      // Finite and above 0, so that its product with 0 is 0 and with -inf is -inf.
      const double least = std::numeric_limits<W>::min(), most = std::numeric_limits<W>::max();
      const Vec inverse(static_cast<W>(std::clamp(1 / sampler.temperature, least, most)));
      tempered[index] =
          sum_of_exponentials<false>(c, [&](Vec logit) { return (logit - shift) * inverse; });
    }
    sums[index] = sum_of_exponentials<true>(c, [&](Vec logit) { return logit - shift; });
  }

  template <bool keep, class Argument>
  static W sum_of_exponentials(W* c, Argument argument) {
    Vec sum(0);
    for (int64_t i = 0; i < kBlock; i += Vec::size()) {
      const Vec e = exponential(argument(Vec::loadu(c + i)));
      if (keep) e.store(c + i);
      sum = sum + e;
    }
    return lane_sum(sum);
  }

  void finish(int64_t first, int64_t count) {
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) finish_row(first + r, r);
    });
  }

  void finish_row(int64_t slot, int64_t r) {
    const W* m = maxima.data + r * tiles;
    const W* s = sums.data + r * tiles;
    const std::vector<double> block_maxima(m, m + tiles);
    const Masses all(block_maxima, {s, s + tiles}, 1);
    slots.max_logit[slot] = all.max;
    slots.log_sum[slot] = std::log(all.total);
    slots.nll[slot] = all.max - target_logit[slot] + slots.log_sum[slot];
    const int64_t j = slots.target[slot] / kBlock;
    slots.correct[slot] =
        target_is_max[slot] && target_logit[slot] == all.max && std::find(m, m + j, m[j]) == m + j;
    if (tempered.data) s = tempered.data + r * tiles;
    slots.sample[slot] =
        sampler.sample(slots.m[slot], slots.target[slot], block_maxima, {s, s + tiles},
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
          to_dlogits(p, first, count, t);
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

  // Replace the exponentials of a tile by w (softmax - onehot(target)), and add its sum over the
  // rows to dbias: kRows rows in W, and then in float64, since thousands of float32 additions lose
  // five digits.
  void to_dlogits(W* p, int64_t first, int64_t count, int64_t t) {
    const int64_t used = std::min(count, slots.size() - first);
    for (int64_t r0 = 0; r0 < used; r0 += kRows) {
      W column_sum[kBlock] = {};
      for (int64_t r = r0; r < std::min(r0 + kRows, used); ++r, p += kBlock) {
        const int64_t slot = first + r, y = slots.target[slot] - t * kBlock;
        const W w = static_cast<W>(slots.weight[slot]);
        const W shift =
            static_cast<W>(maxima[r * tiles + t] - slots.max_logit[slot] - slots.log_sum[slot]);
        const Vec factor(w * std::exp(shift));
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

  // The rows [kBlock, E] of the table for tile t, with zeros past the end of the table.
  const W* table_rows(int64_t t, W* padded) const {
    const int64_t v = t * kBlock, n = std::min(kBlock, V - v);
    if constexpr (std::is_same_v<T, W>) {
      if (n == kBlock) return table_ + v * E;
    }
    std::fill(std::copy(table_ + v * E, table_ + (v + n) * E, padded), padded + kBlock * E, W(0));
    return padded;
  }

  const int64_t E, V, K, tiles;
  int64_t rows, chunk;  // all rows, padded to a multiple of kRows, and the rows of a chunk
  const T *x_, *table_;
  Slots& slots;
  const Sampler sampler;
  const Want want;
  const at::TensorOptions wide;
  Buffer<Operand> packed_x, packed_table;  // [rows, K], [tiles, K, kBlock]
  Buffer<W> packed_bias;                   // [tiles * kBlock]
  Buffer<W> maxima, sums, tempered;        // [chunk, tiles]
  Buffer<W> exponentials;                  // [tiles, chunk, kBlock]
  Buffer<W> dx_rows, dtable_tiles;         // [rows, E], [tiles, E, kBlock]
  Buffer<double> dbias;                    // [tiles * kBlock]
  std::vector<W> target_logit;
  std::vector<char> target_is_max;
};

}  // namespace electra_fast
