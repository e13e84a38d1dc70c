// Attention of one head of one sequence on the CPU: kQueries queries at a time, with all keys.
//
//   S = scale Q K^T    P = softmax(S)       Z = drop(P)             O = Z V
//   dV = Z^T dO        dP = drop(dO V^T)    dS = P (dP - rowsum(P dP)) scale
//                      dQ = dS K            dK = dS^T Q
//
// A row has the scores of all keys, so nothing is rescaled later. The backward pass computes P
// again and divides it by its own sum: if one key has nearly all the probability, dP - rowsum(P dP)
// cancels, and the rounding of lse, or of O in rowsum(dO O), would dominate the result. dK and dV
// are accumulated transposed, since a product reads both its operands by rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../host_device.h"
#include "dropout.h"
#include "tile.h"
#include "vector_math.h"

namespace electra_fast {

constexpr int64_t kQueries = 64;  // rows of a product's tile; its columns are padded to a multiple

struct Sequence {
  int64_t index, first, length;  // first: its first token in a packed batch, 0 in a padded one
};

// One row of D contiguous elements per token and head, of a tensor [B, L, H, D] or [T, H, D].
template <class T>
struct HeadRows {
  T* data;
  int64_t sequence, token, head;  // strides; that of sequences is 0 for [T, H, D]

  T* at(const Sequence& s, int64_t l, int64_t h) const {
    return data + s.index * sequence + (s.first + l) * token + h * head;
  }
};

template <class T>
class AttentionHead {
 public:
  using W = at::opmath_type<T>;
  using Vec = at::vec::Vectorized<W>;

  AttentionHead(int64_t D, int64_t longest, double scale, bool causal)
      : D(D), scale(scale), causal(causal) {
    const int64_t max_columns = round_up(longest, kQueries);
    for (auto* x : {&keys, &values, &keys_t, &values_t, &dkeys, &dvalues})
      x->resize(max_columns * D);
    for (auto* x : {&queries, &upstream, &rows_t, &rows}) x->resize(kQueries * D);
    for (auto* x : {&scores, &weights}) x->resize(kQueries * max_columns);
    mask.resize(max_columns);
  }

  // Select a sequence and a head. `key_mask` is that of the sequence, or null if every key is real.
  // Query l uses row `row` + l * `row_step` of the dropout.
  void select(const Sequence& s, int64_t h, const bool* key_mask, const Dropout& dropout,
              int64_t row, int64_t row_step) {
    sequence = s;
    head = h;
    this->dropout = dropout;
    first_row = row;
    this->row_step = row_step;
    columns = round_up(s.length, kQueries);
    factors.assign(std::max(columns, dropout.padded_columns()), W(1));
    std::fill(mask.begin(), mask.end(), -std::numeric_limits<W>::infinity());
    for (int64_t c = 0; c < s.length; ++c)
      if (!key_mask || key_mask[c]) mask[c] = 0;
  }

  void forward(const HeadRows<const T>& q, const HeadRows<const T>& k, const HeadRows<const T>& v,
               const HeadRows<T>& o, const HeadRows<W>& lse) {
    load(k, 0, columns, keys, /*real_only=*/true);
    load(v, 0, columns, values, /*real_only=*/true);
    transpose_rows(keys, columns, D, keys_t);
    for (int64_t l = 0; l < sequence.length; l += kQueries) {
      const int64_t count = std::min(kQueries, sequence.length - l);
      load(q, l, kQueries, queries);
      product(kQueries, columns, D, queries.data(), D, keys_t.data(), columns, scores.data(),
              columns, false);
      W inverse[kQueries];
      for (int64_t r = 0; r < count; ++r)
        *lse.at(sequence, l + r, head) = softmax(l + r, scores.data() + r * columns, &inverse[r]);
      product(kQueries, D, columns, scores.data(), columns, values.data(), D, rows.data(), D,
              false);
      for (int64_t r = 0; r < count; ++r) {
        T* to = o.at(sequence, l + r, head);
        for (int64_t d = 0; d < D; ++d) to[d] = static_cast<T>(rows[r * D + d] * inverse[r]);
      }
    }
  }

  void backward(const HeadRows<const T>& upstreams, const HeadRows<const T>& q,
                const HeadRows<const T>& k, const HeadRows<const T>& v,
                const HeadRows<const W>& lse, const HeadRows<T>& dq, const HeadRows<T>& dk,
                const HeadRows<T>& dv) {
    load(k, 0, columns, keys, /*real_only=*/true);
    load(v, 0, columns, values, /*real_only=*/true);
    transpose_rows(keys, columns, D, keys_t);
    transpose_rows(values, columns, D, values_t);
    for (int64_t l = 0; l < sequence.length; l += kQueries) {
      const int64_t count = std::min(kQueries, sequence.length - l);
      load(q, l, kQueries, queries);
      load(upstreams, l, kQueries, upstream);  // rows past the end are 0, and so are their terms
      product(kQueries, columns, D, queries.data(), D, keys_t.data(), columns, scores.data(),
              columns, false);
      product(kQueries, columns, D, upstream.data(), D, values_t.data(), columns, weights.data(),
              columns, false);
      for (int64_t r = 0; r < count; ++r)
        gradient(l + r, *lse.at(sequence, l + r, head), scores.data() + r * columns,
                 weights.data() + r * columns);
      transpose_rows(queries, kQueries, D, rows_t);
      product(D, columns, kQueries, rows_t.data(), kQueries, scores.data(), columns, dkeys.data(),
              columns, l > 0);
      transpose_rows(upstream, kQueries, D, rows_t);
      product(D, columns, kQueries, rows_t.data(), kQueries, weights.data(), columns,
              dvalues.data(), columns, l > 0);
      product(kQueries, D, columns, scores.data(), columns, keys.data(), D, rows.data(), D, false);
      store(rows, l, count, dq);
    }
    transpose_rows(dkeys, D, columns, keys);
    store(keys, 0, sequence.length, dk);
    transpose_rows(dvalues, D, columns, values);
    store(values, 0, sequence.length, dv);
  }

 private:
  using Buffer = std::vector<W>;

  // Load rows l, ..., l + n - 1, with zeros past the end and, if `real_only`, for masked keys: they
  // may be NaN, and 0 * NaN is NaN.
  void load(const HeadRows<const T>& from, int64_t l, int64_t n, Buffer& to,
            bool real_only = false) {
    for (int64_t r = 0; r < n; ++r) {
      W* row = to.data() + r * D;
      if (l + r >= sequence.length || (real_only && mask[l + r] != 0)) {
        std::fill(row, row + D, W(0));
      } else {
        const T* x = from.at(sequence, l + r, head);
        for (int64_t d = 0; d < D; ++d) row[d] = static_cast<W>(x[d]);
      }
    }
  }

  void store(const Buffer& from, int64_t l, int64_t n, const HeadRows<T>& to) {
    for (int64_t r = 0; r < n; ++r) {
      T* row = to.at(sequence, l + r, head);
      for (int64_t d = 0; d < D; ++d) row[d] = static_cast<T>(from[r * D + d]);
    }
  }

  static void transpose_rows(const Buffer& from, int64_t n, int64_t m, Buffer& to) {
    transpose(from.data(), n, m, m, to.data(), n);
  }

  // A row of products becomes scores by these two: -inf for keys that the query must not see.
  void mask_future(int64_t query, W* s) const {
    if (causal) std::fill(s + query + 1, s + columns, -std::numeric_limits<W>::infinity());
  }
  Vec score(const W* s, int64_t c) const {
    return at::vec::fmadd(Vec::loadu(s + c), Vec(scale), Vec::loadu(mask.data() + c));
  }

  void draw_dropout(int64_t query) {
    if (dropout->active()) dropout->factors(first_row + query * row_step, factors.data());
  }

  // Replace s by drop(exp(s - max)), set *inverse to 1 / sum, by which its product with the values
  // must be multiplied, and return the log-sum-exp.
  W softmax(int64_t query, W* s, W* inverse) {
    mask_future(query, s);
    draw_dropout(query);
    Vec maxima(-std::numeric_limits<W>::infinity());
    for (int64_t c = 0; c < columns; c += Vec::size())
      maxima = at::vec::maximum(maxima, score(s, c));
    const W maximum = lane_max(maxima);
    const Vec shift(std::max(maximum, std::numeric_limits<W>::lowest()));
    Vec sum(0);
    for (int64_t c = 0; c < columns; c += Vec::size()) {
      const Vec e = exponential(score(s, c) - shift);
      sum = sum + e;
      (e * Vec::loadu(factors.data() + c)).store(s + c);
    }
    const W total = lane_sum(sum);
    *inverse = total == 0 ? 0 : 1 / total;
    return maximum + std::log(total);
  }

  // Replace the products s = q K^T by dS and dp = dO V^T by Z.
  void gradient(int64_t query, W lse, W* s, W* dp) {
    if (lse == -std::numeric_limits<W>::infinity()) {
      for (W* x : {s, dp}) std::fill(x, x + columns, W(0));
      return;
    }
    mask_future(query, s);
    draw_dropout(query);
    Vec sum(0), sum_dp(0);
    for (int64_t c = 0; c < columns; c += Vec::size()) {
      const Vec p = exponential(score(s, c) - Vec(lse));
      const Vec d = Vec::loadu(dp + c) * Vec::loadu(factors.data() + c);
      sum = sum + p;
      sum_dp = at::vec::fmadd(p, d, sum_dp);
      p.store(s + c), d.store(dp + c);
    }
    const W total = lane_sum(sum);
    const Vec center(lane_sum(sum_dp) / total), inverse(1 / total), scaled(scale / total);
    for (int64_t c = 0; c < columns; c += Vec::size()) {
      const Vec p = Vec::loadu(s + c);
      (p * scaled * (Vec::loadu(dp + c) - center)).store(s + c);
      (p * inverse * Vec::loadu(factors.data() + c)).store(dp + c);
    }
  }

  const int64_t D;
  const W scale;
  const bool causal;
  Sequence sequence{};
  int64_t head = 0, columns = 0, first_row = 0, row_step = 0;
  std::optional<Dropout> dropout;
  Buffer mask, factors;  // [columns] 0 or -inf, added to scores; 0, 1 or 1 / (1 - p)
  Buffer keys, values;   // [columns, D]
  Buffer keys_t, values_t, dkeys, dvalues;  // [D, columns]
  Buffer queries, upstream, rows;           // [kQueries, D]
  Buffer rows_t;                            // [D, kQueries]
  Buffer scores, weights;                   // [kQueries, columns]
};

}  // namespace electra_fast
