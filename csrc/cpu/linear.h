// The products of a linear layer on the CPU in float32, from tiles of FMA instructions, which are
// faster than MKL's sgemm (docs/kernels/linear.md has the numbers). One thread computes a tile and
// sums over the depth in order: the bits do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../host_device.h"
#include "fma_product.h"
#include "huge_pages.h"
#include "scratch.h"
#include "tile.h"

namespace electra_fast {

constexpr int64_t kFewestRows = 256;  // with fewer, packing costs more time than tiles save
constexpr int64_t kTileRows = 96, kTileColumns = 256, kTileDepth = 128;
constexpr int64_t kPanel = 64;  // columns

inline bool tiles_are_faster(const at::Tensor& rows, const at::Tensor& weight) {
  const auto whole = [](int64_t n) { return n > 0 && n % at::vec::Vectorized<float>::size() == 0; };
  return rows.is_cpu() && rows.scalar_type() == at::kFloat && rows.size(0) >= kFewestRows &&
         whole(weight.size(0)) && whole(weight.size(1));
}

// Copy a right operand b [K, N], whose rows are ldb elements apart, to panels of columns, each with
// its rows one after the other: rows that are a power of two apart would share few lines of a
// cache.
inline void pack(const float* b, int64_t K, int64_t N, int64_t ldb, float* panels) {
  for (int64_t n = 0; n < N; n += kPanel) {
    const int64_t columns = std::min(kPanel, N - n);
    for (int64_t k = 0; k < K; ++k) panels = std::copy_n(b + k * ldb + n, columns, panels);
  }
}

// A right operand [K, N] in panels.
struct Panels {
  at::Tensor data;
  int64_t K, N;

  static Panels of(const at::Tensor& b) {
    const Panels p{at::empty(b.sizes(), b.options()), b.size(0), b.size(1)};
    pack(b.const_data_ptr<float>(), p.K, p.N, p.N, p.data.mutable_data_ptr<float>());
    return p;
  }
  static Panels of_transpose(const at::Tensor& x) {
    const Panels p{at::empty(x.sizes(), x.options()), x.size(1), x.size(0)};
    const float* from = x.const_data_ptr<float>();
    float* to = p.data.mutable_data_ptr<float>();
    for (int64_t n = 0; n < p.N; n += kPanel) {
      const int64_t columns = std::min(kPanel, p.N - n);
      transpose(from + n * p.K, columns, p.K, p.K, to + n * p.K, columns);
    }
    return p;
  }
};

// a b + bias for a [T, K], b [K, N] and bias [N], which may be null.
inline at::Tensor matmul(const at::Tensor& a, const Panels& b, const float* bias) {
  const int64_t T = a.size(0), K = b.K, N = b.N;
  const at::Tensor c = huge_empty({T, N}, a.options());
  const float *as = a.const_data_ptr<float>(), *bs = b.data.const_data_ptr<float>();
  float* cs = c.mutable_data_ptr<float>();
  const int64_t across = ceil_div(N, kTileColumns), tasks = ceil_div(T, kTileRows) * across;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task / across * kTileRows, first = task % across * kTileColumns;
      const int64_t rows = std::min(kTileRows, T - t), last = std::min(first + kTileColumns, N);
      for (int64_t r = 0; bias && r < rows; ++r)
        std::copy(bias + first, bias + last, cs + (t + r) * N + first);
      for (int64_t n = first; n < last; n += kPanel) {
        const int64_t columns = std::min(kPanel, last - n);
        fma_product(rows, columns, K, {as + t * K, K, 1}, bs + n * K, columns, cs + t * N + n, N,
                    /*add=*/bias != nullptr);
      }
    }
  });
  return c;
}

// a^T b for a [T, M] and b [T, N]. A task computes a square of the result, which stays in the
// cache.
inline at::Tensor matmul_tn(const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t kSide = kTileColumns;
  const int64_t T = a.size(0), M = a.size(1), N = b.size(1);
  const at::Tensor c = at::empty({M, N}, a.options());
  const float *as = a.const_data_ptr<float>(), *bs = b.const_data_ptr<float>();
  float* cs = c.mutable_data_ptr<float>();
  const int64_t across = ceil_div(N, kSide), tasks = ceil_div(M, kSide) * across;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> left(kSide * kTileDepth), panels(kSide * kTileDepth);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / across * kSide, n0 = task % across * kSide;
      const int64_t rows = std::min(kSide, M - m), across_square = std::min(kSide, N - n0);
      for (int64_t t = 0; t < T; t += kTileDepth) {
        const int64_t depth = std::min(kTileDepth, T - t);
        for (int64_t l = 0; l < depth; ++l)
          std::copy_n(as + (t + l) * M + m, rows, left.data() + l * rows);
        pack(bs + t * N + n0, depth, across_square, N, panels.data());
        for (int64_t n = 0; n < across_square; n += kPanel) {
          const int64_t columns = std::min(kPanel, across_square - n);
          fma_product(rows, columns, depth, {left.data(), 1, rows}, panels.data() + n * depth,
                      columns, cs + m * N + n0 + n, N, /*add=*/t > 0);
        }
      }
    }
  });
  return c;
}

}  // namespace electra_fast
