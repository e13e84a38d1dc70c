// Loss, sample and gradient of the generator's head from its logits (Clark et al. 2020, eq. 1):
//
//   l_v = (x table^T)_v + b_v     lse = log sum_v exp(l_v)     nll = lse - l_target
//   dl_v = w (exp(l_v - lse) - [v = target])
//   sample = min{v : p_0 + ... + p_v > u},  p = softmax(l / temperature)
//
// A block takes a row and reads it once. Each of its warps sums one span of the vocabulary,
// relative to the largest logit so far; the warp in whose span the running sum passes u looks into
// it again. Terms are float32, sums of more than kItems of them float64, and none depends on the
// order in which threads run.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>

#include "../philox.h"
#include "launch.cuh"
#include "mlm_head.h"

namespace electra_fast {
namespace {

constexpr int kWarp = 32, kMaxWarps = 16, kThreads = kWarp * kMaxWarps;
constexpr int kItems = 8;  // loads in flight a thread
constexpr int kGroup = kWarp * kItems;
constexpr unsigned kAll = 0xFFFFFFFF;

__device__ float warp_max(float x) {
  for (int d = kWarp / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, d));
  return x;
}

__device__ double warp_sum(double x) {
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

// The sum over this lane and those below.
__device__ double warp_scan(double x) {
  const int lane = threadIdx.x % kWarp;
  for (int d = 1; d < kWarp; d *= 2) {
    const double below = __shfl_up_sync(kAll, x, d);
    if (lane >= d) x += below;
  }
  return x;
}

// sum_v exp(beta (l_v - top)), top the largest l_v. It begins at the lowest number and not at -inf,
// whose difference to itself is NaN.
struct SoftSum {
  float top = -FLT_MAX;
  double sum = 0;

  __device__ void add(const float (&l)[kItems], float beta) {
    const float before = top;
    for (int k = 0; k < kItems; ++k) top = fmaxf(top, l[k]);
    float part = 0;
    for (int k = 0; k < kItems; ++k) part += expf(beta * (l[k] - top));
    sum = sum * expf(beta * (before - top)) + part;
  }

  __device__ SoftSum over_the_warp(float beta) const {
    const float highest = warp_max(top);
    return {highest, warp_sum(sum * expf(beta * (top - highest)))};
  }
};

// What a warp left for the others.
struct Shared {
  float top;
  double sum;
};

__device__ SoftSum read(const Shared* shared, int warps) {
  const int lane = threadIdx.x % kWarp;
  return lane < warps ? SoftSum{shared[lane].top, shared[lane].sum} : SoftSum{};
}

// A warp's part of the vocabulary.
struct Span {
  const float* logits;
  const float* bias;
  int begin, end;

  __device__ static int id(int base, int k) { return base + k * kWarp + threadIdx.x % kWarp; }

  __device__ void load(int base, float (&l)[kItems]) const {
    for (int k = 0; k < kItems; ++k) {
      const int v = id(base, k);
      l[k] = v < end ? logits[v] + bias[v] : -INFINITY;
    }
  }
};

__device__ void mask(float (&l)[kItems], int base, int banned) {
  for (int k = 0; k < kItems; ++k) {
    if (Span::id(base, k) == banned) l[k] = -INFINITY;
  }
}

// The first token of a span at which the running sum of exp(beta (l_v - top)) exceeds `goal`. Where
// rounding, or a goal of infinity, leaves none, the last one with a term above 0; the span has one,
// its term at the top being 1.
__device__ int find(const Span& span, int banned, float beta, float top, double goal) {
  const int lane = threadIdx.x % kWarp;
  const auto term = [&](int v) {
    const bool possible = v < span.end && v != banned;
    return possible ? expf(beta * (span.logits[v] + span.bias[v] - top)) : 0.0f;
  };
  double below = 0;
  int last = span.begin;
  for (int base = span.begin; base < span.end; base += kGroup) {
    float part = 0;
    for (int k = 0; k < kItems; ++k) {
      const int v = Span::id(base, k);
      const float p = term(v);
      if (p > 0) last = v;
      part += p;
    }
    const double sum = warp_sum(part);
    if (below + sum <= goal) {
      below += sum;
      continue;
    }
    // This group has it. Now a lane takes neighbours, so that one scan tells which lane has it.
    const int first = base + lane * kItems;
    double own = 0;
    for (int k = 0; k < kItems; ++k) own += term(first + k);
    const double through = below + warp_scan(own);
    const unsigned passed = __ballot_sync(kAll, own > 0 && through > goal);
    if (passed == 0) break;
    double running = through - own;
    int found = -1;
    for (int k = 0; k < kItems && (found < 0 || running <= goal); ++k) {
      const float p = term(first + k);
      running += p;
      if (p > 0) found = first + k;
    }
    return __shfl_sync(kAll, found, __ffs(passed) - 1);
  }
  for (int d = kWarp / 2; d > 0; d /= 2) last = max(last, __shfl_xor_sync(kAll, last, d));
  return last;
}

__device__ double uniform(const MlmHeadDraw& draw, int64_t m) {
  const Words w = philox<10>(static_cast<uint64_t>(draw.rng[0]),
                             {0, static_cast<uint32_t>(m), static_cast<uint32_t>(draw.rng[1]), 1});
  return static_cast<double>((uint64_t{w.w0 >> 5} << 26) + (w.w1 >> 6)) * 0x1p-53;
}

// A target outside the vocabulary is never followed; as -1 it is no token's id.
__device__ int legal_target(const MlmHeadRows& rows, int64_t r) {
  const int64_t target = rows.targets[r];
  return target >= 0 && target < rows.V ? static_cast<int>(target) : -1;
}

// Two blocks a multiprocessor leave 64 registers a thread; for three the compiler would spill.
__global__ void __launch_bounds__(kThreads, 2)
    mlm_head_rows_kernel(MlmHeadRows rows, MlmHeadDraw draw, MlmHeadResults results) {
  __shared__ Shared all_of[kMaxWarps], open_of[kMaxWarps];
  __shared__ int beaten_in[kMaxWarps];
  const int64_t r = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const float w = rows.weights[r];
  if (w == 0) {
    if (threadIdx.x == 0) {
      results.samples[r] = 0;
      results.lse[r] = results.top[r] = results.log_sum[r] = results.nll[r] = results.hits[r] = 0;
    }
    return;
  }

  const float* logits = rows.logits + r * rows.V;
  const int target = legal_target(rows, r);
  const float l_target = target >= 0 ? logits[target] + rows.bias[target] : NAN;
  const int banned = draw.disallow_correct ? target : -1;
  const float beta = draw.inverse_temperature;
  const bool same = beta == 1 && banned < 0;  // what may be drawn has the sum that the loss needs

  const int width = (rows.V + blockDim.x - 1) / blockDim.x * kWarp;
  const Span span{logits, rows.bias, min(rows.V, warp * width), min(rows.V, (warp + 1) * width)};
  SoftSum all, open;  // over every token, and over those that may be drawn
  bool beaten = false;
  for (int base = span.begin; base < span.end; base += kGroup) {
    float l[kItems];
    span.load(base, l);
    for (int k = 0; k < kItems; ++k) {
      const int v = Span::id(base, k);
      beaten |= v < target ? l[k] >= l_target : l[k] > l_target;
    }
    all.add(l, 1);
    if (same) continue;
    mask(l, base, banned);
    open.add(l, beta);
  }
  all = all.over_the_warp(1);
  open = same ? all : open.over_the_warp(beta);
  beaten = __any_sync(kAll, beaten);
  if (lane == 0) {
    all_of[warp] = {all.top, all.sum};
    open_of[warp] = {open.top, open.sum};
    beaten_in[warp] = beaten;
  }
  __syncthreads();  // each warp has left its sums; from here on none waits for another

  if (warp == 0) {
    const SoftSum row = read(all_of, warps).over_the_warp(1);
    beaten = __any_sync(kAll, lane < warps && beaten_in[lane]);
    if (lane == 0) {
      // Of a peaked row the difference is exact and the logarithm small: no digits cancel.
      const double log_sum = log(row.sum);
      const float nll = static_cast<float>(log_sum + (row.top - l_target));
      results.lse[r] = static_cast<float>(row.top + log_sum);
      results.top[r] = row.top;
      results.log_sum[r] = static_cast<float>(log_sum);
      results.nll[r] = nll;
      results.hits[r] = beaten || isnan(nll) ? 0 : w;
    }
  }

  // Every warp adds up the spans, a lane each, and so knows by itself whether it has the sample.
  const SoftSum mine = read(open_of, warps);
  const float highest = warp_max(mine.top);
  const double share = mine.sum * expf(beta * (mine.top - highest));
  const double through = warp_scan(share);
  const double goal = uniform(draw, draw.first + r) * __shfl_sync(kAll, through, kWarp - 1);
  const unsigned passed = __ballot_sync(kAll, share > 0 && through > goal);
  const unsigned possible = __ballot_sync(kAll, share > 0);
  const int chosen = passed ? __ffs(passed) - 1 : kWarp - 1 - __clz(possible);
  const double before = __shfl_up_sync(kAll, through, 1);
  const double below = __shfl_sync(kAll, lane == 0 ? 0 : before, max(chosen, 0));
  if (chosen < 0 && threadIdx.x == 0) results.samples[r] = 0;  // a row of NaN
  if (warp != chosen) return;

  // In the span's own scale, where the largest term is 1 whatever lies in other spans.
  const double rest = passed ? (goal - below) / expf(beta * (open.top - highest)) : INFINITY;
  const int sample = find(span, banned, beta, open.top, rest);
  if (lane == 0) results.samples[r] = sample;
}

__device__ void store(float* p, float x) { *p = x; }
__device__ void store(__half* p, float x) { *p = __float2half(x); }
__device__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }

template <class T>
__global__ void __launch_bounds__(kThreads)
    mlm_head_gradient_kernel(MlmHeadRows rows, const float* top, const float* log_sum, T* dlogits) {
  const int64_t r = blockIdx.x, row = r * rows.V;
  const float w = rows.weights[r] / *rows.unit;
  const int target = w == 0 ? -1 : legal_target(rows, r);
  const float shift = target < 0 ? NAN : top[r], less = log_sum[r];
  const int first = blockIdx.y * kItems * kThreads + threadIdx.x;
  float l[kItems];  // all loads before the first store, which may be to where they came from
  for (int k = 0; k < kItems; ++k) {
    const int v = first + k * kThreads;
    l[k] = w != 0 && v < rows.V ? rows.logits[row + v] + rows.bias[v] : 0;
  }
  for (int k = 0; k < kItems; ++k) {
    const int v = first + k * kThreads;
    if (v >= rows.V) return;
    const float p = expf(l[k] - shift - less);
    store(dlogits + row + v, w == 0 ? 0 : w * (p - (v == target ? 1.0f : 0.0f)));
  }
}

__global__ void __launch_bounds__(kThreads)
    mlm_head_finish_kernel(const float* weights, const float* unit, const float* nll,
                           const float* hits, int64_t M, float* loss, float* correct,
                           float* scale) {
  __shared__ double parts[3][kMaxWarps];
  double sums[3] = {};  // of w nll, hits, w
  for (int64_t m = threadIdx.x; m < M; m += kThreads) {
    sums[0] += static_cast<double>(weights[m]) * nll[m];
    sums[1] += hits[m];
    sums[2] += weights[m];
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = 0; i < 3; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (lane == 0) parts[i][warp] = sums[i];
  }
  __syncthreads();  // each warp has left its sums
  if (warp != 0) return;
  for (int i = 0; i < 3; ++i) sums[i] = warp_sum(lane < kMaxWarps ? parts[i][lane] : 0);
  if (lane != 0) return;
  *loss = sums[2] == 0 ? 0 : static_cast<float>(sums[0] / sums[2]);
  *correct = static_cast<float>(sums[1]);
  *scale = sums[2] == 0 ? 0 : static_cast<float>(*unit / sums[2]);
}

unsigned blocks(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }

}  // namespace

cudaError_t mlm_head_rows(const MlmHeadRows& rows, const MlmHeadDraw& draw,
                          const MlmHeadResults& results, cudaStream_t stream) {
  // A warp for each group of tokens: in a small vocabulary more would have nothing to read.
  const unsigned warps = min(blocks(rows.V, kGroup), unsigned{kMaxWarps});
  return launch(mlm_head_rows_kernel, static_cast<unsigned>(rows.R), kWarp * warps, stream, rows,
                draw, results);
}

cudaError_t mlm_head_gradient(const MlmHeadRows& rows, const float* top, const float* log_sum,
                              void* dlogits, Storage storage, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(rows.R), blocks(rows.V, kItems * kThreads));
  const auto launch_for = [&]<class T>(T* dl) {
    return launch(mlm_head_gradient_kernel<T>, grid, kThreads, stream, rows, top, log_sum, dl);
  };
  switch (storage) {
    case Storage::kFloat16:
      return launch_for(static_cast<__half*>(dlogits));
    case Storage::kBFloat16:
      return launch_for(static_cast<__nv_bfloat16*>(dlogits));
    default:
      return launch_for(static_cast<float*>(dlogits));
  }
}

cudaError_t mlm_head_finish(const float* weights, const float* unit, const float* nll,
                            const float* hits, int64_t M, float* loss, float* correct, float* scale,
                            cudaStream_t stream) {
  return launch(mlm_head_finish_kernel, 1, kThreads, stream, weights, unit, nll, hits, M, loss,
                correct, scale);
}

}  // namespace electra_fast
