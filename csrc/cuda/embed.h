// The launchers of embed's CUDA kernels. Each returns the error of its launch and does not wait for
// the kernel to finish.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "storage.h"

namespace electra_fast {

constexpr int kEmbedColumns = 4096;  // the largest E
constexpr int kEmbedBlocks = 1024;   // the most blocks: about twice as many as an H200 runs at once

struct Ids {
  const void* data;  // [T] int64 if `is_int64`, else int32; null if there are none
  bool is_int64;
};

struct EmbedTokens {
  Ids ids, type_ids, position_ids;  // without type_ids 0, without position_ids t % L
  int T, L;                         // L is at least 1 if there are tokens
};

struct EmbedTables {
  const void *word, *position, *type;  // [V, E], [P, E], [S, E]
  const float* weight;                 // [E], of the LayerNorm
  Storage storage;                     // of the three tables
  int V, P, S, E;
};

struct EmbedDropout {
  const int64_t* rng;  // [2] seed, step; not read if the threshold is 0
  uint32_t dropout_stream;
  uint32_t threshold;  // an element is kept if its 16 random bits reach it
  float scale;         // of the kept elements
};

// y [T, E] = drop(LayerNorm(x)), mean [T] and rstd [T] of x = word + position + type. The row of a
// token with an id outside its table is NaN.
cudaError_t embed_rows(const EmbedTokens& tokens, const EmbedTables& tables, const float* bias,
                       float eps, const EmbedDropout& dropout, void* y, Storage storage,
                       float* mean, float* rstd, cudaStream_t stream);

// dx [T, E], the gradient of x, and sums [splits, groups, 3, E] of dx, of h drop(dy) and of
// drop(dy). Group g has the tokens t = g + groups * i; each split sums an equal range of i.
cudaError_t embed_row_gradients(const EmbedTokens& tokens, const EmbedTables& tables,
                                const EmbedDropout& dropout, const void* dy, Storage storage,
                                const float* mean, const float* rstd, int groups, int splits,
                                float* dx, float* sums, cudaStream_t stream);

// The gradient of a table: row v is the sum of dx over the tokens of id v. The tokens are sorted by
// id, which makes those of a row neighbours. A piece is kPiece neighbours, the first at a multiple
// of kPiece; if all of them have one id, their sum is computed once and stored in `pieces`.
constexpr int kPiece = 32;

struct EmbedSums {
  const int* starts;     // [rows + 1] index in `order` of a row's first token
  const int64_t* order;  // [T] the tokens, sorted by id
  const float* dx;       // [T, E]
  float* pieces;         // [T / kPiece, E]
  int T, rows, E;
};

// keys [T], int16 if `narrow`, else int32: the ids, with `rows` for an id outside the table.
cudaError_t embed_keys(const Ids& ids, int T, int rows, void* keys, bool narrow,
                       cudaStream_t stream);

cudaError_t embed_pieces(const EmbedSums& sums, const void* sorted_keys, bool narrow,
                         cudaStream_t stream);

// table [rows, E] = base + the sums; a null base counts as 0.
cudaError_t embed_table(const EmbedSums& sums, const void* base, void* table, Storage storage,
                        cudaStream_t stream);

}  // namespace electra_fast
