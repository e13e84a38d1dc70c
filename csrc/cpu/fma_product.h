// Products of small matrices on the CPU, on the calling thread. A call costs nothing before its
// first multiplication, and an operand can be read transposed. Tiles of large products are faster
// in tile.h.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace electra_fast {

// Element (i, l) of the left operand is data[i * row + l * column].
template <class W>
struct Left {
  const W* data;
  int64_t row, column;
};

// The sums of `rows` x `vectors` registers, which are as many as the registers hold: AVX512 has 32,
// AVX2 has 16.
constexpr int kProductRows = 6;
template <class W>
constexpr int kProductVectors = at::vec::Vectorized<W>::size() * sizeof(W) == 64 ? 4 : 2;

// The values to which a product is added: rows that are `row` elements apart, or 0 if there are
// none.
template <class W>
struct Start {
  const W* data;
  int64_t row;
};

template <int rows, int vectors, class W>
void fma_tile(int64_t k, Left<W> a, const W* b, int64_t ldb, Start<W> start, W* c, int64_t ldc) {
  using Vec = at::vec::Vectorized<W>;
  constexpr int64_t kSize = Vec::size();
  Vec sum[rows][vectors];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
      sum[i][j] = start.data ? Vec::loadu(start.data + i * start.row + j * kSize) : Vec(0);
  for (int64_t l = 0; l < k; ++l, b += ldb, a.data += a.column) {
    Vec row[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) row[j] = Vec::loadu(b + j * kSize);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      const Vec factor(a.data[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = at::vec::fmadd(factor, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j].store(c + i * ldc + j * kSize);
}

// All rows of some columns. The last tile has fewer rows.
template <int vectors, class W>
void fma_columns(int64_t m, int64_t k, Left<W> a, const W* b, int64_t ldb, Start<W> start, W* c,
                 int64_t ldc) {
  const auto next = [&]<int rows>(std::integral_constant<int, rows>) {
    fma_tile<rows, vectors>(k, a, b, ldb, start, c, ldc);
    a.data += rows * a.row, c += rows * ldc;
    if (start.data) start.data += rows * start.row;
  };
  for (; m >= kProductRows; m -= kProductRows) next(std::integral_constant<int, kProductRows>());
  [&]<int... rows>(std::integer_sequence<int, rows...>) {
    ((m == rows && rows > 0 ? next(std::integral_constant<int, std::max(rows, 1)>()) : void()),
     ...);
  }(std::make_integer_sequence<int, kProductRows>());
}

// c [m, n] = start + a [m, k] b [k, n]. n is a multiple of the size of a vector.
template <class W>
void fma_product(int64_t m, int64_t n, int64_t k, Left<W> a, const W* b, int64_t ldb,
                 Start<W> start, W* c, int64_t ldc) {
  constexpr int64_t kSize = at::vec::Vectorized<W>::size(), kMost = kProductVectors<W>;
  for (int64_t vectors = n / kSize; vectors > 0; vectors -= kMost) {
    const auto columns = [&]<int count>(std::integral_constant<int, count>) {
      fma_columns<count>(m, k, a, b, ldb, start, c, ldc);
    };
    const int64_t count = std::min(vectors, kMost);
    [&]<int... less>(std::integer_sequence<int, less...>) {
      ((count == less + 1 ? columns(std::integral_constant<int, less + 1>()) : void()), ...);
    }(std::make_integer_sequence<int, kMost>());
    b += kMost * kSize, c += kMost * kSize;
    if (start.data) start.data += kMost * kSize;
  }
}

// c = a b, or += if `add`.
template <class W>
void fma_product(int64_t m, int64_t n, int64_t k, Left<W> a, const W* b, int64_t ldb, W* c,
                 int64_t ldc, bool add) {
  fma_product(m, n, k, a, b, ldb, Start<W>{add ? c : nullptr, ldc}, c, ldc);
}

}  // namespace electra_fast
