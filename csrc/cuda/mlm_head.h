// The CUDA kernels of mlm_head by the pointers they take. A launch tells its error and does not
// wait.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "storage.h"

namespace electra_fast {

// R of the M slots: a chunk whose logits fit into memory.
struct MlmHeadRows {
  const float* logits;     // [R, V] x table^T, the bias not yet added
  const float* bias;       // [V]
  const int64_t* targets;  // [R]
  const float* weights;    // [R]; of a row of weight 0 nothing else is read
  const float* unit;       // [] the largest weight, if it is below 1 and above 0, else 1
  int64_t R;
  int V;
};

struct MlmHeadDraw {
  const int64_t* rng;  // [2] seed, step
  int64_t first;       // the chunk's first row among the M slots
  float inverse_temperature;
  bool disallow_correct;
};

struct MlmHeadResults {
  int64_t* samples;  // [R]
  float* lse;        // [R] top + log_sum
  float* top;        // [R] the largest logit
  float* log_sum;    // [R] log sum_v exp(logits[v] - top): of large logits lse loses it
  float* nll;        // [R] lse - logits[target]
  float* hits;       // [R] the weight, where the target is the arg-max
};

cudaError_t mlm_head_rows(const MlmHeadRows& rows, const MlmHeadDraw& draw,
                          const MlmHeadResults& results, cudaStream_t stream);

// dlogits [R, V] = w / unit (softmax(logits) - onehot(target)), not yet divided by the sum of
// w / unit, which would be too small for float16. In float32 it may be the logits' own memory.
cudaError_t mlm_head_gradient(const MlmHeadRows& rows, const float* top, const float* log_sum,
                              void* dlogits, Storage storage, cudaStream_t stream);

// Of all M slots: loss = sum(w nll) / sum(w), correct = sum(hits), and scale = unit / sum(w); loss
// and scale are 0 where that sum is.
cudaError_t mlm_head_finish(const float* weights, const float* unit, const float* nll,
                            const float* hits, int64_t M, float* loss, float* correct, float* scale,
                            cudaStream_t stream);

}  // namespace electra_fast
