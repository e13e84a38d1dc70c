// The CUDA kernels of embed by the pointers they take. A launch tells its error and does not wait.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "storage.h"

namespace electra_fast {

constexpr int kEmbedColumns = 4096;  // that a row may have
constexpr int kEmbedBlocks = 1024;   // share the tokens: some two times what an H200 runs at once

struct Ids {
  const void* data;  // [T] int32 or, `wide`, int64; null where none are given
  bool wide;
};

struct EmbedTokens {
  Ids ids, types, places;  // without types 0, without places t % L
  int T, L;                // L at least 1, if there are tokens
};

struct EmbedTables {
  const void *word, *position, *type;  // [V, E], [P, E], [S, E]
  const float* weight;                 // [E] of the LayerNorm
  Storage storage;                     // of the three tables
  int V, P, S, E;
};

struct EmbedDropout {
  const int64_t* rng;  // [2] seed, step; not read where the threshold is 0
  uint32_t stream;
  uint32_t threshold;  // of 2^16: an element stays where its bits reach it
  float scale;         // of what stays
};

// y [T, E] = drop(LayerNorm(x)), mean [T] and rstd [T] of x = word + position + type; NaN where an
// id is outside its table.
cudaError_t embed_rows(const EmbedTokens& tokens, const EmbedTables& tables, const float* bias,
                       float eps, const EmbedDropout& dropout, void* y, Storage storage,
                       float* mean, float* rstd, cudaStream_t stream);

// dx [T, E], the gradient of x, and sums [splits, groups, 3, E] of dx, of h drop(dy) and of
// drop(dy). Group g has the tokens t = g + groups * i; a split takes as many i as the others.
cudaError_t embed_row_gradients(const EmbedTokens& tokens, const EmbedTables& tables,
                                const EmbedDropout& dropout, const void* dy, Storage storage,
                                const float* mean, const float* rstd, int groups, int splits,
                                float* dx, float* sums, cudaStream_t stream);

// The gradient of a table is that of its rows v = 0, 1, …: the sum of dx over the tokens of id v.
// Sorted by id, these lie side by side, and the sum of each kPiece places from a multiple of it on
// that one row has alone is made once, by itself.
constexpr int kPiece = 32;

struct EmbedSums {
  const int* starts;     // [rows + 1] a row's first place among the sorted tokens
  const int64_t* order;  // [T] the token at each place
  const float* dx;       // [T, E]
  float* pieces;         // [T / kPiece, E]
  int T, rows, E;
};

// keys [T], int16 where `narrow`, else int32: the ids, with `rows` for one outside the table.
cudaError_t embed_keys(const Ids& ids, int T, int rows, void* keys, bool narrow,
                       cudaStream_t stream);

cudaError_t embed_pieces(const EmbedSums& sums, const void* sorted_keys, bool narrow,
                         cudaStream_t stream);

// table [rows, E] = base, or 0 where that is null, + the sums.
cudaError_t embed_table(const EmbedSums& sums, const void* base, void* table, Storage storage,
                        cudaStream_t stream);

}  // namespace electra_fast
