// Rows of a few hundred columns, some columns a lane: loads, stores and sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "storage.h"

namespace electra_fast {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFF;

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(__half* p, float x) { *p = __float2half(x); }
__device__ inline void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }

// Return what f makes of a value of the type that is stored.
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

// f of a value of the type that is stored. Beside a type that is the kernel's own, this one costs
// no second set of kernels.
template <class F>
__device__ void as_stored(Storage storage, const F& f) {
  if (storage == Storage::kFloat32) {
    f(float());
  } else if (storage == Storage::kFloat16) {
    f(__half());
  } else {
    f(__nv_bfloat16());
  }
}

// The kItems columns of a row that a lane takes: packs of kPack neighbours, a warp's side by side.
template <int kItems, int kPack>
struct Columns {
  static constexpr int kPacks = kItems / kPack, kSpan = kItems * kWarp;  // columns a warp

  template <class T>
  struct alignas(kPack * sizeof(T)) Pack {
    T of[kPack];
  };

  template <class T>
  struct Items {
    Pack<T> packs[kPacks];
    __device__ float operator[](int k) const { return wide(packs[k / kPack].of[k % kPack]); }
  };

  int first, E;
  bool aligned;  // a pack is one access

  // Of a warp's part of a row.
  __device__ Columns(int part, int E, bool aligned)
      : first(part * kSpan + threadIdx.x % kWarp * kPack), E(E), aligned(aligned) {}

  __device__ int at(int k) const { return first + k / kPack * kPack * kWarp + k % kPack; }
  __device__ bool has(int k) const { return at(k) < E; }

  // 0 beyond the row's end.
  template <class T>
  __device__ Items<T> load(const T* row) const {
    Items<T> x = {};
    if (aligned) {
      for (int k = 0; k < kItems; k += kPack) {
        if (has(k)) x.packs[k / kPack] = *reinterpret_cast<const Pack<T>*>(row + at(k));
      }
    } else {
      for (int k = 0; k < kItems; ++k) {
        if (has(k)) x.packs[k / kPack].of[k % kPack] = row[at(k)];
      }
    }
    return x;
  }

  template <class T>
  __device__ void save(T* row, const float (&x)[kItems]) const {
    if (aligned) {
      for (int k = 0; k < kItems; k += kPack) {
        Pack<T> pack;
        for (int i = 0; i < kPack; ++i) store(&pack.of[i], x[k + i]);
        if (has(k)) *reinterpret_cast<Pack<T>*>(row + at(k)) = pack;
      }
    } else {
      for (int k = 0; k < kItems; ++k) {
        if (has(k)) store(row + at(k), x[k]);
      }
    }
  }

  // Whether every pack of these rows can be one access.
  template <class T, class... P>
  static bool fit(int E, const P*... rows) {
    return E % kPack == 0 && (... && (reinterpret_cast<uintptr_t>(rows) % sizeof(Pack<T>) == 0));
  }
};

__device__ inline float warp_sum(float x) {
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

}  // namespace electra_fast
