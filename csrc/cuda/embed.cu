// The embedding that both towers share and its gradient (Devlin et al. 2019, section 3):
//
//   x = word[id] + position[place] + type[type id]    m = avg(x)    mean = m + avg(x - m)
//   h = (x - mean) rstd    y = drop(w h + b)
//   d = drop(dy)    g = w d    dx = rstd (g - avg(g) - h avg(g h))    dw = sum h d    db = sum d
//   dtable[v] = sum of dx over the tokens of row v
//
// A token's row of up to 256 columns is a warp's, eight columns a lane, and one of up to 768 too,
// 24 a lane; a wider one has several warps. Sums are float32, and each has one order, whatever runs
// first: a block adds up rows of one group of tokens, where no places are given those of one place;
// a table's row adds up its tokens as a stable sort leaves them.

#include <cmath>
#include <type_traits>

#include "../philox.h"
#include "embed.h"
#include "launch.cuh"
#include "rows.cuh"

namespace electra_fast {
namespace {

constexpr int kCall = 8;  // columns that have their random bits from one Philox call
constexpr int kNarrow = kCall, kWide = 3 * kCall;  // columns a lane, of a token's row

// Pairs: an access of a warp is 128 bytes in the half dtypes.
template <int kItems>
using TokenColumns = Columns<kItems, 2>;

// Warps of a block, unless one row has more, and then.
template <int kItems>
constexpr int kWarps = kItems == kNarrow ? 8 : 4;
template <int kItems>
constexpr int kMaxWarps = kItems == kNarrow ? 8 : 6;
static_assert(kMaxWarps<kWide> * TokenColumns<kWide>::kSpan >= kEmbedColumns);

using TableColumns = Columns<4, 4>;
constexpr int kTableWarps = 16, kTableThreads = kTableWarps * kWarp;
constexpr int kCrowd = kTableWarps * kPiece;  // places from which on a row has the whole block

__device__ int64_t read(const Ids& ids, int64_t t) {
  return ids.wide ? static_cast<const int64_t*>(ids.data)[t]
                  : static_cast<const int32_t*>(ids.data)[t];
}

__device__ bool inside(int64_t id, int rows) { return id >= 0 && id < rows; }

// What the tables have for a token: nothing where one of its ids is bad, which is no address.
template <class T, int kItems>
struct Found {
  using Row = typename TokenColumns<kItems>::template Items<T>;
  bool legal = false;
  int64_t type = 0;
  Row word = {}, position = {};

  // The type's row, one of few and so near at hand, is read when it is needed.
  __device__ void add_up(const EmbedTables& tables, const TokenColumns<kItems>& columns,
                         float (&x)[kItems]) const {
    for (int k = 0; k < kItems; ++k) x[k] = word[k] + position[k];
    if (!legal) return;
    const Row last = columns.load(static_cast<const T*>(tables.type) + type * tables.E);
    for (int k = 0; k < kItems; ++k) x[k] += last[k];
  }
};

template <class T, int kItems>
__device__ Found<T, kItems> look_up(const EmbedTokens& tokens, const EmbedTables& tables,
                                    const TokenColumns<kItems>& columns, int64_t t,
                                    int place_if_not_given) {
  const int64_t id = read(tokens.ids, t);
  const int64_t type = tokens.types.data ? read(tokens.types, t) : 0;
  const int64_t place = tokens.places.data ? read(tokens.places, t) : place_if_not_given;
  if (!inside(id, tables.V) || !inside(place, tables.P) || !inside(type, tables.S)) return {};
  return {true, type, columns.load(static_cast<const T*>(tables.word) + id * tables.E),
          columns.load(static_cast<const T*>(tables.position) + place * tables.E)};
}

// A place where dropout is, in this step.
struct Site {
  uint64_t seed = 0;
  uint32_t step = 0, stream, threshold;
  float scale;

  __device__ explicit Site(const EmbedDropout& dropout)
      : stream(dropout.stream), threshold(dropout.threshold), scale(dropout.scale) {
    if (threshold == 0) return;
    seed = static_cast<uint64_t>(dropout.rng[0]);
    step = static_cast<uint32_t>(dropout.rng[1]);
  }
};

// The 16 bits of kCall columns of row t, two by two (electra_fast/philox.py, keep_mask). The words
// of a call are of pairs 8 columns apart, and so of the four lanes that bits 2 and 3 tell apart.
// Each makes the call of one of their pairs, and a transpose gives it its words of all four.
template <int kItems>
__device__ void draw(const Site& site, const TokenColumns<kItems>& columns, int first, int64_t t,
                     uint32_t (&bits)[kCall / 2]) {
  const int own = threadIdx.x % kWarp / 4 % 4, column = columns.at(first + 2 * own);
  const Words words = philox<7>(site.seed, {static_cast<uint32_t>(column / 32 * 4 + column % 8 / 2),
                                            static_cast<uint32_t>(t), site.step, site.stream});
  bits[0] = words.w0, bits[1] = words.w1, bits[2] = words.w2, bits[3] = words.w3;
  for (int d = 1; d < 4; d *= 2) {
    const bool upper = own & d;
    for (int k = 0; k < 4; ++k) {
      if (k & d) continue;
      const uint32_t other = __shfl_xor_sync(kAll, upper ? bits[k] : bits[k + d], 4 * d);
      (upper ? bits[k] : bits[k + d]) = other;
    }
  }
}

template <int kItems>
__device__ void drop(const Site& site, const TokenColumns<kItems>& columns, int64_t t,
                     float (&x)[kItems]) {
  for (float& value : x) value *= site.scale;
  if (site.threshold == 0) return;
  for (int first = 0; first < kItems; first += kCall) {
    uint32_t bits[kCall / 2];
    draw(site, columns, first, t, bits);
    for (int k = 0; k < kCall; ++k) {
      const uint32_t own = k % 2 == 0 ? bits[k / 2] & 0xFFFF : bits[k / 2] >> 16;
      if (own < site.threshold) x[first + k] = 0;
    }
  }
}

// Each x[n] becomes the sum over the threads of its row, the same for all of them. `left` is what
// warps leave for each other; the next sums of a block must use another.
template <int N, int kMost>
__device__ void row_sums(float (&x)[N], float (&left)[N][kMost]) {
  for (float& value : x) value = warp_sum(value);
  const int warps = blockDim.x / kWarp, first = threadIdx.y * warps;
  if (warps == 1) return;
  for (int n = 0; n < N; ++n) {
    if (threadIdx.x % kWarp == 0) left[n][first + threadIdx.x / kWarp] = x[n];
  }
  __syncthreads();  // each warp has left its sums
  for (int n = 0; n < N; ++n) {
    x[n] = 0;
    for (int i = 0; i < warps; ++i) x[n] += left[n][first + i];
  }
}

// The bounds leave a thread 64 registers or, with a wide row's columns, 128.
template <class T, int kItems>
__global__ void __launch_bounds__(8 * kWarp, kItems == kNarrow ? 4 : 2)
    embed_rows_kernel(EmbedTokens tokens, EmbedTables tables, const float* bias, float eps,
                      EmbedDropout dropout, bool aligned, void* y, Storage storage, float* mean,
                      float* rstd) {
  __shared__ float left[3][1][kMaxWarps<kItems>];
  const int E = tables.E, rows = blockDim.y;
  const float share = 1.0f / E;
  const TokenColumns<kItems> columns(threadIdx.x / kWarp, E, aligned);
  const Site site(dropout);
  for (int first = blockIdx.x * rows; first < tokens.T; first += gridDim.x * rows) {
    // Of the rows that the last block has too many, each is the last one again.
    const int t = min(first + static_cast<int>(threadIdx.y), tokens.T - 1);
    const auto found = look_up<T>(tokens, tables, columns, t, t % tokens.L);
    float x[kItems], sum[1] = {}, more[1] = {}, squares[1] = {};
    found.add_up(tables, columns, x);
    for (const float value : x) sum[0] += value * share;
    row_sums(sum, left[0]);
    for (int k = 0; k < kItems; ++k) more[0] += columns.has(k) ? (x[k] - sum[0]) * share : 0;
    row_sums(more, left[1]);
    const float center = found.legal ? sum[0] + more[0] : NAN;
    for (int k = 0; k < kItems; ++k) {
      x[k] = columns.has(k) ? x[k] - center : 0;
      squares[0] += x[k] * x[k];
    }
    row_sums(squares, left[2]);
    const float r = rsqrtf(squares[0] * share + eps);
    const auto w = columns.load(tables.weight), b = columns.load(bias);
    for (int k = 0; k < kItems; ++k) x[k] = x[k] * r * w[k] + b[k];
    drop(site, columns, t, x);
    as_stored(storage, [&]<class Y>(Y) { columns.save(static_cast<Y*>(y) + int64_t{t} * E, x); });
    if (threadIdx.x == 0) mean[t] = center, rstd[t] = r;
  }
}

// Block (g, s) has n tokens of group g, blockDim.y of them at a time. The bounds leave a thread 80
// registers or 168.
template <class T, int kItems>
__global__ void __launch_bounds__(kMaxWarps<kItems>* kWarp, kItems == kNarrow ? 3 : 2)
    embed_row_gradients_kernel(EmbedTokens tokens, EmbedTables tables, EmbedDropout dropout,
                               bool aligned, const void* dy, Storage storage, const float* mean,
                               const float* rstd, int n, float* dx, float* sums) {
  using Pair = typename TokenColumns<kItems>::template Pack<float>;
  __shared__ float left[2][2][kMaxWarps<kItems>];
  __shared__ Pair totals[kMaxWarps<kItems>][2][kItems / 2][kWarp];  // of h d, d: registers are few
  const int E = tables.E, lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp, rows = blockDim.y;
  const float share = 1.0f / E;
  const TokenColumns<kItems> columns(part, E, aligned);
  const Site site(dropout);
  auto& own = totals[threadIdx.y * warps + part];
  float total[kItems] = {};  // of dx
  for (int k = 0; k < kItems / 2; ++k) own[0][k][lane] = own[1][k][lane] = {};

  for (int first = 0; first < n; first += rows) {
    const int i = first + threadIdx.y;
    const int64_t t = blockIdx.x + (int64_t{blockIdx.y} * n + i) * gridDim.x;
    const bool used = i < n && t < tokens.T;
    float h[kItems], d[kItems], r, sum[2] = {};  // of g, g h
    if (used) {
      const auto found = look_up<T>(tokens, tables, columns, t, blockIdx.x);
      as_stored(storage, [&]<class Y>(Y) {
        const auto row = columns.load(static_cast<const Y*>(dy) + t * E);
        for (int k = 0; k < kItems; ++k) d[k] = row[k];
      });
      const float center = mean[t];
      r = rstd[t];
      found.add_up(tables, columns, h);
      for (float& value : h) value = (value - center) * r;
      drop(site, columns, t, d);
      const auto w = columns.load(tables.weight);
      for (int k = 0; k < kItems; ++k) {
        sum[0] += w[k] * d[k];
        sum[1] += w[k] * d[k] * h[k];
      }
    }
    row_sums(sum, left[first / rows % 2]);
    if (!used) continue;
    const float average = sum[0] * share, slope = sum[1] * share;
    const auto w = columns.load(tables.weight);
    float x[kItems];
    for (int k = 0; k < kItems; ++k) {
      x[k] = r * (w[k] * d[k] - average - h[k] * slope);
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
      const auto& those = totals[i * warps + part][q];
      for (int k = 0; k < kItems; ++k) sum[k] += those[k / 2][lane].of[k % 2];
    }
    columns.save(to, sum);
  };
  __syncthreads();  // each row has its totals
  save_sum(0, sums + E);
  save_sum(1, sums + 2 * E);
  __syncthreads();  // they have been read, and make room for those of dx
  for (int k = 0; k < kItems; ++k) own[0][k / 2][lane].of[k % 2] = total[k];
  __syncthreads();  // each row has them
  save_sum(0, sums);
}

template <class Key>
__global__ void __launch_bounds__(kTableThreads)
    embed_keys_kernel(Ids ids, int T, int rows, Key* keys) {
  const int t = blockIdx.x * kTableThreads + threadIdx.x;
  if (t >= T) return;
  const int64_t id = read(ids, t);
  keys[t] = static_cast<Key>(inside(id, rows) ? id : rows);
}

template <class T>
__device__ void add(const T* row, const TableColumns& columns, float (&sum)[4]) {
  const auto x = columns.load(row);
  for (int k = 0; k < 4; ++k) sum[k] += x[k];
}

template <class Key>
__global__ void __launch_bounds__(kTableThreads)
    embed_pieces_kernel(EmbedSums sums, const Key* keys, bool aligned) {
  const int64_t E = sums.E;
  const int piece = blockIdx.x * kTableWarps + threadIdx.x / kWarp, first = piece * kPiece;
  if (piece >= sums.T / kPiece || keys[first] != keys[first + kPiece - 1]) return;
  const TableColumns columns(blockIdx.y, sums.E, aligned);
  float sum[4] = {};
  for (int p = first; p < first + kPiece; ++p) add(sums.dx + sums.order[p] * E, columns, sum);
  columns.save(sums.pieces + piece * E, sum);
}

// The places of a row: whole pieces from `head` to `tail`, and single ones before and after.
struct Places {
  int begin, head, tail, end;

  __device__ Places(int begin, int end)
      : begin(begin),
        head(min(end, (begin + kPiece - 1) / kPiece * kPiece)),
        tail(max(head, end / kPiece * kPiece)),
        end(end) {}
};

// A warp takes a row, and most rows have no token: they are copied, or made 0.
template <class T>
__global__ void __launch_bounds__(kTableThreads)
    embed_table_kernel(EmbedSums sums, const T* base, bool aligned, T* table) {
  __shared__ float parts[kTableWarps][4][kWarp];
  const int64_t E = sums.E;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = blockIdx.x * kTableWarps, v = row + warp;
  const TableColumns columns(blockIdx.y, sums.E, aligned);
  const auto add_tokens = [&](int begin, int end, float (&sum)[4]) {
    for (int p = begin; p < end; ++p) add(sums.dx + sums.order[p] * E, columns, sum);
  };
  const auto add_pieces = [&](const Places& places, int first, int step, float (&sum)[4]) {
    for (int i = places.head / kPiece + first; i < places.tail / kPiece; i += step) {
      add(sums.pieces + i * E, columns, sum);
    }
  };

  float sum[4] = {};
  if (base && v < sums.rows) add(base + v * E, columns, sum);
  const int start = sums.starts[min(row + lane, sums.rows)];  // of the block's row `lane`
  const int next = __shfl_down_sync(kAll, start, 1);
  const auto places_of = [&](int i) {
    return Places(__shfl_sync(kAll, start, i), __shfl_sync(kAll, start, i + 1));
  };
  const unsigned crowded = __ballot_sync(kAll, lane < kTableWarps && next - start >= kCrowd);
  const Places places = places_of(warp);
  add_tokens(places.begin, places.head, sum);
  if ((crowded >> warp) % 2 == 0) add_pieces(places, 0, 1, sum);
  for (unsigned open = crowded; open != 0; open &= open - 1) {
    const int owner = __ffs(open) - 1;
    float part[4] = {};
    add_pieces(places_of(owner), warp, kTableWarps, part);
    for (int k = 0; k < 4; ++k) parts[warp][k][lane] = part[k];
    __syncthreads();  // each warp has left its part
    for (int i = 0; i < kTableWarps && warp == owner; ++i) {
      for (int k = 0; k < 4; ++k) sum[k] += parts[i][k][lane];
    }
    __syncthreads();  // they have been read, and make room for the next row's
  }
  add_tokens(places.tail, places.end, sum);
  if (v < sums.rows) columns.save(table + v * E, sum);
}

unsigned blocks(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }

template <int kItems>
dim3 token_block(int E) {
  const unsigned warps = blocks(E, TokenColumns<kItems>::kSpan);
  return {warps * kWarp, max(kWarps<kItems> / warps, 1u)};
}

dim3 table_grid(const EmbedSums& sums, int rows) {
  return {blocks(rows, kTableWarps), blocks(sums.E, TableColumns::kSpan)};
}

// f of a value of the tables' type and of a lane's columns.
template <class F>
cudaError_t with_tables(const EmbedTables& tables, const F& f) {
  const auto with_items = [&](auto items) {
    return with_type(tables.storage, [&](auto zero) { return f(zero, items); });
  };
  return tables.E <= TokenColumns<kNarrow>::kSpan
             ? with_items(std::integral_constant<int, kNarrow>())
             : with_items(std::integral_constant<int, kWide>());
}

// Whether a token's rows can be read and written in packs, y (or dy) among them.
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
    const unsigned grid = min(blocks(tokens.T, block.y), unsigned{kEmbedBlocks});
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
  const int n = static_cast<int>(blocks(tokens.T, int64_t{groups} * splits));
  return with_tables(tables, [&]<class T, int kItems>(T, std::integral_constant<int, kItems>) {
    return launch(embed_row_gradients_kernel<T, kItems>, grid, token_block<kItems>(tables.E),
                  stream, tokens, tables, dropout, aligned<T, kItems>(tables, nullptr, dy, storage),
                  dy, storage, mean, rstd, n, dx, sums);
  });
}

cudaError_t embed_keys(const Ids& ids, int T, int rows, void* keys, bool narrow,
                       cudaStream_t stream) {
  if (T == 0) return cudaSuccess;
  const auto launch_for = [&]<class Key>(Key* to) {
    return launch(embed_keys_kernel<Key>, blocks(T, kTableThreads), kTableThreads, stream, ids, T,
                  rows, to);
  };
  return narrow ? launch_for(static_cast<int16_t*>(keys)) : launch_for(static_cast<int32_t*>(keys));
}

cudaError_t embed_pieces(const EmbedSums& sums, const void* sorted_keys, bool narrow,
                         cudaStream_t stream) {
  const int pieces = sums.T / kPiece;
  if (pieces == 0) return cudaSuccess;
  const auto launch_for = [&]<class Key>(const Key* keys) {
    return launch(embed_pieces_kernel<Key>, table_grid(sums, pieces), kTableThreads, stream, sums,
                  keys, TableColumns::fit<float>(sums.E));
  };
  return narrow ? launch_for(static_cast<const int16_t*>(sorted_keys))
                : launch_for(static_cast<const int32_t*>(sorted_keys));
}

cudaError_t embed_table(const EmbedSums& sums, const void* base, void* table, Storage storage,
                        cudaStream_t stream) {
  if (sums.rows == 0) return cudaSuccess;
  return with_type(storage, [&]<class T>(T) {
    return launch(embed_table_kernel<T>, table_grid(sums, sums.rows), kTableThreads, stream, sums,
                  static_cast<const T*>(base), TableColumns::fit<T>(sums.E, base),
                  static_cast<T*>(table));
  });
}

}  // namespace electra_fast
