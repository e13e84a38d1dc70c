"""The properties of a sampler's distribution: the samples of a head are compared with its softmax."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from electra_fast.testing.budget import Judgement
from electra_fast.testing.distributions.statistics import chi_square, judged, plausible, seeded, z_test
from electra_fast.testing.judge import sample_bounds

NEVER, TARGET = 7, 3  # the id whose probability is 0, and that of every target
CASES = (
    ("flat logits", 0.02, {}),
    ("peaked logits", 1.0, {}),
    ("temperature 2", 1.0, {"temperature": 2.0}),
    ("disallow_correct", 0.5, {"disallow_correct": True}),
)
GAPS = (8.0, 12.0)


def sampler_properties(
    function: Callable,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    M: int = 4096,
    steps: int = 8,
    V: int = 257,
    specified: bool = False,
) -> Iterator[Judgement]:
    """Judge the samples of a head with the arguments of `ops.mlm_head` by name.

    Flat and peaked rows are tested by chi-square, the tail behind one token at two logit gaps by z. If
    `specified`, every sample must also be inside the float64 bracket of its uniform from Philox.
    """
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(V, 16, generator=generator).to(dtype)

    def draw(args: dict[str, Tensor], seed: int, **options) -> Tensor:
        """Return the samples of all steps, ``[steps, M]``."""
        found = []
        for step in range(steps):
            rng = torch.tensor([seed, step], device=device)
            with seeded(rng):
                out = function(**{name: x.to(device) for name, x in args.items()}, rng=rng, **options)
            found.append(out.samples.cpu().long())
        return torch.stack(found)

    for number, (name, scale, options) in enumerate(CASES):
        x = (scale * torch.randn(1, 16, generator=generator)).to(dtype).expand(M, 16).contiguous()
        bias = torch.zeros(V)
        bias[NEVER] = -1e4
        args = {"x": x, "table": table, "bias": bias, "targets": torch.full((M,), TARGET)}
        samples = functools.cache(functools.partial(draw, {**args, "weights": torch.ones(M)}, 9, **options))
        bounds = functools.partial(sample_bounds, **args, **options)
        found = {name: functools.partial(_distribution, samples, bounds, V)}
        found[f"{name}: a token of probability 0"] = functools.partial(_never, samples, NEVER)
        if "disallow_correct" in options:
            found[f"{name}: the target"] = functools.partial(_never, samples, TARGET)
        if specified:
            found[f"{name}: bracket of the uniform"] = functools.partial(_inside, samples, bounds)
        if number == 0:
            found["independence of slots"] = functools.partial(_alike, samples, bounds, 1)
            found["independence of steps"] = functools.partial(_alike, samples, bounds, 0)
        yield from judged("sampler", found)

    M = 4 * M  # for about 200 draws behind the larger gap
    args = {"x": torch.zeros(M, 16, dtype=dtype), "table": table, "weights": torch.ones(M)}
    args["targets"] = torch.zeros(M, dtype=torch.long)
    for gap in GAPS:

        def behind(gap=gap):
            bias = torch.zeros(V)
            bias[V // 2] = gap
            seen = (draw({**args, "bias": bias}, 11) != V // 2).sum().item()
            share, n = (V - 1) / (V - 1 + torch.tensor(gap).double().exp().item()), M * steps
            return z_test(seen, n * share, n * share * (1 - share))

        yield from judged("sampler", {f"tail behind a gap of {gap:.0f}": behind})


def _probabilities(bounds: Callable) -> Tensor:
    cdf, _, _ = bounds(rng=torch.tensor([9, 0]))
    return cdf[0].diff(prepend=cdf.new_zeros(1))


def _distribution(samples: Callable, bounds: Callable, V: int) -> Judgement | str:
    drawn, p = samples(), _probabilities(bounds)
    if not ((drawn >= 0) & (drawn < V)).all():
        return f"a sample outside of the vocabulary: {drawn.min()} to {drawn.max()}"
    counts = drawn.flatten().bincount(minlength=V)
    return plausible(chi_square(counts[p > 0], (p * drawn.numel())[p > 0]))


def _never(samples: Callable, token: int) -> str:
    count = int((samples() == token).sum())
    return f"it was drawn {count} times" if count else ""


def _alike(samples: Callable, bounds: Callable, axis: int) -> Judgement:
    """Count the samples that are equal to the next on an axis; such pairs overlap."""
    drawn, p = samples(), _probabilities(bounds)
    n, equal, three = drawn.shape[axis] - 1, (p**2).sum().item(), (p**3).sum().item()
    same = drawn.narrow(axis, 0, n) == drawn.narrow(axis, 1, n)
    variance = equal * (1 - equal) + 2 * (three - equal**2)
    return z_test(same.sum().item(), equal * same.numel(), variance * same.numel())


def _inside(samples: Callable, bounds: Callable) -> str:
    for step, drawn in enumerate(samples()):
        cdf, u, tol = bounds(rng=torch.tensor([9, step]))
        below = torch.where(drawn > 0, cdf.gather(1, (drawn - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        above = cdf.gather(1, drawn[:, None])[:, 0]
        if not ((below - tol <= u) & (u < above + tol)).all():
            return f"a sample of step {step} is outside"
    return ""
