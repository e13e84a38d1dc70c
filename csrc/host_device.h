// Functions for C++ and CUDA sources alike. No torch header here: nvcc compiles this file too.
#pragma once

#include <type_traits>

#ifdef __CUDACC__
#define ELECTRA_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ELECTRA_FAST_HOST_DEVICE inline
#endif

namespace electra_fast {

template <class T>
ELECTRA_FAST_HOST_DEVICE T ceil_div(T n, std::type_identity_t<T> d) {
  return (n + d - 1) / d;
}

// The smallest multiple of d that is at least n.
template <class T>
ELECTRA_FAST_HOST_DEVICE T round_up(T n, std::type_identity_t<T> d) {
  return ceil_div(n, d) * d;
}

}  // namespace electra_fast
