// The embedding that generator and discriminator share, and its gradient (Devlin et al. 2019,
// section 3):
//
//   x = word[id] + position[position id] + type[type id]    m = avg(x)    mean = m + avg(x - m)
//   h = (x - mean) rstd    y = drop(w h + b)
//   d = drop(dy)    g = w d    dx = rstd (g - avg(g) - h avg(g h))    dw = sum h d    db = sum d
//
// One warp computes a row of up to 768 columns, with 8 columns per lane up to 256 columns and 24
// above; several warps share a wider row. Sums are float32 and have one order, whichever thread
// runs first: a block sums the rows of one group of tokens. Without position ids a group is the
// tokens of one position. The gradient of a table is in embed_table_gradient.cu.

#include <cmath>
#include <type_traits>

#include "../philox.h"
#include "embed.cuh"
#include "embed.h"
#include "launch.cuh"
#include "rows.cuh"

namespace electra_fast {
namespace {

constexpr int kCall = 8;  // columns that get their random bits from one Philox call
constexpr int kNarrow = kCall, kWide = 3 * kCall;  // columns per lane

// With packs of two, a warp accesses 128 bytes at once in the half dtypes.
template <int kItems>
using TokenColumns = Columns<kItems, 2>;

// Warps per block: by default, and at most, when one row needs more.
template <int kItems>
constexpr int kWarps = kItems == kNarrow ? 8 : 4;
template <int kItems>
constexpr int kMaxWarps = kItems == kNarrow ? 8 : 6;
static_assert(kMaxWarps<kWide> * TokenColumns<kWide>::kSpan >= kEmbedColumns);

// A lane's columns of the table rows of one token. If one of the ids is outside its table, it is
// not used as an address, and all columns are 0.
template <class T, int kItems>
struct TableRows {
  using Row = typename TokenColumns<kItems>::template Items<T>;
  bool valid = false;
  int64_t type_id = 0;
  Row word = {}, position = {};

  // The type table is small and cached, so its row is read only here.
  __device__ void sum(const EmbedTables& tables, const TokenColumns<kItems>& columns,
                      float (&x)[kItems]) const {
    for (int k = 0; k < kItems; ++k) x[k] = word[k] + position[k];
    if (!valid) return;
    const Row type = columns.load(static_cast<const T*>(tables.type) + type_id * tables.E);
    for (int k = 0; k < kItems; ++k) x[k] += type[k];
  }
};

template <class T, int kItems>
__device__ TableRows<T, kItems> look_up(const EmbedTokens& tokens, const EmbedTables& tables,
                                        const TokenColumns<kItems>& columns, int64_t t,
                                        int default_position_id) {
  const int64_t id = id_at(tokens.ids, t);
  const int64_t type_id = tokens.type_ids.data ? id_at(tokens.type_ids, t) : 0;
  const int64_t position_id =
      tokens.position_ids.data ? id_at(tokens.position_ids, t) : default_position_id;
  if (!is_row(id, tables.V) || !is_row(position_id, tables.P) || !is_row(type_id, tables.S))
    return {};
  return {true, type_id, columns.load(static_cast<const T*>(tables.word) + id * tables.E),
          columns.load(static_cast<const T*>(tables.position) + position_id * tables.E)};
}

// EmbedDropout with the values of its rng.
struct Dropout {
  uint64_t seed = 0;
  uint32_t step = 0, dropout_stream, threshold;
  float scale;

  __device__ explicit Dropout(const EmbedDropout& dropout)
      : dropout_stream(dropout.dropout_stream), threshold(dropout.threshold), scale(dropout.scale) {
    if (threshold == 0) return;
    seed = static_cast<uint64_t>(dropout.rng[0]);
    step = static_cast<uint32_t>(dropout.rng[1]);
  }
};

// The 16 random bits of each of kCall columns of row t, two columns per word (keep_mask in
// electra_fast/philox.py). The four words of a Philox call belong to column pairs 8 columns apart,
// which are in the four lanes that differ only in bits 2 and 3 of the lane number. Each of these
// lanes computes the call of a different pair, and a 4 x 4 transpose among them gives each lane
// its own word of every call.
template <int kItems>
__device__ void random_bits(const Dropout& dropout, const TokenColumns<kItems>& columns, int first,
                            int64_t t, uint32_t (&bits)[kCall / 2]) {
  const int own = threadIdx.x % kWarp / 4 % 4, column = columns.at(first + 2 * own);
  const Words words =
      philox<7>(dropout.seed, {static_cast<uint32_t>(column / 32 * 4 + column % 8 / 2),
                               static_cast<uint32_t>(t), dropout.step, dropout.dropout_stream});
  bits[0] = words.w0, bits[1] = words.w1, bits[2] = words.w2, bits[3] = words.w3;
  for (int d = 1; d < 4; d *= 2) {
    const bool upper = own & d;
    for (int k = 0; k < 4; ++k) {
      if (k & d) continue;
      const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? bits[k] : bits[k + d], 4 * d);
      (upper ? bits[k] : bits[k + d]) = other;
    }
  }
}

template <int kItems>
__device__ void drop(const Dropout& dropout, const TokenColumns<kItems>& columns, int64_t t,
                     float (&x)[kItems]) {
  for (float& value : x) value *= dropout.scale;
  if (dropout.threshold == 0) return;
  for (int first = 0; first < kItems; first += kCall) {
    uint32_t bits[kCall / 2];
    random_bits(dropout, columns, first, t, bits);
    for (int k = 0; k < kCall; ++k) {
      const uint32_t own = k % 2 == 0 ? bits[k / 2] & 0xFFFF : bits[k / 2] >> 16;
      if (own < dropout.threshold) x[first + k] = 0;
    }
  }
}

// Replace each x[n] by its sum over the threads of the row, the same value in all of them. Warps
// exchange their sums in `partial`; two calls in a row must not use the same memory.
template <int N, int kMost>
__device__ void row_sums(float (&x)[N], float (&partial)[N][kMost]) {
  for (float& value : x) value = warp_sum(value);
  const int warps = blockDim.x / kWarp, first = threadIdx.y * warps;
  if (warps == 1) return;
  for (int n = 0; n < N; ++n) {
    if (threadIdx.x % kWarp == 0) partial[n][first + threadIdx.x / kWarp] = x[n];
  }
  __syncthreads();  // every warp has stored its sums
  for (int n = 0; n < N; ++n) {
    x[n] = 0;
    for (int i = 0; i < warps; ++i) x[n] += partial[n][first + i];
  }
}

// The launch bounds allow 64 registers per thread, 128 with kWide columns per lane.
template <class T, int kItems>
__global__ void __launch_bounds__(8 * kWarp, kItems == kNarrow ? 4 : 2)
    embed_rows_kernel(EmbedTokens tokens, EmbedTables tables, const float* bias, float eps,
                      EmbedDropout embed_dropout, bool aligned, void* y, Storage storage,
                      float* mean, float* rstd) {
  __shared__ float partial[3][1][kMaxWarps<kItems>];
  const int E = tables.E, rows = blockDim.y;
  const float inverse_E = 1.0f / E;
  const TokenColumns<kItems> columns(threadIdx.x / kWarp, E, aligned);
  const Dropout dropout(embed_dropout);
  for (int first = blockIdx.x * rows; first < tokens.T; first += gridDim.x * rows) {
    // Threads past the last token repeat it, so that all threads reach every barrier.
    const int t = min(first + static_cast<int>(threadIdx.y), tokens.T - 1);
    const auto found = look_up<T>(tokens, tables, columns, t, t % tokens.L);
    float x[kItems], average[1] = {}, correction[1] = {}, squares[1] = {};
    found.sum(tables, columns, x);
    for (const float value : x) average[0] += value * inverse_E;
    row_sums(average, partial[0]);
    for (int k = 0; k < kItems; ++k) {
      correction[0] += columns.has(k) ? (x[k] - average[0]) * inverse_E : 0;
    }
    row_sums(correction, partial[1]);
    const float center = found.valid ? average[0] + correction[0] : NAN;
    for (int k = 0; k < kItems; ++k) {
      x[k] = columns.has(k) ? x[k] - center : 0;
      squares[0] += x[k] * x[k];
    }
    row_sums(squares, partial[2]);
    const float r = rsqrtf(squares[0] * inverse_E + eps);
    const auto w = columns.load(tables.weight), b = columns.load(bias);
    for (int k = 0; k < kItems; ++k) x[k] = x[k] * r * w[k] + b[k];
    drop(dropout, columns, t, x);
    with_type_in_kernel(storage,
                        [&]<class Y>(Y) { columns.save(static_cast<Y*>(y) + int64_t{t} * E, x); });
    if (threadIdx.x == 0) mean[t] = center, rstd[t] = r;
  }
}

// Block (g, s) sums n tokens of group g, blockDim.y tokens at a time. The launch bounds allow 80
// registers per thread, 168 with kWide columns per lane.
template <class T, int kItems>
__global__ void __launch_bounds__(kMaxWarps<kItems>* kWarp, kItems == kNarrow ? 3 : 2)
    embed_row_gradients_kernel(EmbedTokens tokens, EmbedTables tables, EmbedDropout embed_dropout,
                               bool aligned, const void* dy, Storage storage, const float* mean,
                               const float* rstd, int n, float* dx, float* sums) {
  using Pair = typename TokenColumns<kItems>::template Pack<float>;
  __shared__ float partial[2][2][kMaxWarps<kItems>];
  // The sums of h d and of d: registers do not suffice for them.
  __shared__ Pair totals[kMaxWarps<kItems>][2][kItems / 2][kWarp];
  const int E = tables.E, lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp, rows = blockDim.y;
  const float inverse_E = 1.0f / E;
  const TokenColumns<kItems> columns(part, E, aligned);
  const Dropout dropout(embed_dropout);
  auto& own = totals[threadIdx.y * warps + part];
  float total[kItems] = {};  // of dx
  for (int k = 0; k < kItems / 2; ++k) own[0][k][lane] = own[1][k][lane] = {};

  for (int first = 0; first < n; first += rows) {
    const int i = first + threadIdx.y;
    const int64_t t = blockIdx.x + (int64_t{blockIdx.y} * n + i) * gridDim.x;
    const bool used = i < n && t < tokens.T;
    float h[kItems], d[kItems], r, sum[2] = {};  // sum of g and of g h
    if (used) {
      const auto found = look_up<T>(tokens, tables, columns, t, blockIdx.x);
      with_type_in_kernel(storage, [&]<class Y>(Y) {
        const auto row = columns.load(static_cast<const Y*>(dy) + t * E);
        for (int k = 0; k < kItems; ++k) d[k] = row[k];
      });
      const float center = mean[t];
      r = rstd[t];
      found.sum(tables, columns, h);
      for (float& value : h) value = (value - center) * r;
      drop(dropout, columns, t, d);
      const auto w = columns.load(tables.weight);
      for (int k = 0; k < kItems; ++k) {
        sum[0] += w[k] * d[k];
        sum[1] += w[k] * d[k] * h[k];
      }
    }
    row_sums(sum, partial[first / rows % 2]);
    if (!used) continue;
    const float average_g = sum[0] * inverse_E, average_gh = sum[1] * inverse_E;
    const auto w = columns.load(tables.weight);
    float x[kItems];
    for (int k = 0; k < kItems; ++k) {
      x[k] = r * (w[k] * d[k] - average_g - h[k] * average_gh);
      total[k] += x[k];
      own[0][k / 2][lane].of[k % 2] += h[k] * d[k];
      own[1][k / 2][lane].of[k % 2] += d[k];
    }
    columns.save(dx + t * E, x);
  }

  sums += (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * 3 * E;
  const auto save_sum = [&](int q, float* to) {
    if (threadIdx.y > 0) return;
    float sum[kItems] = {};
    for (int i = 0; i < rows; ++i) {
      const auto& row = totals[i * warps + part][q];
      for (int k = 0; k < kItems; ++k) sum[k] += row[k / 2][lane].of[k % 2];
    }
    columns.save(to, sum);
  };
  __syncthreads();  // all rows have stored their totals
  save_sum(0, sums + E);
  save_sum(1, sums + 2 * E);
  __syncthreads();  // the totals have been read, and those of dx may replace them
  for (int k = 0; k < kItems; ++k) own[0][k / 2][lane].of[k % 2] = total[k];
  __syncthreads();  // all rows have stored their totals of dx
  save_sum(0, sums);
}

template <int kItems>
dim3 token_block(int E) {
  const unsigned warps = ceil_div(E, TokenColumns<kItems>::kSpan);
  return {warps * kWarp, max(kWarps<kItems> / warps, 1u)};
}

// Call f with a zero of the tables' type and the number of columns per lane.
template <class F>
cudaError_t with_tables(const EmbedTables& tables, const F& f) {
  const auto with_items = [&](auto items) {
    return with_type(tables.storage, [&](auto zero) { return f(zero, items); });
  };
  return tables.E <= TokenColumns<kNarrow>::kSpan
             ? with_items(std::integral_constant<int, kNarrow>())
             : with_items(std::integral_constant<int, kWide>());
}

// Whether all rows of a token, that of y (or dy) too, can be loaded and stored in packs.
template <class T, int kItems>
bool aligned(const EmbedTables& tables, const float* bias, const void* y, Storage storage) {
  using Any = TokenColumns<kItems>;
  const int E = tables.E;
  return Any::template fit<T>(E, tables.word, tables.position, tables.type) &&
         Any::template fit<float>(E, tables.weight, bias) &&
         with_type(storage, [&]<class Y>(Y) { return Any::template fit<Y>(E, y); });
}

}  // namespace

cudaError_t embed_rows(const EmbedTokens& tokens, const EmbedTables& tables, const float* bias,
                       float eps, const EmbedDropout& dropout, void* y, Storage storage,
                       float* mean, float* rstd, cudaStream_t stream) {
  if (tokens.T == 0) return cudaSuccess;
  return with_tables(tables, [&]<class T, int kItems>(T, std::integral_constant<int, kItems>) {
    const dim3 block = token_block<kItems>(tables.E);
    const unsigned grid = min(ceil_div<unsigned>(tokens.T, block.y), unsigned{kEmbedBlocks});
    return launch(embed_rows_kernel<T, kItems>, grid, block, stream, tokens, tables, bias, eps,
                  dropout, aligned<T, kItems>(tables, bias, y, storage), y, storage, mean, rstd);
  });
}

cudaError_t embed_row_gradients(const EmbedTokens& tokens, const EmbedTables& tables,
                                const EmbedDropout& dropout, const void* dy, Storage storage,
                                const float* mean, const float* rstd, int groups, int splits,
                                float* dx, float* sums, cudaStream_t stream) {
  if (tokens.T == 0) return cudaSuccess;
  const dim3 grid(groups, splits);
  const int n = static_cast<int>(ceil_div<int64_t>(tokens.T, int64_t{groups} * splits));
  return with_tables(tables, [&]<class T, int kItems>(T, std::integral_constant<int, kItems>) {
    return launch(embed_row_gradients_kernel<T, kItems>, grid, token_block<kItems>(tables.E),
                  stream, tokens, tables, dropout, aligned<T, kItems>(tables, nullptr, dy, storage),
                  dy, storage, mean, rstd, n, dx, sums);
  });
}

}  // namespace electra_fast
