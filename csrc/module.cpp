// The Python module electra_fast._C: lists the kernels of csrc/, registers them on request, and
// launches those of Triton.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.h"
#include "registry.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Kernels of electra_fast written in C++ and CUDA";
  module.def("implemented", &electra_fast::implemented,
             "Return the (op, device) pairs that have a kernel in this library.");
  module.def("serve", &electra_fast::serve,
             "Register the kernel of (op, device) under a name, for tensors of a dispatch key.");
  electra_fast::bind_launch(module);
}
