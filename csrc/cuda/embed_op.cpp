// The embedding that generator and discriminator share, on a GPU. For the schema, the arguments and
// the results see electra_fast/ops/embed.py, for the kernels embed.h.
//
// Nothing is added atomically. Without position ids, a block of the kernel that computes dx sums
// the tokens of one position, which gives the gradient of the position table. For a table that is
// looked up by ids, the tokens are sorted by id, and each row of the table sums its own tokens.

#ifdef ELECTRA_FAST_CUDA

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "../host_device.h"
#include "../philox.h"
#include "../registry.h"
#include "embed.h"
#include "op.h"

namespace electra_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The most tokens, and the most rows of a table. Sums of such a number and a block's size fit int.
constexpr int64_t kMaxRows = int64_t{1} << 30;
constexpr int64_t kBlocks = kEmbedBlocks;
constexpr int64_t kRows = 8;  // the most rows that a block computes at once

Ids ids_of(const Tensor& ids) {
  return {.data = ids.const_data_ptr(), .is_int64 = ids.scalar_type() == at::kLong};
}

EmbedTokens tokens_of(const Tensor& ids, const MaybeTensor& type_ids,
                      const MaybeTensor& position_ids) {
  TORCH_CHECK_NOT_IMPLEMENTED(ids.numel() < kMaxRows,
                              "embed: ids must be fewer than 2^30 for the CUDA kernel, got ",
                              ids.numel());
  return {.ids = ids_of(ids),
          .type_ids = type_ids ? ids_of(*type_ids) : Ids{},
          .position_ids = position_ids ? ids_of(*position_ids) : Ids{},
          .T = static_cast<int>(ids.numel()),
          .L = position_ids ? 1 : static_cast<int>(ids.size(-1))};
}

EmbedTables tables_of(const Tensor& word, const Tensor& position, const Tensor& type,
                      const Tensor& weight) {
  const int64_t V = word.size(0), P = position.size(0), S = type.size(0), E = word.size(1);
  TORCH_CHECK_NOT_IMPLEMENTED(
      E >= 1 && E <= kEmbedColumns && std::max({V, P, S}) < kMaxRows, "embed: word must have 1 to ",
      kEmbedColumns, " columns, and a table fewer than 2^30 rows, for the CUDA kernel, got ",
      word.sizes(), "; electra_fast.reference.embed has no such limit");
  return {.word = word.const_data_ptr(),
          .position = position.const_data_ptr(),
          .type = type.const_data_ptr(),
          .weight = weight.const_data_ptr<float>(),
          .storage = storage_of(word, "embed", "word"),
          .V = static_cast<int>(V),
          .P = static_cast<int>(P),
          .S = static_cast<int>(S),
          .E = static_cast<int>(E)};
}

EmbedDropout dropout_of(double p, const MaybeTensor& rng, int64_t dropout_stream) {
  return {.rng = rng ? rng->const_data_ptr<int64_t>() : nullptr,
          .dropout_stream = static_cast<uint32_t>(dropout_stream),
          .threshold = dropout_threshold(p),
          .scale = static_cast<float>(1 / (1 - p))};
}

std::tuple<Tensor, Tensor, Tensor> embed_fwd_cuda(const Tensor& ids, const MaybeTensor& type_ids,
                                                  const MaybeTensor& position_ids,
                                                  const Tensor& word, const Tensor& position,
                                                  const Tensor& type, const Tensor& weight,
                                                  const Tensor& bias, double eps, double dropout,
                                                  const MaybeTensor& rng, int64_t dropout_stream,
                                                  at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(word.device());
  const Tensor w = weight.to(at::kFloat), b = bias.to(at::kFloat);
  const EmbedTables tables = tables_of(word, position, type, w);
  auto shape = ids.sizes().vec();
  shape.push_back(word.size(1));
  const Tensor y = at::empty(shape, word.options().dtype(dtype));
  const Tensor mean = at::empty(ids.sizes(), w.options()), rstd = at::empty_like(mean);
  C10_CUDA_CHECK(embed_rows(tokens_of(ids, type_ids, position_ids), tables,
                            b.const_data_ptr<float>(), static_cast<float>(eps),
                            dropout_of(dropout, rng, dropout_stream), y.mutable_data_ptr(),
                            storage_of(y, "embed", "y"), mean.mutable_data_ptr<float>(),
                            rstd.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return {y, mean, rstd};
}

// base, if there is one, plus for each row of the table the sum of dx over the tokens of that id.
Tensor table_gradient(const Tensor& dx, const Tensor& ids, const Tensor& table,
                      const MaybeTensor& base) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int T = static_cast<int>(ids.numel()), rows = static_cast<int>(table.size(0));
  const int E = static_cast<int>(table.size(1));
  const bool narrow = rows <= std::numeric_limits<int16_t>::max();  // halves the passes of the sort
  const Tensor keys = at::empty({T}, ids.options().dtype(narrow ? at::kShort : at::kInt));
  C10_CUDA_CHECK(embed_keys(ids_of(ids), T, rows, keys.mutable_data_ptr(), narrow, stream));
  const auto [sorted, order] = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor starts = at::searchsorted(sorted, at::arange(rows + int64_t{1}, keys.options()),
                                         /*out_int32=*/true);
  const Tensor pieces = at::empty({T / kPiece, E}, dx.options());
  const EmbedSums sums{.starts = starts.const_data_ptr<int>(),
                       .order = order.const_data_ptr<int64_t>(),
                       .dx = dx.const_data_ptr<float>(),
                       .pieces = pieces.mutable_data_ptr<float>(),
                       .T = T,
                       .rows = rows,
                       .E = E};
  C10_CUDA_CHECK(embed_pieces(sums, sorted.const_data_ptr(), narrow, stream));
  const Tensor result = at::empty_like(table);
  C10_CUDA_CHECK(embed_table(sums, base ? base->const_data_ptr() : nullptr,
                             result.mutable_data_ptr(), storage_of(table, "embed", "word"),
                             stream));
  return result;
}

// The gradient of a table from that of its first rows; the other rows are 0.
Tensor padded(const Tensor& rows, const Tensor& table) {
  const Tensor result = at::zeros_like(table);
  const int64_t n = std::min(rows.size(0), table.size(0));
  result.narrow(0, 0, n).copy_(rows.narrow(0, 0, n));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embed_bwd_cuda(
    const Tensor& dy, const Tensor& ids, const MaybeTensor& type_ids,
    const MaybeTensor& position_ids, const Tensor& word, const Tensor& position, const Tensor& type,
    const Tensor& weight, const Tensor& mean, const Tensor& rstd, double dropout,
    const MaybeTensor& rng, int64_t dropout_stream, const MaybeTensor& dword, bool want_word) {
  const c10::cuda::CUDAGuard guard(word.device());
  const Tensor w = weight.to(at::kFloat);
  const EmbedTokens tokens = tokens_of(ids, type_ids, position_ids);
  const EmbedTables tables = tables_of(word, position, type, w);
  const int64_t T = tokens.T, E = word.size(1);
  // One group per position. With position ids: groups of kRows tokens, or kBlocks larger groups.
  const int64_t groups = position_ids ? std::min(kBlocks, ceil_div(T, kRows)) : tokens.L;
  const int64_t splits =
      T == 0 ? 1 : std::clamp(kBlocks / groups, int64_t{1}, ceil_div(ceil_div(T, groups), kRows));
  const Tensor dx = at::empty({T, E}, w.options());
  const Tensor sums = at::empty({splits, T == 0 ? 0 : groups, 3, E}, w.options());
  C10_CUDA_CHECK(embed_row_gradients(
      tokens, tables, dropout_of(dropout, rng, dropout_stream), dy.const_data_ptr(),
      storage_of(dy, "embed", "dy"), mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(),
      static_cast<int>(groups), static_cast<int>(splits), dx.mutable_data_ptr<float>(),
      sums.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  const auto total = [&](int64_t q) { return sums.select(2, q).sum(at::IntArrayRef{0, 1}); };

  return {want_word ? table_gradient(dx, ids, word, dword) : at::empty({0}, word.options()),
          position_ids ? table_gradient(dx, *position_ids, position, {})
                       : padded(sums.select(2, 0).sum(0), position),
          type_ids ? table_gradient(dx, *type_ids, type, {}) : padded(total(0).unsqueeze(0), type),
          total(1).to(weight.scalar_type()), total(2).to(weight.scalar_type())};
}

}  // namespace

ELECTRA_FAST_IMPL(embed_fwd, CUDA, embed_fwd_cuda)
ELECTRA_FAST_IMPL(embed_bwd, CUDA, embed_bwd_cuda)

}  // namespace electra_fast

#endif  // ELECTRA_FAST_CUDA
