"""Whether the gradients of an op with dropout belong to the mask that its result has.

With the same seed an op with dropout is an ordinary function, so its gradients can be compared with central
differences. A backward pass that draws another mask has an error of about sqrt(2p) of the gradient's norm.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from electra_fast.testing.budget import Judgement
from electra_fast.testing.distributions.statistics import NotJudged, judged, seeded, within

P, DIRECTIONS, STEP = 0.25, 8, 2.0**-6
SHARE = 0.1  # of the norm of a gradient: another mask gives 0.7, central differences 0.001


def _arguments(op: str) -> tuple[dict[str, Tensor], dict]:
    """Return the arguments with a gradient and the others."""
    generator = torch.Generator().manual_seed(6)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if op == "attention":
        return {name: normal(2, 16, 2, 64) for name in "qkv"}, {}
    if op == "attention_qkv":
        return {"qkv": normal(2, 16, 3, 2, 64)}, {}
    if op == "add_norm":
        names = {"x": (2, 12, 128), "residual": (2, 12, 128), "weight": (128,), "bias": (128,)}
        return {name: normal(*shape) for name, shape in names.items()}, {"eps": 1e-5}
    names = {"word": (40, 128), "position": (12, 128), "type": (2, 128)}
    names |= {"norm_weight": (128,), "norm_bias": (128,)}
    ids = torch.randint(40, (2, 12), generator=generator)
    tables = {name: normal(*shape) for name, shape in names.items()}
    return tables, {"ids": ids, "type_ids": None, "position_ids": None, "eps": 1e-5}


def gradient_properties(op: str, function: Callable, device: str = "cpu") -> Iterator[Judgement]:
    """Judge the gradient of each float32 argument of an op with dropout."""
    leaves, rest = _arguments(op)
    leaves = {name: x.to(device) for name, x in leaves.items()}
    rest = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in rest.items()}
    rng = torch.tensor([3, 0], device=device)
    generator, weight = torch.Generator().manual_seed(7), []

    def normal(like):
        return torch.randn(like.shape, generator=generator).to(device)

    def terms(**args):
        with seeded(rng, 2):
            y = function(**args, **rest, dropout=P, rng=rng, stream=2)
        weight[:] = weight or [normal(y)]
        return weight[0].double() * y

    def judge(name):
        y, again = terms(**leaves), terms(**leaves)
        if not torch.equal(y, again):
            raise NotJudged("another mask for the same seed of torch: there is nothing to compare with")
        x = leaves[name].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(terms(**{**leaves, name: x}).sum(), x)
        off = 0.0
        for _ in range(DIRECTIONS):
            step = normal(x)
            high, low = (terms(**{**leaves, name: leaves[name] + s * step}) for s in (STEP, -STEP))
            off += ((high - low).sum() / (2 * STEP) - (gradient.double() * step).sum()).item() ** 2
        error, norm = (off / DIRECTIONS) ** 0.5, gradient.double().norm().item()
        error = error / norm if norm else math.inf
        return within(error, SHARE, f"differs from central differences by {error:.2g} of its norm")

    yield from judged("dropout", {f"gradient of {name}": lambda name=name: judge(name) for name in leaves})
