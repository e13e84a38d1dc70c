// Launches compiled Triton kernels through the CUDA driver, without Triton's binder, which is
// Python.
//
// A compiled kernel is found by a key. It has the dtype, the device and the alignment of each
// tensor, what Triton asks about each integer, the value of each constant, and the identity of the
// objects around the call. So calls that Triton compiles differently have different keys; two keys
// may lead to the same kernel. `kernels/_launch.py` fills the table and decides when it may be
// used.
#include <dlfcn.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <tuple>
#include <unordered_map>

#include "module.h"

namespace py = pybind11;

namespace electra_fast {
namespace {

// cuLaunchKernel: function, grid, block, bytes of shared memory, stream, parameters, extra options.
using LaunchKernel = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                             unsigned, void*, void**, void**);

constexpr std::size_t MOST = 64;  // parameters of a kernel

struct Compiled {
  void* function;
  unsigned threads, shared;
  // One letter per flattened argument: p, l and i are passed as 64, 64 and 32 bits, f as float32,
  // and an argument with the letter c was a constant of the compilation.
  std::string types;
  py::object alive;  // the objects whose addresses are in the key
};

// Never destroyed, because Python has ended before static objects are.
std::unordered_map<std::string, Compiled>& table() {
  static auto& all = *new std::unordered_map<std::string, Compiled>;
  return all;
}

LaunchKernel driver() {
  static const auto function = [] {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    return library ? reinterpret_cast<LaunchKernel>(dlsym(library, "cuLaunchKernel")) : nullptr;
  }();
  return function;
}

// The key of a call, and the value of each flattened argument.
struct Call {
  std::string key;
  std::array<std::uint64_t, MOST> values;
  std::size_t count = 0;
  bool supported = true;  // false: only Triton launches this call

  Call(const py::tuple& context, const py::tuple& arguments, const py::dict& constants) {
    key.reserve(512);
    for (py::handle x : context) add(x.ptr());
    for (py::handle x : arguments) argument(x.ptr());
    for (auto [name, value] : constants) constant(name.ptr(), value.ptr());
  }

 private:
  template <class T>
  void add(T x) {
    key.append(reinterpret_cast<const char*>(&x), sizeof x);
  }

  template <class... T>
  void value(std::uint64_t bits, T... facts) {
    supported = supported && count < MOST;
    if (supported) values[count++] = bits;
    (add(static_cast<std::int8_t>(facts)), ...);
  }

  void argument(PyObject* x) {
    if (THPVariable_CheckExact(x)) {
      const at::Tensor& tensor = THPVariable_Unpack(x);
      const auto address = reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
      const at::Device device = tensor.device();
      value(address, 't', tensor.scalar_type(), device.type(), device.index(), address % 16 == 0);
    } else if (x == Py_None) {
      value(0, 'n');
    } else if (PyLong_CheckExact(x)) {
      int overflow = 0;
      const long long n = PyLong_AsLongLongAndOverflow(x, &overflow);
      supported = supported && overflow == 0;
      value(n, 'i', n == 1, n % 16 == 0, n == static_cast<std::int32_t>(n));
    } else if (PyFloat_CheckExact(x)) {
      value(std::bit_cast<std::uint32_t>(static_cast<float>(PyFloat_AS_DOUBLE(x))), 'f');
    } else if (PyTuple_CheckExact(x)) {
      add('(');
      for (py::handle item : py::reinterpret_borrow<py::tuple>(x)) argument(item.ptr());
      add(')');
    } else {
      supported = false;
    }
  }

  void constant(PyObject* name, PyObject* x) {
    int overflow = 0;
    const bool is_int = PyLong_Check(x);  // a bool too; the types are in the key
    const long long n = is_int ? PyLong_AsLongLongAndOverflow(x, &overflow) : 0;
    supported = supported && (is_int || x == Py_None) && overflow == 0;
    add(name), add(Py_TYPE(x)), add(n);
  }
};

bool launch(const py::tuple& context, const py::tuple& grid, std::uintptr_t stream,
            const py::tuple& arguments, const py::dict& constants) {
  Call call(context, arguments, constants);
  const auto found = call.supported ? table().find(call.key) : table().end();
  if (found == table().end()) return false;
  const Compiled& kernel = found->second;

  std::array<void*, MOST + 2> parameters;
  std::size_t n = 0;
  for (std::size_t i = 0; i < call.count; ++i)
    if (kernel.types[i] != 'c') parameters[n++] = &call.values[i];
  std::uint64_t no_scratch = 0;  // two pointers to memory that these kernels do not use
  parameters[n] = parameters[n + 1] = &no_scratch;

  std::array<unsigned, 3> size = {1, 1, 1};
  for (std::size_t i = 0; i < grid.size(); ++i) size.at(i) = grid[i].cast<unsigned>();
  if (size[0] == 0 || size[1] == 0 || size[2] == 0) return true;
  const auto [function, threads, shared] =
      std::tuple(kernel.function, kernel.threads, kernel.shared);
  const py::gil_scoped_release release;  // the driver waits if its queue is full
  return driver()(function, size[0], size[1], size[2], threads, 1, 1, shared,
                  reinterpret_cast<void*>(stream), parameters.data(), nullptr) == 0;
}

void remember(const py::tuple& context, const py::tuple& arguments, const py::dict& constants,
              std::uintptr_t function, unsigned threads, unsigned shared, const std::string& types,
              const py::object& compiled) {
  const Call call(context, arguments, constants);
  if (!call.supported) return;
  TORCH_CHECK_VALUE(types.size() == call.count, "remember: types must have ", call.count,
                    " letters, got ", types);
  table().insert_or_assign(call.key,
                           Compiled{reinterpret_cast<void*>(function), threads, shared, types,
                                    py::make_tuple(context, py::list(constants), compiled)});
}

const auto& part = parts().emplace_back([](py::module_& module) {
  module.def(
      "has_driver", [] { return driver() != nullptr; },
      "Return whether CUDA's driver is installed.");
  module.def(
      "launch", &launch,
      "Launch the kernel that `remember` was given for such a call. Return false if there is "
      "none, or if the driver refuses.");
  module.def("remember", &remember, "Enter the compiled kernel of a call into the table.");
});

}  // namespace

}  // namespace electra_fast
