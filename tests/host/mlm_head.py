"""mlm_head in csrc/cuda: examples of its kernels' own regimes, what else must hold, faults to be found."""

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


# Every warp goes through several groups of tokens, the gradient's rows through several blocks.
EXAMPLES = [example(5, 10007, temperature=0.9, disallow_correct=True)]


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

FAULTS = {
    "a warp reads sums that others have not left": (
        "  __syncthreads();  // each warp has left its sums; from",
        "  // from",
    ),
    "the loss is summed before each warp has left its part": (
        "  __syncthreads();  // each warp has left its sums\n",
        "",
    ),
    "a barrier that one warp alone reaches": (
        "  if (warp != 0) return;\n",
        "  if (warp != 0) return;\n  __syncthreads();\n",
    ),
    "the tail of the vocabulary dropped": (
        "base < span.end; base += kGroup) {\n    float l",
        "base + kGroup <= span.end; base += kGroup) {\n    float l",
    ),
    "the bias dropped": ("l[k] = v < end ? logits[v] + bias[v]", "l[k] = v < end ? logits[v]"),
    "a new maximum does not rescale the sum": (
        "sum = sum * expf(beta * (before - top)) + part",
        "sum = sum + part",
    ),
    "the target may be drawn": ("draw.disallow_correct ? target : -1", "-1"),
    "another stream": ("static_cast<uint32_t>(draw.rng[1]), 1}", "static_cast<uint32_t>(draw.rng[1]), 0}"),
    "a lane too few in the scan": ("if (lane >= d) x += below", "if (lane > d) x += below"),
    "the second look begins at the span": ("(goal - below) /", "goal /"),
    "a tie or a smaller logit beats the target": ("l[k] > l_target;", "l[k] != l_target;"),
    "unused rows are looked at": (
        "  if (w == 0) {\n    if (threadIdx.x",
        "  if (false) {\n    if (threadIdx.x",
    ),
    "no gradient through the target's logit": ("(v == target ? 1.0f : 0.0f)", "0.0f"),
    "a gradient without its weight": (": w * (p - ", ": (p - "),
    "blocks of the gradient overlap": ("blockIdx.y * kItems * kThreads", "blockIdx.y * kThreads"),
    "the mean over slots, not weights": ("sums[2] += weights[m]", "sums[2] += 1"),
}
