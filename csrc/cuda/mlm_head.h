// The launchers of mlm_head's CUDA kernels. Each returns the error of its launch and does not wait
// for the kernel to finish.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "storage.h"

namespace electra_fast {

// R of the M slots: a chunk whose logits fit into memory.
struct MlmHeadRows {
  const float* logits;     // [R, V] x table^T, without the bias
  const float* bias;       // [V]
  const int64_t* targets;  // [R]
  const float* weights;    // [R]; if the weight of a row is 0, nothing else of it is read
  const float* unit;       // [] the largest |weight|, or 1 if that is 0 or above 1
  int64_t R;
  int V;
};

struct MlmHeadSampling {
  const int64_t* rng;  // [2] seed, step
  int64_t first;       // number of the chunk's first row among the M slots
  float inverse_temperature;
  bool disallow_correct;
};

struct MlmHeadResults {
  int64_t* samples;  // [R]
  float* lse;        // [R] max_logit + log_sum
  float* max_logit;  // [R]
  float* log_sum;    // [R] log sum_v exp(logits[v] - max_logit); large logits round it away in lse
  float* nll;        // [R] lse - logits[target]
  float* hits;       // [R] the weight if the target is the argmax, else 0
};

cudaError_t mlm_head_rows(const MlmHeadRows& rows, const MlmHeadSampling& sampling,
                          const MlmHeadResults& results, cudaStream_t stream);

// dlogits [R, V] = w / unit (softmax(logits) - onehot(target)). The division by sum(w / unit)
// comes later: its results would be too small for float16. In float32, dlogits may be `logits`.
cudaError_t mlm_head_gradient(const MlmHeadRows& rows, const float* max_logit, const float* log_sum,
                              void* dlogits, Storage storage, cudaStream_t stream);

// Over all M slots: loss = sum(w nll) / sum(w), correct = sum(hits) and scale = unit / sum(w). If
// sum(w) is 0, loss and scale are 0.
cudaError_t mlm_head_finish(const float* weights, const float* unit, const float* nll,
                            const float* hits, int64_t M, float* loss, float* correct, float* scale,
                            cudaStream_t stream);

}  // namespace electra_fast
