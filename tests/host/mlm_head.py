"""mlm_head in csrc/cuda: an example for its kernels' regimes, further checks, and faults to detect."""

import torch

from electra_fast import testing
from electra_fast.testing.examples import Example

OP = "mlm_head"


def example(M, V, E=8, **options):
    g = torch.Generator().manual_seed(V)
    args = {"x": torch.randn(M, E, generator=g), "table": 0.3 * torch.randn(V, E, generator=g)}
    args |= {"bias": torch.randn(V, generator=g), "targets": torch.randint(V, (M,), generator=g)}
    args |= {"weights": torch.rand(M, generator=g) + 0.5, "rng": torch.tensor([5, 6]), **options}
    return Example(OP, f"M={M} V={V}", args, ("x", "table", "bias"))


# Every warp reads several groups of tokens, and several blocks compute a row of the gradient. Of the second
# example, a thread sums the losses of several slots.
EXAMPLES = [example(5, 10007, temperature=0.9, disallow_correct=True), example(600, 9)]


def check_a_target_outside_the_vocabulary_makes_its_row_nan(function):
    for dtype, bad in ((torch.int32, 9), (torch.int32, -1), (torch.int64, -1), (torch.int64, 2**32 + 1)):
        case = example(4, 9)
        case.args["targets"] = case.args["targets"].to(dtype)
        case.args["targets"][2] = bad
        results, gradients = testing.run(function, case)
        assert results["loss"].isnan() and results["lse"].isfinite().all()
        assert gradients["x"].isnan().any(1).tolist() == [False, False, True, False]
        assert results["samples"].dtype == dtype and (0 <= results["samples"]).all()


CHECKS = [check_a_target_outside_the_vocabulary_makes_its_row_nan]

SOURCES = ("mlm_head.cu", "warp.cuh")  # each fault is in one of them
FAULTS = {
    "a warp reads sums that other warps have not stored": (
        "  __syncthreads();  // every warp has stored its sums; after",
        "  // after",
    ),
    "the loss is summed before every warp has stored its part": (
        "  __syncthreads();  // every warp has stored its sums\n",
        "",
    ),
    "a thread counts only its last slot": (
        "sums[0] += static_cast<double>(weights[m])",
        "sums[0] = static_cast<double>(weights[m])",
    ),
    "only one warp reaches a barrier": (
        "  if (warp != 0) return;\n",
        "  if (warp != 0) return;\n  __syncthreads();\n",
    ),
    "the end of the vocabulary is left out": (
        "base < span.end; base += kGroup) {\n    float l",
        "base + kGroup <= span.end; base += kGroup) {\n    float l",
    ),
    "no bias": ("l[k] = v < end ? logits[v] + bias[v]", "l[k] = v < end ? logits[v]"),
    "a new maximum does not rescale the sum": (
        "sum = sum * expf(beta * (before - max)) + part",
        "sum = sum + part",
    ),
    "the target may be sampled": ("sampling.disallow_correct ? target : -1", "-1"),
    "the random numbers of masking": (
        "static_cast<uint32_t>(sampling.rng[1]), 1}",
        "static_cast<uint32_t>(sampling.rng[1]), 0}",
    ),
    "the scan has one lane too few": ("if (lane >= d) x += below", "if (lane > d) x += below"),
    "the goal is not relative to the span": ("(goal - below) /", "goal /"),
    "a smaller logit beats the target": ("l[k] > l_target;", "l[k] != l_target;"),
    "unused rows are read": (
        "  if (w == 0) {\n    if (threadIdx.x",
        "  if (false) {\n    if (threadIdx.x",
    ),
    "the gradient has no term of the target": ("(v == target ? 1.0f : 0.0f)", "0.0f"),
    "the gradient has no weight": (": w * (p - ", ": (p - "),
    "blocks of the gradient overlap": ("blockIdx.y * kItems * kThreads", "blockIdx.y * kThreads"),
    "the mean is over slots, not weights": ("sums[2] += weights[m]", "sums[2] += 1"),
}
