// Implement an op whose schema Python defines (electra_fast/ops), and remember that it is done.
#pragma once

#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

namespace electra_fast {

// The (op, dispatch key) pairs that this library serves; Python registers Triton only for the rest.
inline std::vector<std::pair<std::string, std::string>>& implemented() {
  static std::vector<std::pair<std::string, std::string>> pairs;
  return pairs;
}

}  // namespace electra_fast

// One statement registers and records, so that the list cannot promise what the dispatcher lacks.
#define ELECTRA_FAST_IMPL(op, key, function)               \
  TORCH_LIBRARY_IMPL(electra_fast, key, library) {         \
    library.impl(#op, TORCH_FN(function));                 \
    ::electra_fast::implemented().emplace_back(#op, #key); \
  }
