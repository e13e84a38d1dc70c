// The Python module electra_fast._C: lists the kernels of csrc/ and registers them on request.

#include "module.h"

#include <pybind11/stl.h>

#include "registry.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Kernels of electra_fast written in C++ and CUDA";
  module.def("implemented", &electra_fast::implemented,
             "Return the (op, device) pairs that have a kernel in this library.");
  module.def("serve", &electra_fast::serve,
             "Register the kernel of (op, device) under a name, for tensors of a dispatch key.");
  for (const electra_fast::Part add : electra_fast::parts()) add(module);
}
