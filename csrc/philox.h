// Philox4x32-R, bit for bit that of Random123 (Salmon et al. 2011) and of Triton's tl.philox.
// No torch header here: CUDA kernels include it too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ELECTRA_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ELECTRA_FAST_HOST_DEVICE inline
#endif

namespace electra_fast {

struct Words {
  uint32_t w0, w1, w2, w3;
};

// The key is the seed's low and high half; a negative seed counts as its two's complement.
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

}  // namespace electra_fast
