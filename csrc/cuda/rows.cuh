// Rows of a few hundred columns: which columns a lane has, and how it loads and stores them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "storage.cuh"
#include "warp.cuh"

namespace electra_fast {

// The kItems columns of a row that one lane has: packs of kPack neighbours. The packs of a warp's
// lanes are neighbours too.
template <int kItems, int kPack>
struct Columns {
  static constexpr int kPacks = kItems / kPack;
  static constexpr int kSpan = kItems * kWarp;  // columns per warp

  template <class T>
  struct alignas(kPack * sizeof(T)) Pack {
    T of[kPack];
  };

  template <class T>
  struct Items {
    Pack<T> packs[kPacks];
    __device__ float operator[](int k) const { return to_float(packs[k / kPack].of[k % kPack]); }
  };

  int first, E;
  bool aligned;  // a pack is loaded or stored by one instruction

  // Part `part` of a row is that of one warp.
  __device__ Columns(int part, int E, bool aligned)
      : first(part * kSpan + threadIdx.x % kWarp * kPack), E(E), aligned(aligned) {}

  __device__ int at(int k) const { return first + k / kPack * kPack * kWarp + k % kPack; }
  __device__ bool has(int k) const { return at(k) < E; }

  // Columns past the end of the row are 0.
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

  // Whether one instruction can access each pack of these rows.
  template <class T, class... P>
  static bool fit(int E, const P*... rows) {
    return E % kPack == 0 && (... && (reinterpret_cast<uintptr_t>(rows) % sizeof(Pack<T>) == 0));
  }
};

}  // namespace electra_fast
