// Loss, sample and gradient of the generator's head from its logits (Clark et al. 2020, eq. 1):
//
//   l_v = (x table^T)_v + b_v     lse = log sum_v exp(l_v)     nll = lse - l_target
//   dl_v = w (exp(l_v - lse) - [v = target])
//   sample = min{v : p_0 + ... + p_v > u},  p = softmax(l / temperature)
//
// One block reads one row once. Each of its warps sums one span of the vocabulary, relative to the
// largest logit so far; only the warp in whose span the running sum exceeds u reads its span again.
// Terms are float32, sums of more than kItems terms are float64, and no sum depends on the order in
// which threads run.

#include <cfloat>
#include <cmath>

#include "../philox.h"
#include "launch.cuh"
#include "mlm_head.h"
#include "storage.cuh"
#include "warp.cuh"

namespace electra_fast {
namespace {

constexpr int kMaxWarps = 16, kThreads = kWarp * kMaxWarps;
constexpr int kItems = 8;  // loads in flight per thread
constexpr int kGroup = kWarp * kItems;

// sum_v exp(beta (l_v - max)) with max = max_v l_v so far. The initial max is the lowest number
// and not -inf, because -inf - -inf is NaN.
struct SoftmaxSum {
  float max = -FLT_MAX;
  double sum = 0;

  __device__ void add(const float (&l)[kItems], float beta) {
    const float before = max;
    for (int k = 0; k < kItems; ++k) max = fmaxf(max, l[k]);
    float part = 0;
    for (int k = 0; k < kItems; ++k) part += expf(beta * (l[k] - max));
    sum = sum * expf(beta * (before - max)) + part;
  }

  __device__ SoftmaxSum over_warp(float beta) const {
    const float warp_maximum = warp_max(max);
    return {warp_maximum, warp_sum(sum * expf(beta * (max - warp_maximum)))};
  }
};

// A SoftmaxSum in shared memory, where a member must not have an initial value.
struct StoredSum {
  float max;
  double sum;
};

// Lane i gets the sum of warp i.
__device__ SoftmaxSum load_sum(const StoredSum* stored, int warps) {
  const int lane = threadIdx.x % kWarp;
  return lane < warps ? SoftmaxSum{stored[lane].max, stored[lane].sum} : SoftmaxSum{};
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

// Return the first token of a span at which the running sum of exp(beta (l_v - max)) exceeds
// `goal`. If rounding or an infinite goal leaves no such token, return the last one whose term is
// above 0. There is one: the term of the largest logit is 1.
__device__ int find(const Span& span, int banned, float beta, float max, double goal) {
  const int lane = threadIdx.x % kWarp;
  const auto term = [&](int v) {
    const bool allowed = v < span.end && v != banned;
    return allowed ? expf(beta * (span.logits[v] + span.bias[v] - max)) : 0.0f;
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
    const double sum = warp_sum<double>(part);
    if (below + sum <= goal) {
      below += sum;
      continue;
    }
    // The token is in this group. A lane now reads neighbours, so that one scan finds the lane.
    const int first = base + lane * kItems;
    double own = 0;
    for (int k = 0; k < kItems; ++k) own += term(first + k);
    const double through = below + warp_scan(own);
    const unsigned passed = __ballot_sync(kAllLanes, own > 0 && through > goal);
    if (passed == 0) break;
    double running = through - own;
    int found = -1;
    for (int k = 0; k < kItems && (found < 0 || running <= goal); ++k) {
      const float p = term(first + k);
      running += p;
      if (p > 0) found = first + k;
    }
    return __shfl_sync(kAllLanes, found, __ffs(passed) - 1);
  }
  return warp_max(last);
}

__device__ double draw(const MlmHeadSampling& sampling, int64_t m) {
  return uniform(
      philox<10>(static_cast<uint64_t>(sampling.rng[0]),
                 {0, static_cast<uint32_t>(m), static_cast<uint32_t>(sampling.rng[1]), 1}));
}

// The target of row r, or -1, which is the id of no token, if it is outside the vocabulary.
__device__ int valid_target(const MlmHeadRows& rows, int64_t r) {
  const int64_t target = rows.targets[r];
  return target >= 0 && target < rows.V ? static_cast<int>(target) : -1;
}

// Two blocks per multiprocessor allow 64 registers per thread; with three the compiler would spill.
__global__ void __launch_bounds__(kThreads, 2)
    mlm_head_rows_kernel(MlmHeadRows rows, MlmHeadSampling sampling, MlmHeadResults results) {
  __shared__ StoredSum all_sums[kMaxWarps], allowed_sums[kMaxWarps];
  __shared__ int warp_beaten[kMaxWarps];
  const int64_t r = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const float w = rows.weights[r];
  if (w == 0) {
    if (threadIdx.x == 0) {
      results.samples[r] = 0;
      results.nll[r] = results.hits[r] = 0;
      results.lse[r] = results.max_logit[r] = results.log_sum[r] = 0;
    }
    return;
  }

  const float* logits = rows.logits + r * rows.V;
  const int target = valid_target(rows, r);
  const float l_target = target >= 0 ? logits[target] + rows.bias[target] : NAN;
  const int banned = sampling.disallow_correct ? target : -1;
  const float beta = sampling.inverse_temperature;
  const bool one_sum = beta == 1 && banned < 0;  // the sampling needs the same sum as the loss

  const int width = ceil_div<unsigned>(rows.V, blockDim.x) * kWarp;
  const Span span{logits, rows.bias, min(rows.V, warp * width), min(rows.V, (warp + 1) * width)};
  SoftmaxSum all, allowed;  // over all tokens, and over those that may be sampled
  bool beaten = false;      // another token is the argmax
  for (int base = span.begin; base < span.end; base += kGroup) {
    float l[kItems];
    span.load(base, l);
    for (int k = 0; k < kItems; ++k) {
      const int v = Span::id(base, k);
      beaten |= v < target ? l[k] >= l_target : l[k] > l_target;
    }
    all.add(l, 1);
    if (one_sum) continue;
    mask(l, base, banned);
    allowed.add(l, beta);
  }
  all = all.over_warp(1);
  allowed = one_sum ? all : allowed.over_warp(beta);
  beaten = __any_sync(kAllLanes, beaten);
  if (lane == 0) {
    all_sums[warp] = {all.max, all.sum};
    allowed_sums[warp] = {allowed.max, allowed.sum};
    warp_beaten[warp] = beaten;
  }
  __syncthreads();  // every warp has stored its sums; after this no warp waits for another

  if (warp == 0) {
    const SoftmaxSum row = load_sum(all_sums, warps).over_warp(1);
    beaten = __any_sync(kAllLanes, lane < warps && warp_beaten[lane]);
    if (lane == 0) {
      // If one token dominates, the difference is exact and log_sum small: no digits cancel.
      const double log_sum = log(row.sum);
      const float nll = static_cast<float>(log_sum + (row.max - l_target));
      results.lse[r] = static_cast<float>(row.max + log_sum);
      results.max_logit[r] = row.max;
      results.log_sum[r] = static_cast<float>(log_sum);
      results.nll[r] = nll;
      results.hits[r] = beaten || isnan(nll) ? 0 : w;
    }
  }

  // Every warp adds up the spans, one per lane, and so finds out whether its span has the sample.
  const SoftmaxSum own = load_sum(allowed_sums, warps);
  const float row_max = warp_max(own.max);
  const double mass = own.sum * expf(beta * (own.max - row_max));
  const double through = warp_scan(mass);
  const double goal =
      draw(sampling, sampling.first + r) * __shfl_sync(kAllLanes, through, kWarp - 1);
  const unsigned passed = __ballot_sync(kAllLanes, mass > 0 && through > goal);
  const unsigned possible = __ballot_sync(kAllLanes, mass > 0);
  const int chosen = passed ? __ffs(passed) - 1 : kWarp - 1 - __clz(possible);
  const double before = __shfl_up_sync(kAllLanes, through, 1);
  const double below = __shfl_sync(kAllLanes, lane == 0 ? 0 : before, max(chosen, 0));
  if (chosen < 0 && threadIdx.x == 0) results.samples[r] = 0;  // all logits of the row are NaN
  if (warp != chosen) return;

  // Relative to the span's own maximum: its largest term is 1, whatever the other spans have.
  const double rest = passed ? (goal - below) / expf(beta * (allowed.max - row_max)) : INFINITY;
  const int sample = find(span, banned, beta, allowed.max, rest);
  if (lane == 0) results.samples[r] = sample;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    mlm_head_gradient_kernel(MlmHeadRows rows, const float* max_logit, const float* log_sum,
                             T* dlogits) {
  const int64_t r = blockIdx.x, row = r * rows.V;
  const float w = rows.weights[r] / *rows.unit;
  const int target = w == 0 ? -1 : valid_target(rows, r);
  const float shift = target < 0 ? NAN : max_logit[r], log_of_sum = log_sum[r];
  const int first = blockIdx.y * kItems * kThreads + threadIdx.x;
  float l[kItems];  // all loads come before the first store, as dlogits may be the logits
  for (int k = 0; k < kItems; ++k) {
    const int v = first + k * kThreads;
    l[k] = w != 0 && v < rows.V ? rows.logits[row + v] + rows.bias[v] : 0;
  }
  for (int k = 0; k < kItems; ++k) {
    const int v = first + k * kThreads;
    if (v >= rows.V) return;
    const float p = expf(l[k] - shift - log_of_sum);
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
  __syncthreads();  // every warp has stored its sums
  if (warp != 0) return;
  for (int i = 0; i < 3; ++i) sums[i] = warp_sum<double>(lane < kMaxWarps ? parts[i][lane] : 0);
  if (lane != 0) return;
  *loss = sums[2] == 0 ? 0 : static_cast<float>(sums[0] / sums[2]);
  *correct = static_cast<float>(sums[1]);
  *scale = sums[2] == 0 ? 0 : static_cast<float>(*unit / sums[2]);
}

}  // namespace

cudaError_t mlm_head_rows(const MlmHeadRows& rows, const MlmHeadSampling& sampling,
                          const MlmHeadResults& results, cudaStream_t stream) {
  // One warp per group of tokens: in a small vocabulary more warps would have nothing to read.
  const int warps = min(ceil_div(rows.V, kGroup), kMaxWarps);
  return launch(mlm_head_rows_kernel, static_cast<unsigned>(rows.R), kWarp * warps, stream, rows,
                sampling, results);
}

cudaError_t mlm_head_gradient(const MlmHeadRows& rows, const float* max_logit, const float* log_sum,
                              void* dlogits, Storage storage, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(rows.R), ceil_div(rows.V, kItems * kThreads));
  return with_type(storage, [&]<class T>(T) {
    return launch(mlm_head_gradient_kernel<T>, grid, kThreads, stream, rows, max_logit, log_sum,
                  static_cast<T*>(dlogits));
  });
}

cudaError_t mlm_head_finish(const float* weights, const float* unit, const float* nll,
                            const float* hits, int64_t M, float* loss, float* correct, float* scale,
                            cudaStream_t stream) {
  return launch(mlm_head_finish_kernel, 1, kThreads, stream, weights, unit, nll, hits, M, loss,
                correct, scale);
}

}  // namespace electra_fast
