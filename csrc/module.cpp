// The Python module electra_fast._C. Loading it registers every kernel of csrc/.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "registry.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of electra_fast written in C++ and CUDA";
  module.def("implemented", &electra_fast::implemented,
             "Return the (op, dispatch key) pairs that this library serves.");
}
