// The Python module electra_fast._C: what csrc/ implements, and its registration on request.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "registry.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Kernels of electra_fast written in C++ and CUDA";
  module.def("implemented", &electra_fast::implemented,
             "Return the (op, device) pairs that this library can serve.");
  module.def("serve", &electra_fast::serve,
             "Register the kernel of (op, device) under a name, for tensors of a dispatch key.");
}
