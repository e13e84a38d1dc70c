"""`numerics`: what the fused kernels cost in accuracy on anybody's weights, beside what PyTorch costs."""

import copy
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from electra_fast.ops import FUSED, REFERENCE, Ops
from electra_fast.testing.baseline import TORCH


class Row(NamedTuple):
    """Errors of one module against float64, ||got - exact|| / ||exact||; None where there is no such thing.

    Errors of an output are those of all before it too, and errors of a gradient those of all behind it.
    """

    module: str
    output: float | None  # PyTorch's
    output_fused: float | None
    gradient: float | None  # of the module's parameters, PyTorch's
    gradient_fused: float | None

    @property
    def ratio(self) -> float:
        """Return how many times PyTorch's error the fused one is, of output and gradient the larger."""
        pairs = ((self.output_fused, self.output), (self.gradient_fused, self.gradient))
        return max((fused / max(plain, 1e-12) for fused, plain in pairs if fused is not None), default=0.0)


class Numerics(NamedTuple):
    dtype: torch.dtype
    rows: list[Row]

    def __str__(self) -> str:
        """Return a table: modules that differ in a layer's number make one line, of the largest ratio."""
        alike: dict[str, list[Row]] = {}
        for row in self.rows:
            alike.setdefault(re.sub(r"\b\d+\b", "*", row.module), []).append(row)
        name = str(self.dtype).removeprefix("torch.")
        lines = [("module", "of", f"output, torch {name}", "fused", "gradient, torch", "fused", "ratio")]
        for module, rows in alike.items():
            row = max(rows, key=lambda row: row.ratio)
            errors = ("" if e is None else f"{e:.1e}" for e in row[1:])
            lines.append((module, str(len(rows)), *errors, f"{row.ratio:.2f}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
        )


def numerics(model: nn.Module, batch: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Numerics:
    """Compare the fused kernels and plain PyTorch, both in `dtype`, with float64, module by module.

    Args:
        model: a model of transformers that `electra_fast.hf.patch` serves, patched or not, or
            `electra_fast.Generator` or `Discriminator`. It is copied and stays as it is. The copies are in
            training, for a patched masked language model has a head of its own there, without dropout.
        batch: its keyword arguments. With labels the gradients are the loss's, without those of a fixed
            weighted sum of the first output.
        dtype: of autocast; torch.float32: no autocast.

    Returns:
        Numerics: the rows, and a table when printed. A ratio near 1 is what rounding alone gives.

    Raises:
        TypeError: a model without fused kernels, or one that draws what it is compared by, as `Electra` does.
    """
    exact, plain, fused = (_without_dropout(copy.deepcopy(model).train()) for _ in range(3))
    implement = _with_ops if any(hasattr(m, "ops") for m in model.modules()) else _with_patch
    implement(exact, REFERENCE)
    implement(plain, TORCH)
    implement(fused, FUSED)
    ref = _observe(exact.double(), {k: _double(x) for k, x in batch.items()}, None)
    torch_, ours = (_observe(m, batch, None if dtype == torch.float32 else dtype) for m in (plain, fused))

    def error(got: Tensor | None, exact: Tensor | None) -> float | None:
        if got is None or exact is None or got.shape != exact.shape:
            return None
        return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()

    rows = []
    for name in ref:
        triples = zip(ref[name], torch_[name], ours[name], strict=True)
        errors = [error(got, x) for x, *both in triples for got in both]
        rows.append(Row(name or type(model).__name__, *errors))
    return Numerics(dtype, rows)


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # a module of ours
            module.dropout = 0.0
    return model


def _double(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _with_ops(model: nn.Module, ops: Ops) -> None:
    if hasattr(model, "mask"):
        raise TypeError(
            "numerics: model must be one half, Generator or Discriminator, got Electra, whose samples "
            "depend on rounding; pass model.generator or model.discriminator"
        )
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops


def _with_patch(model: nn.Module, ops: Ops) -> None:
    from electra_fast import hf

    patched = hf.patch(model)
    if ops is not FUSED:
        patched.undo()


def _observe(model: nn.Module, batch: Mapping, dtype: torch.dtype | None) -> dict[str, tuple]:
    """Run a model and its backward pass; return by module its output and the gradient of its parameters."""
    outputs: dict[str, Tensor] = {}
    mask = batch.get("attention_mask", batch.get("key_mask"))

    def keep(name):
        def hook(module, args, y):
            y = y[0] if isinstance(y, tuple) else y
            if isinstance(y, Tensor):
                real = mask is not None and mask.dim() == 2 and y.shape[:2] == mask.shape
                outputs[name] = (y[mask.bool()] if real else y).detach()

        return hook

    # Not on submodules: before an op reads the parameters of one, it must be without hooks.
    named = [(name, m) for name, m in model.named_modules() if any(True for _ in m.children())]
    handles = [module.register_forward_hook(keep(name)) for name, module in named]
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype is not None):
        out = model(**batch)
    for handle in handles:
        handle.remove()
    loss = getattr(out, "loss", None)
    if loss is None:
        first = out if isinstance(out, Tensor) else out[0]
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(first.shape, generator=generator, dtype=torch.float32, device="cpu")
        if mask is not None and first.shape[:2] == mask.shape:
            weights = weights * mask.cpu().view(*mask.shape, *[1] * (first.dim() - 2))
        loss = (first.double() * weights.to(first.device)).sum()
    loss.backward()
    gradients = {}
    for name, module in named:
        parts = [p.grad.flatten().double() for p in module.parameters() if p.grad is not None]
        gradients[name] = torch.cat(parts) if parts else None
    return {name: (outputs.get(name), gradients[name]) for name, _ in named}
