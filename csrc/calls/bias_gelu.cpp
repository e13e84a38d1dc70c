// The hot path of bias_gelu. For the arguments see electra_fast/ops/bias_gelu.py.

#include "call.h"

namespace electra_fast {
namespace {

Operator<Tensor(const Tensor&, const Tensor&)> fwd("bias_gelu_fwd");
Operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)> bwd(
    "bias_gelu_bwd");

struct BiasGELU : torch::autograd::Function<BiasGELU> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& bias) {
    ctx->save_for_backward({x, bias});
    ctx->set_materialize_grads(false);
    return fwd(x, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const Tensor& dy = upstream[0];
    if (!dy.defined()) return variable_list(2);
    const variable_list saved = ctx->get_saved_variables();
    const auto [dx, dbias] = bwd(dy.contiguous(), saved[0], saved[1]);
    return once_differentiable("bias_gelu", {dx, dbias}, {dy, saved[0], saved[1]});
  }
};

MaybeTensor bias_gelu(const Tensor& x, const Tensor& bias) {
  if (!is_float(x) || !is_parameter_of(bias, x)) return {};
  const Tensor x_ = x.contiguous(), bias_ = bias.contiguous();
  return need_gradient(x_, bias_) ? BiasGELU::apply(x_, bias_) : fwd(x_, bias_);
}

ELECTRA_FAST_CALL(bias_gelu)

}  // namespace
}  // namespace electra_fast
