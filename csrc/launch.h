#pragma once

#include <pybind11/pybind11.h>

namespace electra_fast {

// Add `has_driver`, `launch` and `remember` to the Python module.
void bind_launch(pybind11::module_& module);

}  // namespace electra_fast
