// The generator's head on a GPU (Clark et al. 2020, eq. 1). For the schema, the arguments and the
// results see electra_fast/ops/mlm_head.py, for the kernels mlm_head.h.
//
// Slots are processed in chunks whose logits fit into kLogitsBytes. cuBLAS computes the three
// products, with float32 results, and the kernels compute everything else:
//
//   logits = x table^T       dx = dlogits table       dtable = sum over chunks of dlogits^T x

#ifdef ELECTRA_FAST_CUDA

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cfloat>
#include <tuple>

#include "../registry.h"
#include "mlm_head.h"
#include "op.h"

namespace electra_fast {
namespace {

using at::Tensor;

constexpr int64_t kLogitsBytes = 256 << 20;
constexpr int64_t kRowStep = 64;  // a multiple of the rows of cuBLAS's tiles

struct Want {
  bool gradient, dx, dtable;
};

struct Results {
  Tensor loss, samples, correct, lse, dx, dtable, dbias;
};

int64_t chunk_rows(int64_t V) {
  const int64_t rows = kLogitsBytes / static_cast<int64_t>(sizeof(float)) / V;
  return std::max(rows / kRowStep, int64_t{1}) * kRowStep;
}

Tensor product(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == at::kFloat ? at::mm(a, b) : at::mm(a, b, at::kFloat);
}

void add(Tensor& sum, const Tensor& part) { sum = sum.defined() ? sum.add_(part) : part; }

// 1 / temperature as a finite number above 0, so that its product with 0 is 0 and with -inf is
// -inf.
float inverse_of(double temperature) {
  return static_cast<float>(std::clamp(1 / temperature, double{FLT_MIN}, double{FLT_MAX}));
}

Results run(const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
            const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct,
            Want want) {
  const int64_t M = x.size(0), E = x.size(1), V = table.size(0);
  const Storage storage = storage_of(x, "mlm_head", "x");
  TORCH_CHECK_VALUE(V > 0, "mlm_head: table must have a row, got none");
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::NoTF32Guard no_tf32;  // TF32 logits would change the sample

  const auto f32 = x.options().dtype(at::kFloat);
  const Tensor ids = targets.to(at::kLong), float_bias = bias.to(at::kFloat);
  const Tensor samples = at::empty({M}, ids.options()), lse = at::empty({M}, f32);
  const Tensor max_logit = at::empty({M}, f32), log_sum = at::empty({M}, f32);
  const Tensor nll = at::empty({M}, f32), hits = at::empty({M}, f32);
  const Tensor loss = at::zeros({}, f32), correct = at::zeros({}, f32), scale = at::zeros({}, f32);
  // An unused slot may contain NaN, and 0 * NaN would reach every row of dtable.
  const Tensor used_x = want.dtable ? x.masked_fill(weights.eq(0).unsqueeze(1), 0) : x;
  // Without this unit, a sum of weights below 3e-39 would have an infinite reciprocal.
  const Tensor unit = M > 0 ? weights.abs().amax().clamp_max_(1) : at::zeros({}, f32);
  unit.masked_fill_(unit.le(0), 1);
  Tensor dx = want.dx ? at::empty({M, E}, f32) : Tensor(), dtable, dbias;

  const int64_t step = chunk_rows(V);
  for (int64_t first = 0; first < M; first += step) {
    const int64_t R = std::min(step, M - first);
    const Tensor chunk = used_x.narrow(0, first, R), logits = product(chunk, table.t());
    const MlmHeadRows rows{.logits = logits.const_data_ptr<float>(),
                           .bias = float_bias.const_data_ptr<float>(),
                           .targets = ids.const_data_ptr<int64_t>() + first,
                           .weights = weights.const_data_ptr<float>() + first,
                           .unit = unit.const_data_ptr<float>(),
                           .R = R,
                           .V = static_cast<int>(V)};
    const MlmHeadSampling sampling{.rng = rng.const_data_ptr<int64_t>(),
                                   .first = first,
                                   .inverse_temperature = inverse_of(temperature),
                                   .disallow_correct = disallow_correct};
    const MlmHeadResults results{.samples = samples.mutable_data_ptr<int64_t>() + first,
                                 .lse = lse.mutable_data_ptr<float>() + first,
                                 .max_logit = max_logit.mutable_data_ptr<float>() + first,
                                 .log_sum = log_sum.mutable_data_ptr<float>() + first,
                                 .nll = nll.mutable_data_ptr<float>() + first,
                                 .hits = hits.mutable_data_ptr<float>() + first};
    C10_CUDA_CHECK(mlm_head_rows(rows, sampling, results, stream));
    if (!want.gradient) continue;

    const Tensor dlogits =
        storage == Storage::kFloat32 ? logits : at::empty_like(logits, x.options());
    C10_CUDA_CHECK(mlm_head_gradient(rows, results.max_logit, results.log_sum,
                                     dlogits.mutable_data_ptr(), storage, stream));
    if (want.dx) dx.narrow(0, first, R).copy_(product(dlogits, table));
    if (want.dtable) add(dtable, product(dlogits.t(), chunk));
    add(dbias, dlogits.sum(0, false, at::kFloat));
  }
  if (M > 0) {
    C10_CUDA_CHECK(mlm_head_finish(
        weights.const_data_ptr<float>(), unit.const_data_ptr<float>(), nll.const_data_ptr<float>(),
        hits.const_data_ptr<float>(), M, loss.mutable_data_ptr<float>(),
        correct.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>(), stream));
  }
  if (want.dtable && M == 0) dtable = at::zeros({V, E}, f32);
  if (want.gradient && M == 0) dbias = at::zeros({V}, f32);
  for (Tensor* gradient : {&dx, &dtable, &dbias}) {
    *gradient = gradient->defined() ? gradient->mul_(scale) : at::empty({0}, f32);
  }
  return {loss, samples.to(targets.scalar_type()), correct, lse, dx, dtable, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlm_head_fwd_cuda(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct) {
  const Results r =
      run(x, table, bias, targets, weights, rng, temperature, disallow_correct, Want{});
  return {r.loss, r.samples, r.correct, r.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlm_head_bwd_cuda(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct,
    bool want_dx, bool want_dtable) {
  const Results r = run(x, table, bias, targets, weights, rng, temperature, disallow_correct,
                        {.gradient = true, .dx = want_dx, .dtable = want_dtable});
  return {r.loss, r.samples, r.correct, r.lse, r.dx, r.dtable, r.dbias};
}

}  // namespace

ELECTRA_FAST_IMPL(mlm_head_fwd, CUDA, mlm_head_fwd_cuda)
ELECTRA_FAST_IMPL(mlm_head_bwd, CUDA, mlm_head_bwd_cuda)

}  // namespace electra_fast

#endif  // ELECTRA_FAST_CUDA
