// Products of tiles on the CPU, and the layout of their operands.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fma_product.h"

namespace electra_fast {

// For a storage type T, `wide` is the type of the arithmetic and `operand` the type that a product
// reads. Only bfloat16 with AVX512 is read as it is stored: elsewhere that would not be faster.
template <class T>
struct Types {
  using wide = float;
  using operand = float;
};
template <>
struct Types<double> {
  using wide = double;
  using operand = double;
};
#ifdef CPU_CAPABILITY_AVX512
template <>
struct Types<c10::BFloat16> {
  using wide = float;
  using operand = c10::BFloat16;
};
#endif

template <class Operand>
constexpr int64_t kPair = sizeof(Operand) == 2 ? 2 : 1;  // rows of b that are interleaved

// Compute a product without terms or without results, which brgemm rejects. Return whether it is
// one.
inline bool handle_empty(int64_t m, int64_t n, int64_t k, float* c, int64_t ldc, bool add) {
  if (m > 0 && n > 0 && k > 0) return false;
  for (int64_t i = 0; i < m && !add; ++i) std::fill_n(c + i * ldc, n, 0.0f);
  return true;
}

// c [m, n] = a [m, k] b [k, n], or += if `add`, on the calling thread. In bfloat16 two rows of b
// are interleaved, b[k / 2][n][2], as its instructions need them. oneDNN compiles a kernel for each
// new shape, so callers pad their operands to a few shapes. Its kernels in float32 serve only where
// n is not a multiple of a vector.
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
  if (handle_empty(m, n, k, c, ldc, add)) return;
  if (n % at::vec::Vectorized<float>::size() == 0)
    return fma_product(m, n, k, Left<float>{a, lda, 1}, b, ldb, c, ldc, add);
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
}

// Whether the CPU has instructions for bfloat16. oneDNN has no kernel of brgemm without them.
inline bool multiplies_bfloat16() {
  static const bool has = __builtin_cpu_supports("avx512bf16") != 0;
  return has;
}

// For a CPU with AVX512 and without those instructions, so not optimised.
inline void product_by_elements(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a,
                                int64_t lda, const c10::BFloat16* b, int64_t ldb, float* c,
                                int64_t ldc, bool add) {
  for (int64_t i = 0; i < m; ++i, a += lda, c += ldc) {
    if (!add) std::fill(c, c + n, 0.0f);
    for (int64_t l = 0; l < k; ++l)
      for (int64_t j = 0; j < n; ++j)
        c[j] += static_cast<float>(a[l]) * static_cast<float>(b[(l / 2 * ldb + j) * 2 + l % 2]);
  }
}

inline void product(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda,
                    const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  if (handle_empty(m, n, k, c, ldc, add)) return;
  if (!multiplies_bfloat16()) return product_by_elements(m, n, k, a, lda, b, ldb, c, ldc, add);
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/true);
}

// For gradient checks in float64, so not optimised.
inline void product(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
                    int64_t ldb, double* c, int64_t ldc, bool add) {
  for (int64_t i = 0; i < m; ++i, a += lda, c += ldc) {
    if (!add) std::fill(c, c + n, 0.0);
    for (int64_t l = 0; l < k; ++l)
      for (int64_t j = 0; j < n; ++j) c[j] += a[l] * b[l * ldb + j];
  }
}

// Write the transpose of `from` [rows, columns] as an operand b of a product. The rows of `from`
// are ld_from elements apart, those of `to` ld_to.
template <class T, class Operand>
void transpose(const T* from, int64_t rows, int64_t columns, int64_t ld_from, Operand* to,
               int64_t ld_to) {
  constexpr int64_t kSide = 16, P = kPair<Operand>;  // a square of each fits the L1 cache
  constexpr bool kVector = std::is_same_v<T, float> && std::is_same_v<Operand, float>;
  for (int64_t r0 = 0; r0 < rows; r0 += kSide) {
    for (int64_t c0 = 0; c0 < columns; c0 += kSide) {
      const int64_t r1 = std::min(r0 + kSide, rows), c1 = std::min(c0 + kSide, columns);
      if constexpr (kVector) {
        at::vec::transpose_mxn<float>(from + r0 * ld_from + c0, ld_from, to + c0 * ld_to + r0,
                                      ld_to, r1 - r0, c1 - c0);
        continue;
      }
      for (int64_t c = c0; c < c1; ++c) {
        Operand* row = to + c / P * ld_to * P + c % P;
        for (int64_t r = r0; r < r1; ++r) row[r * P] = static_cast<Operand>(from[r * ld_from + c]);
      }
    }
  }
}

}  // namespace electra_fast
