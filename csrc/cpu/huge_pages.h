// Memory for a large result, on huge pages.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <sys/mman.h>

#include <cstdint>

#include "../host_device.h"

namespace electra_fast {

// Ask the system, which may ignore it, for huge pages: mapping the small pages of new memory one by
// one takes longer than writing them. Small memory is rarely new, because malloc keeps it, and
// there the request costs more than it saves.
inline at::Tensor with_huge_pages(const at::Tensor& memory) {
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (memory.nbytes() < 4 * kHuge) return memory;
  const auto begin = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t first = round_up(begin, kHuge);
  const uintptr_t last = (begin + memory.nbytes()) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return memory;
}

inline at::Tensor huge_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return with_huge_pages(at::empty(sizes, options));
}
inline at::Tensor huge_empty_like(const at::Tensor& like) {
  return with_huge_pages(at::empty_like(like));
}

}  // namespace electra_fast
