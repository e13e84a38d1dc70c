// The products of a linear layer on the CPU in float32, from tiles computed by oneDNN's brgemm,
// which is faster than MKL's sgemm on AMD's cores (docs/kernels/linear.md has the numbers). One
// thread computes a tile and sums over the depth in order: the bits do not depend on the number of
// threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "../host_device.h"
#include "huge_pages.h"
#include "tile.h"

namespace electra_fast {

constexpr int64_t kTileRows = 64, kTileColumns = 256, kTileDepth = 256;

// With fewer tokens, transposing the weights costs more time than tiles save.
inline bool tiles_are_faster(const at::Tensor& rows, const at::Tensor& weight) {
  return rows.is_cpu() && rows.scalar_type() == at::kFloat && rows.size(0) >= 4 * kTileRows &&
         std::min(weight.size(0), weight.size(1)) >= 16;
}

inline at::Tensor transposed(const at::Tensor& x) {
  const at::Tensor y = at::empty({x.size(1), x.size(0)}, x.options());
  transpose(x.const_data_ptr<float>(), x.size(0), x.size(1), x.size(1), y.mutable_data_ptr<float>(),
            x.size(0));
  return y;
}

// a b + bias for a [T, K], b [K, N] and bias [N], which may be null.
inline at::Tensor matmul(const at::Tensor& a, const at::Tensor& b, const float* bias) {
  const int64_t T = a.size(0), K = a.size(1), N = b.size(1);
  const at::Tensor c = huge_empty({T, N}, a.options());
  const float *as = a.const_data_ptr<float>(), *bs = b.const_data_ptr<float>();
  float* cs = c.mutable_data_ptr<float>();
  const int64_t blocks = ceil_div(T, kTileRows), tasks = blocks * ceil_div(N, kTileColumns);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> last_a, last_c;  // the last rows, padded to the shape of a tile
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task % blocks * kTileRows, n = task / blocks * kTileColumns;
      const int64_t rows = std::min(kTileRows, T - t), columns = std::min(kTileColumns, N - n);
      const float* from = as + t * K;
      float* to = cs + t * N + n;
      int64_t ld = N;
      if (rows < kTileRows) {
        last_a.assign(kTileRows * K, 0), last_c.resize(kTileRows * columns);
        from = std::copy(from, from + rows * K, last_a.data()) - rows * K;
        to = last_c.data(), ld = columns;
      }
      for (int64_t k = 0; k < K; k += kTileDepth)
        product(kTileRows, columns, std::min(kTileDepth, K - k), from + k, K, bs + k * N + n, N, to,
                ld, k > 0);
      for (int64_t r = 0; r < rows; ++r) {
        float* row = cs + (t + r) * N + n;
        if (rows < kTileRows) std::copy_n(to + r * ld, columns, row);
        for (int64_t e = 0; bias && e < columns; ++e) row[e] += bias[n + e];
      }
    }
  });
  return c;
}

// a^T b for a [T, M] and b [T, N]. A task computes a square of the result, which stays in the
// cache, and transposes one tile of a at a time.
inline at::Tensor matmul_tn(const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t kSide = kTileColumns;
  const int64_t T = a.size(0), M = a.size(1), N = b.size(1);
  const at::Tensor c = at::empty({M, N}, a.options());
  const float *as = a.const_data_ptr<float>(), *bs = b.const_data_ptr<float>();
  float* cs = c.mutable_data_ptr<float>();
  const int64_t across = ceil_div(N, kSide), tasks = ceil_div(M, kSide) * across;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> a_t(kSide * kTileDepth), last(kSide * kTileDepth);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m0 = task / across * kSide, n0 = task % across * kSide;
      const int64_t rows = std::min(kSide, M - m0), columns = std::min(kSide, N - n0);
      for (int64_t t = 0; t < T; t += kTileDepth) {
        const int64_t depth = std::min(kTileDepth, T - t);
        const float* tile = bs + t * N + n0;
        int64_t ld = N;
        if (depth < kTileDepth) {  // the last tokens, padded to the shape of a tile
          std::fill(a_t.begin(), a_t.end(), 0.0f), std::fill(last.begin(), last.end(), 0.0f);
          for (int64_t l = 0; l < depth; ++l)
            std::copy_n(tile + l * N, columns, last.data() + l * columns);
          tile = last.data(), ld = columns;
        }
        transpose(as + t * M + m0, depth, rows, M, a_t.data(), kTileDepth);
        for (int64_t m = 0; m < rows; m += kTileRows)
          product(std::min(kTileRows, rows - m), columns, kTileDepth, a_t.data() + m * kTileDepth,
                  kTileDepth, tile, ld, cs + (m0 + m) * N + n0, N, t > 0);
      }
    }
  });
  return c;
}

}  // namespace electra_fast
