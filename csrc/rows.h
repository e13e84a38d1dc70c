// Rows of a tensor on the CPU: read in the dtype of the arithmetic, shared out between threads, and
// summed over tokens.
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

namespace electra_fast {

constexpr int64_t kGrain = 8192;    // elements a thread, beside which waking it is cheap
constexpr int64_t kBlockRows = 32;  // whose sum float32 holds without losing digits

inline int64_t rows_of(const at::Tensor& x) {
  const int64_t E = x.size(-1);
  return E == 0 ? 0 : x.numel() / E;
}

// A row in the dtype of the arithmetic: itself where it has that, else a copy.
template <class T, class W>
const W* widened(const T* row, int64_t E, W* copy) {
  if constexpr (std::is_same_v<T, W>) {
    return row;
  } else {
    at::vec::convert(row, copy, E);
    return copy;
  }
}

// Where to compute a row of results, and how they then come to lie in it.
template <class T, class W>
W* room_for(T* row, W* copy) {
  if constexpr (std::is_same_v<T, W>) return row;
  return copy;
}
template <class T, class W>
void narrow(const W* copy, int64_t E, T* row) {
  if constexpr (!std::is_same_v<T, W>) at::vec::convert(copy, row, E);
}

template <class W>
void add(const W* x, int64_t E, W* sum) {
  for (int64_t e = 0; e < E; ++e) sum[e] += x[e];
}

// Call f(begin, end) on ranges of n rows of E elements.
template <class F>
void for_rows(int64_t n, int64_t E, F f) {
  at::parallel_for(0, n, at::divup(kGrain, std::max<int64_t>(1, E)), f);
}

// Call f(block, begin, end) on the blocks of n rows of E elements.
template <class F>
void for_blocks(int64_t n, int64_t E, F f) {
  for_rows(at::divup(n, kBlockRows), kBlockRows * E, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      f(block, block * kBlockRows, std::min(n, (block + 1) * kBlockRows));
  });
}

// Sums [E] over n rows. A block of rows is one task's, and blocks are added in their order, in
// float64: the same bits for any number of threads.
class Sums {
 public:
  Sums(int64_t n, int64_t E, const at::TensorOptions& options)
      : blocks_(at::zeros({at::divup(n, kBlockRows), E}, options)) {}

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
    return result.to(dtype);
  }

 private:
  at::Tensor blocks_;
};

}  // namespace electra_fast
