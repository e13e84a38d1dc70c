// The hot path of attention and attention_qkv. For the arguments see electra_fast/ops/attention.py.

#include <algorithm>
#include <vector>

#include "call.h"

namespace electra_fast {
namespace {

// The arguments after q, k and v, or after qkv.
struct Options {
  MaybeTensor key_mask, cu_seqlens;
  int64_t max_seqlen;
  bool causal;
  double scale, dropout;
  MaybeTensor rng;
  int64_t stream;
  MaybeTensor cu_seqlens_k = {};  // this and the next are not those of attention_qkv
  int64_t max_seqlen_k = 0;
};

using Result = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
#define OPTIONS                                                                                  \
  const MaybeTensor&, const MaybeTensor&, c10::SymInt, bool, double, double, const MaybeTensor&, \
      c10::SymInt
#define KEY_OPTIONS const MaybeTensor&, c10::SymInt
Operator<Result(const Tensor&, const Tensor&, const Tensor&, OPTIONS, KEY_OPTIONS)> fwd(
    "attention_fwd");
Operator<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
               const Tensor&, OPTIONS, KEY_OPTIONS)>
    bwd("attention_bwd");
Operator<Result(const Tensor&, OPTIONS)> fwd_qkv("attention_qkv_fwd");
Operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, OPTIONS)> bwd_qkv(
    "attention_qkv_bwd");
#undef OPTIONS
#undef KEY_OPTIONS

// f(tensors…, options…) for an operator f.
template <class F, class... T>
auto with(F& f, const Options& o, const T&... tensors) {
  return f(tensors..., o.key_mask, o.cu_seqlens, o.max_seqlen, o.causal, o.scale, o.dropout, o.rng,
           o.stream);
}
template <class F, class... T>
auto with_keys(F& f, const Options& o, const T&... tensors) {
  return f(tensors..., o.key_mask, o.cu_seqlens, o.max_seqlen, o.causal, o.scale, o.dropout, o.rng,
           o.stream, o.cu_seqlens_k, o.max_seqlen_k);
}

Result forward(const Options& options, const Tensor& q, const Tensor& k, const Tensor& v) {
  return with_keys(fwd, options, q, k, v);
}
Result forward(const Options& options, const Tensor& qkv) { return with(fwd_qkv, options, qkv); }

variable_list gradients(const Options& options, const Tensor& d_o, at::TensorList inputs,
                        const Tensor& o, const Tensor& lse) {
  if (inputs.size() == 1) return {with(bwd_qkv, options, d_o, inputs[0], o, lse)};
  const auto [dq, dk, dv] = with_keys(bwd, options, d_o, inputs[0], inputs[1], inputs[2], o, lse);
  return {dq, dk, dv};
}

// The attention of (q, k, v) or of (qkv).
template <class... T>
struct Attention : torch::autograd::Function<Attention<T...>> {
  static constexpr size_t kInputs = sizeof...(T);

  static Tensor forward(AutogradContext* ctx, const Options& options, const T&... tensors) {
    const auto [o, lse] = electra_fast::forward(options, tensors...);
    ctx->save_for_backward({tensors..., o, lse, to_save(options.key_mask),
                            to_save(options.cu_seqlens), to_save(options.rng),
                            to_save(options.cu_seqlens_k)});
    auto& data = ctx->saved_data;
    data["max_seqlen"] = options.max_seqlen, data["causal"] = options.causal;
    data["scale"] = options.scale, data["dropout"] = options.dropout;
    data["stream"] = options.stream, data["max_seqlen_k"] = options.max_seqlen_k;
    ctx->set_materialize_grads(false);
    return o;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const Tensor& d_o = upstream[0];
    if (!d_o.defined()) return variable_list(1 + kInputs);
    variable_list saved = ctx->get_saved_variables();
    const Tensor* rest = saved.data() + kInputs;
    auto& data = ctx->saved_data;
    const Options options = {maybe(rest[2]),
                             maybe(rest[3]),
                             data["max_seqlen"].toInt(),
                             data["causal"].toBool(),
                             data["scale"].toDouble(),
                             data["dropout"].toDouble(),
                             maybe(rest[4]),
                             data["stream"].toInt(),
                             maybe(rest[5]),
                             data["max_seqlen_k"].toInt()};
    variable_list results =
        gradients(options, d_o, at::TensorList(saved.data(), kInputs), rest[0], rest[1]);
    results.insert(results.begin(), Tensor());
    saved.push_back(d_o);
    return once_differentiable(kInputs == 1 ? "attention_qkv" : "attention", std::move(results),
                               saved);
  }
};

bool are_bounds(const Tensor& bounds, const Tensor& tokens) {
  const bool integers = bounds.scalar_type() == at::kInt || bounds.scalar_type() == at::kLong;
  return integers && bounds.dim() == 1 && bounds.numel() >= 1 && bounds.device() == tokens.device();
}

// Check the options against the tokens of q, its axes before the last `head_axes`, and set
// max_seqlen and scale. A padded sequence has `keys` keys. Return whether the options are well.
bool complete(const Tensor& q, int64_t head_axes, int64_t keys,
              const std::optional<int64_t>& max_seqlen, const std::optional<double>& scale,
              Options& options) {
  const at::IntArrayRef tokens = q.sizes().slice(0, q.dim() - head_axes);
  if (options.cu_seqlens) {
    if (!are_bounds(*options.cu_seqlens, q) || tokens.size() != 1 || options.key_mask ||
        !max_seqlen)
      return false;
    options.max_seqlen = *max_seqlen;
  } else {
    if (tokens.size() != 2 || !has(options.key_mask, at::kBool, {tokens[0], keys}, q)) return false;
    options.max_seqlen = tokens[1];
  }
  options.scale = scale ? *scale : std::pow(std::max<int64_t>(q.size(-1), 1), -0.5);
  for (MaybeTensor* x :
       {&options.key_mask, &options.cu_seqlens, &options.cu_seqlens_k, &options.rng})
    *x = contiguous(*x);
  return std::isfinite(options.scale) &&
         is_dropout(options.dropout, options.rng, options.stream, q);
}

// Check k against q, and the layout of the keys, and set max_seqlen_k.
bool complete_keys(const Tensor& q, const Tensor& k, const std::optional<int64_t>& max_seqlen,
                   const std::optional<int64_t>& max_seqlen_k, Options& options) {
  std::vector<int64_t> shape = q.sizes().vec();
  shape[q.dim() - 3] = k.dim() < 3 ? -1 : k.size(-3);
  if (!has(k, q.scalar_type(), shape, q)) return false;
  const int64_t tokens = q.size(-3), keys = k.size(-3);
  if (options.cu_seqlens_k) {
    const Tensor& bounds = *options.cu_seqlens_k;
    options.max_seqlen_k = max_seqlen_k.value_or(0);
    return options.cu_seqlens && max_seqlen_k && are_bounds(bounds, q) &&
           bounds.sizes() == options.cu_seqlens->sizes();
  }
  options.max_seqlen_k = options.cu_seqlens ? max_seqlen.value_or(0) : keys;
  return options.cu_seqlens ? tokens == keys : !options.causal || tokens <= keys;
}

template <class... T>
Tensor run(const Options& options, const T&... tensors) {
  return need_gradient(tensors...) ? Attention<T...>::apply(options, tensors...)
                                   : std::get<0>(forward(options, tensors...));
}

MaybeTensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                      const MaybeTensor& key_mask, const MaybeTensor& cu_seqlens,
                      const std::optional<int64_t>& max_seqlen, bool causal,
                      const std::optional<double>& scale, double dropout, const MaybeTensor& rng,
                      int64_t stream, const MaybeTensor& cu_seqlens_k,
                      const std::optional<int64_t>& max_seqlen_k) {
  Options options = {key_mask, cu_seqlens, 0, causal, 0, dropout, rng, stream, cu_seqlens_k};
  if (!is_float(q) || q.dim() < 3 || !complete_keys(q, k, max_seqlen, max_seqlen_k, options) ||
      !has(v, q.scalar_type(), k.sizes(), q) ||
      !complete(q, 2, options.max_seqlen_k, max_seqlen, scale, options))
    return {};
  return run(options, autocast(q), autocast(k), autocast(v));
}

MaybeTensor attention_qkv(const Tensor& qkv, const MaybeTensor& key_mask,
                          const MaybeTensor& cu_seqlens, const std::optional<int64_t>& max_seqlen,
                          bool causal, const std::optional<double>& scale, double dropout,
                          const MaybeTensor& rng, int64_t stream) {
  Options options = {key_mask, cu_seqlens, 0, causal, 0, dropout, rng, stream};
  if (!is_float(qkv) || qkv.dim() < 4 || qkv.size(-3) != 3 ||
      !complete(qkv, 3, qkv.size(1), max_seqlen, scale, options))
    return {};
  return run(options, autocast(qkv));
}

ELECTRA_FAST_CALL(attention)
ELECTRA_FAST_CALL(attention_qkv)

}  // namespace
}  // namespace electra_fast
