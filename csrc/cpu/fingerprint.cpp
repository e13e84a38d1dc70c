// A number that changes when weights change. For the changes that it sees and does not see, see
// electra_fast/ops/encoder_layer.py.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../registry.h"

namespace electra_fast {
namespace {

constexpr int64_t kSamples = 32;

class Hash {
 public:
  void add(uint64_t value) { sum_ = ((sum_ ^ value) * 0x9e3779b97f4a7c15) ^ (sum_ >> 32); }
  int64_t total() const { return static_cast<int64_t>(sum_); }

 private:
  uint64_t sum_ = 1;
};

// Add kSamples values, evenly spaced along each axis. More would cost time: each is a cache miss.
template <class Bits>
void add_values(const at::Tensor& x, Hash& hash) {
  const auto* data = static_cast<const Bits*>(x.const_data_ptr());
  for (int64_t i = 0; i < kSamples && x.numel() > 0; ++i) {
    int64_t offset = 0;
    for (int64_t axis = 0; axis < x.dim(); ++axis)
      offset += i * x.size(axis) / kSamples * x.stride(axis);
    hash.add(data[offset]);
  }
}

int64_t fingerprint(at::TensorList weights) {
  Hash hash;
  for (const at::Tensor& x : weights) {
    hash.add(reinterpret_cast<uint64_t>(x.const_data_ptr()));
    hash.add(x.is_inference() ? 0 : x._version());
    x.element_size() == 2 ? add_values<uint16_t>(x, hash) : add_values<uint32_t>(x, hash);
  }
  return hash.total();
}

}  // namespace

ELECTRA_FAST_IMPL_STRIDED(fingerprint, CPU, fingerprint)

}  // namespace electra_fast
