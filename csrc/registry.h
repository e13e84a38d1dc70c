// Kernels of ops whose schemas Python defines (electra_fast/ops). Loading the library only lists
// its kernels; Python chooses which to register.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKey.h>
#include <torch/library.h>

#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace electra_fast {

struct Kernel {
  std::string op, device;
  void (*register_in)(torch::Library& library, const char* name);
};

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

// The (op, device) pairs that have a kernel in this library.
inline std::vector<std::pair<std::string, std::string>> implemented() {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const Kernel& kernel : kernels()) pairs.emplace_back(kernel.op, kernel.device);
  return pairs;
}

// Register the kernel of (op, device) as electra_fast::`name` for tensors of dispatch key `key`.
inline void serve(const std::string& op, const std::string& device, const std::string& name,
                  const std::string& key) {
  static std::deque<torch::Library> libraries;  // a registration ends with its library object
  for (const Kernel& kernel : kernels()) {
    if (kernel.op != op || kernel.device != device) continue;
    libraries.emplace_back(torch::Library::IMPL, "electra_fast", c10::parseDispatchKey(key),
                           __FILE__, __LINE__);
    kernel.register_in(libraries.back(), name.c_str());
    return;
  }
  TORCH_CHECK_VALUE(false, "serve: ", op, " must be compiled for ", device, ", got no kernel");
}

inline void check_contiguous(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_contiguous(), op, ": tensors must be contiguous, got shape ", x.sizes(),
                    " with strides ", x.strides(), "; functions of electra_fast.ops make them so");
}
inline void check_contiguous(const char* op, const std::optional<at::Tensor>& x) {
  if (x) check_contiguous(op, *x);
}
template <class T>
void check_contiguous(const char*, const T&) {}

// `call` is `function`, which reads tensors through plain pointers, behind a check that they are
// contiguous.
template <auto function, const char* op>
struct OfContiguous;
template <class R, class... A, R (*function)(A...), const char* op>
struct OfContiguous<function, op> {
  static R call(A... arguments) {
    (check_contiguous(op, arguments), ...);
    return function(arguments...);
  }
};

}  // namespace electra_fast

// List a function that needs contiguous tensors as the kernel of (op, device).
#define ELECTRA_FAST_IMPL(op, device, function)                            \
  static constexpr char op##_##device##_name[] = #op;                      \
  static constexpr auto op##_##device##_checked =                          \
      &::electra_fast::OfContiguous<function, op##_##device##_name>::call; \
  ELECTRA_FAST_IMPL_STRIDED(op, device, op##_##device##_checked)

// List a function that accepts tensors of any strides.
#define ELECTRA_FAST_IMPL_STRIDED(op, device, function)                                        \
  [[maybe_unused]] static const auto op##_##device##_listed =                                  \
      &::electra_fast::kernels().emplace_back(                                                 \
          ::electra_fast::Kernel{#op, #device, [](torch::Library& library, const char* name) { \
                                   library.impl(name, TORCH_FN(function));                     \
                                 }});
