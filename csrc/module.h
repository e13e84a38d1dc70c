// The parts of the Python module electra_fast._C. A file that lists a part is compiled or left out
// without a change of module.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace electra_fast {

using Part = void (*)(pybind11::module_& module);

inline std::vector<Part>& parts() {
  static std::vector<Part> all;
  return all;
}

}  // namespace electra_fast
