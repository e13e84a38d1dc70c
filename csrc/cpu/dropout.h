// Dropout on the CPU. Which elements of a row are kept is an integer function of (seed, step,
// dropout stream, row, column), the same on every backend (keep_mask in electra_fast/philox.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>

#include "../host_device.h"
#include "../philox.h"

namespace electra_fast {

class Dropout {
 public:
  Dropout(double p, const std::optional<at::Tensor>& rng, int64_t dropout_stream, int64_t columns)
      : p_(p),
        threshold_(static_cast<int32_t>(dropout_threshold(p))),
        dropout_stream_(static_cast<uint32_t>(dropout_stream)),
        batches_(ceil_div(columns, kColumns)) {
    if (p == 0) return;
    const int64_t* state = rng->const_data_ptr<int64_t>();
    seed_ = static_cast<uint64_t>(state[0]);
    step_ = static_cast<uint32_t>(state[1]);
  }

  bool active() const { return p_ > 0; }
  int64_t padded_columns() const { return batches_ * kColumns; }

  // factor[c] = 1 / (1 - p) if column c of the row is kept, else 0, for c < padded_columns().
  template <class W>
  void factors(int64_t row, W* factor) const {
    const W scale = static_cast<W>(1 / (1 - p_));
    for (int64_t batch = 0; batch < batches_; ++batch) {
      uint32_t words[4][kCalls];
      for (int j = 0; j < kCalls; ++j) {
        const Words w = philox<7>(seed_, {static_cast<uint32_t>(batch * kCalls + j),
                                          static_cast<uint32_t>(row), step_, dropout_stream_});
        words[0][j] = w.w0, words[1][j] = w.w1, words[2][j] = w.w2, words[3][j] = w.w3;
      }
      for (int first = 0; first < kCalls; first += 4, factor += 32) {
        // Column 8 i + 2 j + h has half h of word i of call j, so words [i][j] have the columns' 16
        // bits in the order of the columns.
        uint16_t bits[32];
        for (int i = 0; i < 4; ++i) std::memcpy(bits + 8 * i, words[i] + first, 16);
        for (int c = 0; c < 32; ++c) factor[c] = bits[c] >= threshold_ ? scale : 0;
      }
    }
  }

 private:
  // Calls and columns per batch: 4 calls give 32 columns, and 16 calls are vectorised best.
  static constexpr int kCalls = 16, kColumns = 8 * kCalls;

  double p_;
  int32_t threshold_;
  uint32_t dropout_stream_, step_ = 0;
  uint64_t seed_ = 0;
  int64_t batches_;
};

// A dropped element is 0 even if x is infinite or NaN.
template <class W>
W dropped(W x, W factor) {
  return factor == 0 ? 0 : x * factor;
}

}  // namespace electra_fast
