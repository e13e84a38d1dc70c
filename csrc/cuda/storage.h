// The dtypes in which kernels read and write tensors; what they compute with is float32.
#pragma once

namespace electra_fast {

enum class Storage { kFloat32, kFloat16, kBFloat16 };

}  // namespace electra_fast
