// CUDA's float16 on the host: PyTorch's type, which rounds the same way.
#pragma once

#include <c10/util/Half.h>

using __half = c10::Half;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
