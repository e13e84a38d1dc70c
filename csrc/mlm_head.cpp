// The generator's head on the CPU: loss, one sample a slot, and the gradient, without [M, V] logits.
// The schema, and what arguments and results mean: electra_fast/ops/mlm_head.py.
//
// Rows of weight 0 are left out first. Then, a chunk of rows at a time:
//   sweep     tiles of logits; of each row and block of 128 tokens the maximum and the sum of
//             exponentials; with a gradient wanted the exponentials stay, in 32 MB
//   finish    a row's log-sum-exp from its blocks; one uniform picks the block in float64, and a
//             second look at that block picks the token
//   gradient  w (softmax - onehot) from the exponentials, and its products with table and x
//
// Tiles are of fixed size, each is one thread's, and partial sums are added in a fixed order: all
// results are the same bits for any number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "philox.h"
#include "registry.h"
#include "tile.h"

namespace electra_fast {
namespace {

using at::Tensor;

constexpr int64_t kRows = 64, kColumns = 512;  // of a product's tile
constexpr int64_t kBlock = 128;                // tokens behind one maximum and one sum
constexpr int64_t kChunkBytes = 32 << 20;      // of exponentials: about a last-level cache
constexpr int64_t kSegments = 16;              // partial sums of dx, whatever the threads
constexpr int64_t kTaskRows = 1024;            // of a tile that one task sweeps

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }

struct Draw {
  uint64_t seed;
  uint32_t step;
  double temperature;
  bool disallow_correct;

  double uniform(int64_t m) const {
    const Words w = philox<10>(seed, {0, static_cast<uint32_t>(m), step, 1});
    return ((w.w0 >> 5) * 67108864.0 + (w.w1 >> 6)) * 0x1p-53;
  }
};

struct Want {
  bool gradient = false, dx = false, dtable = false;
};

// The used slots, and what each of them contributes to the results.
struct Slots {
  std::vector<int64_t> m, target;
  std::vector<double> weight, nll, lse;
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
    }
    nll.resize(size()), lse.resize(size()), sample.resize(size()), correct.resize(size());
  }
  int64_t size() const { return static_cast<int64_t>(m.size()); }
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
        tiles(ceil_div(V, kColumns)),
        blocks(ceil_div(V, kBlock)),
        x_(x.const_data_ptr<T>()),
        table_(table.const_data_ptr<T>()),
        slots(slots),
        draw(draw),
        want(want),
        wide(x.options().dtype(c10::CppTypeToScalarType<W>::value)) {
    rows = round_up(slots.size(), kRows);
    chunk = rows;
    if (want.gradient) {
      const int64_t row_bytes = tiles * kColumns * static_cast<int64_t>(sizeof(W));
      chunk = std::clamp(kChunkBytes / row_bytes / kRows * kRows, kRows, std::min(rows, 4 * kRows));
      exponentials = at::empty({tiles, chunk, kColumns}, wide);
      dbias = at::zeros({tiles * kColumns}, wide);
    }
    maxima = at::empty({chunk, blocks}, wide);
    sums = at::empty({chunk, blocks}, wide);
    if (draw.temperature != 1) tempered = at::empty({chunk, blocks}, wide);
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
      const W* from = dx_rows.const_data_ptr<W>() + i * E;
      W* to = dx.mutable_data_ptr<W>() + slots.m[i] * E;
      for (int64_t e = 0; e < E; ++e) to[e] = from[e] * scale;
    }
    const Tensor dtable = want.dtable ? at::zeros({V, E}, wide) : at::empty({0}, wide);
    at::parallel_for(0, dtable_tiles.defined() ? tiles : 0, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t v = t * kColumns, n = std::min(kColumns, V - v);
        const W* from = dtable_tiles.const_data_ptr<W>() + t * E * kColumns;
        W* to = dtable.mutable_data_ptr<W>() + v * E;
        for (int64_t i0 = 0; i0 < n; i0 += 16) {  // a transpose, in strips that the caches hold
          for (int64_t e = 0; e < E; ++e) {
            for (int64_t i = i0; i < std::min(i0 + 16, n); ++i)
              to[i * E + e] = from[e * kColumns + i] * scale;
          }
        }
      }
    });
    return {dx, dtable, at::mul(dbias.slice(0, 0, V), scale)};
  }

 private:
  // Pad what the products read to whole tiles: zero rows of x, and tokens of logit -inf.
  void pack(const Tensor& bias) {
    const auto operand = wide.dtype(c10::CppTypeToScalarType<Operand>::value);
    packed_x = at::zeros({rows, K}, operand);
    packed_table = at::zeros({tiles, K, kColumns}, operand);
    packed_bias = at::full({tiles * kColumns}, -std::numeric_limits<double>::infinity(), wide);
    packed_bias.slice(0, 0, V).copy_(bias);
    for (int64_t i = 0; i < slots.size(); ++i) {
      const T* row = x_ + slots.m[i] * E;
      std::copy(row, row + E, packed_x.mutable_data_ptr<Operand>() + i * K);
    }
    at::parallel_for(0, rows > 0 ? tiles : 0, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t v = t * kColumns;
        transpose(table_ + v * E, std::min(kColumns, V - v), E,
                  packed_table.mutable_data_ptr<Operand>() + t * K * kColumns, kColumns);
      }
    });
    target_logit.resize(rows), target_leads.resize(rows);
  }

  W* tile_of_exponentials(int64_t t) const {
    return exponentials.mutable_data_ptr<W>() + t * chunk * kColumns;
  }

  void sweep(int64_t first, int64_t count) {
    const int64_t tasks = ceil_div(count, kTaskRows);
    at::parallel_for(0, tiles * tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<W> scratch(want.gradient ? 0 : kRows * kColumns);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t t = task / tasks, from = task % tasks * kTaskRows;
        for (int64_t r = from; r < std::min(from + kTaskRows, count); r += kRows) {
          W* c = want.gradient ? tile_of_exponentials(t) + r * kColumns : scratch.data();
          product(kRows, kColumns, K, packed_x.const_data_ptr<Operand>() + (first + r) * K, K,
                  packed_table.const_data_ptr<Operand>() + t * K * kColumns, kColumns, c, kColumns,
                  false);
          const int64_t used = std::min(kRows, slots.size() - first - r);
          for (int64_t i = 0; i < used; ++i)
            reduce(c + i * kColumns, first, r + i, t);
        }
      }
      if (sizeof(Operand) == 2) at::native::cpublas::brgemm_release();
    });
  }

  // Add the bias to a row of a tile, note its blocks' maxima and sums, leave the exponentials.
  void reduce(W* c, int64_t first, int64_t r, int64_t t) {
    const int64_t v = t * kColumns, in_tile = std::min(kColumns / kBlock, blocks - v / kBlock);
    const W* b = packed_bias.const_data_ptr<W>() + v;
    const int64_t at = r * blocks + v / kBlock;
    W* maximum = maxima.mutable_data_ptr<W>() + at;
    for (int64_t k = 0; k < in_tile; ++k) {
      Vec top(-std::numeric_limits<W>::infinity());
      for (int64_t i = k * kBlock; i < (k + 1) * kBlock; i += Vec::size()) {
        const Vec logit = Vec::loadu(c + i) + Vec::loadu(b + i);
        logit.store(c + i);
        top = at::vec::maximum(top, logit);  // NaN stays
      }
      maximum[k] = at::vec::vec_reduce_all<W>(
          [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, top);
    }
    const int64_t y = slots.target[first + r] - v;
    if (y >= 0 && y < kColumns) look_at_target(c, y, first + r, maximum[y / kBlock]);

    for (int64_t k = 0; k < in_tile; ++k) {
      // A block without any probability has the sum 0, not exp(-inf + inf).
      const Vec top(std::max(maximum[k], std::numeric_limits<W>::lowest()));
      if (tempered.defined()) {
        const Vec inverse(static_cast<W>(1 / draw.temperature));
        tempered.mutable_data_ptr<W>()[at + k] = sum_of_exponentials<false>(
            c + k * kBlock, [&](Vec logit) { return (logit - top) * inverse; });
      }
      sums.mutable_data_ptr<W>()[at + k] = sum_of_exponentials<true>(
          c + k * kBlock, [&](Vec logit) { return logit - top; });
    }
  }

  template <bool keep, class Argument>
  static W sum_of_exponentials(W* c, Argument argument) {
    Vec sum(0);
    for (int64_t i = 0; i < kBlock; i += Vec::size()) {
      const Vec e = argument(Vec::loadu(c + i)).exp();
      if (keep) e.store(c + i);
      sum = sum + e;
    }
    return at::vec::vec_reduce_all<W>([](const Vec& a, const Vec& b) { return a + b; }, sum);
  }

  // The target leads its block if no token before it has as much and none behind it more.
  void look_at_target(const W* c, int64_t y, int64_t slot, W maximum) {
    target_logit[slot] = c[y];
    const W* block = c + y / kBlock * kBlock;
    target_leads[slot] = c[y] == maximum && std::find(block, c + y, maximum) == c + y;
  }

  void finish(int64_t first, int64_t count) {
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> mass(blocks), tops(blocks);
      for (int64_t r = begin; r < end; ++r) finish_row(first + r, r, mass, tops);
    });
  }

  // z_j = s_j exp((m_j - top) / temperature) of each block; returns (top, sum of z).
  std::pair<double, double> masses(const std::vector<double>& tops, const W* s, double temperature,
                                   std::vector<double>& z) const {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const double m : tops) top = m > top ? m : top;
    for (int64_t j = 0; j < blocks; ++j) z[j] = (tops[j] - top) / temperature;
    at::vec::map<double>([](at::vec::Vectorized<double> a) { return a.exp(); }, z.data(), z.data(),
                         blocks);
    for (int64_t j = 0; j < blocks; ++j) sum += z[j] *= s[j];
    return {top, sum};
  }

  void finish_row(int64_t slot, int64_t r, std::vector<double>& z, std::vector<double>& tops) {
    const W* m = maxima.const_data_ptr<W>() + r * blocks;
    const W* s = sums.const_data_ptr<W>() + r * blocks;
    tops.assign(m, m + blocks);
    auto [top, sum] = masses(tops, s, 1, z);
    slots.lse[slot] = top + std::log(sum);
    slots.nll[slot] = slots.lse[slot] - target_logit[slot];
    const int64_t j = slots.target[slot] / kBlock;
    slots.correct[slot] = target_leads[slot] && target_logit[slot] == top &&
                          std::find(m, m + j, m[j]) == m + j;

    int64_t barred = -1;
    if (draw.temperature != 1) s = tempered.const_data_ptr<W>() + r * blocks;
    std::vector<W> without;
    if (draw.disallow_correct) {  // the target's block again, without it
      barred = slots.target[slot];
      const std::vector<double> logits = block_logits(slot, j, barred);
      tops[j] = *std::max_element(logits.begin(), logits.end());
      double rest = 0;
      for (const double l : logits)
        if (l > -std::numeric_limits<double>::infinity())
          rest += std::exp((l - tops[j]) / draw.temperature);
      without.assign(s, s + blocks), without[j] = static_cast<W>(rest), s = without.data();
    }
    if (draw.temperature != 1 || draw.disallow_correct)
      std::tie(top, sum) = masses(tops, s, draw.temperature, z);
    slots.sample[slot] = pick(slot, barred, top, sum, z);
  }

  // The first token at which the cumulated masses pass u. Rounding may leave none: then the last
  // one that has a probability. In a row of NaN no comparison holds, and it is token 0.
  int64_t pick(int64_t slot, int64_t barred, double top, double sum,
               const std::vector<double>& z) const {
    const double threshold = draw.uniform(slots.m[slot]) * sum;
    double passed = 0, before = 0;
    int64_t block = 0;
    for (int64_t j = 0; j < blocks && !(passed > threshold); ++j) {
      if (z[j] > 0) block = j, before = passed, passed += z[j];
    }
    int64_t token = block * kBlock;
    const std::vector<double> logits = block_logits(slot, block, barred);
    for (size_t i = 0; i < logits.size() && !(before > threshold); ++i) {
      const double e = std::exp((logits[i] - top) / draw.temperature);
      if (e > 0) token = block * kBlock + static_cast<int64_t>(i), before += e;
    }
    return token;
  }

  std::vector<double> block_logits(int64_t slot, int64_t block, int64_t barred) const {
    const int64_t v0 = block * kBlock;
    std::vector<double> logits(std::min(kBlock, V - v0));
    const T* row = x_ + slots.m[slot] * E;
    for (int64_t i = 0; i < static_cast<int64_t>(logits.size()); ++i) {
      using VecT = at::vec::Vectorized<at::vec::vec_scalar_t<T>>;
      const W dot = static_cast<W>(at::vec::map2_reduce_all<T>(
          [](VecT a, VecT b) { return a * b; }, [](VecT a, VecT b) { return a + b; }, row,
          table_ + (v0 + i) * E, E));
      logits[i] = dot + packed_bias.const_data_ptr<W>()[v0 + i];
    }
    if (barred >= v0 && barred < v0 + kBlock)
      logits[barred - v0] = -std::numeric_limits<double>::infinity();
    return logits;
  }

  void gradient(int64_t first, int64_t count) {
    const int64_t segments = std::min(kSegments, tiles);
    const Tensor partial = want.dx ? at::empty({segments, count, E}, wide) : Tensor();
    const Tensor x_transposed = at::zeros({E, count}, wide);
    if (first == 0 && want.dx) dx_rows = at::empty({rows, E}, wide);
    if (first == 0 && want.dtable) dtable_tiles = at::empty({tiles, E, kColumns}, wide);
    if (want.dtable) {
      for (int64_t i = 0; i < std::min(count, slots.size() - first); ++i) {
        const T* row = x_ + slots.m[first + i] * E;
        W* column = x_transposed.mutable_data_ptr<W>() + i;
        for (int64_t e = 0; e < E; ++e) column[e * count] = static_cast<W>(row[e]);
      }
    }
    at::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
      std::vector<W> padded(want.dx ? kColumns * E : 0);
      for (int64_t segment = begin; segment < end; ++segment) {
        const int64_t t0 = segment * tiles / segments, t1 = (segment + 1) * tiles / segments;
        for (int64_t t = t0; t < t1; ++t) {
          W* p = tile_of_exponentials(t);
          difference(p, first, count, t);
          if (want.dx) {
            const W* rows_of_table = table_rows(t, padded.data());
            W* sum = partial.mutable_data_ptr<W>() + segment * count * E;
            for (int64_t r = 0; r < count; r += kRows)
              product(kRows, E, kColumns, p + r * kColumns, kColumns, rows_of_table, E,
                      sum + r * E, E, t > t0);
          }
          if (want.dtable)
            product(E, kColumns, count, x_transposed.const_data_ptr<W>(), count, p, kColumns,
                    dtable_tiles.mutable_data_ptr<W>() + t * E * kColumns, kColumns, first > 0);
        }
      }
    });
    if (!want.dx) return;
    at::parallel_for(0, count * E, 8192, [&](int64_t begin, int64_t end) {
      W* sum = dx_rows.mutable_data_ptr<W>() + first * E;
      const W* part = partial.const_data_ptr<W>();
      std::copy(part + begin, part + end, sum + begin);
      for (int64_t segment = 1; segment < segments; ++segment)
        for (int64_t i = begin; i < end; ++i) sum[i] += part[segment * count * E + i];
    });
  }

  // w (softmax - onehot(target)) of a tile, in place of its exponentials, and its sum over the rows.
  void difference(W* p, int64_t first, int64_t count, int64_t t) {
    const int64_t v = t * kColumns, in_tile = std::min(kColumns / kBlock, blocks - v / kBlock);
    W* column_sum = dbias.mutable_data_ptr<W>() + v;
    const int64_t used = std::min(count, slots.size() - first);
    for (int64_t r = 0; r < used; ++r, p += kColumns) {
      const int64_t slot = first + r, y = slots.target[slot] - v;
      const W w = static_cast<W>(slots.weight[slot]);
      const W* m = maxima.const_data_ptr<W>() + r * blocks + v / kBlock;
      for (int64_t k = 0; k < in_tile; ++k) {
        const Vec factor(w * std::exp(static_cast<W>(m[k] - slots.lse[slot])));
        for (int64_t i = k * kBlock; i < (k + 1) * kBlock; i += Vec::size()) {
          const Vec d = Vec::loadu(p + i) * factor;
          d.store(p + i);
          (Vec::loadu(column_sum + i) + d).store(column_sum + i);
        }
      }
      std::fill(p + in_tile * kBlock, p + kColumns, W(0));
      if (y >= 0 && y < kColumns) p[y] -= w, column_sum[y] -= w;
    }
    std::fill(p, p + (count - used) * kColumns, W(0));
  }

  // The rows [kColumns, E] of the table that a tile has, those past its end 0.
  const W* table_rows(int64_t t, W* padded) const {
    const int64_t v = t * kColumns, n = std::min(kColumns, V - v);
    if constexpr (std::is_same_v<T, W>) {
      if (n == kColumns) return table_ + v * E;
    }
    std::fill(std::copy(table_ + v * E, table_ + (v + n) * E, padded), padded + kColumns * E, W(0));
    return padded;
  }

  const int64_t E, V, K, tiles, blocks;
  int64_t rows, chunk;  // all rows, padded, and those that are worked on together
  const T *x_, *table_;
  Slots& slots;
  const Draw draw;
  const Want want;
  const at::TensorOptions wide;
  Tensor packed_x, packed_table, packed_bias;  // [rows, K], [tiles, K, kColumns], [tiles * kColumns]
  Tensor maxima, sums, tempered;               // [chunk, blocks]
  Tensor exponentials;                         // [tiles, chunk, kColumns]
  Tensor dx_rows, dtable_tiles, dbias;  // [rows, E], [tiles, E, kColumns], [tiles * kColumns]
  std::vector<W> target_logit;
  std::vector<char> target_leads;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlm_head(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct,
    Want want) {
  Slots slots(targets, weights, table.size(0));
  const int64_t* state = rng.const_data_ptr<int64_t>();
  const Draw draw{static_cast<uint64_t>(state[0]), static_cast<uint32_t>(state[1]), temperature,
                  disallow_correct};
  double total = 0, loss = 0, correct = 0;
  Tensor dx, dtable, dbias;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "mlm_head", [&] {
    Head<scalar_t> head(x, table, bias, slots, draw, want);
    head.run();
    for (int64_t i = 0; i < slots.size(); ++i) {
      total += slots.weight[i];
      loss += slots.weight[i] * slots.nll[i];
      correct += slots.weight[i] * slots.correct[i];
    }
    if (want.gradient) std::tie(dx, dtable, dbias) = head.gradients(x.size(0), total);
  });
  const auto wide = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor samples = at::zeros({x.size(0)}, wide.dtype(at::kLong));
  const Tensor lse = at::zeros({x.size(0)}, wide.dtype(at::kDouble));
  for (int64_t i = 0; i < slots.size(); ++i) {
    samples.mutable_data_ptr<int64_t>()[slots.m[i]] = slots.sample[i];
    lse.mutable_data_ptr<double>()[slots.m[i]] = slots.lse[i];
  }
  return {at::full({}, total == 0 ? 0 : loss / total, wide),
          samples.to(targets.scalar_type()),
          at::full({}, correct, wide.dtype(at::kFloat)),
          lse.to(wide.dtype()),
          dx,
          dtable,
          dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlm_head_fwd_cpu(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct) {
  auto [loss, samples, correct, lse, dx, dtable, dbias] =
      mlm_head(x, table, bias, targets, weights, rng, temperature, disallow_correct, {});
  return {loss, samples, correct, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlm_head_bwd_cpu(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct,
    bool want_dx, bool want_dtable) {
  return mlm_head(x, table, bias, targets, weights, rng, temperature, disallow_correct,
                  {.gradient = true, .dx = want_dx, .dtable = want_dtable});
}

}  // namespace

ELECTRA_FAST_IMPL(mlm_head_fwd, CPU, mlm_head_fwd_cpu)
ELECTRA_FAST_IMPL(mlm_head_bwd, CPU, mlm_head_bwd_cpu)

}  // namespace electra_fast
