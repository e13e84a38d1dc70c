// Attention of one head of one sequence on the CPU: kQueries queries at a time, with all keys.
//
//   S = scale Q K^T    P = softmax(S)       Z = drop(P)             O = Z V
//   dV = Z^T dO        dP = drop(dO V^T)    dS = P (dP - rowsum(P dP)) scale
//                      dQ = dS K            dK = dS^T Q
//
// A row has the scores of all keys, so nothing is rescaled later. The backward pass computes P
// again and divides it by its own sum: if one key has nearly all the probability, dP - rowsum(P dP)
// cancels, and the rounding of lse, or of O in rowsum(dO O), would dominate the result. Keys after
// the last visible one are left out; the others are padded to whole vectors.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include "../host_device.h"
#include "dropout.h"
#include "fma_product.h"
#include "scratch.h"
#include "tile.h"
#include "vector_math.h"

namespace electra_fast {

constexpr int64_t kQueries = 64;  // their scores with all keys stay in a cache
// So few queries, as in decoding, read keys and values in place: a copy and a transpose would cost
// more than the products.
constexpr int64_t kFewQueries = 2;

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

  AttentionHead(int64_t D, int64_t longest, double scale, bool causal, int64_t dropout_columns)
      : D(D),
        width(round_up(D, Vec::size())),
        scale(scale),
        factor(scale == 0 ? std::numeric_limits<W>::min() : W(scale)),
        hidden(scale < 0 ? std::numeric_limits<W>::infinity()
                         : -std::numeric_limits<W>::infinity()),
        causal(causal),
        most_columns(round_up(longest, Vec::size())),
        memory(most_columns * (1 + 6 * width + 2 * kQueries) + 3 * kQueries * width +
               std::max(most_columns, dropout_columns)) {
    W* next = memory.data();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    mask = take(most_columns);
    for (W** x : {&keys, &values, &keys_t, &values_t, &dkeys, &dvalues})
      *x = take(most_columns * width);
    for (W** x : {&scores, &weights}) *x = take(most_columns * kQueries);
    for (W** x : {&queries, &upstream, &rows}) *x = take(kQueries * width);
    factors = next;
    std::fill_n(factors, most_columns, W(1));
  }

  // Select a sequence: its queries and its keys. `key_mask` is that of the sequence, or null if
  // every key is visible.
  void select(const Sequence& q, const Sequence& k, const bool* key_mask, const Dropout& dropout) {
    query_tokens = q, key_tokens = k;
    this->dropout = dropout;
    keys_used = q.length == 0 ? 0 : k.length;
    while (key_mask && keys_used > 0 && !key_mask[keys_used - 1]) --keys_used;
    columns = round_up(keys_used, Vec::size());
    std::fill(mask, mask + keys_used, W(0));
    std::fill(mask + keys_used, mask + columns, -std::numeric_limits<W>::infinity());
    for (int64_t c = 0; key_mask && c < keys_used; ++c)
      if (!key_mask[c]) mask[c] = -std::numeric_limits<W>::infinity();
  }

  // Select a head of the sequence. Query l uses row `row` + l * `row_step` of the dropout.
  void select(int64_t h, int64_t row, int64_t step) { head = h, first_row = row, row_step = step; }

  void forward(const HeadRows<const T>& q, const HeadRows<const T>& k, const HeadRows<const T>& v,
               const HeadRows<T>& o, const HeadRows<W>& lse) {
    if (query_tokens.length <= kFewQueries) {
      for (int64_t l = 0; l < query_tokens.length; ++l) forward_one(q, k, v, o, lse, l);
      return;
    }
    load_keys(k, keys);
    load_keys(v, values);
    transpose_keys(keys, keys_t);
    for (int64_t l = 0; l < query_tokens.length; l += kQueries) {
      const int64_t count = std::min(kQueries, query_tokens.length - l);
      load(q, l, count, queries);
      fma_product(count, columns, D, {queries, width, 1}, keys_t, columns, scores, columns, false);
      W inverse[kQueries];
      for (int64_t r = 0; r < count; ++r)
        *lse.at(query_tokens, l + r, head) = softmax(l + r, scores + r * columns, &inverse[r]);
      fma_product(count, width, keys_used, {scores, columns, 1}, values, width, rows, width, false);
      for (int64_t r = 0; r < count; ++r) {
        W* row = rows + r * width;
        for (int64_t d = 0; d < width; ++d) row[d] *= inverse[r];
      }
      store(rows, query_tokens, l, count, o);
    }
  }

  void backward(const HeadRows<const T>& upstreams, const HeadRows<const T>& q,
                const HeadRows<const T>& k, const HeadRows<const T>& v,
                const HeadRows<const W>& lse, const HeadRows<T>& dq, const HeadRows<T>& dk,
                const HeadRows<T>& dv) {
    load_keys(k, keys);
    load_keys(v, values);
    transpose_keys(keys, keys_t);
    transpose_keys(values, values_t);
    for (int64_t l = 0; l < query_tokens.length; l += kQueries) {
      const int64_t count = std::min(kQueries, query_tokens.length - l);
      load(q, l, count, queries);
      load(upstreams, l, count, upstream);
      fma_product(count, columns, D, {queries, width, 1}, keys_t, columns, scores, columns, false);
      fma_product(count, columns, D, {upstream, width, 1}, values_t, columns, weights, columns,
                  false);
      for (int64_t r = 0; r < count; ++r)
        gradient(l + r, *lse.at(query_tokens, l + r, head), scores + r * columns,
                 weights + r * columns);
      fma_product(keys_used, width, count, {scores, 1, columns}, queries, width, dkeys, width,
                  l > 0);
      fma_product(keys_used, width, count, {weights, 1, columns}, upstream, width, dvalues, width,
                  l > 0);
      fma_product(count, width, keys_used, {scores, columns, 1}, keys, width, rows, width, false);
      store(rows, query_tokens, l, count, dq);
    }
    store_keys(dkeys, dk);
    store_keys(dvalues, dv);
  }

 private:
  void forward_one(const HeadRows<const T>& q, const HeadRows<const T>& k,
                   const HeadRows<const T>& v, const HeadRows<T>& o, const HeadRows<W>& lse,
                   int64_t l) {
    load(q, l, 1, queries);
    std::fill(scores, scores + columns, W(0));
    for (int64_t c = 0; c < keys_used; ++c)
      if (mask[c] == 0) scores[c] = dot(queries, in_place(k.at(key_tokens, c, head)));
    W inverse;
    *lse.at(query_tokens, l, head) = softmax(l, scores, &inverse);
    std::fill(rows, rows + width, W(0));
    for (int64_t c = 0; c < keys_used; ++c)
      if (mask[c] == 0) add(scores[c] * inverse, in_place(v.at(key_tokens, c, head)), rows);
    store(rows, query_tokens, l, 1, o);
  }

  // A row as W, in place if it is of that type.
  const W* in_place(const T* row) const {
    if constexpr (std::is_same_v<T, W>) return row;
    load_row_of(row, upstream);
    return upstream;
  }

  W dot(const W* x, const W* y) const {
    Vec sum(0);
    int64_t d = 0;
    for (; d + Vec::size() <= D; d += Vec::size())
      sum = at::vec::fmadd(Vec::loadu(x + d), Vec::loadu(y + d), sum);
    if (d < D) sum = at::vec::fmadd(Vec::loadu(x + d, D - d), Vec::loadu(y + d, D - d), sum);
    return lane_sum(sum);
  }

  // sum += factor * x
  void add(W factor, const W* x, W* sum) const {
    const Vec f(factor);
    int64_t d = 0;
    for (; d + Vec::size() <= D; d += Vec::size())
      at::vec::fmadd(f, Vec::loadu(x + d), Vec::loadu(sum + d)).store(sum + d);
    for (; d < D; ++d) sum[d] += factor * x[d];
  }

  // Convert a row, and pad it with zeros to whole vectors.
  void load_row_of(const T* from, W* to) const {
    if constexpr (std::is_same_v<T, W>) {
      std::copy(from, from + D, to);
    } else {
      at::vec::convert(from, to, D);
    }
    std::fill(to + D, to + width, W(0));
  }

  void load(const HeadRows<const T>& from, int64_t l, int64_t n, W* to) const {
    for (int64_t r = 0; r < n; ++r) load_row_of(from.at(query_tokens, l + r, head), to + r * width);
  }

  // Masked keys become 0: they may be NaN, and 0 * NaN is NaN.
  void load_keys(const HeadRows<const T>& from, W* to) const {
    for (int64_t c = 0; c < keys_used; ++c, to += width) {
      if (mask[c] == 0)
        load_row_of(from.at(key_tokens, c, head), to);
      else
        std::fill(to, to + width, W(0));
    }
  }

  void store(const W* from, const Sequence& tokens, int64_t l, int64_t n,
             const HeadRows<T>& to) const {
    for (int64_t r = 0; r < n; ++r, from += width) {
      T* row = to.at(tokens, l + r, head);
      if constexpr (std::is_same_v<T, W>) {
        std::copy(from, from + D, row);
      } else {
        at::vec::convert(from, row, D);
      }
    }
  }

  void store_keys(const W* from, const HeadRows<T>& to) const {
    store(from, key_tokens, 0, keys_used, to);
    for (int64_t c = keys_used; c < key_tokens.length; ++c)
      std::fill_n(to.at(key_tokens, c, head), D, T(0));
  }

  // `to` [D, columns] becomes the transpose of `from`, with zeros after the last key.
  void transpose_keys(const W* from, W* to) const {
    for (int64_t d = 0; d < D && keys_used < columns; ++d)
      Vec(0).store(to + (d + 1) * columns - Vec::size());
    transpose(from, keys_used, D, width, to, columns);
  }

  // A row of products becomes scores by these two: -inf for keys that the query must not see.
  void mask_future(int64_t query, W* s) const {
    const int64_t visible = query + 1 + key_tokens.length - query_tokens.length;
    if (causal && visible < columns) std::fill(s + visible, s + columns, hidden);
  }
  Vec score(const W* s, int64_t c) const {
    return at::vec::fmadd(Vec::loadu(s + c), Vec(factor), Vec::loadu(mask + c));
  }

  void draw_dropout(int64_t query) {
    if (dropout->active()) dropout->factors(first_row + query * row_step, factors);
  }

  // Replace s by drop(exp(s - max)), set *inverse to 1 / sum, by which its product with the values
  // must be multiplied, and return the log-sum-exp.
  W softmax(int64_t query, W* s, W* inverse) {
    mask_future(query, s);
    draw_dropout(query);
    Vec maxima(-std::numeric_limits<W>::infinity());
    for (int64_t c = 0; c < columns; c += Vec::size())
      maxima =
          at::vec::clamp_min(score(s, c), maxima);  // a NaN reaches the sum without the maximum
    const W maximum = lane_max(maxima);
    const Vec shift(std::max(maximum, std::numeric_limits<W>::lowest()));
    Vec sum(0);
    for (int64_t c = 0; c < columns; c += Vec::size()) {
      const Vec e = exponential(score(s, c) - shift);
      sum = sum + e;
      (e * Vec::loadu(factors + c)).store(s + c);
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
      const Vec d = Vec::loadu(dp + c) * Vec::loadu(factors + c);
      sum = sum + p;
      sum_dp = at::vec::fmadd(p, d, sum_dp);
      p.store(s + c), d.store(dp + c);
    }
    const W total = lane_sum(sum);
    const Vec center(lane_sum(sum_dp) / total), inverse(1 / total), scaled(scale / total);
    for (int64_t c = 0; c < columns; c += Vec::size()) {
      const Vec p = Vec::loadu(s + c);
      (p * scaled * (Vec::loadu(dp + c) - center)).store(s + c);
      (p * inverse * Vec::loadu(factors + c)).store(dp + c);
    }
  }

  const int64_t D, width;  // width: D padded to whole vectors
  const W scale;
  const W factor;  // of products in scores: scale, but not 0, because 0 * inf is NaN
  const W hidden;  // the product of a key that a query must not see: factor makes it -inf
  const bool causal;
  const int64_t most_columns;
  Sequence query_tokens{}, key_tokens{};
  std::optional<Dropout> dropout;
  int64_t keys_used = 0, columns = 0;  // keys up to the last visible one, padded to whole vectors
  int64_t head = 0, first_row = 0, row_step = 0;
  Scratch<W> memory;             // of all that follow
  W *mask, *factors;             // [columns] 0 or -inf, added to scores; 0, 1 or 1 / (1 - p)
  W *keys, *values;              // [keys_used, width]
  W *keys_t, *values_t;          // [D, columns]
  W *dkeys, *dvalues;            // [keys_used, width]
  W *queries, *upstream, *rows;  // [kQueries, width]
  W *scores, *weights;           // [kQueries, columns]
};

}  // namespace electra_fast
