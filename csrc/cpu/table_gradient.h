// The gradient of a table that is looked up by id, on the CPU: sums of dx over the tokens of each
// id.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "huge_pages.h"
#include "nontemporal.h"
#include "rows.h"

namespace electra_fast {

using at::Tensor;

constexpr int64_t kPiece = 32;  // rows of dx that are summed before they are added to a row's sum

// Tokens sorted by their rows of a table, in order within a row.
struct Sorted {
  std::vector<int64_t> start, token;  // row v has token[start[v]], ..., token[start[v + 1] - 1]

  Sorted(const Tensor& ids, int64_t rows) : start(rows + 1), token(ids.numel()) {
    const int64_t* id = ids.const_data_ptr<int64_t>();
    const int64_t T = ids.numel();
    for (int64_t t = 0; t < T; ++t) ++start[id[t]];
    std::partial_sum(start.begin(), start.end(),
                     start.begin());  // for now start[v] is the end of row v
    for (int64_t t = T - 1; t >= 0; --t) token[--start[id[t]]] = t;
  }

  // The first row of part k of n. The parts have equal sums of rows and tokens.
  int64_t boundary(int64_t k, int64_t n) const {
    const int64_t rows = static_cast<int64_t>(start.size()) - 1;
    const int64_t goal = (rows + start[rows]) * k / n;
    const auto below = [&](const int64_t& s) { return (&s - start.data()) + s < goal; };
    return std::partition_point(start.begin(), start.end() - 1, below) - start.begin();
  }
};

// The gradient of `table`: `base`, or 0, plus the sums of dx over the tokens of each row. One
// thread sums a row, and adds its pieces in order: the bits do not depend on the number of threads.
template <class T>
Tensor table_gradient(const Tensor& dx, const Tensor& ids, const Tensor& table,
                      const std::optional<Tensor>& base = {}) {
  using W = at::opmath_type<T>;
  const int64_t E = table.size(1), parts = 4 * at::get_num_threads();
  const Sorted sorted(ids, table.size(0));
  const Tensor result = huge_empty_like(table);
  T* gradient = result.mutable_data_ptr<T>();
  const T* base_rows = base ? base->const_data_ptr<T>() : nullptr;
  const W* rows = dx.const_data_ptr<W>();
  const auto write_without_tokens = [&](int64_t v, int64_t end) {
    const auto* from = reinterpret_cast<const char*>(base_rows ? base_rows + v * E : nullptr);
    nontemporal_copy(from, reinterpret_cast<char*>(gradient + v * E), (end - v) * E * sizeof(T));
  };

  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<W> sum(E), piece(E);
    const int64_t last = sorted.boundary(end, parts);
    int64_t written = sorted.boundary(begin, parts);
    for (int64_t v = written; v < last; ++v) {
      const int64_t first = sorted.start[v], row_end = sorted.start[v + 1];
      if (first == row_end) continue;
      write_without_tokens(written, v);
      written = v + 1;
      for (int64_t e = 0; e < E; ++e)
        sum[e] = base_rows ? static_cast<W>(base_rows[v * E + e]) : W(0);
      for (int64_t i = first; i < row_end; i += kPiece) {
        std::fill(piece.begin(), piece.end(), W(0));
        for (int64_t j = i; j < std::min(i + kPiece, row_end); ++j) {
          add(rows + sorted.token[j] * E, E, piece.data());
        }
        add(piece.data(), E, sum.data());
      }
      std::copy(sum.begin(), sum.end(), gradient + v * E);
    }
    write_without_tokens(written, last);
  });
  return result;
}

}  // namespace electra_fast
