// Memory of one call on the calling thread, not initialised and aligned for vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace electra_fast {

template <class W>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<W*>(::operator new(n * sizeof(W), kAlignment))) {}
  W* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(W* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<W, Free> data_;
};

}  // namespace electra_fast
