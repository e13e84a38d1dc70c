// The embedding that both towers share, on a GPU. The schema, and what arguments and results mean:
// electra_fast/ops/embed.py; the kernels: csrc/cuda/embed.cu.
//
// Nothing is added atomically. Where no places are given, the kernel that makes dx takes the tokens
// of one place together, and their sum is the position's gradient. For a table looked up by ids the
// tokens are sorted by id, and each of its rows adds up its own.

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
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda/embed.h"
#include "registry.h"

namespace electra_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMost = int64_t{1} << 30;  // tokens or rows: what is added to these is int, too
constexpr int64_t kBlocks = kEmbedBlocks, kRows = 8;  // rows that a block takes at once, at most

int64_t divide_up(int64_t n, int64_t size) { return (n + size - 1) / size; }

Storage storage_of(const Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype != at::kDouble,
                   "embed: word must be float32, float16 or bfloat16 for the CUDA kernel, got "
                   "float64; electra_fast.reference.embed takes it");
  if (dtype == at::kHalf) return Storage::kFloat16;
  return dtype == at::kBFloat16 ? Storage::kBFloat16 : Storage::kFloat32;
}

Ids ids_of(const Tensor& ids) { return {ids.const_data_ptr(), ids.scalar_type() == at::kLong}; }

EmbedTokens tokens_of(const Tensor& ids, const MaybeTensor& types, const MaybeTensor& places) {
  TORCH_CHECK_NOT_IMPLEMENTED(ids.numel() < kMost,
                              "embed: ids must be fewer than 2^30 for the CUDA kernel, got ",
                              ids.numel());
  return {.ids = ids_of(ids),
          .types = types ? ids_of(*types) : Ids{},
          .places = places ? ids_of(*places) : Ids{},
          .T = static_cast<int>(ids.numel()),
          .L = places ? 1 : static_cast<int>(ids.size(-1))};
}

EmbedTables tables_of(const Tensor& word, const Tensor& position, const Tensor& type,
                      const Tensor& weight) {
  const int64_t V = word.size(0), P = position.size(0), S = type.size(0), E = word.size(1);
  TORCH_CHECK_NOT_IMPLEMENTED(
      E >= 1 && E <= kEmbedColumns && std::max({V, P, S}) < kMost, "embed: word must have 1 to ",
      kEmbedColumns, " columns, and a table fewer than 2^30 rows, for the CUDA kernel, got ",
      word.sizes(), "; electra_fast.reference.embed has no such limit");
  return {.word = word.const_data_ptr(),
          .position = position.const_data_ptr(),
          .type = type.const_data_ptr(),
          .weight = weight.const_data_ptr<float>(),
          .storage = storage_of(word),
          .V = static_cast<int>(V),
          .P = static_cast<int>(P),
          .S = static_cast<int>(S),
          .E = static_cast<int>(E)};
}

EmbedDropout dropout_of(double p, const MaybeTensor& rng, int64_t stream) {
  return {.rng = rng ? rng->const_data_ptr<int64_t>() : nullptr,
          .stream = static_cast<uint32_t>(stream),
          .threshold = static_cast<uint32_t>(std::nearbyint(p * 65536)),
          .scale = static_cast<float>(1 / (1 - p))};
}

std::tuple<Tensor, Tensor, Tensor> embed_fwd_cuda(
    const Tensor& ids, const MaybeTensor& types, const MaybeTensor& places, const Tensor& word,
    const Tensor& position, const Tensor& type, const Tensor& weight, const Tensor& bias,
    double eps, double dropout, const MaybeTensor& rng, int64_t stream, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(word.device());
  const Tensor w = weight.to(at::kFloat), b = bias.to(at::kFloat);
  auto shape = ids.sizes().vec();
  shape.push_back(word.size(1));
  const Tensor y = at::empty(shape, word.options().dtype(dtype));
  const Tensor mean = at::empty(ids.sizes(), w.options()), rstd = at::empty_like(mean);
  C10_CUDA_CHECK(embed_rows(tokens_of(ids, types, places), tables_of(word, position, type, w),
                            b.const_data_ptr<float>(), static_cast<float>(eps),
                            dropout_of(dropout, rng, stream), y.mutable_data_ptr(), storage_of(y),
                            mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(),
                            c10::cuda::getCurrentCUDAStream()));
  return {y, mean, rstd};
}

// base, where there is one, + for each row of the table the sum of dx over the tokens of its id.
Tensor table_gradient(const Tensor& dx, const Tensor& ids, const Tensor& table,
                      const MaybeTensor& base) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int T = static_cast<int>(ids.numel()), rows = static_cast<int>(table.size(0));
  const int E = static_cast<int>(table.size(1));
  const bool narrow = rows <= std::numeric_limits<int16_t>::max();  // half the passes of the sort
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
                             result.mutable_data_ptr(), storage_of(table), stream));
  return result;
}

// The gradient of a table of whose rows the first are given, and the others 0.
Tensor padded(const Tensor& rows, const Tensor& table) {
  const Tensor result = at::zeros_like(table);
  const int64_t n = std::min(rows.size(0), table.size(0));
  result.narrow(0, 0, n).copy_(rows.narrow(0, 0, n));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embed_bwd_cuda(
    const Tensor& dy, const Tensor& ids, const MaybeTensor& types, const MaybeTensor& places,
    const Tensor& word, const Tensor& position, const Tensor& type, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, double dropout, const MaybeTensor& rng, int64_t stream,
    const MaybeTensor& dword, bool want_word) {
  const c10::cuda::CUDAGuard guard(word.device());
  const Tensor w = weight.to(at::kFloat);
  const EmbedTokens tokens = tokens_of(ids, types, places);
  const int64_t T = tokens.T, E = word.size(1);
  // Groups of a place each or, where places are given, of as many tokens as a block takes at once.
  const int64_t groups = places ? std::min(kBlocks, divide_up(T, kRows)) : tokens.L;
  const int64_t splits =
      T == 0 ? 1 : std::clamp(kBlocks / groups, int64_t{1}, divide_up(divide_up(T, groups), kRows));
  const Tensor dx = at::empty({T, E}, w.options());
  const Tensor parts = at::empty({splits, T == 0 ? 0 : groups, 3, E}, w.options());
  C10_CUDA_CHECK(embed_row_gradients(
      tokens, tables_of(word, position, type, w), dropout_of(dropout, rng, stream),
      dy.const_data_ptr(), storage_of(dy), mean.const_data_ptr<float>(),
      rstd.const_data_ptr<float>(), static_cast<int>(groups), static_cast<int>(splits),
      dx.mutable_data_ptr<float>(), parts.mutable_data_ptr<float>(),
      c10::cuda::getCurrentCUDAStream()));
  const auto total = [&](int64_t q) { return parts.select(2, q).sum(at::IntArrayRef{0, 1}); };

  return {want_word ? table_gradient(dx, ids, word, dword) : at::empty({0}, word.options()),
          places ? table_gradient(dx, *places, position, {})
                 : padded(parts.select(2, 0).sum(0), position),
          types ? table_gradient(dx, *types, type, {}) : padded(total(0).unsqueeze(0), type),
          total(1).to(weight.scalar_type()), total(2).to(weight.scalar_type())};
}

}  // namespace

ELECTRA_FAST_IMPL(embed_fwd, CUDA, embed_fwd_cuda)
ELECTRA_FAST_IMPL(embed_bwd, CUDA, embed_bwd_cuda)

}  // namespace electra_fast

#endif  // ELECTRA_FAST_CUDA
