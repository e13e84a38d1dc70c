// Memory for a large result.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <sys/mman.h>

#include <cstdint>

namespace electra_fast {

// As at::empty_like. Pages that are new to the process take longer to map one by one than to write,
// so it asks for huge ones: a hint, which the system may ignore.
inline at::Tensor fresh_like(const at::Tensor& like) {
  const at::Tensor result = at::empty_like(like);
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + result.nbytes()) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return result;
}

}  // namespace electra_fast
