// Device functions of both files of embed's kernels.
#pragma once

#include <cstdint>

#include "embed.h"

namespace electra_fast {

__device__ inline int64_t id_at(const Ids& ids, int64_t t) {
  return ids.is_int64 ? static_cast<const int64_t*>(ids.data)[t]
                      : static_cast<const int32_t*>(ids.data)[t];
}

__device__ inline bool is_row(int64_t id, int rows) { return id >= 0 && id < rows; }

}  // namespace electra_fast
