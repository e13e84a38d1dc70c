// Reductions over the lanes of a warp, each in a fixed order.
#pragma once

#include <cuda_runtime.h>

namespace electra_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

template <class T>
__device__ T warp_sum(T x) {
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int d = kWarp / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}
__device__ inline int warp_max(int x) {
  for (int d = kWarp / 2; d > 0; d /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}

// The sum over this lane and all lower lanes.
__device__ inline double warp_scan(double x) {
  const int lane = threadIdx.x % kWarp;
  for (int d = 1; d < kWarp; d *= 2) {
    const double below = __shfl_up_sync(kAllLanes, x, d);
    if (lane >= d) x += below;
  }
  return x;
}

}  // namespace electra_fast
