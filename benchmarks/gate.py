"""No number without a right result: what is checked before a provider is timed.

The fused ops pass `testing.check_op`, once each. Every provider is then run on the arguments that are
timed, dropout off, and held against the reference in float64 (`ref`):

    max |got - ref| <= 4 * max |low - ref| + max(4 * eps, 2^-19) * max |ref|

for each result and each gradient; `low` is the reference in the arguments' own dtype, eps that dtype's.
It is the error budget's rule, wider because a baseline is not the scale of its own error here: twice
the factor, and 16 float32 roundings, since a compiler may add up thousands of terms in any order. That
is close enough to tell other work, GELU's tanh form say. Integers are equal, except where a baseline
draws from another generator.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from electra_fast import reference, testing
from electra_fast.testing.examples import Example

FACTOR, ANY_ORDER = 4.0, 2.0**-19
# Results of a baseline that differ by right: it draws otherwise, and rounding may turn an arg-max.
FREE = {"samples", "correct"}


def check_kernel(op: str, function: Callable, args: dict[str, Any]) -> None:
    """Hold a fused op against the reference on the harness's examples, in the dtype that is timed."""
    tensors = [x for x in args.values() if isinstance(x, Tensor)]
    dtypes = {x.dtype for x in tensors if x.is_floating_point()}
    _check_kernel(op, function, tensors[0].device.type, tuple(sorted(dtypes, key=str)))


@functools.cache
def _check_kernel(op: str, function: Callable, device: str, dtypes: tuple) -> None:
    # One seed, so that a number is refused for what the op does and not by chance.
    testing.check_op(op, function, seed=0, device=device, dtypes=dtypes)


def check_call(op: str, function: Callable, args: dict[str, Any], gradients: tuple[str, ...]) -> None:
    """Refuse `function` unless it does the reference's work on these arguments."""
    args = args | {"dropout": 0.0} if "dropout" in args else args
    example = Example(op, "timed arguments", args, gradients)
    if op == "mask_tokens":
        check_masking(args, function(**args))
        return
    got, got_gradients = testing.run(function, example)
    definition = getattr(reference, op)
    ref, ref_gradients = testing.run(definition, example.to(torch.float64))
    low, low_gradients = testing.run(definition, example)
    for name in set(ref) - FREE:
        used = args["weights"] != 0 if name == "lse" else ...  # an unused slot holds anything
        if ref[name].is_floating_point():
            check_close(name, got[name][used], ref[name][used], low[name][used], example)
        else:
            assert torch.equal(got[name], ref[name]), f"{name}: differs from the reference"
    if "samples" in ref:
        inside = (got["samples"] >= 0) & (got["samples"] < len(args["table"]))
        assert inside.all(), "samples: outside the vocabulary"
    assert set(got_gradients) == set(ref_gradients), f"gradients of {sorted(got_gradients)} only"
    for name, gradient in got_gradients.items():
        close = (gradient, ref_gradients[name], low_gradients[name], example)
        check_close(f"gradient of {name}", *close)


def check_close(name: str, got: Tensor, ref: Tensor, low: Tensor, example: Example | None = None):
    """Apply the rule at the top of this page."""
    dtypes = [low.dtype]
    if example is not None:
        floats = [x for x in example.args.values() if isinstance(x, Tensor)]
        dtypes += [x.dtype for x in floats if x.is_floating_point()]
    relative = max(FACTOR * torch.finfo(dtype).eps for dtype in dtypes)
    assert got.shape == ref.shape, f"{name}: shape {list(got.shape)}, not {list(ref.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    got, low = got.double(), low.double()
    error = (got - ref).abs().max().item()
    relative = max(relative, ANY_ORDER) * ref.abs().max().item()
    bound = FACTOR * (low - ref).abs().max().item() + relative
    assert error <= bound, f"{name}: {error:.2g} from the reference, {bound:.2g} is allowed"


def check_masking(args: dict[str, Any], got: reference.MaskedTokens) -> None:
    """Refuse masks that are not the same amount of work: other counts, padding, repeated places."""
    ids, allowed = args["ids"], args["candidates"] & args["key_mask"]
    ref = reference.mask_tokens(**args)
    used, place = got.weights != 0, got.positions[got.weights != 0].long()
    assert len(place.unique()) == len(place), "positions: one is masked twice"
    assert allowed.flatten()[place].all(), "positions: one may not be masked"
    assert torch.equal(got.targets[used], ids.flatten()[place]), "targets: not the original ids"
    n, n_ref = (x.weights.view(len(ids), -1).sum(1) for x in (got, ref))
    assert (n - n_ref).abs().max() <= 1, "weights: too many or too few"  # 1: a half, rounded otherwise
    changed = (got.ids != ids).flatten().nonzero()[:, 0]
    assert torch.isin(changed, place).all(), "ids: changed where nothing is masked"
    assert (got.ids.flatten()[changed] == args["mask_id"]).all(), "ids: something else than [MASK]"
