// One token of a slot by the inverse CDF of softmax(logits / temperature), from the maxima and sums
// of blocks of its logits: one uniform picks the block by the masses in float64, a second look at
// the block's logits the token.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "philox.h"

namespace electra_fast {

constexpr int64_t kBlock = 128;  // tokens behind one maximum and one sum
constexpr double kNever =
    -std::numeric_limits<double>::infinity();  // the logit of what is not drawn

// mass_j = sum_j exp((maximum_j - top) / temperature) of each block, and their total.
struct Masses {
  std::vector<double> mass;
  double top = kNever, total = 0;

  Masses(const std::vector<double>& maxima, const std::vector<double>& sums, double temperature)
      : mass(maxima.size()) {
    for (const double m : maxima) top = m > top ? m : top;
    for (size_t j = 0; j < mass.size(); ++j) mass[j] = (maxima[j] - top) / temperature;
    at::vec::map<double>([](at::vec::Vectorized<double> z) { return z.exp(); }, mass.data(),
                         mass.data(), static_cast<int64_t>(mass.size()));
    for (size_t j = 0; j < mass.size(); ++j) total += mass[j] *= sums[j];
  }
};

struct Draw {
  uint64_t seed;
  uint32_t step;
  double temperature;
  bool disallow_correct;

  double uniform(int64_t m) const {
    const Words w = philox<10>(seed, {0, static_cast<uint32_t>(m), step, 1});
    return ((w.w0 >> 5) * 67108864.0 + (w.w1 >> 6)) * 0x1p-53;
  }

  // `look(j)` returns the logits of block j. `sums` are at the temperature. Rounding may leave no
  // token at which the cumulated masses pass u: then it is the last one that has a mass. In a row
  // of NaN no comparison holds, and it is token 0.
  template <class Look>
  int64_t sample(int64_t m, int64_t target, std::vector<double> maxima, std::vector<double> sums,
                 const Look& look) const {
    const int64_t barred = disallow_correct ? target : -1;
    const auto look_without = [&](int64_t j) {
      std::vector<double> logits = look(j);
      if (barred >= 0 && barred / kBlock == j) logits[barred % kBlock] = kNever;
      return logits;
    };
    if (barred >= 0) {  // what its block has left; a difference of sums would cancel
      const int64_t j = barred / kBlock;
      const std::vector<double> logits = look_without(j);
      maxima[j] = *std::max_element(logits.begin(), logits.end());
      sums[j] = 0;
      for (const double l : logits) {
        if (l > kNever) sums[j] += std::exp((l - maxima[j]) / temperature);
      }
    }
    const Masses blocks(maxima, sums, temperature);
    const double threshold = uniform(m) * blocks.total;
    double passed = 0, before = 0;
    int64_t block = 0;
    for (size_t j = 0; j < blocks.mass.size() && !(passed > threshold); ++j) {
      if (blocks.mass[j] > 0) block = j, before = passed, passed += blocks.mass[j];
    }
    // In the block's own scale, where the largest term is 1, however the second look rounded it.
    const double share = (threshold - before) / blocks.mass[block];
    const std::vector<double> logits = look_without(block);
    const Masses tokens(logits, std::vector<double>(logits.size(), 1), temperature);
    int64_t token = block * kBlock;
    double sum = 0;
    for (size_t i = 0; i < logits.size() && !(sum > share * tokens.total); ++i) {
      if (tokens.mass[i] > 0)
        token = block * kBlock + static_cast<int64_t>(i), sum += tokens.mass[i];
    }
    return token;
  }
};

}  // namespace electra_fast
