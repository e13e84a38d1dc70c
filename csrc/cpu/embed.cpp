// The embedding that generator and discriminator share, on the CPU: lookup, LayerNorm and dropout
// in one pass, and their gradient. For the schema, the arguments and the results see
// electra_fast/ops/embed.py.
//
//   x = word[id] + position[position id] + type[type id]       h = (x - mean) rstd
//   y = drop(h w + b)         g = w drop(dy)                   dx = rstd (g - avg(g) - h avg(g h))
//
// Without position ids, the backward pass visits the tokens position by position, so that one
// thread sums the gradient of a position. The gradient of the word table is then summed from dx,
// row by row, over the tokens sorted by id. The tasks, and so the bits, do not depend on the number
// of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../registry.h"
#include "dropout.h"
#include "layer_norm.h"
#include "rows.h"
#include "table_gradient.h"

namespace electra_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kTasks = 64;  // of the backward pass; each has its own sums over tokens

// The index of token t in a tensor of this shape.
std::vector<int64_t> index_of(int64_t t, at::IntArrayRef shape) {
  std::vector<int64_t> index(shape.size());
  for (size_t axis = shape.size(); axis-- > 0; t /= shape[axis]) index[axis] = t % shape[axis];
  return index;
}

// Return the ids as int64. Each must be a row of its table.
Tensor checked_ids(const char* name, const Tensor& given, const Tensor& table) {
  const Tensor ids = given.to(at::kLong);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t rows = table.size(0);
  for (int64_t t = 0; t < ids.numel(); ++t) {
    if (id[t] >= 0 && id[t] < rows) continue;
    TORCH_CHECK_INDEX(false, "embed: ", name, " must be in [0, ", rows, "), got ", id[t], " at ",
                      at::IntArrayRef(index_of(t, ids.sizes())),
                      "; electra_fast.check_batch finds such ids before training");
  }
  return ids;
}

// The rows of the three tables that each token looks up.
struct Lookup {
  Tensor ids, type_ids, position_ids;  // undefined type_ids are 0, undefined position_ids t % L
  int64_t T, L;

  Lookup(const Tensor& ids, const MaybeTensor& type_ids, const MaybeTensor& position_ids,
         const Tensor& word, const Tensor& position, const Tensor& type)
      : ids(checked_ids("ids", ids, word)),
        type_ids(type_ids ? checked_ids("type_ids", *type_ids, type) : Tensor()),
        position_ids(position_ids ? checked_ids("position_ids", *position_ids, position)
                                  : Tensor()),
        T(ids.numel()),
        L(ids.size(-1)),
        id_(this->ids.const_data_ptr<int64_t>()),
        type_(type_ids ? this->type_ids.const_data_ptr<int64_t>() : nullptr),
        position_(position_ids ? this->position_ids.const_data_ptr<int64_t>() : nullptr) {}

  int64_t id(int64_t t) const { return id_[t]; }
  int64_t type_id(int64_t t) const { return type_ ? type_[t] : 0; }
  int64_t position_id(int64_t t) const { return position_ ? position_[t] : t % L; }

 private:
  const int64_t *id_, *type_, *position_;
};

template <class T>
struct Tables {
  using W = at::opmath_type<T>;
  const T *word, *position, *type;
  int64_t E;

  Tables(const Tensor& word, const Tensor& position, const Tensor& type)
      : word(word.const_data_ptr<T>()),
        position(position.const_data_ptr<T>()),
        type(type.const_data_ptr<T>()),
        E(word.size(1)) {}

  void sum(const Lookup& rows, int64_t t, W* x) const {
    const T* a = word + rows.id(t) * E;
    const T* b = position + rows.position_id(t) * E;
    const T* c = type + rows.type_id(t) * E;
    for (int64_t e = 0; e < E; ++e) {
      x[e] = static_cast<W>(a[e]) + static_cast<W>(b[e]) + static_cast<W>(c[e]);
    }
  }
};

template <class T>
void forward(const Lookup& rows, const Tables<T>& tables, const Tensor& weight, const Tensor& bias,
             double eps, const Dropout& dropout, const Tensor& y, const Tensor& mean,
             const Tensor& rstd) {
  using W = at::opmath_type<T>;
  const int64_t E = tables.E;
  const W *w = weight.const_data_ptr<W>(), *b = bias.const_data_ptr<W>();
  W *results = y.mutable_data_ptr<W>(), *means = mean.mutable_data_ptr<W>();
  W* rstds = rstd.mutable_data_ptr<W>();
  for_rows(rows.T, E, [&](int64_t begin, int64_t end) {
    std::vector<W> factor(dropout.padded_columns());
    for (int64_t t = begin; t < end; ++t) {
      W* row = results + t * E;
      tables.sum(rows, t, row);
      layer_norm(row, E, w, b, eps, means[t], rstds[t], row);
      if (!dropout.active()) continue;
      dropout.factors(t, factor.data());
      for (int64_t e = 0; e < E; ++e) row[e] = dropped(row[e], factor[e]);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> embed_fwd_cpu(const Tensor& ids, const MaybeTensor& type_ids,
                                                 const MaybeTensor& position_ids,
                                                 const Tensor& word, const Tensor& position,
                                                 const Tensor& type, const Tensor& weight,
                                                 const Tensor& bias, double eps, double p,
                                                 const MaybeTensor& rng, int64_t dropout_stream,
                                                 at::ScalarType dtype) {
  const Lookup rows(ids, type_ids, position_ids, word, position, type);
  const Dropout dropout(p, rng, dropout_stream, word.size(1));
  const auto wide = word.options().dtype(at::toOpMathType(word.scalar_type()));
  std::vector<int64_t> shape = ids.sizes().vec();
  const Tensor mean = at::empty(shape, wide), rstd = at::empty(shape, wide);
  shape.push_back(word.size(1));
  const Tensor y = at::empty(shape, wide);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, word.scalar_type(), "embed", [&] {
    forward(rows, Tables<scalar_t>(word, position, type), weight.to(wide.dtype()),
            bias.to(wide.dtype()), eps, dropout, y, mean, rstd);
  });
  return {y.to(dtype), mean, rstd};
}

// The gradient of the x of one token, and the token's terms in those of w and b.
template <class T>
class TokenGradient {
 public:
  using W = at::opmath_type<T>;

  TokenGradient(const Tables<T>& tables, const W* w, const Dropout& dropout)
      : tables(tables),
        E(tables.E),
        w(w),
        dropout(dropout),
        x(E),
        g(E),
        factor(dropout.padded_columns()) {}

  void compute(const Lookup& rows, int64_t t, const W* dy, W mean, W rstd, W* dx, W* dw, W* db) {
    tables.sum(rows, t, x.data());
    std::copy(dy, dy + E, g.begin());
    if (dropout.active()) {
      dropout.factors(t, factor.data());
      for (int64_t e = 0; e < E; ++e) g[e] = dropped(g[e], factor[e]);
    }
    layer_norm_gradient(g.data(), x.data(), E, w, mean, rstd, dw, db, dx);
  }

 private:
  const Tables<T>& tables;
  int64_t E;
  const W* w;
  const Dropout& dropout;
  std::vector<W> x, g, factor;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Lookup& rows, const Tensor& word, const Tensor& position,
    const Tensor& type, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
    const Dropout& dropout, const MaybeTensor& dword, bool want_word) {
  using W = at::opmath_type<T>;
  const Tables<T> tables(word, position, type);
  const int64_t E = tables.E, S = type.size(0);
  const bool by_position = !rows.position_ids.defined();
  // Group i has the tokens i, i + groups, ...: without position ids those of one position.
  const int64_t groups = by_position ? (rows.T > 0 ? rows.L : 0) : rows.T;
  const int64_t tasks = std::min(kTasks, groups);
  const auto wide = word.options().dtype(c10::CppTypeToScalarType<W>::value);
  const Tensor w = weight.to(wide.dtype()), upstream = dy.to(wide.dtype());
  const Tensor dx = at::empty({rows.T, E}, wide);
  const Tensor dposition = by_position ? at::zeros_like(position, wide) : Tensor();
  const Tensor dtype = at::zeros({tasks, S, E}, wide);
  const Tensor dweight = at::zeros({tasks, E}, wide), dbias = at::zeros({tasks, E}, wide);

  const W *weights = w.const_data_ptr<W>(), *upstreams = upstream.const_data_ptr<W>();
  const W *means = mean.const_data_ptr<W>(), *rstds = rstd.const_data_ptr<W>();
  W *gradients = dx.mutable_data_ptr<W>(), *types = dtype.mutable_data_ptr<W>();
  W *dws = dweight.mutable_data_ptr<W>(), *dbs = dbias.mutable_data_ptr<W>();
  W* positions = by_position ? dposition.mutable_data_ptr<W>() : nullptr;

  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    TokenGradient<T> token(tables, weights, dropout);
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t group = groups * task / tasks; group < groups * (task + 1) / tasks; ++group) {
        for (int64_t t = group; t < rows.T; t += groups) {
          W* gradient = gradients + t * E;
          token.compute(rows, t, upstreams + t * E, means[t], rstds[t], gradient, dws + task * E,
                        dbs + task * E);
          add(gradient, E, types + (task * S + rows.type_id(t)) * E);
          if (by_position) add(gradient, E, positions + group * E);
        }
      }
    }
  });
  return {want_word ? table_gradient<T>(dx, rows.ids, word, dword) : at::empty({0}, word.options()),
          by_position ? dposition.to(position.scalar_type())
                      : table_gradient<T>(dx, rows.position_ids, position),
          dtype.sum(0).to(type.scalar_type()), dweight.sum(0).to(weight.scalar_type()),
          dbias.sum(0).to(weight.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embed_bwd_cpu(
    const Tensor& dy, const Tensor& ids, const MaybeTensor& type_ids,
    const MaybeTensor& position_ids, const Tensor& word, const Tensor& position, const Tensor& type,
    const Tensor& weight, const Tensor& mean, const Tensor& rstd, double p, const MaybeTensor& rng,
    int64_t dropout_stream, const MaybeTensor& dword, bool want_word) {
  const Lookup rows(ids, type_ids, position_ids, word, position, type);
  const Dropout dropout(p, rng, dropout_stream, word.size(1));
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, word.scalar_type(), "embed", [&] {
        return backward<scalar_t>(dy, rows, word, position, type, weight, mean, rstd, dropout,
                                  dword, want_word);
      });
}

}  // namespace

ELECTRA_FAST_IMPL(embed_fwd, CPU, embed_fwd_cpu)
ELECTRA_FAST_IMPL(embed_bwd, CPU, embed_bwd_cpu)

}  // namespace electra_fast
