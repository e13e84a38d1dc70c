"""A provider is timed only after its results are checked.

The fused ops must pass `testing.check_op`, once each. Then every provider runs on the arguments that are
timed, without dropout, and is compared with the reference in float64 (`ref`):

    max |got - ref| <= 4 * max |low - ref| + max(4 * eps, roundings) * max |ref|

for each result and each gradient. `low` is the reference in the arguments' own dtype, and eps belongs to that
dtype. This is the error budget's rule with wider limits, because here a baseline does not set the scale of
its own error: twice the factor, and `roundings` of 2^-19, which is 16 float32 roundings, since a compiler may
sum in any order. At the sizes that only `mlm_head` has, `roundings` is 2^-16 for every provider except fused:
torch.compile sums the gradient of a bias over 2432 slots one after another, which is 90 roundings off. These
limits still detect a different computation, for example GELU's tanh form. Integers must be equal, unless a
baseline draws from another generator.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from electra_fast import reference, testing
from electra_fast.testing.examples import Example

FACTOR, ANY_ORDER, MANY_TERMS = 4.0, 2.0**-19, 2.0**-16
INT8 = 2.0**-4  # of the logits of a model of 12 layers with int8 weights and activations
Errors = dict[str, tuple[float, float]]  # max |got - ref| and the allowed error, by result or gradient
# Results of a baseline that may differ: it draws other random numbers, and rounding may change an arg-max.
FREE = {"samples", "correct"}
LACKING = {"correct", "lse"}  # not returned by other libraries' losses over the vocabulary
SLOTS = 1024  # masked slots per piece of `mlm_head`'s reference
SCORES = 2**26  # scores per piece of attention's reference, which holds 5.5 tensors of them: 3 GB in float64
QUERIES, KEYS = ("q", "qkv"), ("k", "v", "key_mask")  # with one row per sequence, or per token of one
Results = tuple[dict[str, Any], dict[str, Tensor]]  # results, gradients


class NoGradient(AssertionError):
    """No result of a function has a gradient, but the reference's results have."""


def check_kernel(op: str, function: Callable, args: dict[str, Any]) -> None:
    """Check a fused op against the reference on `testing`'s examples, in the dtype that is timed."""
    tensors = [x for x in args.values() if isinstance(x, Tensor)]
    dtypes = {x.dtype for x in tensors if x.is_floating_point()}  # none: mask_tokens, on all its examples
    _check_kernel(op, function, tensors[0].device.type, tuple(sorted(dtypes, key=str)) or None)


@functools.cache
def _check_kernel(op: str, function: Callable, device: str, dtypes: tuple | None) -> None:
    # A fixed seed, so that chance does not decide whether a provider is refused.
    testing.check_op(op, function, seed=0, device=device, dtypes=dtypes)


class Gate:
    """The reference's results of one call, with which the results of other providers are compared."""

    def __init__(self, op: str, args: dict[str, Any], gradients: tuple[str, ...]):
        args = args | {"dropout": 0.0} if "dropout" in args else args
        self.example = Example(op, "timed arguments", args, gradients)

    @functools.cached_property
    def definition(self) -> tuple[Results, Results]:
        """`ref` and `low` of the module's rule, each with gradients."""
        cut = {"mlm_head": pieces, "attention": sequences, "attention_qkv": sequences}
        define = cut.get(self.example.op, whole)
        return define(self.example.to(torch.float64)), define(self.example)

    def check(self, function: Callable, roundings: float = ANY_ORDER, backward: bool = True) -> Errors:
        """Return the errors of `function`; raise AssertionError if it does other work than the reference.

        Without `backward` the gradients are not compared.
        """
        args = self.example.args
        if self.example.op == "mask_tokens":
            check_masking(args, function(**args))
            return {}
        wanted = self.example if backward else replace(self.example, gradients=())
        got, got_gradients = testing.run(function, wanted)
        (ref, ref_gradients), (low, low_gradients) = self.definition
        for name in ref:
            assert name in got or name in LACKING, f"{name}: missing"
        errors: Errors = {}
        for name in (name for name in ref if name in got and name not in FREE):
            used = args["weights"] != 0 if name == "lse" else ...  # unused slots are undefined
            if ref[name].is_floating_point():
                close = (x[name][used] for x in (got, ref, low))
                errors[name] = check_close(name, *close, self.example, roundings)
            else:
                assert torch.equal(got[name], ref[name]), f"{name}: differs from the reference"
        if "samples" in ref:
            samples = got["samples"]
            assert samples.shape == args["targets"].shape, f"samples: shape {list(samples.shape)}"
            inside = (samples >= 0) & (samples < len(args["table"]))
            assert inside.all(), "samples: outside the vocabulary"
        if backward:
            if ref_gradients and not got_gradients:
                raise NoGradient("its results have no gradient")
            assert set(got_gradients) == set(ref_gradients), f"gradients of {sorted(got_gradients)} only"
        for name, gradient in got_gradients.items():
            close = (gradient, ref_gradients[name], low_gradients[name], self.example, roundings)
            errors[f"gradient of {name}"] = check_close(f"gradient of {name}", *close)
        return errors


def whole(example: Example) -> Results:
    return testing.run(getattr(reference, example.op), example)


def pieces(example: Example) -> Results:
    """Run `mlm_head` on a few slots at a time, because all logits in float64 may not fit into memory.

    The loss is a mean, so each piece is weighted by its share of the weights.
    """
    slots = ("x", "targets", "weights")
    total = example.args["weights"].sum()
    rows, sums = {"samples": [], "lse": [], "x": []}, {"correct": 0, "loss": 0, "table": 0, "bias": 0}
    for part in zip(*(example.args[name].split(SLOTS) for name in slots), strict=True):
        piece = dict(zip(slots, part, strict=True))
        results, gradients = whole(replace(example, args=example.args | piece))
        share = piece["weights"].sum().double() / total
        shared = {name: share * y.double() for name, y in (gradients | {"loss": results["loss"]}).items()}
        found = results | shared
        rows = {name: [*parts, found[name]] for name, parts in rows.items()}
        sums = {name: y + found[name] for name, y in sums.items()}
    found = {name: torch.cat(parts) for name, parts in rows.items()} | sums
    return {name: found[name] for name in results}, {name: found[name] for name in gradients}


def sequences(example: Example) -> Results:
    """Run attention on a few sequences at a time: all scores of base 256x512 in float64 need 35 GB.

    The scores of a piece are computed again for its gradient, so memory holds those of one piece only.
    """
    define = getattr(reference, example.op)

    def by_sequence(**args):
        cu, x = args.get("cu_seqlens"), args.get("qkv", args.get("q"))  # [B, L, ..., H, D] or [T, ..., H, D]
        cu_k = args.get("cu_seqlens_k")
        B, L = x.shape[:2] if cu is None else (len(cu) - 1, args["max_seqlen"])
        K = args["k"].shape[1] if cu is None and "k" in args else args.get("max_seqlen_k", L)
        count = max(1, SCORES // (x.shape[-2] * L * max(K, 1)))
        o = []
        for b in range(0, B, count):
            end = min(b + count, B)
            given = {"cu_seqlens": cu, "cu_seqlens_k": cu_k}
            bounds = {name: x[b : end + 1] - x[b] for name, x in given.items() if x is not None}
            queries = slice(b, end) if cu is None else slice(*cu[[b, end]].tolist())
            keys = queries if cu_k is None else slice(*cu_k[[b, end]].tolist())
            rows = dict.fromkeys(QUERIES, queries) | dict.fromkeys(KEYS, keys)
            piece = {name: args[name][i] for name, i in rows.items() if args.get(name) is not None}
            settings = {"use_reentrant": False, "preserve_rng_state": False}
            o.append(checkpoint(define, **args | piece | bounds, **settings))
        return torch.cat(o)

    return testing.run(by_sequence, example)


def check_close(
    name: str,
    got: Tensor,
    ref: Tensor,
    low: Tensor,
    example: Example | None = None,
    roundings: float = ANY_ORDER,
) -> tuple[float, float]:
    """Apply the module's rule; return the error and the allowed error."""
    dtypes = [low.dtype]
    if example is not None:
        floats = [x for x in example.args.values() if isinstance(x, Tensor)]
        dtypes += [x.dtype for x in floats if x.is_floating_point()]
    relative = max(FACTOR * torch.finfo(dtype).eps for dtype in dtypes)
    assert got.shape == ref.shape, f"{name}: shape {list(got.shape)}, not {list(ref.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    got, low = got.double(), low.double()
    error = (got - ref).abs().max().item()
    relative = max(relative, roundings) * ref.abs().max().item()
    bound = FACTOR * (low - ref).abs().max().item() + relative
    assert error <= bound, f"{name}: {error:.2g} from the reference, {bound:.2g} is allowed"
    return error, bound


def check_masking(args: dict[str, Any], got: reference.MaskedTokens) -> None:
    """Refuse masks that are another amount of work: other counts, masked padding, repeated positions."""
    ids, allowed = args["ids"], args["candidates"] & args["key_mask"]
    ref = reference.mask_tokens(**args)
    used = got.weights != 0
    positions = got.positions[used].long()
    assert len(positions.unique()) == len(positions), "positions: a token is masked twice"
    assert allowed.flatten()[positions].all(), "positions: a masked token is not a candidate"
    assert torch.equal(got.targets[used], ids.flatten()[positions]), "targets: not the original ids"
    n, n_ref = (x.weights.view(len(ids), -1).sum(1) for x in (got, ref))
    assert (n - n_ref).abs().max() <= 1, "weights: too many or too few"  # 1: a half may round up or down
    changed = (got.ids != ids).flatten().nonzero()[:, 0]
    assert torch.isin(changed, positions).all(), "ids: an unmasked token is changed"
    assert (got.ids.flatten()[changed] == args["mask_id"]).all(), "ids: a changed token is not [MASK]"
