// The hot path of a public op: one call from Python that checks the arguments, casts and copies
// them as the Python path of electra_fast/ops does, and runs the operator under a gradient.
//
// A file of this folder has a function of each op that takes the arguments of its signature in
// order. The function returns nothing if an argument breaks a rule or is of a kind that only
// Python supports. Python then makes the same call on its own path, which alone has the sentences
// of the errors. So a rule that is missing here is a fault, and a rule that is too strict only
// costs time.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/python_headers.h>

#include <cmath>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace electra_fast {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- The operators ------------------------------------------------------------------------------

// electra_fast::`name` of the dispatcher, without its gradient. Python defines it before a call.
template <class Signature>
class Operator;
template <class R, class... A>
class Operator<R(A...)> {
 public:
  explicit Operator(const char* name) : name_(name) {}

  R operator()(A... arguments) {
    std::call_once(found_, [&] {
      const std::string name = std::string("electra_fast::") + name_;
      handle_ = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<R(A...)>();
    });
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return handle_->call(std::forward<A>(arguments)...);
  }

 private:
  const char* name_;
  std::once_flag found_;
  std::optional<c10::TypedOperatorHandle<R(A...)>> handle_;
};

// ---- The rules, as in electra_fast/ops/_check.py ------------------------------------------------

inline bool is_float(const Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

inline bool has(const Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes, const Tensor& like) {
  return x.scalar_type() == dtype && x.sizes() == sizes && x.device() == like.device();
}
inline bool has(const MaybeTensor& x, at::ScalarType dtype, at::IntArrayRef sizes,
                const Tensor& like) {
  return !x || has(*x, dtype, sizes, like);
}

// Whether a parameter has the size of the last axis of x, and the dtype of x or float32.
inline bool is_parameter_of(const Tensor& parameter, const Tensor& x) {
  return x.dim() > 0 &&
         (parameter.scalar_type() == at::kFloat || parameter.scalar_type() == x.scalar_type()) &&
         has(parameter, parameter.scalar_type(), x.sizes().slice(x.dim() - 1), x);
}

inline bool is_dropout(double p, const MaybeTensor& rng, int64_t stream, const Tensor& like) {
  return 0 <= p && p < 1 && 0 <= stream && stream >> 32 == 0 && (p == 0 || rng) &&
         has(rng, at::kLong, {2}, like);
}

inline MaybeTensor contiguous(const MaybeTensor& x) { return x ? MaybeTensor(x->contiguous()) : x; }

// x in the autocast dtype of its device, if autocast is enabled.
Tensor autocast(const Tensor& x);

// ---- The gradient -------------------------------------------------------------------------------

inline bool requires_grad(const Tensor& x) { return x.requires_grad(); }
inline bool requires_grad(const MaybeTensor& x) { return x && x->requires_grad(); }
template <class... T>
bool need_gradient(const T&... inputs) {
  return at::GradMode::is_enabled() && (requires_grad(inputs) || ...);
}

// PyTorch saves an absent tensor as an undefined one.
inline Tensor to_save(const MaybeTensor& x) { return x.value_or(Tensor()); }
inline MaybeTensor maybe(const Tensor& x) { return x.defined() ? MaybeTensor(x) : std::nullopt; }

// The gradients of an op, which depend on `inputs`. A second derivative raises the error that
// electra_fast/ops/_transforms.py words.
variable_list once_differentiable(const char* op, variable_list gradients,
                                  const variable_list& inputs);

// ---- The call from Python -----------------------------------------------------------------------

// Reads Python objects and calls the function of an op; NotImplemented if that returns nothing.
using Run = PyObject* (*)(PyObject* const* arguments);

struct Call {
  const char* op;
  size_t arguments;
  Run run;
  std::string second_derivative;  // the sentence of its refusal
};
std::vector<Call>& calls();

// Read an argument, and return whether its type is one that C++ supports.
bool read(PyObject* object, Tensor& x);
bool read(PyObject* object, bool& x);
bool read(PyObject* object, int64_t& x);
bool read(PyObject* object, double& x);
template <class T>
bool read(PyObject* object, std::optional<T>& x) {
  return object == Py_None || read(object, x.emplace());
}

PyObject* wrapped(const std::optional<Tensor>& result);

// Releases the lock of Python's interpreter. pybind11 has such a class, but each file that includes
// its headers takes seconds longer to compile.
class ReleasedLock {
 public:
  ReleasedLock() : thread_(PyEval_SaveThread()) {}
  ~ReleasedLock() { PyEval_RestoreThread(thread_); }
  ReleasedLock(const ReleasedLock&) = delete;

 private:
  PyThreadState* thread_;
};

template <auto function>
struct Caller;
template <class... A, MaybeTensor (*function)(A...)>
struct Caller<function> {
  static constexpr size_t kArguments = sizeof...(A);

  static PyObject* run(PyObject* const* objects) {
    return run(objects, std::make_index_sequence<kArguments>());
  }

 private:
  template <size_t... i>
  static PyObject* run(PyObject* const* objects, std::index_sequence<i...>) {
    std::tuple<std::decay_t<A>...> arguments;
    MaybeTensor result;
    if ((read(objects[i], std::get<i>(arguments)) && ...)) {
      const ReleasedLock other_threads_may_run;
      result = std::apply(function, arguments);
    }
    return wrapped(result);
  }
};

}  // namespace electra_fast

// List the function `op` as the hot path of the public op of its name.
#define ELECTRA_FAST_CALL(op)                                    \
  [[maybe_unused]] static const auto& op##_call_listed =         \
      ::electra_fast::calls().emplace_back(::electra_fast::Call{ \
          #op, ::electra_fast::Caller<&op>::kArguments, ::electra_fast::Caller<&op>::run, ""});
