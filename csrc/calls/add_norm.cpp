// The hot path of add_norm. For the arguments see electra_fast/ops/add_norm.py.

#include "call.h"

namespace electra_fast {
namespace {

Operator<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const MaybeTensor&, const Tensor&,
                                            const Tensor&, double, double, const MaybeTensor&,
                                            c10::SymInt)>
    fwd("add_norm_fwd");
Operator<std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&,
    double, const MaybeTensor&, c10::SymInt)>
    bwd("add_norm_bwd");

struct AddNorm : torch::autograd::Function<AddNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& residual,
                        const Tensor& weight, const Tensor& bias, double eps, double dropout,
                        const MaybeTensor& rng, int64_t stream) {
    const auto [y, mean, rstd] = fwd(x, residual, weight, bias, eps, dropout, rng, stream);
    ctx->save_for_backward({x, to_save(residual), weight, mean, rstd, to_save(rng)});
    ctx->saved_data["dropout"] = dropout, ctx->saved_data["stream"] = stream;
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const Tensor& dy = upstream[0];
    if (!dy.defined()) return variable_list(8);
    variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &residual = saved[1], &weight = saved[2];
    const double dropout = ctx->saved_data["dropout"].toDouble();
    auto [dx, dresidual, dweight, dbias] =
        bwd(dy.contiguous(), x, maybe(residual), weight, saved[3], saved[4], dropout,
            maybe(saved[5]), ctx->saved_data["stream"].toInt());
    // Without dropout the two gradients are equal, and the operator returns the first.
    if (!residual.defined())
      dresidual = Tensor();
    else if (dropout == 0)
      dresidual = dx;
    saved.push_back(dy);
    return once_differentiable("add_norm", {dx, dresidual, dweight, dbias, {}, {}, {}, {}}, saved);
  }
};

MaybeTensor add_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight,
                     const Tensor& bias, double eps, double dropout, const MaybeTensor& rng,
                     int64_t stream) {
  if (!is_float(x) || !has(residual, x.scalar_type(), x.sizes(), x) ||
      !is_parameter_of(weight, x) || !has(bias, weight.scalar_type(), weight.sizes(), x) ||
      !(0 <= eps && eps < INFINITY) || !is_dropout(dropout, rng, stream, x))
    return {};
  const Tensor x_ = x.contiguous(), weight_ = weight.contiguous(), bias_ = bias.contiguous();
  const MaybeTensor residual_ = contiguous(residual), rng_ = contiguous(rng);
  if (need_gradient(x_, residual_, weight_, bias_))
    return AddNorm::apply(x_, residual_, weight_, bias_, eps, dropout, rng_, stream);
  return std::get<0>(fwd(x_, residual_, weight_, bias_, eps, dropout, rng_, stream));
}

ELECTRA_FAST_CALL(add_norm)

}  // namespace
}  // namespace electra_fast
