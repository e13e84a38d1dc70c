// Launch a kernel without <<<>>>: the sources are then plain C++ too, and tests/host runs them on
// a CPU.
#pragma once

#include <cuda_runtime.h>

namespace electra_fast {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream,
                   const A&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}

}  // namespace electra_fast
