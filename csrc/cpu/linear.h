// The products of a linear layer on the CPU from tiles: in float32 of FMA instructions, and the
// gradient of the weight in bfloat16 (docs/kernels/linear.md has the numbers). One thread computes
// a tile and sums over the depth in order: the bits do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <vector>

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
      for (int64_t n = first; n < last; n += kPanel) {
        const int64_t columns = std::min(kPanel, last - n);
        const Start<float> start{bias ? bias + n : nullptr, 0};
        fma_product(rows, columns, K, {as + t * K, K, 1}, bs + n * K, columns, start,
                    cs + t * N + n, N);
      }
    }
  });
  return c;
}

// Call f(m, rows, n, columns) for each square of a result [M, N], which stays in the cache.
template <class F>
void for_squares(int64_t M, int64_t N, F f) {
  constexpr int64_t kSide = 256;
  const int64_t across = ceil_div(N, kSide), tasks = ceil_div(M, kSide) * across;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / across * kSide, n = task % across * kSide;
      f(m, std::min(kSide, M - m), n, std::min(kSide, N - n));
    }
  });
}

// a^T b for a [T, M] and b [T, N].
inline at::Tensor matmul_tn(const at::Tensor& a, const at::Tensor& b) {
  const int64_t T = a.size(0), M = a.size(1), N = b.size(1);
  const at::Tensor c = at::empty({M, N}, a.options());
  const float *as = a.const_data_ptr<float>(), *bs = b.const_data_ptr<float>();
  float* cs = c.mutable_data_ptr<float>();
  for_squares(M, N, [&](int64_t m, int64_t rows, int64_t n0, int64_t across) {
    const Scratch<float> left(rows * kTileDepth), panels(across * kTileDepth);
    for (int64_t t = 0; t < T; t += kTileDepth) {
      const int64_t depth = std::min(kTileDepth, T - t);
      for (int64_t l = 0; l < depth; ++l)
        std::copy_n(as + (t + l) * M + m, rows, left.data() + l * rows);
      pack(bs + t * N + n0, depth, across, N, panels.data());
      for (int64_t n = 0; n < across; n += kPanel) {
        const int64_t columns = std::min(kPanel, across - n);
        fma_product(rows, columns, depth, {left.data(), 1, rows}, panels.data() + n * depth,
                    columns, cs + m * N + n0 + n, N, /*add=*/t > 0);
      }
    }
  });
  return c;
}

#ifdef CPU_CAPABILITY_AVX512
// The same in float32 for bfloat16 a and b, which ATen would round to bfloat16. A product reads a
// transposed tile of a, and pairs of rows of b.
inline at::Tensor matmul_tn_bfloat16(const at::Tensor& a, const at::Tensor& b) {
  using T16 = c10::BFloat16;
  constexpr int64_t kDepth = 512, kRows = 64, kSide = 32;
  const int64_t T = a.size(0), M = a.size(1), N = b.size(1);
  const at::Tensor c = at::empty({M, N}, a.options().dtype(at::kFloat));
  const T16 *as = a.const_data_ptr<T16>(), *bs = b.const_data_ptr<T16>();
  float* cs = c.mutable_data_ptr<float>();
  for_squares(M, N, [&](int64_t m0, int64_t rows, int64_t n0, int64_t columns) {
    const Scratch<T16> left(rows * kDepth);
    const Scratch<uint32_t> right(columns * kDepth / 2);
    const std::vector<T16> zeros(columns);
    for (int64_t t = 0; t < T; t += kDepth) {
      const int64_t tokens = std::min(kDepth, T - t),
                    depth = round_up(tokens, kRows);  // few shapes
      std::fill_n(left.data(), tokens < depth ? rows * depth : 0, T16(0));
      for (int64_t m = 0; m < rows; m += kSide)
        for (int64_t l = 0; l < tokens; l += kSide)
          at::vec::transpose_mxn<T16>(as + (t + l) * M + m0 + m, M, left.data() + m * depth + l,
                                      depth, std::min(kSide, tokens - l),
                                      std::min(kSide, rows - m));
      const auto row = [&](int64_t l) { return l < tokens ? bs + (t + l) * N + n0 : zeros.data(); };
      for (int64_t l = 0; l < depth; l += 2) {
        const T16 *even = row(l), *odd = row(l + 1);
        uint32_t* pairs = right.data() + l / 2 * columns;
        for (int64_t n = 0; n < columns; ++n) pairs[n] = even[n].x | uint32_t{odd[n].x} << 16;
      }
      for (int64_t m = 0; m < rows; m += kRows)
        product(std::min(kRows, rows - m), columns, depth, left.data() + m * depth, depth,
                reinterpret_cast<const T16*>(right.data()), columns, cs + (m0 + m) * N + n0, N,
                /*add=*/t > 0);
    }
    at::native::cpublas::brgemm_release();
  });
  return c;
}
#endif

}  // namespace electra_fast
