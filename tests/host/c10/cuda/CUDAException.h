// Replaces PyTorch's header of this name; see tests/host/__init__.py.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(call)                                              \
  do {                                                                    \
    const cudaError_t error = (call);                                     \
    TORCH_CHECK(error == cudaSuccess, #call ": CUDA error ", int{error}); \
  } while (false)
