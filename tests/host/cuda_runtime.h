// The part of CUDA that csrc/cuda/*.cu use, for running them unchanged on the host. This folder
// comes before the toolkit's in the include path; see tests/host/__init__.py for the build and the
// purpose.
//
// Only whole warps, no dynamic shared memory, no inline PTX. Code that needs more must not be in
// .cu files; products are those of cuBLAS or Triton.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::isnan, std::max, std::min;

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline void __syncthreads(cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::meet(cuda_host::machine.block, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from,
              cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::exchange(mask, value, where)(from);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int difference,
                  cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::exchange(mask, value, where)(cuda_host::lane() ^ difference);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance,
                 cuda_host::Where where = cuda_host::Where::current()) {
  const auto values = cuda_host::exchange(mask, value, where);
  return cuda_host::lane() < distance ? value : values(cuda_host::lane() - distance);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance,
                   cuda_host::Where where = cuda_host::Where::current()) {
  const unsigned from = cuda_host::lane() + distance;
  const auto values = cuda_host::exchange(mask, value, where);
  return from < cuda_host::kWarp ? values(from) : value;
}

inline unsigned __ballot_sync(unsigned mask, int vote,
                              cuda_host::Where where = cuda_host::Where::current()) {
  const auto votes = cuda_host::exchange(mask, vote, where);
  unsigned bits = 0;
  for (unsigned i = 0; i < cuda_host::kWarp; ++i) bits |= (votes(i) != 0 ? 1u : 0u) << i;
  return bits;
}

inline int __any_sync(unsigned mask, int vote,
                      cuda_host::Where where = cuda_host::Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }

// The part of the runtime API that launchers use.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = grid.x > 0 && grid.x < 1u << 31 && grid.y - 1 < 65535 && grid.z - 1 < 65535;
  if (!fits || threads == 0 || threads > cuda_host::kMaxThreads ||
      threads % cuda_host::kWarp != 0) {
    return cudaErrorInvalidConfiguration;
  }
  using Call = std::tuple<void (*)(P...), P...>;
  const Call call{kernel, P(arguments)...};
  const auto body = [](const void* stored) {
    std::apply([](auto* f, const P&... values) { f(values...); },
               *static_cast<const Call*>(stored));
  };
  cuda_host::run(grid, block, body, &call);
  return cudaSuccess;
}
