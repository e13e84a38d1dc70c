"""Compare a function with a definition on one example: its results, its gradients, its samples."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from electra_fast import philox
from electra_fast.errors import must
from electra_fast.testing.budget import LUCK, STATISTICAL, Judgement, judge
from electra_fast.testing.definition import definition_of, results_by_name
from electra_fast.testing.example import Example
from electra_fast.testing.layouts import LAYOUTS, copied, with_layout_of

FEW = 2  # such inputs for a stable example that is further away
NEIGHBOURS = 8  # inputs one rounding away, on which plain PyTorch is run in that case


class Overflow(NotImplementedError):
    """The values of an example are so large that nothing can be judged."""


class BadReference(ValueError):
    """The reference of an example fails, so nothing can be compared with it."""


def leaves(example: Example) -> dict[str, Any]:
    """Return the arguments of an example, of which those that need a gradient are copies without history."""
    return {n: copied(x).requires_grad_() if n in example.gradients else x for n, x in example.args.items()}


def forward(function, example: Example, args: dict[str, Any]) -> dict[str, Tensor]:
    """Call `function`; return the results that the example compares, by name."""
    results = results_by_name(example, function(**args))
    return {n: y for n, y in results.items() if example.results is None or n in example.results}


def upstream(example: Example, results: dict[str, Tensor]) -> list[Tensor]:
    """Return a gradient of each result that has a history.

    They differ between elements, are the same for the same example, and are exact in every dtype, so that
    their rounding is not part of the error.
    """
    generator = torch.Generator().manual_seed(len(example.name))
    wanted = [y for y in results.values() if y.requires_grad]
    found = [((16 * torch.randn(y.shape, generator=generator)).round() / 16 + 0.5).to(y) for y in wanted]
    if example.nudge:
        found = [g * (1 + example.nudge * torch.randint(-1, 2, g.shape, generator=generator)) for g in found]
    return [LAYOUTS[example.layout](g) if example.layout and g.dim() else g for g in found]


def backward(
    example: Example, args: dict[str, Any], results: dict[str, Tensor], upstream: list[Tensor], **options
) -> dict[str, Tensor]:
    """Return the gradients of the arguments by name; the options are those of `torch.autograd.grad`."""
    wanted = [y for y in results.values() if y.requires_grad]
    names = [name for name in example.gradients if args[name] is not None]
    if not wanted or not names:  # the function itself may have parameters
        return {}
    found = torch.autograd.grad(wanted, [args[n] for n in names], upstream, allow_unused=True, **options)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def run(function, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Call `function` on an example; return its results and its gradients by name.

    Autograd is on, whatever the caller or the function's module has set.

    Raises:
        AssertionError: the function returned something else, or an input has changed.
    """
    with torch.inference_mode(False), torch.enable_grad():
        args = leaves(example)
        before = {n: x.detach().clone() for n, x in args.items() if isinstance(x, Tensor)}
        results = forward(function, example, args)
        _assert_unchanged(example, args, before, "")
        gradients = backward(example, args, results, upstream(example, results))
        _assert_unchanged(example, args, before, " in the backward pass")
    return {name: y.detach() for name, y in results.items()}, gradients


def _assert_unchanged(example: Example, args: dict[str, Any], before: dict[str, Tensor], when: str) -> None:
    for name, x in before.items():
        now = args[name].detach()
        if not torch.equal(now, x) and not ((now == x) | ((now != now) & (x != x))).all():
            rule = f"{name} must not change{when}, got another value"
            raise AssertionError(f"{example.op} ({example.name}): {rule}")


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
    if not ((s >= 0) & (s < cdf.shape[1] - 1)).all():
        raise AssertionError(f"mlm_head: a sample outside of the vocabulary: {s.tolist()}")
    if (s[~used] != 0).any():
        raise AssertionError("mlm_head: a sample other than 0 in an unused slot")
    below, above = (cdf.gather(1, (s + i)[:, None])[:, 0] for i in (0, 1))
    wrong = used & ~((below - tol <= u) & (u < above + tol))
    if wrong.any():
        slot = wrong.nonzero()[0].item()
        raise AssertionError(f"mlm_head: slot {slot} drew {s[slot]}, not the inverse CDF of its uniform")


def _asserted(name: str, check: Callable[[], None]) -> Judgement:
    """Return the judgement of a check that gives no number, only right or wrong."""
    try:
        check()
    except AssertionError as error:
        return Judgement(name, math.inf, str(error))
    return Judgement(name, 0.0)


def _equal(name: str, field: str, got: Tensor, wanted: Tensor) -> Judgement:
    why = ""
    if got.dtype != wanted.dtype:
        why = f"{name}: dtype {got.dtype}, not {wanted.dtype}"
    elif not torch.equal(got.cpu(), wanted.cpu()):
        why = f"{name}: differs from the reference"
    return Judgement(name, math.inf if why else 0.0, why, quantity=field)


def _plain_errors(
    example: Example, wanted: dict[str, Tensor], neighbours: int = NEIGHBOURS
) -> dict[str, tuple[float, float]]:
    """Return by name the largest error of plain PyTorch on inputs that are one rounding away.

    For a stable example, the second number is the largest relative L2 norm, and both include the change of
    the exact results `wanted` by that rounding, because a stable algorithm may be as far away as that.
    Otherwise the second number is 0.
    """
    generator, errors, stable = torch.Generator().manual_seed(0), {}, example.stable
    floats = [x.dtype for x in example.args.values() if isinstance(x, Tensor) and x.is_floating_point()]
    nudge = max((torch.finfo(dtype).eps for dtype in floats), default=0.0) if stable else 0.0

    def moved(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        steps = torch.randint(-1, 2, x.shape, generator=generator)
        return with_layout_of(x * (1 + steps * torch.finfo(x.dtype).eps).to(x.dtype), x)

    for _ in range(neighbours):
        near = replace(example, args={name: moved(x) for name, x in example.args.items()})
        exact = replace(near.to(torch.float64), nudge=nudge)
        refs = {**(found := run(definition_of(example).reference, exact))[0], **_gradients(found)}
        lows = {**(found := run(definition_of(example).low, near))[0], **_gradients(found)}
        for name in lows.keys() & refs.keys() & wanted.keys():
            differences = [lows[name].double() - refs[name].double()]
            differences += [refs[name].double() - wanted[name].double()] if stable else []
            for x in (difference.nan_to_num(0, 0, 0) for difference in differences):
                largest, relative = errors.get(name, (0.0, 0.0))
                norm = wanted[name].double().nan_to_num(0, 0, 0).norm().item()
                largest = max(largest, x.abs().max().item() if x.numel() else 0.0)
                relative = max(relative, x.norm().item() / norm) if stable and norm else relative
                errors[name] = largest, relative
    return errors


def _gradients(outcome: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the gradients of an outcome by the names that judgements have."""
    return {f"gradient of {name}": g for name, g in outcome[1].items()}


def defined(function, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a definition, whose errors are not those of the function that is compared."""
    try:
        return run(function, example)
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0]} ({example.name})"
        empty = any(not x.numel() for x in example.tensors().values())
        remedy = "declare supports={'empty': False}" if empty else ""
        rule = "run on every example"
        raise BadReference(must(f"{example.op}: the reference", rule, got, remedy)) from error


def _other_results(title: str, got: dict, wanted: dict) -> Judgement:
    return Judgement(title, math.inf, f"{title}: must return {', '.join(wanted)}, got {', '.join(got)}")


def judge_example(function, example: Example) -> list[Judgement]:
    """Compare `function` with the reference on one example; return one judgement per result and gradient.

    Errors that `function` raises are not caught.

    Raises:
        Overflow: the values of the example are extreme, and plain PyTorch overflows too.
    """
    got, got_gradients = run(function, example)
    title, definition = f"{example.op} ({example.name})", definition_of(example)
    if example.exact:
        wanted, _ = defined(definition.reference, example)
        if got.keys() != wanted.keys():
            return [_other_results(title, got, wanted)]
        return [_equal(f"{title}.{field}", field, got[field], y) for field, y in wanted.items()]

    cpu = example.to(device="cpu")
    ref, ref_gradients = defined(definition.reference, cpu.to(torch.float64))
    low, low_gradients = defined(definition.low, cpu)
    if got.keys() != ref.keys():
        return [_other_results(title, got, ref)]
    if example.extreme and not all(y.isfinite().all() for y in (*low.values(), *low_gradients.values())):
        raise Overflow("plain PyTorch overflows too")
    wanted_all = {**ref, **_gradients((ref, ref_gradients))}
    plain_errors = functools.cache(functools.partial(_plain_errors, cpu, wanted_all))

    def judged(name, field, got, ref, low, factor=2.0):
        first = judge(name, got, ref, low, factor)
        lucky = ref.numel() < STATISTICAL or first.ratio <= LUCK or example.stable
        if not first.why or got.shape != ref.shape or not lucky:
            return first
        few = example.stable and first.ratio > LUCK  # it may be as far away as any rounding moves the result
        return judge(name, got, ref, low, factor, *plain_errors(FEW if few else NEIGHBOURS).get(field, ()))

    found = []
    for field, y in got.items():
        name = f"{title}.{field}"
        if y.dtype != low[field].dtype:
            one = Judgement(name, math.inf, f"{name} has dtype {y.dtype}, not {low[field].dtype}")
        elif field == "samples":
            one = _asserted(name, functools.partial(assert_samples, example, y))
        elif not y.is_floating_point():
            one = _equal(name, field, y, ref[field])
        else:
            one = judged(name, field, y, ref[field], low[field])
        found.append(one._replace(quantity=field))

    wanted = set(ref_gradients)
    if set(got_gradients) != wanted:
        why = f"{title}: gradients of {sorted(got_gradients)}, not {sorted(wanted)}"
        return [*found, Judgement(f"{title}: gradients", math.inf, why, quantity="gradients")]
    for field, g in got_gradients.items():
        name, dtype = f"{title}: gradient of {field}", example.args[field].dtype
        if g.dtype != dtype:
            why = f"{title}: the gradient of {field} has dtype {g.dtype}, not {dtype}"
            one = Judgement(name, math.inf, why)
        else:
            wanted_g = ref_gradients[field]
            one = judged(
                name, f"gradient of {field}", g, wanted_g, low_gradients.get(field, wanted_g), factor=3.0
            )
        found.append(one._replace(quantity=f"gradient of {field}"))
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
