// Philox4x32-R: the same bits as Random123 (Salmon et al. 2011) and Triton's tl.philox.
// No torch header here: nvcc compiles this file too.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace electra_fast {

struct Words {
  uint32_t w0, w1, w2, w3;
};

// The key is the low and the high half of the seed, as two's complement if the seed is negative.
// R is 10 for masking and sampling, 7 for dropout.
template <int R>
ELECTRA_FAST_HOST_DEVICE Words philox(uint64_t seed, Words counter) {
  auto [c0, c1, c2, c3] = counter;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < R; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

// A double in [0, 1) from 53 bits.
ELECTRA_FAST_HOST_DEVICE double uniform(const Words& w) {
  return static_cast<double>((uint64_t{w.w0 >> 5} << 26) + (w.w1 >> 6)) * 0x1p-53;
}

// Dropout keeps an element if its 16 random bits reach this threshold (electra_fast/philox.py).
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::nearbyint(p * 65536));
}

}  // namespace electra_fast
