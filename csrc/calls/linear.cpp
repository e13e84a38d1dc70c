// The hot path of linear. For the arguments see electra_fast/ops/linear.py.

#include "call.h"

namespace electra_fast {
namespace {

Operator<Tensor(const Tensor&, const Tensor&, const MaybeTensor&)> fwd("linear_fwd");
Operator<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                            at::ScalarType, bool, bool, bool)>
    bwd("linear_bwd");

// What the product reads instead of weight and bias. As a struct they are no inputs of the
// gradient.
struct Copies {
  Tensor weight;
  MaybeTensor bias;
};

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const MaybeTensor& bias, const Copies& product) {
    ctx->save_for_backward({x, product.weight, weight});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->set_materialize_grads(false);
    return fwd(x, product.weight, product.bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const Tensor& dy = upstream[0];
    if (!dy.defined()) return variable_list(4);
    const variable_list saved = ctx->get_saved_variables();
    // An absent bias has no number among the inputs.
    const bool wanted[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                           ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)};
    const auto [dx, dweight, dbias] = bwd(dy.contiguous(), saved[0], saved[1],
                                          saved[2].scalar_type(), wanted[0], wanted[1], wanted[2]);
    return once_differentiable("linear",
                               {wanted[0] ? dx : Tensor(),
                                wanted[1] ? dweight : Tensor(),
                                wanted[2] ? dbias : Tensor(),
                                {}},
                               {dy, saved[0], saved[1], saved[2]});
  }
};

MaybeTensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                   const MaybeTensor& low_weight, const MaybeTensor& low_bias) {
  if (!is_float(x) || x.dim() == 0 || !is_float(weight) || weight.dim() != 2 ||
      weight.size(1) != x.size(-1) || weight.device() != x.device())
    return {};
  const at::IntArrayRef columns = weight.sizes().slice(0, 1);
  if (!has(bias, weight.scalar_type(), columns, x)) return {};
  Tensor x_, weight_ = weight;
  MaybeTensor bias_ = bias;
  Copies product;
  if (low_weight) {
    if (!is_float(*low_weight) || !has(*low_weight, low_weight->scalar_type(), weight.sizes(), x) ||
        bias.has_value() != low_bias.has_value() ||
        !has(low_bias, low_weight->scalar_type(), columns, x))
      return {};
    x_ = x.to(low_weight->scalar_type());
    product = {*low_weight, low_bias};
  } else {
    x_ = autocast(x), weight_ = autocast(weight);
    if (bias) bias_ = autocast(*bias);
    if (low_bias || weight_.scalar_type() != x_.scalar_type()) return {};
    product = {weight_, bias_};
  }
  x_ = x_.contiguous();
  return need_gradient(x_, weight_, bias_) ? Linear::apply(x_, weight_, bias_, product)
                                           : fwd(x_, product.weight, product.bias);
}

ELECTRA_FAST_CALL(linear)

}  // namespace
}  // namespace electra_fast
