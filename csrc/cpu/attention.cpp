// Attention on the CPU. For the schema, the arguments and the results see
// electra_fast/ops/attention.py and attention_qkv.py, for the algorithm attention_head.h. A task is
// a whole head of one sequence, so the bits do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "../registry.h"
#include "attention_head.h"
#include "packed.h"

namespace electra_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Multiplications per task that outweigh the cost of waking a thread.
constexpr int64_t kGrain = 1 << 18;

// The tokens of a batch, those of the queries or those of the keys, as sequences.
struct Layout {
  Tensor bounds;    // undefined if the batch is padded
  int64_t longest;  // length of the longest sequence, or more

  // `suffix` ends the names of the arguments in errors.
  Layout(const Tensor& tokens, const MaybeTensor& cu_seqlens, int64_t max_seqlen,
         const char* suffix = "")
      : bounds(cu_seqlens ? checked_bounds("attention", *cu_seqlens, tokens.size(0), suffix)
                          : Tensor()),
        longest(cu_seqlens ? std::min(max_seqlen, tokens.size(0)) : tokens.size(1)) {
    for (int64_t b = 0; cu_seqlens && b + 1 < bounds.numel(); ++b)
      TORCH_CHECK_VALUE(sequence(b).length <= longest, "attention: max_seqlen", suffix,
                        " must be at least ", sequence(b).length, ", got ", max_seqlen);
  }

  Sequence sequence(int64_t b) const {
    if (!bounds.defined()) return {b, 0, longest};
    const int64_t* bound = bounds.const_data_ptr<int64_t>() + b;
    return {b, bound[0], bound[1] - bound[0]};
  }
};

// The arguments that follow q, k and v, and the sequences that they define.
struct Params {
  Tensor mask;  // undefined if there is none
  Layout queries, keys;
  int64_t B, H, D;
  bool causal;
  double scale, p;
  MaybeTensor rng;
  int64_t dropout_stream;

  Params(const Tensor& q, const Tensor& k, const MaybeTensor& key_mask,
         const MaybeTensor& cu_seqlens, int64_t max_seqlen, bool causal, double scale, double p,
         const MaybeTensor& rng, int64_t dropout_stream, const MaybeTensor& cu_seqlens_k = {},
         int64_t max_seqlen_k = 0)
      : mask(key_mask ? key_mask->contiguous() : Tensor()),
        queries(q, cu_seqlens, max_seqlen),
        keys(cu_seqlens_k ? Layout(k, cu_seqlens_k, max_seqlen_k, "_k")
                          : Layout(k, cu_seqlens, max_seqlen)),
        B(cu_seqlens ? cu_seqlens->numel() - 1 : q.size(0)),
        H(q.size(-2)),
        D(q.size(-1)),
        causal(causal),
        scale(scale),
        p(p),
        rng(rng ? MaybeTensor(rng->contiguous()) : rng),
        dropout_stream(dropout_stream) {
    for (int64_t b = 0; causal && b < B; ++b)
      TORCH_CHECK_VALUE(queries.sequence(b).length <= keys.sequence(b).length,
                        "attention: causal must be False if a sequence has more queries than keys, "
                        "got ",
                        queries.sequence(b).length, " queries and ", keys.sequence(b).length,
                        " keys in sequence ", b);
  }

  template <class T>
  HeadRows<T> rows(const Tensor& x) const {  // of lse too, which has no last axis
    using Value = std::remove_const_t<T>;
    const int64_t token = queries.bounds.defined() ? 0 : 1;
    return {const_cast<T*>(x.const_data_ptr<Value>()), token ? x.stride(0) : 0, x.stride(token),
            x.stride(token + 1)};
  }

  // Call task(head) for every head of every sequence.
  template <class T, class Task>
  void run(const Task& task) const {
    const int64_t cost = std::max<int64_t>(1, queries.longest * keys.longest * D);
    at::parallel_for(
        0, B * H, std::max<int64_t>(1, kGrain / cost), [&](int64_t begin, int64_t end) {
          const auto dropout = [&](int64_t columns) {
            return Dropout(p, rng, dropout_stream, columns);
          };
          const int64_t longest = keys.longest;
          AttentionHead<T> head(D, longest, scale, causal,
                                p > 0 ? dropout(longest).padded_columns() : 0);
          for (int64_t i = begin; i < end; ++i) {
            const Sequence q = queries.sequence(i / H), k = keys.sequence(i / H);
            const int64_t h = i % H;
            if (i == begin || h == 0) {
              const bool* visible =
                  mask.defined() ? mask.const_data_ptr<bool>() + i / H * longest : nullptr;
              head.select(q, k, visible, dropout(k.length));
            }
            const int64_t first = queries.bounds.defined() ? q.first : q.index * q.length;
            head.select(h, first * H + h, H);
            task(head);
          }
        });
  }
};

Tensor contiguous_rows(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Params& params) {
  const Tensor o = at::empty(q.sizes(), q.options());
  const auto wide = q.options().dtype(at::toOpMathType(q.scalar_type()));
  const Tensor lse = at::empty(q.sizes().slice(0, q.dim() - 1), wide);
  if (q.numel() == 0) return {o, lse.zero_()};
  if (k.numel() == 0) return {o.zero_(), lse.fill_(-std::numeric_limits<double>::infinity())};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "attention", [&] {
    using W = at::opmath_type<scalar_t>;
    const auto rows = [&](const Tensor& x) { return params.rows<const scalar_t>(x); };
    const Tensor q_ = contiguous_rows(q), k_ = contiguous_rows(k), v_ = contiguous_rows(v);
    params.run<scalar_t>([&](AttentionHead<scalar_t>& head) {
      head.forward(rows(q_), rows(k_), rows(v_), params.rows<scalar_t>(o), params.rows<W>(lse));
    });
  });
  return {o, lse};
}

void backward(const Tensor& upstream, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& lse, const Params& params, const Tensor& dq, const Tensor& dk,
              const Tensor& dv) {
  if (q.numel() == 0 || k.numel() == 0) {
    for (const Tensor& x : {dq, dk, dv}) x.zero_();
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "attention", [&] {
    using W = at::opmath_type<scalar_t>;
    const auto rows = [&](const Tensor& x) { return params.rows<const scalar_t>(x); };
    const auto results = [&](const Tensor& x) { return params.rows<scalar_t>(x); };
    const Tensor u_ = contiguous_rows(upstream), q_ = contiguous_rows(q), k_ = contiguous_rows(k),
                 v_ = contiguous_rows(v);
    params.run<scalar_t>([&](AttentionHead<scalar_t>& head) {
      head.backward(rows(u_), rows(q_), rows(k_), rows(v_), params.rows<const W>(lse), results(dq),
                    results(dk), results(dv));
    });
  });
}

std::tuple<Tensor, Tensor> attention_fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const MaybeTensor& key_mask,
                                             const MaybeTensor& cu_seqlens, int64_t max_seqlen,
                                             bool causal, double scale, double p,
                                             const MaybeTensor& rng, int64_t dropout_stream,
                                             const MaybeTensor& cu_seqlens_k,
                                             int64_t max_seqlen_k) {
  return forward(q, k, v,
                 {q, k, key_mask, cu_seqlens, max_seqlen, causal, scale, p, rng, dropout_stream,
                  cu_seqlens_k, max_seqlen_k});
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd_cpu(
    const Tensor& upstream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
    const Tensor& lse, const MaybeTensor& key_mask, const MaybeTensor& cu_seqlens,
    int64_t max_seqlen, bool causal, double scale, double p, const MaybeTensor& rng,
    int64_t dropout_stream, const MaybeTensor& cu_seqlens_k, int64_t max_seqlen_k) {
  const Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  const Tensor dv = at::empty(k.sizes(), k.options());
  backward(upstream, q, k, v, lse,
           {q, k, key_mask, cu_seqlens, max_seqlen, causal, scale, p, rng, dropout_stream,
            cu_seqlens_k, max_seqlen_k},
           dq, dk, dv);
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_qkv_fwd_cpu(const Tensor& qkv, const MaybeTensor& key_mask,
                                                 const MaybeTensor& cu_seqlens, int64_t max_seqlen,
                                                 bool causal, double scale, double p,
                                                 const MaybeTensor& rng, int64_t dropout_stream) {
  const Tensor q = qkv.select(-3, 0);
  return forward(q, qkv.select(-3, 1), qkv.select(-3, 2),
                 {q, q, key_mask, cu_seqlens, max_seqlen, causal, scale, p, rng, dropout_stream});
}

Tensor attention_qkv_bwd_cpu(const Tensor& upstream, const Tensor& qkv, const Tensor& o,
                             const Tensor& lse, const MaybeTensor& key_mask,
                             const MaybeTensor& cu_seqlens, int64_t max_seqlen, bool causal,
                             double scale, double p, const MaybeTensor& rng,
                             int64_t dropout_stream) {
  const Tensor q = qkv.select(-3, 0), dqkv = at::empty(qkv.sizes(), qkv.options());
  backward(upstream, q, qkv.select(-3, 1), qkv.select(-3, 2), lse,
           {q, q, key_mask, cu_seqlens, max_seqlen, causal, scale, p, rng, dropout_stream},
           dqkv.select(-3, 0), dqkv.select(-3, 1), dqkv.select(-3, 2));
  return dqkv;
}

}  // namespace

ELECTRA_FAST_IMPL_STRIDED(attention_fwd, CPU, attention_fwd_cpu)
ELECTRA_FAST_IMPL_STRIDED(attention_bwd, CPU, attention_bwd_cpu)
ELECTRA_FAST_IMPL_STRIDED(attention_qkv_fwd, CPU, attention_qkv_fwd_cpu)
ELECTRA_FAST_IMPL_STRIDED(attention_qkv_bwd, CPU, attention_qkv_bwd_cpu)

}  // namespace electra_fast
