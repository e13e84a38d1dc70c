// Sampling by the inverse CDF of softmax(logits / temperature), from the maximum and the sum of
// each block of logits. One uniform number first chooses the block, by the blocks' masses in
// float64, and then the token, by the logits of that block, which are computed again.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../philox.h"

namespace electra_fast {

constexpr int64_t kBlock = 128;  // tokens per block
// The logit of a token that must not be sampled.
constexpr double kNever = -std::numeric_limits<double>::infinity();

// mass_j = sums_j exp((maxima_j - max) / temperature) of each block j, and their total.
struct Masses {
  std::vector<double> mass;
  double max = kNever, total = 0;

  Masses(const std::vector<double>& maxima, const std::vector<double>& sums, double temperature)
      : mass(maxima.size()) {
    for (const double m : maxima) max = m > max ? m : max;
    for (size_t j = 0; j < mass.size(); ++j) mass[j] = (maxima[j] - max) / temperature;
    at::vec::map<double>([](at::vec::Vectorized<double> z) { return z.exp(); }, mass.data(),
                         mass.data(), static_cast<int64_t>(mass.size()));
    for (size_t j = 0; j < mass.size(); ++j) total += mass[j] *= sums[j];
  }
};

struct Sampler {
  uint64_t seed;
  uint32_t step;
  double temperature;
  bool disallow_correct;

  double draw(int64_t m) const {
    return uniform(philox<10>(seed, {0, static_cast<uint32_t>(m), step, 1}));
  }

  // Return the sample of slot m. `logits_of(j)` returns the logits of block j, and `sums` are those
  // at the temperature. If rounding leaves no token at which the cumulative mass exceeds u, the
  // sample is the last token whose mass is above 0. In a row of NaN every comparison is false, and
  // the sample is token 0.
  template <class LogitsOf>
  int64_t sample(int64_t m, int64_t target, std::vector<double> maxima, std::vector<double> sums,
                 const LogitsOf& logits_of) const {
    const int64_t banned = disallow_correct ? target : -1;
    const auto allowed_logits = [&](int64_t j) {
      std::vector<double> logits = logits_of(j);
      if (banned >= 0 && banned / kBlock == j) logits[banned % kBlock] = kNever;
      return logits;
    };
    if (banned >= 0) {  // sum its block again: a difference of sums would cancel
      const int64_t j = banned / kBlock;
      const std::vector<double> logits = allowed_logits(j);
      maxima[j] = *std::max_element(logits.begin(), logits.end());
      sums[j] = 0;
      for (const double l : logits) {
        if (l > kNever) sums[j] += std::exp((l - maxima[j]) / temperature);
      }
    }
    const Masses blocks(maxima, sums, temperature);
    const double threshold = draw(m) * blocks.total;
    double through = 0, before = 0;
    int64_t block = 0;
    for (size_t j = 0; j < blocks.mass.size() && !(through > threshold); ++j) {
      if (blocks.mass[j] > 0) block = j, before = through, through += blocks.mass[j];
    }
    // Relative to the block's own maximum: the largest term is 1 even if these logits are rounded
    // differently from the first ones.
    const double share = (threshold - before) / blocks.mass[block];
    const std::vector<double> logits = allowed_logits(block);
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
