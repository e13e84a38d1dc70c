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
constexpr int64_t kPanel = 64;    // columns
constexpr int64_t kSquare = 256;  // rows and columns of a weight's gradient
// Elements between rows whose distance would be a power of two: they would share few lines of a
// cache.
constexpr int64_t kPad = 16;
// Elements whose copy outweighs the cost of waking a thread.
constexpr int64_t kCopyGrain = 1 << 15;

inline bool tiles_are_faster(const at::Tensor& rows, const at::Tensor& weight) {
  const auto whole = [](int64_t n) { return n > 0 && n % at::vec::Vectorized<float>::size() == 0; };
  return rows.is_cpu() && rows.scalar_type() == at::kFloat && rows.size(0) >= kFewestRows &&
         whole(weight.size(0)) && whole(weight.size(1));
}

// Copy columns of a right operand [K, N], whose rows are ldb elements apart, to a panel, with its
// rows one after the other: rows that are a power of two apart would share few lines of a cache.
inline void pack(const float* b, int64_t K, int64_t columns, int64_t ldb, float* panel) {
  for (int64_t k = 0; k < K; ++k) panel = std::copy_n(b + k * ldb, columns, panel);
}

// A right operand [K, N] in panels of columns.
struct Panels {
  at::Tensor data;
  int64_t K, N;

  static Panels of(const at::Tensor& b) {
    return make(b, b.size(0), b.size(1),
                [&](const float* from, int64_t n, int64_t columns, float* to) {
                  pack(from + n, b.size(0), columns, b.size(1), to);
                });
  }
  static Panels of_transpose(const at::Tensor& x) {
    const int64_t K = x.size(1);
    return make(x, K, x.size(0), [&](const float* from, int64_t n, int64_t columns, float* to) {
      transpose(from + n * K, columns, K, K, to, columns);
    });
  }

 private:
  // Call fill(values, n, columns, panel) for each panel.
  template <class F>
  static Panels make(const at::Tensor& x, int64_t K, int64_t N, const F& fill) {
    const Panels p{at::empty(x.sizes(), x.options()), K, N};
    const float* from = x.const_data_ptr<float>();
    float* to = p.data.mutable_data_ptr<float>();
    const int64_t grain = std::max<int64_t>(1, kCopyGrain / (K * kPanel));
    at::parallel_for(0, ceil_div(N, kPanel), grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * kPanel; n < std::min(N, end * kPanel); n += kPanel)
        fill(from, n, std::min(kPanel, N - n), to + n * K);
    });
    return p;
  }
};

// The rows of a tile, of which no thread has many more than another one.
inline int64_t tile_rows(int64_t T, int64_t across) {
  const int64_t threads = at::get_num_threads();
  const int64_t of_thread = ceil_div(ceil_div(T, kTileRows) * across, threads);
  const int64_t tiles = std::max<int64_t>(of_thread * threads / across, 1);
  return std::min(kTileRows, round_up(ceil_div(T, tiles), kProductRows));
}

// a b + bias for a [T, K], b [K, N] and bias [N], which may be null.
inline at::Tensor matmul(const at::Tensor& a, const Panels& b, const float* bias) {
  const int64_t T = a.size(0), K = b.K, N = b.N;
  const at::Tensor c = huge_empty({T, N}, a.options());
  const float *as = a.const_data_ptr<float>(), *bs = b.data.const_data_ptr<float>();
  float* cs = c.mutable_data_ptr<float>();
  const int64_t across = ceil_div(N, kTileColumns), height = tile_rows(T, across);
  at::parallel_for(0, ceil_div(T, height) * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task / across * height, first = task % across * kTileColumns;
      const int64_t rows = std::min(height, T - t), last = std::min(first + kTileColumns, N);
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

// Call f(m, rows, n, columns) for each square of a result [M, N], which stays in the cache. If
// there are more threads than squares, the squares are smaller.
template <class F>
void for_squares(int64_t M, int64_t N, F f) {
  int64_t side = kSquare;
  while (side > kPanel && ceil_div(M, side) * ceil_div(N, side) < at::get_num_threads()) side /= 2;
  const int64_t across = ceil_div(N, side), tasks = ceil_div(M, side) * across;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / across * side, n = task % across * side;
      f(m, std::min(side, M - m), n, std::min(side, N - n));
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
    const int64_t apart = rows + kPad;
    const Scratch<float> left(apart * kTileDepth), panels(across * kTileDepth);
    for (int64_t t = 0; t < T; t += kTileDepth) {
      const int64_t depth = std::min(kTileDepth, T - t);
      for (int64_t l = 0; l < depth; ++l)
        std::copy_n(as + (t + l) * M + m, rows, left.data() + l * apart);
      for (int64_t n = 0; n < across; n += kPanel) {
        const int64_t columns = std::min(kPanel, across - n);
        pack(bs + t * N + n0 + n, depth, columns, N, panels.data() + n * depth);
        fma_product(rows, columns, depth, {left.data(), 1, apart}, panels.data() + n * depth,
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
