// What every <op>_op.cpp needs to hand tensors to a CUDA kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include "storage.h"

namespace electra_fast {

// `name` is the argument that an error names.
inline Storage storage_of(const at::Tensor& x, const char* op, const char* name) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype != at::kDouble, op, ": ", name,
                   " must be float32, float16 or bfloat16 for the CUDA kernel, got float64; "
                   "electra_fast.reference.",
                   op, " accepts it");
  if (dtype == at::kHalf) return Storage::kFloat16;
  return dtype == at::kBFloat16 ? Storage::kBFloat16 : Storage::kFloat32;
}

}  // namespace electra_fast
