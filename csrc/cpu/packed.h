// The bounds of the sequences of a packed batch, cu_seqlens [B + 1], on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

namespace electra_fast {

// Return the bounds as int64. An unchecked wrong bound would make a kernel read and write memory
// outside its tensors.
inline at::Tensor checked_bounds(const char* op, const at::Tensor& cu_seqlens, int64_t T,
                                 const char* suffix = "") {
  const at::Tensor bounds = cu_seqlens.to(at::kLong).contiguous();
  const int64_t *first = bounds.const_data_ptr<int64_t>(), *end = first + bounds.numel();
  TORCH_CHECK_VALUE(*first == 0 && end[-1] == T && std::is_sorted(first, end), op, ": cu_seqlens",
                    suffix, " must rise from 0 to the ", T, " tokens, got ",
                    at::IntArrayRef(first, end));
  return bounds;
}

}  // namespace electra_fast
