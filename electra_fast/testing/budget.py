"""The error budget: the error of a result is compared with that of the same mathematics in plain PyTorch.

With `ref` the reference in float64 and `low` plain PyTorch in the dtype of the implementation,

    max |got - ref|      <= factor * (max |low - ref| + eps * max |ref|)
    ||got - ref|| / ||ref|| <= factor * max(||low - ref|| / ||ref||, eps / 4) + 4 eps(float32)

with factor 2 for results and 3 for gradients (flash-attention has the idea of the first line). The second
line finds a bias that is too small for the maximum but present in all elements. It always allows eps / 4, the
error of one rounding to the dtype of the result, even if plain PyTorch is exact or NaN.

The first line depends on one element, where plain PyTorch may be exact by chance. If the excess is at most
`LUCK`, or there are too few elements for the second line, the largest error of plain PyTorch on inputs that
are one rounding away counts too.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICAL = 32  # elements from which the L2 norm of a rounding error is meaningful
LUCK = 2  # up to this multiple of the first bound, plain PyTorch may have been exact by chance


class Judgement(NamedTuple):
    """One result or gradient of one example, compared with the reference."""

    name: str
    ratio: float  # error / budget, the larger quotient of the two lines above; right up to 1, NaN: not judged
    why: str = ""  # the error in words, empty if the result is right
    error: float = math.nan  # the two numbers of that line; NaN where there is only right or wrong
    budget: float = math.nan
    quantity: str = ""  # "loss", "gradient of x": the name without that of the example

    def assert_right(self) -> None:
        """Raise AssertionError if the result is wrong."""
        if self.why:
            raise AssertionError(self.why)


def judge(
    name: str, got: Tensor, ref: Tensor, low: Tensor, factor: float = 2.0,
    plain_error: float = 0.0, plain_norm: float = 0.0,
) -> Judgement:  # fmt: skip
    """Compare the error of `got` with `factor` times that of `low`; name the worst element.

    `plain_error` and `plain_norm` are the largest error of plain PyTorch and its relative L2 norm, if they
    are larger than those of `low`.
    """
    if got.shape != ref.shape:
        why = f"{name}: shape {list(got.shape)}, the reference has {list(ref.shape)}"
        return Judgement(name, math.inf, why)
    eps, most = torch.finfo(got.dtype).eps, torch.finfo(got.dtype).max
    got, ref, low = (x.detach().double().cpu() for x in (got, ref, low))
    # A number beyond the dtype's range becomes infinite; close to its end both roundings are right.
    beyond = ref.abs() > most * (1 + 16 * eps)
    near = ~beyond & (ref.abs() > most * (1 - 16 * eps))
    ref = torch.where(beyond | near & got.isinf(), ref.sign() * math.inf, ref)
    differ = got.isfinite() != ref.isfinite()
    if differ.any():
        index, wanted = differ.nonzero()[0].tolist(), ref[differ][0]
        return Judgement(name, math.inf, f"{name}: {got[differ][0]} at {index}, the reference has {wanted}")
    finite = ref.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), ref[~finite].nan_to_num()):
        return Judgement(name, math.inf, f"{name}: another infinity than the reference's")
    if not finite.any():
        return Judgement(name, 0.0, "", 0.0, 0.0)
    # `low` counts as exact if it is NaN and the reference a number, as for the mean of no element.
    low = torch.where(low.isfinite(), low, ref)
    got, ref, low = (torch.where(finite, x, 0) for x in (got, ref, low))

    error = (got - ref).abs()
    largest = max((low - ref).abs().max().item(), plain_error)
    bound = factor * (largest + eps * ref.abs().max()) + torch.finfo(torch.float32).tiny
    worst = torch.unravel_index(error.argmax(), error.shape)
    found = Judgement(name, (error.max() / bound).item(), "", error.max().item(), bound.item())
    if found.ratio > 1:
        found = found._replace(
            why=f"{name}: error {found.error:.3g} exceeds the budget {found.budget:.3g} at "
            f"{[int(i) for i in worst]}: got {got[worst]:.9g}, the reference has {ref[worst]:.9g}"
        )
    if ref.numel() >= STATISTICAL and ref.norm() > 0:
        relative = ((got - ref).norm() / ref.norm()).item()
        plain = max(((low - ref).norm() / ref.norm()).item(), plain_norm)
        allowed = factor * max(plain, eps / 4) + 4 * 2.0**-23
        why = found.why
        if relative > allowed:
            why = why or f"{name}: relative L2 error {relative:.3g} exceeds the budget {allowed:.3g}"
        if relative / allowed > found.ratio:
            found = found._replace(ratio=relative / allowed, error=relative, budget=allowed)
        found = found._replace(why=why)
    return found


def assert_within_budget(name: str, got: Tensor, ref: Tensor, low: Tensor, factor: float = 2.0) -> None:
    """Raise AssertionError if `got` is further from `ref` than `factor` times what `low` is."""
    judgement = judge(name, got, ref, low, factor)
    judgement.assert_right()
