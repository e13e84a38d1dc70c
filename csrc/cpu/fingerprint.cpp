// A number that changes when weights change, for caches of packed weights. For what it sees, and
// what it does not see, see electra_fast/ops/encoder_layer.py.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../registry.h"

namespace electra_fast {
namespace {

// Four sums in turn: one sum would wait for each multiplication.
class Hash {
 public:
  void add(uint64_t value) {
    uint64_t& sum = sums_[next_++ % 4];
    sum = (sum ^ value) * 0x9e3779b97f4a7c15;
  }
  int64_t total() const {
    uint64_t sum = 0;
    for (const uint64_t s : sums_) sum = (sum ^ s ^ (s >> 32)) * 0xd6e8feb86659fd93;
    return static_cast<int64_t>(sum);
  }

 private:
  uint64_t sums_[4] = {1, 2, 3, 4};
  int next_ = 0;
};

// Add one element of each row and of each column of a matrix, all elements of a vector.
template <class Bits>
void add_values(const at::Tensor& x, Hash& hash) {
  const int64_t rows = x.dim() == 2 ? x.size(0) : 1, columns = x.size(-1);
  const int64_t row = x.dim() == 2 ? x.stride(0) : 0, column = x.stride(-1);
  const auto* data = static_cast<const Bits*>(x.const_data_ptr());
  if (x.numel() == 0) return;
  for (int64_t i = 0, r = 0, c = 0; i < std::max(rows, columns); ++i) {
    hash.add(data[r * row + c * column]);
    if (++r == rows) r = 0;
    if (++c == columns) c = 0;
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
