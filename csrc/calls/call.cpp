// Arguments from Python, second derivatives, and `bind` of the Python module.

#include "call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <deque>

#include "../module.h"

namespace electra_fast {

std::vector<Call>& calls() {
  static std::vector<Call> all;
  return all;
}

namespace {

const Call& call_of(const std::string& op) {
  for (const Call& call : calls())
    if (call.op == op) return call;
  TORCH_CHECK_VALUE(false, "bind: op must have a function in csrc/calls, got ", op);
}

// ---- Second derivatives -------------------------------------------------------------------------

// The first `count` tensors as a function of the other ones, which has no derivative.
struct Gradients : torch::autograd::Function<Gradients> {
  static variable_list forward(AutogradContext* ctx, const std::string& refusal, int64_t count,
                               at::TensorList tensors) {
    ctx->saved_data["refusal"] = refusal;
    return tensors.slice(0, count).vec();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    C10_THROW_ERROR(NotImplementedError, ctx->saved_data["refusal"].toStringRef());
  }
};

// ---- Arguments ----------------------------------------------------------------------------------

// A wrapper (of vmap or functionalization, a lazy conjugate) has a key above Dense, a sparse or
// quantized tensor has another one instead.
bool is_plain(const Tensor& x) {
  constexpr c10::DispatchKeySet ordinary =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  return (x.is_cpu() || x.is_cuda()) &&
         (x.key_set() - ordinary).highestFunctionalityKey() == c10::DispatchKey::Dense &&
         !x._fw_grad(/*level=*/0).defined();
}

constexpr size_t kMostArguments = 16;
using Objects = std::array<PyObject*, kMostArguments>;

// The signature of an op. The strings are those of Python's code, so they are usually found by
// their address.
struct Signature {
  const Call* call;
  std::vector<pybind11::object> names, defaults;  // a null default: the argument is required
  size_t positional;

  // Order the arguments by their names. Return whether the signature accepts them.
  bool order(PyObject* args, PyObject* kwargs, Objects& objects) const {
    const size_t given = PyTuple_GET_SIZE(args);
    if (given > positional) return false;
    objects.fill(nullptr);
    for (size_t i = 0; i < given; ++i) objects[i] = PyTuple_GET_ITEM(args, i);
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &name, &value);) {
      const size_t i = index_of(name);
      if (i == names.size() || objects[i]) return false;
      objects[i] = value;
    }
    for (size_t i = given; i < names.size(); ++i)
      if (!objects[i] && !(objects[i] = defaults[i].ptr())) return false;
    return true;
  }

 private:
  size_t index_of(PyObject* name) const {
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i].ptr() == name) return i;
    for (size_t i = 0; i < names.size(); ++i)
      if (PyUnicode_Compare(names[i].ptr(), name) == 0) return i;
    return names.size();
  }
};

bool transformed() {
  return c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         at::impl::torch_function_mode_enabled();
}

// call(args, kwargs), which Python's function of the op makes first.
PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const auto* signature = static_cast<const Signature*>(PyCapsule_GetPointer(self, nullptr));
  Objects objects;
  if (transformed() || !signature->order(arguments[0], arguments[1], objects))
    Py_RETURN_NOTIMPLEMENTED;
  return signature->call->run(objects.data());
  END_HANDLE_TH_ERRORS
}

pybind11::object bind(const std::string& op, const pybind11::tuple& names, size_t positional,
                      const pybind11::dict& defaults, const std::string& second_derivative) {
  static std::deque<Signature> signatures;  // they live as long as the process
  static PyMethodDef method = {"call", reinterpret_cast<PyCFunction>(&call), METH_FASTCALL,
                               "Call an op with (args, kwargs), or return NotImplemented."};
  auto& listed = const_cast<Call&>(call_of(op));
  TORCH_CHECK_VALUE(names.size() == listed.arguments && names.size() <= kMostArguments,
                    "bind: names must have the ", listed.arguments, " arguments of ", op, ", got ",
                    names.size());
  listed.second_derivative = second_derivative;
  Signature& signature = signatures.emplace_back(Signature{&listed, {}, {}, positional});
  for (const pybind11::handle name : names) {
    signature.names.push_back(pybind11::reinterpret_borrow<pybind11::object>(name));
    signature.defaults.push_back(defaults.contains(name) ? pybind11::object(defaults[name])
                                                         : pybind11::object());
  }
  const pybind11::capsule self(&signature);
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, self.ptr()));
}

const auto& part = parts().emplace_back([](pybind11::module_& module) {
  module.def(
      "calls",
      [] {
        std::vector<std::string> ops;
        for (const Call& call : calls()) ops.emplace_back(call.op);
        return ops;
      },
      "Return the ops that have a hot path.");
  module.def("bind", &bind,
             "Return the hot path of an op, given the names of its arguments, how many of them may "
             "be positional, their defaults, and the error of a second derivative.");
});

}  // namespace

Tensor autocast(const Tensor& x) {
  const at::DeviceType device = x.device().type();
  return at::autocast::is_autocast_enabled(device) ? x.to(at::autocast::get_autocast_dtype(device))
                                                   : x;
}

variable_list once_differentiable(const char* op, variable_list gradients,
                                  const variable_list& inputs) {
  if (!at::GradMode::is_enabled()) return gradients;
  variable_list tensors;
  for (const Tensor& x : gradients)
    if (x.defined()) tensors.push_back(x);
  const auto count = static_cast<int64_t>(tensors.size());
  for (const Tensor& x : inputs)
    if (x.defined()) tensors.push_back(x);
  const variable_list results =
      Gradients::apply(call_of(op).second_derivative, count, at::TensorList(tensors));
  auto result = results.begin();
  for (Tensor& x : gradients)
    if (x.defined()) x = *result++;
  return gradients;
}

bool read(PyObject* object, Tensor& x) {
  if (!THPVariable_CheckExact(object)) return false;
  x = THPVariable_Unpack(object);
  return is_plain(x);
}

bool read(PyObject* object, bool& x) {
  x = object == Py_True;
  return PyBool_Check(object);
}

bool read(PyObject* object, int64_t& x) {
  int overflow = 0;
  if (!PyLong_CheckExact(object)) return false;
  x = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool read(PyObject* object, double& x) {
  if (PyFloat_CheckExact(object)) {
    x = PyFloat_AS_DOUBLE(object);
    return true;
  }
  int64_t integer;
  if (!read(object, integer)) return false;
  x = static_cast<double>(integer);
  return true;
}

PyObject* wrapped(const MaybeTensor& result) {
  if (!result) Py_RETURN_NOTIMPLEMENTED;
  return THPVariable_Wrap(*result);
}

}  // namespace electra_fast
