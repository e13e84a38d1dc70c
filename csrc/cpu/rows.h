// Rows of a tensor on the CPU: conversion to the dtype of the arithmetic, distribution over
// threads, and sums over tokens.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../host_device.h"

namespace electra_fast {

constexpr int64_t kGrain = 8192;    // elements per thread that outweigh the cost of waking it
constexpr int64_t kBlockRows = 32;  // rows that float32 sums without losing digits

inline int64_t rows_of(const at::Tensor& x) {
  const int64_t E = x.size(-1);
  return E == 0 ? 0 : x.numel() / E;
}

// x in this dtype, without a dispatch if it has it.
inline at::Tensor as(const at::Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype ? x : x.to(dtype);
}

// Return the row in the dtype of the arithmetic: itself if that is its dtype, else a copy.
template <class T, class W>
const W* load_row(const T* row, int64_t E, W* copy) {
  if constexpr (std::is_same_v<T, W>) {
    return row;
  } else {
    at::vec::convert(row, copy, E);
    return copy;
  }
}

// Return where to compute a row of results: in the row itself, or in `copy`, which store_row then
// converts.
template <class T, class W>
W* result_row(T* row, W* copy) {
  if constexpr (std::is_same_v<T, W>) return row;
  return copy;
}
template <class T, class W>
void store_row(const W* copy, int64_t E, T* row) {
  if constexpr (!std::is_same_v<T, W>) at::vec::convert(copy, row, E);
}

template <class W>
void add(const W* x, int64_t E, W* sum) {
  for (int64_t e = 0; e < E; ++e) sum[e] += x[e];
}

// Call f(begin, end) for ranges of n rows of E elements.
template <class F>
void for_rows(int64_t n, int64_t E, F f) {
  at::parallel_for(0, n, ceil_div(kGrain, std::max<int64_t>(1, E)), f);
}

// Call f(block, begin, end) for each block of n rows of E elements.
template <class F>
void for_blocks(int64_t n, int64_t E, F f) {
  for_rows(ceil_div(n, kBlockRows), kBlockRows * E, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      f(block, block * kBlockRows, std::min(n, (block + 1) * kBlockRows));
  });
}

// Sums [E] over n rows. One task sums a block of rows, and the blocks are added in order, in
// float64: the bits do not depend on the number of threads.
class Sums {
 public:
  Sums(int64_t n, int64_t E, const at::TensorOptions& options)
      : blocks_(at::zeros({ceil_div(n, kBlockRows), E}, options)) {}

  template <class W>
  W* of_block(int64_t block) const {
    return blocks_.mutable_data_ptr<W>() + block * blocks_.size(1);
  }

  template <class W>
  at::Tensor total(at::ScalarType dtype) const {
    const int64_t blocks = blocks_.size(0), E = blocks_.size(1);
    const at::Tensor result = at::empty({E}, blocks_.options());
    W* sums = result.mutable_data_ptr<W>();
    for_rows(E, blocks, [&](int64_t begin, int64_t end) {
      std::vector<double> sum(end - begin);
      for (int64_t block = 0; block < blocks; ++block) {
        const W* part = of_block<W>(block);
        for (int64_t e = begin; e < end; ++e) sum[e - begin] += part[e];
      }
      std::copy(sum.begin(), sum.end(), sums + begin);
    });
    return as(result, dtype);
  }

 private:
  at::Tensor blocks_;
};

}  // namespace electra_fast
