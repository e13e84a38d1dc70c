// Memory for a large result.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <sys/mman.h>

#include <cstdint>

namespace electra_fast {

// Pages that are new to the process take longer to map one by one than to write, so this asks for
// huge ones: a hint, which the system may ignore.
inline at::Tensor on_huge_pages(const at::Tensor& memory) {
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + memory.nbytes()) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return memory;
}

inline at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return on_huge_pages(at::empty(sizes, options));
}
inline at::Tensor fresh_like(const at::Tensor& like) { return on_huge_pages(at::empty_like(like)); }

}  // namespace electra_fast
