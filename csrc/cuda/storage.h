// The dtypes in which CUDA kernels read and write tensors. They compute in float32.
#pragma once

namespace electra_fast {

enum class Storage { kFloat32, kFloat16, kBFloat16 };

}  // namespace electra_fast
