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

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from electra_fast import baseline, philox, reference
from electra_fast.ops import TORCH, Ops
from electra_fast.testing.example import Example
from electra_fast.testing.examples import examples
from electra_fast.testing.layouts import LAYOUTS, copied, with_layout_of

# Plain PyTorch with the dropout masks of the kernels, so that results can be compared.
_with_dropout = ("embed", "attention", "attention_qkv", "add_norm")
REPLAYED = TORCH._replace(
    **{op: functools.partial(getattr(baseline, op), drop=philox.drop) for op in _with_dropout}
)

STATISTICAL = 32  # elements from which the L2 norm of a rounding error is meaningful
LUCK = 2  # up to this multiple of the first bound, plain PyTorch may have been exact by chance
NEIGHBOURS = 8  # inputs one rounding away, on which plain PyTorch is run in that case


def run(function, example: Example) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Call `function` on an example; return its results and its gradients by name.

    The upstream gradients differ between elements, are the same for the same example, and are exact in every
    dtype, so that their rounding is not part of the error.
    """
    args = {n: copied(x).requires_grad_() if n in example.gradients else x for n, x in example.args.items()}
    before = {n: x.detach().clone() for n, x in args.items() if isinstance(x, Tensor)}
    results = {name: y for name, y in _named(example, function(**args)).items() if y is not None}
    for name, x in before.items():
        if not torch.equal(args[name].nan_to_num(), x.nan_to_num()):
            raise AssertionError(f"{example.op} ({example.name}): {name} must not change, got another value")
    generator = torch.Generator().manual_seed(len(example.name))
    wanted = [y for y in results.values() if isinstance(y, Tensor) and y.requires_grad]
    gradients = {}
    if wanted:
        upstream = [
            ((16 * torch.randn(y.shape, generator=generator)).round() / 16 + 0.5).to(y) for y in wanted
        ]
        if example.layout:
            upstream = [LAYOUTS[example.layout](g) if g.dim() else g for g in upstream]
        names = [name for name in example.gradients if args[name] is not None]
        found = torch.autograd.grad(wanted, [args[name] for name in names], upstream, allow_unused=True)
        gradients = {name: g for name, g in zip(names, found, strict=True) if g is not None}
    return {name: y.detach() if isinstance(y, Tensor) else y for name, y in results.items()}, gradients


def _named(example: Example, result) -> dict[str, Any]:
    """Return the results of an op by name; a plain tuple or list gets the names of the reference.

    Raises:
        AssertionError: the function returned something else.
    """
    kind = get_type_hints(getattr(reference, example.op)).get("return", Tensor)
    kinds = get_args(kind) or (kind,)  # `embed` returns two kinds, with and without its table
    tuples = [kind for kind in kinds if kind is not Tensor]
    if isinstance(result, Tensor) and Tensor in kinds:
        return {"result": result}
    if isinstance(result, tuple | list):
        for kind in tuples:
            required = len(kind._fields) - len(kind._field_defaults)
            fields = getattr(result, "_fields", kind._fields)
            if fields == kind._fields and required <= len(result) <= len(kind._fields):
                results = kind(*result)._asdict()
                for name, y in results.items():
                    if not isinstance(y, Tensor | None):  # None: this result was not asked for
                        got = type(y).__name__
                        raise AssertionError(f"{example.op}: {name} must be a Tensor, got {got}")
                return results
    wanted = [f"{kind.__name__}({', '.join(kind._fields)})" for kind in tuples]
    wanted = " or ".join(["a Tensor"] * (Tensor in kinds) + wanted)
    length = f" of {len(result)}" if isinstance(result, tuple | list) else ""
    got = "None" if result is None else type(result).__name__ + length
    raise AssertionError(f"{example.op}: must return {wanted}, got {got}")


class Judgement(NamedTuple):
    """One result or gradient of one example, compared with the reference."""

    name: str
    ratio: float  # error divided by budget, the larger quotient of the two lines above; right up to 1
    why: str = ""  # the error in words, empty if the result is right


def judge(
    name: str, got: Tensor, ref: Tensor, low: Tensor, factor: float = 2.0, plain_error: float = 0.0
) -> Judgement:
    """Compare the error of `got` with `factor` times that of `low`; name the worst element.

    `plain_error` is the largest error of plain PyTorch, if it is larger than that of `low`.
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
        return Judgement(name, 0.0)
    # `low` counts as exact if it is NaN and the reference a number, as for the mean of no element.
    low = torch.where(low.isfinite(), low, ref)
    got, ref, low = (torch.where(finite, x, 0) for x in (got, ref, low))

    error = (got - ref).abs()
    largest = max((low - ref).abs().max().item(), plain_error)
    bound = factor * (largest + eps * ref.abs().max()) + torch.finfo(torch.float32).tiny
    worst = torch.unravel_index(error.argmax(), error.shape)
    ratio, why = (error.max() / bound).item(), ""
    if ratio > 1:
        why = (
            f"{name}: error {error.max():.3g} exceeds the budget {bound:.3g} at {[int(i) for i in worst]}: "
            f"got {got[worst]:.6g}, the reference has {ref[worst]:.6g}"
        )
    if ref.numel() >= STATISTICAL and ref.norm() > 0:
        relative = ((got - ref).norm() / ref.norm()).item()
        allowed = factor * max(((low - ref).norm() / ref.norm()).item(), eps / 4) + 4 * 2.0**-23
        if relative > allowed:
            why = why or f"{name}: relative L2 error {relative:.3g} exceeds the budget {allowed:.3g}"
        ratio = max(ratio, relative / allowed)
    return Judgement(name, ratio, why)


def assert_within_budget(name: str, got: Tensor, ref: Tensor, low: Tensor, factor: float = 2.0) -> None:
    """Raise AssertionError if `got` is further from `ref` than `factor` times what `low` is."""
    judgement = judge(name, got, ref, low, factor)
    assert not judgement.why, judgement.why


def sample_bounds(x, table, bias, targets, rng, temperature=1.0, disallow_correct=False, weights=None):
    """Return float64 (cdf [M, V], u [M], tol [M]); sample s is right if cdf[s-1] - tol <= u < cdf[s] + tol.

    `tol` is the largest error of float32 accumulation of the logits, per row.
    """
    x, table, bias = (t.detach().double().cpu() for t in (x, table, bias))
    logits = (x @ table.T + bias) / temperature
    if disallow_correct:
        logits = logits.scatter(1, targets.cpu().long().clamp(min=0)[:, None], -torch.inf)
    scale = (x.abs() @ table.abs().T + bias.abs()).amax(1) / temperature
    return logits.softmax(-1).cumsum(-1), philox.uniforms(rng.cpu(), len(x)), 2e-7 + 2.0**-22 * scale


def assert_samples(example: Example, samples: Tensor) -> None:
    """Assert that the samples of `mlm_head` are inside the bracket of the float64 CDF for their uniforms."""
    args = example.args
    used = args["weights"].cpu() != 0
    cdf, u, tol = sample_bounds(**{k: v for k, v in args.items() if k not in ("weights", "return_table")})
    cdf = torch.cat([torch.zeros(len(cdf), 1), cdf], 1).double()
    s = samples.cpu().long()
    assert ((s >= 0) & (s < cdf.shape[1] - 1)).all(), (
        f"mlm_head: a sample outside of the vocabulary: {s.tolist()}"
    )
    assert (s[~used] == 0).all(), "mlm_head: a sample other than 0 in an unused slot"
    below, above = (cdf.gather(1, (s + i)[:, None])[:, 0] for i in (0, 1))
    wrong = used & ~((below - tol <= u) & (u < above + tol))
    assert not wrong.any(), (
        f"mlm_head: slot {wrong.nonzero()[0].item()} drew {s[wrong][0]}, not the inverse CDF of its uniform"
    )


def _asserted(name: str, check: Callable[[], None]) -> Judgement:
    """Return the judgement of a check that gives no number, only right or wrong."""
    try:
        check()
    except AssertionError as error:
        return Judgement(name, math.inf, str(error))
    return Judgement(name, 0.0)


def _assert_equal(name: str, got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype, f"{name}: dtype {got.dtype}, not {wanted.dtype}"
    assert torch.equal(got.cpu(), wanted.cpu()), f"{name}: differs from the reference"


def _plain_errors(example: Example) -> dict[str, float]:
    """Return the largest error of plain PyTorch on inputs that are one rounding away, by name."""
    generator, errors = torch.Generator().manual_seed(0), {}

    def moved(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        steps = torch.randint(-1, 2, x.shape, generator=generator)
        return with_layout_of(x * (1 + steps * torch.finfo(x.dtype).eps).to(x.dtype), x)

    for _ in range(NEIGHBOURS):
        near = replace(example, args={name: moved(x) for name, x in example.args.items()})
        refs = run(getattr(reference, example.op), near.to(torch.float64))
        lows = run(getattr(REPLAYED, example.op), near)
        for ref, low in zip(refs, lows, strict=True):
            for name in low.keys() & ref.keys():
                error = (low[name].double() - ref[name].double()).abs().nan_to_num(0, 0, 0)
                errors[name] = max(errors.get(name, 0.0), error.max().item() if error.numel() else 0.0)
    return errors


def _other_results(title: str, got: dict, wanted: dict) -> Judgement:
    return Judgement(title, math.inf, f"{title}: must return {', '.join(wanted)}, got {', '.join(got)}")


def judge_example(function, example: Example) -> list[Judgement]:
    """Compare `function` with the reference on one example; return one judgement per result and gradient.

    Errors that `function` raises are not caught.
    """
    got, got_gradients = run(function, example)
    title = f"{example.op} ({example.name})"
    found = []
    if example.exact:
        wanted, _ = run(getattr(reference, example.op), example)
        if got.keys() != wanted.keys():
            return [_other_results(title, got, wanted)]
        for field, y in wanted.items():
            name = f"{title}.{field}"
            found.append(_asserted(name, functools.partial(_assert_equal, name, got[field], y)))
        return found

    cpu = example.to(device="cpu")
    ref, ref_gradients = run(getattr(reference, example.op), cpu.to(torch.float64))
    low, low_gradients = run(getattr(REPLAYED, example.op), cpu)
    if got.keys() != ref.keys():
        return [_other_results(title, got, ref)]
    plain_errors = functools.cache(functools.partial(_plain_errors, cpu))

    def judged(name, field, got, ref, low, factor=2.0):
        first = judge(name, got, ref, low, factor)
        lucky = ref.numel() < STATISTICAL or first.ratio <= LUCK
        if not first.why or got.shape != ref.shape or not lucky or field == "lse":
            return first  # unused slots of `lse` may contain anything
        return judge(name, got, ref, low, factor, plain_errors()[field])

    for field, y in got.items():
        name = f"{title}.{field}"
        if y.dtype != low[field].dtype:
            why = f"{name} has dtype {y.dtype}, not {low[field].dtype}"
            found.append(Judgement(name, math.inf, why))
        elif field == "samples":
            found.append(_asserted(name, functools.partial(assert_samples, example, y)))
        elif field == "lse":  # unused slots have no meaning
            used = cpu.args["weights"] != 0
            found.append(judged(name, field, y.cpu()[used], ref["lse"][used], low["lse"][used]))
        else:
            found.append(judged(name, field, y, ref[field], low[field]))

    wanted = set(ref_gradients)
    if set(got_gradients) != wanted:
        why = f"{title}: gradients of {sorted(got_gradients)}, not {sorted(wanted)}"
        return [*found, Judgement(f"{title}: gradients", math.inf, why)]
    for field, g in got_gradients.items():
        name, dtype = f"{title}: gradient of {field}", example.args[field].dtype
        if g.dtype != dtype:
            why = f"{title}: the gradient of {field} has dtype {g.dtype}, not {dtype}"
            found.append(Judgement(name, math.inf, why))
            continue
        wanted_g = ref_gradients[field]
        found.append(judged(name, field, g, wanted_g, low_gradients.get(field, wanted_g), factor=3.0))
    return found


def _wrong(function, example: Example) -> bool:
    try:
        return any(judgement.why for judgement in judge_example(function, example))
    except Exception:  # an error is wrong too
        return True


def blame(function, example: Example) -> str:
    """Name the arguments whose memory layout makes an example wrong that is right with contiguous tensors."""
    plain, layout = example.plain, example.layout
    if plain is None or _wrong(function, plain):
        return ""
    alone = [name for name in plain.tensors() if _wrong(function, plain.laid_out(layout, name))]
    alone += ["the upstream gradient"] if _wrong(function, replace(plain, layout=layout)) else []
    return f"; contiguous tensors are right, {layout} are wrong: {', '.join(alone) or 'these together'}"


def check_example(function, example: Example) -> None:
    """Raise AssertionError for the first result or gradient that `judge_example` finds wrong."""
    for judgement in judge_example(function, example):
        assert not judgement.why, judgement.why


def check_function(call: str, op: str, function) -> None:
    """Check the name of an op and that a function is callable; `call` begins the error message."""
    if op not in Ops._fields:
        raise ValueError(f"{call}: op must be one of {', '.join(Ops._fields)}, got {op}")
    if not callable(function):
        raise TypeError(f"{call}: function must be callable, got {type(function).__name__}")


def check_op(op: str, function, *, seed: int | None = None, device: str = "cpu", dtypes=None) -> None:
    """Compare an implementation of an op with the reference: `check_op("rtd_loss", my_function)`.

    Args:
        op: a name in `electra_fast.ops.Ops`.
        function: has the signature of that op and is called with keywords.
        seed: the seed of the example inputs; None draws a new one, which is part of the error message.
        device: the device of the inputs.
        dtypes: the floating dtypes to try; None: float32, bfloat16 and float16.

    Raises:
        AssertionError: an integer result differs from the reference, or an error exceeds the budget; the
            message names the worst element.
    """
    check_function("check_op", op, function)
    seed = torch.seed() % 2**31 if seed is None else seed
    for example in examples(op, seed):
        used = {x.dtype for name, x in example.args.items() if name in example.gradients}
        if dtypes is not None and used and not used & set(dtypes):
            continue
        example = example.to(device=device)
        try:
            check_example(function, example)
        except AssertionError as error:
            raise AssertionError(f"{error}{blame(function, example)} [seed {seed}]") from error
