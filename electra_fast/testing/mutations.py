"""Faults for correct implementations. A check that accepts one of them is useless."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from electra_fast.testing.examples import examples


class _Gradient(torch.autograd.Function):
    """The identity, with `fault` applied to its gradient."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return ctx.fault(dx), None


def _on_argument(name: str, fault: Callable[[Tensor], Tensor], function: Callable) -> Callable:
    @functools.wraps(function)
    def broken(**args):
        x = args.get(name)
        return function(**args if x is None else {**args, name: fault(x)})

    return broken


def _on_results(fault: Callable[[Tensor], Tensor], fields: set[str] | None, function: Callable) -> Callable:
    def broken(**args):
        result = function(**args)
        if isinstance(result, Tensor):
            return fault(result)
        found = {k: v for k, v in result._asdict().items() if v is not None}
        return result._replace(**{k: fault(v) for k, v in found.items() if fields is None or k in fields})

    return broken


def _scaled(x: Tensor) -> Tensor:
    return x * 1.01 if x.is_floating_point() else x


def _last_dropped(x: Tensor) -> Tensor:
    """Set the last elements to 0, as a grid with one tile too few would."""
    keep = torch.arange(x.numel(), device=x.device).view(x.shape) < x.numel() - max(x.numel() // 8, 1)
    return torch.where(keep, x, torch.zeros_like(x))


def _aligned_at_the_start(function: Callable) -> Callable:
    """Align the first query with the first key, as PyTorch does: later keys are not seen."""

    def broken(**args):
        L = args["q"].shape[1]
        if args.get("causal") and args.get("cu_seqlens") is None:
            args |= {name: args[name][:, :L] for name in ("k", "v", "key_mask") if args.get(name) is not None}
        return function(**args)

    return broken


def mutations(op: str) -> dict[str, Callable[[Callable], Callable]]:
    """Return by name functions that break an implementation of `op`: each maps it to a broken one."""
    names = {name for example in examples(op) for name, x in example.args.items() if isinstance(x, Tensor)}
    wanted = sorted({name for example in examples(op) for name in example.gradients})
    broken = {"the last results lost": functools.partial(_on_results, _last_dropped, None)}
    if wanted:
        broken["results scaled by 1.01"] = functools.partial(_on_results, _scaled, None)
    for name in wanted:
        for fault, change in (
            ("zero", torch.zeros_like),
            ("flipped", torch.neg),
            ("scaled by 1.01", _scaled),
        ):
            broken[f"gradient of {name} {fault}"] = functools.partial(
                _on_argument, name, lambda x, change=change: _Gradient.apply(x, change)
            )
    flags = {"key_mask", "candidates", "replaced", "noise", "positions", "weights", "targets"}
    for name in sorted(names & flags):
        broken[f"{name} shifted by one"] = functools.partial(_on_argument, name, lambda x: x.roll(1, -1))
    for name in sorted(names & {"bias", "norm_bias", "residual", "type", "position", "log_q"}):
        broken[f"{name} dropped"] = functools.partial(_on_argument, name, torch.zeros_like)
    if "cu_seqlens_k" in names:
        broken["causal, aligned at the start"] = _aligned_at_the_start
    if "rng" in names:
        broken["the next step's random numbers"] = functools.partial(
            _on_argument, "rng", lambda x: x + torch.tensor([0, 1], device=x.device)
        )
    return broken
