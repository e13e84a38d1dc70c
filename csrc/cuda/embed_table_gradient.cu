// The gradient of a table that is looked up by id: sums of dx over the tokens of each id, which
// embed.h describes. Nothing is added atomically, and the order of a sum is that of a stable sort,
// so the results do not depend on the order of threads.

#include "../host_device.h"
#include "embed.cuh"
#include "embed.h"
#include "launch.cuh"
#include "rows.cuh"

namespace electra_fast {
namespace {

using TableColumns = Columns<4, 4>;
constexpr int kTableWarps = 16, kTableThreads = kTableWarps * kWarp;
constexpr int kCrowded = kTableWarps * kPiece;  // tokens from which the whole block sums one row

template <class Key>
__global__ void __launch_bounds__(kTableThreads)
    embed_keys_kernel(Ids ids, int T, int rows, Key* keys) {
  const int t = blockIdx.x * kTableThreads + threadIdx.x;
  if (t >= T) return;
  const int64_t id = id_at(ids, t);
  keys[t] = static_cast<Key>(is_row(id, rows) ? id : rows);
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
  for (int i = first; i < first + kPiece; ++i) add(sums.dx + sums.order[i] * E, columns, sum);
  columns.save(sums.pieces + piece * E, sum);
}

// The sorted tokens of a row: [begin, head) and [tail, end) are single tokens, [head, tail) whole
// pieces.
struct Segment {
  int begin, head, tail, end;

  __device__ Segment(int begin, int end)
      : begin(begin),
        head(min(end, round_up(begin, kPiece))),
        tail(max(head, end / kPiece * kPiece)),
        end(end) {}
};

// One warp per row. Most rows have no token: they are copied from `base`, or set to 0.
template <class T>
__global__ void __launch_bounds__(kTableThreads)
    embed_table_kernel(EmbedSums sums, const T* base, bool aligned, T* table) {
  __shared__ float parts[kTableWarps][4][kWarp];
  const int64_t E = sums.E;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = blockIdx.x * kTableWarps, v = row + warp;
  const TableColumns columns(blockIdx.y, sums.E, aligned);
  const auto add_tokens = [&](int begin, int end, float (&sum)[4]) {
    for (int i = begin; i < end; ++i) add(sums.dx + sums.order[i] * E, columns, sum);
  };
  const auto add_pieces = [&](const Segment& segment, int first, int step, float (&sum)[4]) {
    for (int i = segment.head / kPiece + first; i < segment.tail / kPiece; i += step) {
      add(sums.pieces + i * E, columns, sum);
    }
  };

  float sum[4] = {};
  if (base && v < sums.rows) add(base + v * E, columns, sum);
  const int start = sums.starts[min(row + lane, sums.rows)];  // of the block's row `lane`
  const int next = __shfl_down_sync(kAllLanes, start, 1);
  const auto segment_of = [&](int i) {
    return Segment(__shfl_sync(kAllLanes, start, i), __shfl_sync(kAllLanes, start, i + 1));
  };
  const unsigned crowded = __ballot_sync(kAllLanes, lane < kTableWarps && next - start >= kCrowded);
  const Segment segment = segment_of(warp);
  add_tokens(segment.begin, segment.head, sum);
  if ((crowded >> warp) % 2 == 0) add_pieces(segment, 0, 1, sum);
  for (unsigned remaining = crowded; remaining != 0; remaining &= remaining - 1) {
    const int owner = __ffs(remaining) - 1;
    float part[4] = {};
    add_pieces(segment_of(owner), warp, kTableWarps, part);
    for (int k = 0; k < 4; ++k) parts[warp][k][lane] = part[k];
    __syncthreads();  // every warp has stored its part
    for (int i = 0; i < kTableWarps && warp == owner; ++i) {
      for (int k = 0; k < 4; ++k) sum[k] += parts[i][k][lane];
    }
    __syncthreads();  // the parts have been read, and those of the next row may replace them
  }
  add_tokens(segment.tail, segment.end, sum);
  if (v < sums.rows) columns.save(table + v * E, sum);
}

dim3 table_grid(const EmbedSums& sums, int rows) {
  return dim3(ceil_div(rows, kTableWarps), ceil_div(sums.E, TableColumns::kSpan));
}

}  // namespace

cudaError_t embed_keys(const Ids& ids, int T, int rows, void* keys, bool narrow,
                       cudaStream_t stream) {
  if (T == 0) return cudaSuccess;
  const auto launch_for = [&]<class Key>(Key* to) {
    return launch(embed_keys_kernel<Key>, ceil_div(T, kTableThreads), kTableThreads, stream, ids, T,
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
