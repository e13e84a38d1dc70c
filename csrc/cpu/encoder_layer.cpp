// A layer of the encoder on the CPU, for inference. For the schema, the arguments and the result
// see electra_fast/ops/encoder_layer.py.
//
//   c = attention(x W_qkv + b)    h = LayerNorm(x + c W_out + b)
//   f = gelu(h W_up + b)          y = LayerNorm(h + f W_down + b)
//
// All steps after attention run for kChunkRows rows at a time, so f, which is the largest tensor,
// stays in the L2 cache. With several chunks each thread computes whole chunks, with one chunk the
// threads share the columns of each product. Each sum has one order, so the bits do not depend on
// the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../registry.h"
#include "gelu.h"
#include "layer_norm.h"
#include "packed_linear.h"
#include "rows.h"

namespace electra_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The order of the tensors in `weights`. Each product has two: its panels and its columns.
enum { kQkv = 0, kOut = 2, kNorm1 = 4, kUp = 6, kDown = 8, kNorm2 = 10, kWeights = 12 };

struct Params {
  const Tensor& x;
  at::TensorList weights;
  const MaybeTensor &key_mask, &cu_seqlens;
  int64_t max_seqlen, heads;
  double scale, eps;
};

Tensor attention(const Tensor& qkv, const Params& p) {
  using Op =
      std::tuple<Tensor, Tensor>(const Tensor&, const MaybeTensor&, const MaybeTensor&, c10::SymInt,
                                 bool, double, double, const MaybeTensor&, c10::SymInt);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("electra_fast::attention_qkv_fwd", "")
                             .typed<Op>();
  return std::get<0>(op.call(qkv, p.key_mask, p.cu_seqlens, p.max_seqlen, /*causal=*/false, p.scale,
                             /*dropout=*/0, /*rng=*/{}, /*stream=*/0));
}

// Call f(first, count) for chunks of T rows. One chunk is not a parallel region, so that the
// products in it can be.
template <class F>
void for_chunks(int64_t T, const F& f) {
  if (T <= kChunkRows) return f(0, T);
  at::parallel_for(0, ceil_div(T, kChunkRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * kChunkRows; t < std::min(T, end * kChunkRows); t += kChunkRows)
      f(t, std::min(kChunkRows, T - t));
  });
}

// X is the dtype of x and y, A that of attention, W that of the packed weights.
template <class X, class A, class W, bool quantised>
Tensor forward(const Params& p) {
  using Linear = PackedLinear<W, quantised>;
  const auto linear = [&](int i) { return Linear(p.weights[i], p.weights[i + 1]); };
  const Linear qkv_w = linear(kQkv), out_w = linear(kOut), up_w = linear(kUp),
               down_w = linear(kDown);
  const int64_t width = p.x.size(-1), T = rows_of(p.x), F = up_w.N;
  TORCH_CHECK_VALUE(qkv_w.N == 3 * width && out_w.N == width && down_w.N == width,
                    "encoder_layer: weights must be those of width ", width);

  std::vector<int64_t> shape = p.x.sizes().vec();
  shape.back() = 3, shape.insert(shape.end(), {p.heads, width / p.heads});
  const auto options = p.x.options().dtype(c10::CppTypeToScalarType<A>::value);
  const Tensor qkv = at::empty(shape, options), y = at::empty_like(p.x);
  const X* xs = p.x.const_data_ptr<X>();
  A* qkvs = qkv.mutable_data_ptr<A>();
  for_chunks(T, [&](int64_t first, int64_t n) {
    Activations<W, quantised> a;
    a.load(xs + first * width, n, width, qkv_w.K);
    a.multiply(qkv_w, [&](int64_t r, int64_t c, int64_t count, const float* values) {
      at::vec::convert(values, qkvs + (first + r) * 3 * width + c, count);
    });
  });

  const Tensor context = attention(qkv, p).contiguous();
  const A* contexts = context.const_data_ptr<A>();
  X* ys = y.mutable_data_ptr<X>();
  const auto floats = [&](int i) { return p.weights[i].const_data_ptr<float>(); };
  for_chunks(T, [&](int64_t first, int64_t n) {
    const int64_t padded = round_up(n, kRowStep);
    Activations<W, quantised> a;
    const auto rows = [&](int64_t columns) {
      return std::make_unique_for_overwrite<float[]>(padded * columns);
    };
    const auto z = rows(width), h = rows(width), f = rows(F);
    const auto norm = [&](int64_t r, int i, float* to) {
      float mean, rstd;
      layer_norm(z.get() + r * width, width, floats(i), floats(i + 1), p.eps, mean, rstd, to);
    };

    a.load(contexts + first * width, n, width, out_w.K);
    a.multiply(out_w, [&](int64_t r, int64_t c, int64_t count, const float* values) {
      const X* x = xs + (first + r) * width + c;
      float* to = z.get() + r * width + c;
      for (int64_t i = 0; i < count; ++i) to[i] = values[i] + static_cast<float>(x[i]);
    });
    for (int64_t r = 0; r < n; ++r) norm(r, kNorm1, h.get() + r * width);

    a.load(h.get(), n, width, up_w.K, /*whole=*/true);
    a.multiply(up_w, [&](int64_t r, int64_t c, int64_t count, const float* values) {
      at::vec::map([](Vec<float> v) { return gelu(v); }, f.get() + r * F + c, values, count);
    });

    a.load(f.get(), n, F, down_w.K, /*whole=*/true);
    a.multiply(down_w, [&](int64_t r, int64_t c, int64_t count, const float* values) {
      const float* residual = h.get() + r * width + c;
      float* to = z.get() + r * width + c;
      for (int64_t i = 0; i < count; ++i) to[i] = values[i] + residual[i];
    });
    for (int64_t r = 0; r < n; ++r) {
      X* row = ys + (first + r) * width;
      float* to = result_row(row, h.get() + r * width);
      norm(r, kNorm2, to);
      store_row(to, width, row);
    }
  });
  return y;
}

template <class X, class A>
Tensor with_weights(const Params& p) {
  const Tensor& panels = p.weights[kQkv];
  if (panels.scalar_type() == at::kBFloat16)
    return forward<X, c10::BFloat16, c10::BFloat16, false>(p);
  if (panels.scalar_type() == at::kChar) return forward<X, A, int8_t, true>(p);
  if (p.weights[kQkv + 1].size(0) == 3) return forward<X, A, float, true>(p);
  return forward<X, A, float, false>(p);
}

Tensor encoder_layer_cpu(const Tensor& x, at::TensorList weights, const MaybeTensor& key_mask,
                         const MaybeTensor& cu_seqlens, int64_t max_seqlen, int64_t heads,
                         double scale, double eps) {
  TORCH_CHECK_VALUE(weights.size() == kWeights, "encoder_layer: weights must be ", int{kWeights},
                    " tensors, got ", weights.size());
  if (x.numel() == 0) return at::empty_like(x);
  const Params p{x, weights, key_mask, cu_seqlens, max_seqlen, heads, scale, eps};
  if (x.scalar_type() == at::kBFloat16) return with_weights<c10::BFloat16, c10::BFloat16>(p);
  return with_weights<float, float>(p);
}

}  // namespace

ELECTRA_FAST_IMPL(encoder_layer, CPU, encoder_layer_cpu)

}  // namespace electra_fast
