// Attention of one head of one sequence on the CPU, kQueries queries at a time against all keys.
//
//   S = scale Q K^T    P = softmax(S)       Z = drop(P)             O = Z V
//   dV = Z^T dO        dP = drop(dO V^T)    dS = P (dP - rowsum(P dP)) scale
//                      dQ = dS K            dK = dS^T Q
//
// A row of scores is whole, so nothing is rescaled on the way. The backward pass makes P again and
// divides by its own sum: where a row is nearly one key dP - rowsum(P dP) cancels, and the rounding
// of the log-sum-exp, or of O in rowsum(dO O), would be what is left. dK and dV grow transposed,
// since a product reads both its operands by rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "dropout.h"
#include "exponential.h"
#include "tile.h"

namespace electra_fast {

constexpr int64_t kQueries = 64;  // rows of a product's tile; columns are padded to as many

struct Sequence {
  int64_t index, first, length;  // first: its place in a packed batch, 0 in a padded one
};

// Rows of D neighbours, one a token and head: of [B, L, H, D], or of [T, H, D] where `sequence` is
// 0.
template <class T>
struct Rows {
  T* data;
  int64_t sequence, token, head;

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
    const int64_t most = padded(longest);
    for (auto* x : {&keys, &values, &keys_turned, &values_turned, &dkeys, &dvalues})
      x->resize(most * D);
    for (auto* x : {&queries, &upstream, &turned, &rows}) x->resize(kQueries * D);
    for (auto* x : {&scores, &weights}) x->resize(kQueries * most);
    hidden.resize(most);
  }

  // `key_mask` is this sequence's, nullptr where every key is real; row t H + h of the dropout.
  void begin(const Sequence& s, int64_t h, const bool* key_mask, const Dropout& dropout,
             int64_t row, int64_t row_step) {
    sequence = s, head = h, drop = dropout, first_row = row, rows_apart = row_step;
    columns = padded(s.length);
    factors.assign(std::max(columns, dropout.padded_columns()), W(1));
    std::fill(hidden.begin(), hidden.end(), -std::numeric_limits<W>::infinity());
    for (int64_t c = 0; c < s.length; ++c)
      if (!key_mask || key_mask[c]) hidden[c] = 0;
  }

  void forward(const Rows<const T>& q, const Rows<const T>& k, const Rows<const T>& v,
               const Rows<T>& o, const Rows<W>& lse) {
    take(k, 0, columns, keys, /*real_only=*/true);
    take(v, 0, columns, values, /*real_only=*/true);
    turn(keys, columns, D, keys_turned);
    for (int64_t l = 0; l < sequence.length; l += kQueries) {
      const int64_t count = std::min(kQueries, sequence.length - l);
      take(q, l, kQueries, queries);
      product(kQueries, columns, D, queries.data(), D, keys_turned.data(), columns, scores.data(),
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

  void backward(const Rows<const T>& upstreams, const Rows<const T>& q, const Rows<const T>& k,
                const Rows<const T>& v, const Rows<const W>& lse, const Rows<T>& dq,
                const Rows<T>& dk, const Rows<T>& dv) {
    take(k, 0, columns, keys, /*real_only=*/true);
    take(v, 0, columns, values, /*real_only=*/true);
    turn(keys, columns, D, keys_turned);
    turn(values, columns, D, values_turned);
    for (int64_t l = 0; l < sequence.length; l += kQueries) {
      const int64_t count = std::min(kQueries, sequence.length - l);
      take(q, l, kQueries, queries);
      take(upstreams, l, kQueries, upstream);  // a row past the end is 0 in all that follows
      product(kQueries, columns, D, queries.data(), D, keys_turned.data(), columns, scores.data(),
              columns, false);
      product(kQueries, columns, D, upstream.data(), D, values_turned.data(), columns,
              weights.data(), columns, false);
      for (int64_t r = 0; r < count; ++r)
        gradient(l + r, *lse.at(sequence, l + r, head), scores.data() + r * columns,
                 weights.data() + r * columns);
      turn(queries, kQueries, D, turned);
      product(D, columns, kQueries, turned.data(), kQueries, scores.data(), columns, dkeys.data(),
              columns, l > 0);
      turn(upstream, kQueries, D, turned);
      product(D, columns, kQueries, turned.data(), kQueries, weights.data(), columns,
              dvalues.data(), columns, l > 0);
      product(kQueries, D, columns, scores.data(), columns, keys.data(), D, rows.data(), D, false);
      give(rows, l, count, dq);
    }
    turn(dkeys, D, columns, keys);
    give(keys, 0, sequence.length, dk);
    turn(dvalues, D, columns, values);
    give(values, 0, sequence.length, dv);
  }

 private:
  using Buffer = std::vector<W>;

  static int64_t padded(int64_t n) { return (n + kQueries - 1) / kQueries * kQueries; }

  // Rows l, ..., l + n - 1, zeros past the end; of keys and values only what is seen, as 0 * NaN is
  // NaN.
  void take(const Rows<const T>& from, int64_t l, int64_t n, Buffer& to, bool real_only = false) {
    for (int64_t r = 0; r < n; ++r) {
      W* row = to.data() + r * D;
      if (l + r >= sequence.length || (real_only && hidden[l + r] != 0)) {
        std::fill(row, row + D, W(0));
      } else {
        const T* x = from.at(sequence, l + r, head);
        for (int64_t d = 0; d < D; ++d) row[d] = static_cast<W>(x[d]);
      }
    }
  }

  void give(const Buffer& from, int64_t l, int64_t n, const Rows<T>& to) {
    for (int64_t r = 0; r < n; ++r) {
      T* row = to.at(sequence, l + r, head);
      for (int64_t d = 0; d < D; ++d) row[d] = static_cast<T>(from[r * D + d]);
    }
  }

  static void turn(const Buffer& from, int64_t n, int64_t m, Buffer& to) {
    transpose(from.data(), n, m, m, to.data(), n);
  }

  // Bring a row of products to scores, -inf where the query sees no key.
  void hide_later(int64_t query, W* s) const {
    if (causal) std::fill(s + query + 1, s + columns, -std::numeric_limits<W>::infinity());
  }
  Vec score(const W* s, int64_t c) const {
    return at::vec::fmadd(Vec::loadu(s + c), Vec(scale), Vec::loadu(hidden.data() + c));
  }

  void draw(int64_t query) {
    if (drop->active()) drop->factors(first_row + query * rows_apart, factors.data());
  }

  // Leave drop(exp(s - max)) in s and what its product with the values lacks, 1 / sum, in inverse;
  // return the log-sum-exp.
  W softmax(int64_t query, W* s, W* inverse) {
    hide_later(query, s);
    draw(query);
    Vec top(-std::numeric_limits<W>::infinity());
    for (int64_t c = 0; c < columns; c += Vec::size()) top = at::vec::maximum(top, score(s, c));
    const W maximum = highest(top);
    const Vec down(std::max(maximum, std::numeric_limits<W>::lowest()));
    Vec sum(0);
    for (int64_t c = 0; c < columns; c += Vec::size()) {
      const Vec e = exponential(score(s, c) - down);
      sum = sum + e;
      (e * Vec::loadu(factors.data() + c)).store(s + c);
    }
    const W all = total(sum);
    *inverse = all == 0 ? 0 : 1 / all;
    return maximum + std::log(all);
  }

  // From the products s = q K^T and dp = dO V^T leave dS in s and Z in dp.
  void gradient(int64_t query, W lse, W* s, W* dp) {
    if (lse == -std::numeric_limits<W>::infinity()) {
      for (W* x : {s, dp}) std::fill(x, x + columns, W(0));
      return;
    }
    hide_later(query, s);
    draw(query);
    Vec sum(0), sum_dp(0);
    for (int64_t c = 0; c < columns; c += Vec::size()) {
      const Vec p = exponential(score(s, c) - Vec(lse));
      const Vec d = Vec::loadu(dp + c) * Vec::loadu(factors.data() + c);
      sum = sum + p;
      sum_dp = at::vec::fmadd(p, d, sum_dp);
      p.store(s + c), d.store(dp + c);
    }
    const W all = total(sum);
    const Vec center(total(sum_dp) / all), inverse(1 / all), scaled(scale / all);
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
  int64_t head = 0, columns = 0, first_row = 0, rows_apart = 0;
  std::optional<Dropout> drop;
  Buffer hidden, factors;                             // [columns]: 0 or -inf; 0, 1 or 1/(1-p)
  Buffer keys, values;                                // [columns, D]
  Buffer keys_turned, values_turned, dkeys, dvalues;  // [D, columns]
  Buffer queries, upstream, rows;                     // [kQueries, D]
  Buffer turned;                                      // [D, kQueries]
  Buffer scores, weights;                             // [kQueries, columns]
};

}  // namespace electra_fast
