// Conversions between float32 and the stored dtype, and the choice of a kernel by that dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "storage.h"

namespace electra_fast {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(__half* p, float x) { *p = __float2half(x); }
__device__ inline void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }

// Call f with a zero of the stored type and return its result: one kernel per type.
template <class F>
auto with_type(Storage storage, const F& f) {
  switch (storage) {
    case Storage::kFloat16:
      return f(__half());
    case Storage::kBFloat16:
      return f(__nv_bfloat16());
    default:
      return f(float());
  }
}

// Call f with a zero of the stored type within a kernel. For a second dtype of a kernel this avoids
// a second set of instantiations.
template <class F>
__device__ void with_type_in_kernel(Storage storage, const F& f) {
  if (storage == Storage::kFloat32) {
    f(float());
  } else if (storage == Storage::kFloat16) {
    f(__half());
  } else {
    f(__nv_bfloat16());
  }
}

}  // namespace electra_fast
