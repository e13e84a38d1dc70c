// Implement an op whose schema Python defines (electra_fast/ops). Loading the library only records
// its kernels; Python, which knows what else there is, asks for those that shall serve.
#pragma once

#include <c10/core/DispatchKey.h>
#include <torch/library.h>

#include <deque>
#include <string>
#include <utility>
#include <vector>

namespace electra_fast {

struct Kernel {
  std::string op, device;
  void (*join)(torch::Library& library, const char* name);
};

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> recorded;
  return recorded;
}

// The (op, device) pairs that this library can serve.
inline std::vector<std::pair<std::string, std::string>> implemented() {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const Kernel& kernel : kernels()) pairs.emplace_back(kernel.op, kernel.device);
  return pairs;
}

// Register the kernel of (op, device) as electra_fast::`name` for the tensors of `key`.
inline void serve(const std::string& op, const std::string& device, const std::string& name,
                  const std::string& key) {
  static std::deque<torch::Library> libraries;  // a registration lasts as long as its library
  for (const Kernel& kernel : kernels()) {
    if (kernel.op != op || kernel.device != device) continue;
    libraries.emplace_back(torch::Library::IMPL, "electra_fast", c10::parseDispatchKey(key),
                           __FILE__, __LINE__);
    kernel.join(libraries.back(), name.c_str());
    return;
  }
  TORCH_CHECK_VALUE(false, "serve: ", op, " must be compiled for ", device, ", got no kernel");
}

}  // namespace electra_fast

#define ELECTRA_FAST_IMPL(op, device, function)                                                \
  [[maybe_unused]] static const auto op##_##device##_recorded =                                \
      &::electra_fast::kernels().emplace_back(                                                 \
          ::electra_fast::Kernel{#op, #device, [](torch::Library& library, const char* name) { \
                                   library.impl(name, TORCH_FN(function));                     \
                                 }});
