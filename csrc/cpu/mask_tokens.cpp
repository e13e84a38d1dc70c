// Choose the tokens that are masked in each sequence (Clark et al. 2020, section 2). For the
// schema, the arguments and the results see electra_fast/ops/mask_tokens.py.
//
// Of the c candidates of a sequence, the k with the smallest Philox words are masked: an integer
// function of (seed, step, token), which does not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Load.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../philox.h"
#include "../registry.h"
#include "packed.h"

namespace electra_fast {
namespace {

using at::Tensor;

// Tokens per task: about 0.2 ms of work, which outweighs the cost of waking a thread.
constexpr int64_t kGrain = 8192;

// n * rate, with the rate in units of 2^-32. Unsigned, because with 2^31 tokens and rate 1 the
// rounding exceeds 2^63.
int64_t floor_count(int64_t n, uint64_t rate) { return static_cast<uint64_t>(n) * rate >> 32; }
int64_t round_count(int64_t n, uint64_t rate) {
  return (static_cast<uint64_t>(n) * rate + (uint64_t{1} << 31)) >> 32;
}

// The first token and the first slot of sequence b, in closed form: no sequence waits for the
// counts of the earlier ones.
struct Layout {
  int64_t L;                  // tokens of a padded sequence
  const int64_t* cu_seqlens;  // [B + 1], or null if sequences are padded
  uint64_t mask_rate;

  int64_t token(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : b * L; }
  int64_t slot(int64_t b) const {
    return cu_seqlens ? floor_count(cu_seqlens[b], mask_rate) + b
                      : b * std::max<int64_t>(1, round_count(L, mask_rate));
  }
};

struct Random {
  uint64_t seed;
  uint32_t step;

  Words operator()(int64_t t) const {
    return philox<10>(seed, {0, static_cast<uint32_t>(t), step, 0});
  }
};

// Leave in `chosen` the positions, in ascending order, of min(k, c) of the c candidates among
// `length` tokens.
void choose(const Random& random, const bool* candidates, int64_t first, int64_t length, int64_t k,
            std::vector<uint64_t>& chosen) {
  // A key is the random word above the position, so of equal words the lower position is chosen.
  // Keys are made for all tokens, because a loop without a branch is vectorised.
  chosen.resize(length);
  for (int64_t l = 0; l < length; ++l) {
    chosen[l] = uint64_t{random(first + l).w0} << 32 | static_cast<uint64_t>(l);
  }
  int64_t c = 0;
  for (int64_t l = 0; l < length; ++l) {
    chosen[c] = chosen[l];
    c += c10::load(candidates + l);
  }
  k = std::min(k, c);
  std::nth_element(chosen.begin(), chosen.begin() + k, chosen.begin() + c);
  chosen.resize(k);
  for (uint64_t& key : chosen) key &= 0xFFFFFFFF;
  std::sort(chosen.begin(), chosen.end());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_tokens_cpu(
    const Tensor& ids, const Tensor& candidates, const Tensor& rng,
    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& cu_seqlens,
    int64_t max_seqlen, int64_t mask_id, int64_t mask_rate, int64_t keep_rate) {
  const int64_t T = ids.numel(), L = ids.size(-1);
  const Tensor bounds = cu_seqlens ? checked_bounds("mask_tokens", *cu_seqlens, T) : Tensor();
  const int64_t B = cu_seqlens ? bounds.numel() - 1 : ids.size(0);
  const int64_t longest = cu_seqlens && B > 0 ? bounds.diff().max().item<int64_t>() : 0;
  TORCH_CHECK_VALUE(longest <= max_seqlen, "mask_tokens: max_seqlen must be at least ", longest,
                    ", got ", max_seqlen);
  const Layout layout{L, cu_seqlens ? bounds.const_data_ptr<int64_t>() : nullptr,
                      static_cast<uint64_t>(mask_rate)};
  const int64_t M = T == 0 ? 0 : layout.slot(B);

  const Tensor eligible = key_mask ? candidates.logical_and(*key_mask) : candidates;
  const Tensor real = key_mask && !cu_seqlens ? key_mask->sum(1) : Tensor();
  const Random random{static_cast<uint64_t>(rng.const_data_ptr<int64_t>()[0]),
                      static_cast<uint32_t>(rng.const_data_ptr<int64_t>()[1])};

  const Tensor masked = ids.clone();
  const Tensor positions = at::zeros({M}, ids.options()), targets = at::zeros({M}, ids.options());
  const Tensor weights = at::zeros({M}, ids.options().dtype(at::kFloat));

  AT_DISPATCH_INDEX_TYPES(ids.scalar_type(), "mask_tokens", [&] {
    const auto mask_sequences = [&](int64_t begin, int64_t end) {
      std::vector<uint64_t> chosen;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = layout.token(b), length = layout.token(b + 1) - first;
        const int64_t n = real.defined() ? real.const_data_ptr<int64_t>()[b] : length;
        const int64_t k = std::max<int64_t>(1, round_count(n, layout.mask_rate));
        choose(random, eligible.const_data_ptr<bool>() + first, first, length, k, chosen);

        int64_t slot = layout.slot(b);
        for (const uint64_t l : chosen) {
          const int64_t t = first + static_cast<int64_t>(l);
          index_t& id = masked.mutable_data_ptr<index_t>()[t];
          positions.mutable_data_ptr<index_t>()[slot] = static_cast<index_t>(t);
          targets.mutable_data_ptr<index_t>()[slot] = id;
          weights.mutable_data_ptr<float>()[slot] = 1;
          if (random(t).w1 >= static_cast<uint64_t>(keep_rate)) id = static_cast<index_t>(mask_id);
          ++slot;
        }
      }
    };
    at::parallel_for(0, B, std::max<int64_t>(1, kGrain * B / std::max<int64_t>(1, T)),
                     mask_sequences);
  });
  return {masked, positions, targets, weights};
}

}  // namespace

ELECTRA_FAST_IMPL(mask_tokens, CPU, mask_tokens_cpu)

}  // namespace electra_fast
