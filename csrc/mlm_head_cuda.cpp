// The generator's head on a GPU (Clark et al. 2020, eq. 1). The schema, and what arguments and
// results mean: electra_fast/ops/mlm_head.py; the kernels: csrc/cuda/mlm_head.cu.
//
// Slots are taken in chunks whose logits fit into kLogitsBytes. cuBLAS makes the three products,
// with float32 results, the kernels what lies between them:
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

#include "cuda/mlm_head.h"
#include "registry.h"

namespace electra_fast {
namespace {

using at::Tensor;

constexpr int64_t kLogitsBytes = 256 << 20;
constexpr int64_t kRowStep = 64;  // cuBLAS's tiles divide it

struct Wanted {
  bool gradient, dx, dtable;
};

struct Head {
  Tensor loss, samples, correct, lse, dx, dtable, dbias;
};

int64_t chunk_rows(int64_t V) {
  const int64_t rows = kLogitsBytes / static_cast<int64_t>(sizeof(float)) / V;
  return std::max(rows / kRowStep, int64_t{1}) * kRowStep;
}

Storage storage_of(const Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype != at::kDouble,
                   "mlm_head: x must be float32, float16 or bfloat16 for the CUDA kernel, got "
                   "float64; electra_fast.reference.mlm_head takes it");
  if (dtype == at::kHalf) return Storage::kFloat16;
  return dtype == at::kBFloat16 ? Storage::kBFloat16 : Storage::kFloat32;
}

Tensor product(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == at::kFloat ? at::mm(a, b) : at::mm(a, b, at::kFloat);
}

void add(Tensor& sum, const Tensor& part) { sum = sum.defined() ? sum.add_(part) : part; }

// Between the least and the largest number, so that times a difference of 0 it is 0 and times one
// of -inf it is -inf.
float inverse(double temperature) {
  return static_cast<float>(std::clamp(1 / temperature, double{FLT_MIN}, double{FLT_MAX}));
}

Head run(const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
         const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct,
         Wanted wanted) {
  const int64_t M = x.size(0), E = x.size(1), V = table.size(0);
  const Storage storage = storage_of(x);
  TORCH_CHECK_VALUE(V > 0, "mlm_head: table must have a row, got none");
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::NoTF32Guard no_tf32;  // float32 logits decide the sample

  const auto f32 = x.options().dtype(at::kFloat);
  const Tensor ids = targets.to(at::kLong), offsets = bias.to(at::kFloat);
  const Tensor samples = at::empty({M}, ids.options()), lse = at::empty({M}, f32);
  const Tensor top = at::empty({M}, f32), log_sum = at::empty({M}, f32);
  const Tensor nll = at::empty({M}, f32), hits = at::empty({M}, f32);
  const Tensor loss = at::zeros({}, f32), correct = at::zeros({}, f32), scale = at::zeros({}, f32);
  // An unused slot may hold NaN, and 0 * NaN would reach every row of dtable.
  const Tensor clean = wanted.dtable ? x.masked_fill(weights.eq(0).unsqueeze(1), 0) : x;
  // The reciprocal of a sum of weights below 3e-39 would be infinite.
  const Tensor unit = M > 0 ? weights.abs().amax().clamp_max_(1) : at::zeros({}, f32);
  unit.masked_fill_(unit.le(0), 1);
  Tensor dx = wanted.dx ? at::empty({M, E}, f32) : Tensor(), dtable, dbias;

  const int64_t step = chunk_rows(V);
  for (int64_t first = 0; first < M; first += step) {
    const int64_t R = std::min(step, M - first);
    const Tensor chunk = clean.narrow(0, first, R), logits = product(chunk, table.t());
    const MlmHeadRows rows{.logits = logits.const_data_ptr<float>(),
                           .bias = offsets.const_data_ptr<float>(),
                           .targets = ids.const_data_ptr<int64_t>() + first,
                           .weights = weights.const_data_ptr<float>() + first,
                           .unit = unit.const_data_ptr<float>(),
                           .R = R,
                           .V = static_cast<int>(V)};
    const MlmHeadDraw draw{.rng = rng.const_data_ptr<int64_t>(),
                           .first = first,
                           .inverse_temperature = inverse(temperature),
                           .disallow_correct = disallow_correct};
    const MlmHeadResults results{.samples = samples.mutable_data_ptr<int64_t>() + first,
                                 .lse = lse.mutable_data_ptr<float>() + first,
                                 .top = top.mutable_data_ptr<float>() + first,
                                 .log_sum = log_sum.mutable_data_ptr<float>() + first,
                                 .nll = nll.mutable_data_ptr<float>() + first,
                                 .hits = hits.mutable_data_ptr<float>() + first};
    C10_CUDA_CHECK(mlm_head_rows(rows, draw, results, stream));
    if (!wanted.gradient) continue;

    const Tensor dlogits =
        storage == Storage::kFloat32 ? logits : at::empty_like(logits, x.options());
    C10_CUDA_CHECK(mlm_head_gradient(rows, results.top, results.log_sum, dlogits.mutable_data_ptr(),
                                     storage, stream));
    if (wanted.dx) dx.narrow(0, first, R).copy_(product(dlogits, table));
    if (wanted.dtable) add(dtable, product(dlogits.t(), chunk));
    add(dbias, dlogits.sum(0, false, at::kFloat));
  }
  if (M > 0) {
    C10_CUDA_CHECK(mlm_head_finish(
        weights.const_data_ptr<float>(), unit.const_data_ptr<float>(), nll.const_data_ptr<float>(),
        hits.const_data_ptr<float>(), M, loss.mutable_data_ptr<float>(),
        correct.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>(), stream));
  }
  if (wanted.dtable && M == 0) dtable = at::zeros({V, E}, f32);
  if (wanted.gradient && M == 0) dbias = at::zeros({V}, f32);
  for (Tensor* gradient : {&dx, &dtable, &dbias}) {
    *gradient = gradient->defined() ? gradient->mul_(scale) : at::empty({0}, f32);
  }
  return {loss, samples.to(targets.scalar_type()), correct, lse, dx, dtable, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlm_head_fwd_cuda(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct) {
  const Head head =
      run(x, table, bias, targets, weights, rng, temperature, disallow_correct, Wanted{});
  return {head.loss, head.samples, head.correct, head.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlm_head_bwd_cuda(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct,
    bool want_dx, bool want_dtable) {
  const Head head = run(x, table, bias, targets, weights, rng, temperature, disallow_correct,
                        {.gradient = true, .dx = want_dx, .dtable = want_dtable});
  return {head.loss, head.samples, head.correct, head.lse, head.dx, head.dtable, head.dbias};
}

}  // namespace

ELECTRA_FAST_IMPL(mlm_head_fwd, CUDA, mlm_head_fwd_cuda)
ELECTRA_FAST_IMPL(mlm_head_bwd, CUDA, mlm_head_bwd_cuda)

}  // namespace electra_fast

#endif  // ELECTRA_FAST_CUDA
