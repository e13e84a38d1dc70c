// The generator's head on the CPU: loss, one sample per slot, and the gradient, without storing all
// [M, V] logits. For the schema, the arguments and the results see electra_fast/ops/mlm_head.py,
// for the algorithm mlm_head_sweep.h.

#include <ATen/Dispatch.h>

#include "../registry.h"
#include "mlm_head_sweep.h"

namespace electra_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlm_head(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct,
    Want want) {
  Slots slots(targets, weights, table.size(0));
  const int64_t* state = rng.const_data_ptr<int64_t>();
  const Sampler sampler{static_cast<uint64_t>(state[0]), static_cast<uint32_t>(state[1]),
                        temperature, disallow_correct};
  double total = 0, loss = 0, correct = 0;
  Tensor dx, dtable, dbias;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "mlm_head", [&] {
    MlmHead<scalar_t> head(x, table, bias, slots, sampler, want);
    head.run();
    for (int64_t i = 0; i < slots.size(); ++i) {
      total += slots.weight[i];
      loss += slots.weight[i] * slots.nll[i];
      correct += slots.unit * slots.weight[i] * slots.correct[i];
    }
    if (want.gradient) std::tie(dx, dtable, dbias) = head.gradients(x.size(0), total);
  });
  const auto wide = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor samples = at::zeros({x.size(0)}, wide.dtype(at::kLong));
  const Tensor lse = at::zeros({x.size(0)}, wide.dtype(at::kDouble));
  for (int64_t i = 0; i < slots.size(); ++i) {
    samples.mutable_data_ptr<int64_t>()[slots.m[i]] = slots.sample[i];
    lse.mutable_data_ptr<double>()[slots.m[i]] = slots.max_logit[i] + slots.log_sum[i];
  }
  return {at::full({}, total == 0 ? 0 : loss / total, wide.dtype(at::kDouble)).to(wide.dtype()),
          samples.to(targets.scalar_type()),
          at::full({}, correct, wide.dtype(at::kDouble)).to(at::kFloat),
          lse.to(wide.dtype()),
          dx,
          dtable,
          dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlm_head_fwd_cpu(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct) {
  auto [loss, samples, correct, lse, dx, dtable, dbias] =
      mlm_head(x, table, bias, targets, weights, rng, temperature, disallow_correct, {});
  return {loss, samples, correct, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlm_head_bwd_cpu(
    const Tensor& x, const Tensor& table, const Tensor& bias, const Tensor& targets,
    const Tensor& weights, const Tensor& rng, double temperature, bool disallow_correct,
    bool want_dx, bool want_dtable) {
  return mlm_head(x, table, bias, targets, weights, rng, temperature, disallow_correct,
                  {.gradient = true, .dx = want_dx, .dtable = want_dtable});
}

}  // namespace

ELECTRA_FAST_IMPL(mlm_head_fwd, CPU, mlm_head_fwd_cpu)
ELECTRA_FAST_IMPL(mlm_head_bwd, CPU, mlm_head_bwd_cpu)

}  // namespace electra_fast
