"""`numerics`: the rounding errors of the fused kernels and of PyTorch on the weights of a given model."""

import copy
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from electra_fast.errors import must
from electra_fast.ops import FUSED, REFERENCE, TORCH, Ops
from electra_fast.tables import text_table


class ModuleErrors(NamedTuple):
    """Errors of one module against float64, ||got - exact|| / ||exact||; None if there is nothing to compare.

    The error of an output includes those of all earlier modules, the error of a gradient those of all later
    ones.
    """

    module: str
    output: float | None  # of PyTorch
    output_fused: float | None
    gradient: float | None  # with respect to the module's parameters, of PyTorch
    gradient_fused: float | None

    @property
    def ratio(self) -> float:
        """Return the fused error divided by PyTorch's, the larger quotient of output and gradient."""
        pairs = ((self.output_fused, self.output), (self.gradient_fused, self.gradient))
        return max((fused / max(plain, 1e-12) for fused, plain in pairs if fused is not None), default=0.0)


class Numerics(NamedTuple):
    dtype: torch.dtype
    rows: list[ModuleErrors]

    def __str__(self) -> str:
        """Return a table with one line per module of a layer: the layer with the largest ratio."""
        groups: dict[str, list[ModuleErrors]] = {}
        for row in self.rows:
            groups.setdefault(re.sub(r"\b\d+\b", "*", row.module), []).append(row)
        name = str(self.dtype).removeprefix("torch.")
        lines = [("module", "of", f"output, torch {name}", "fused", "gradient, torch", "fused", "ratio")]
        for module, rows in groups.items():
            row = max(rows, key=lambda row: row.ratio)
            errors = ("" if e is None else f"{e:.1e}" for e in row[1:])
            lines.append((module, str(len(rows)), *errors, f"{row.ratio:.2f}"))
        return text_table(lines, right=range(1, 7))


def numerics(model: nn.Module, batch: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Numerics:
    """Compare the fused kernels and plain PyTorch, both in `dtype`, with float64, module by module.

    Args:
        model: a model of transformers that `electra_fast.hf.patch` supports, patched or not, or
            `electra_fast.Generator` or `Discriminator`. It is copied and not changed. The copies are in
            training mode without dropout, because a patched masked language model has another head there.
        batch: the model's keyword arguments. With labels the gradients are those of the loss, else those of a
            fixed weighted sum of the first output.
        dtype: the autocast dtype; torch.float32: no autocast.

    Returns:
        Numerics: the errors per module, printed as a table. Rounding alone gives a ratio near 1.

    Raises:
        TypeError: the model has no fused kernels, or it is an `Electra`, whose samples depend on rounding.
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
        rows.append(ModuleErrors(name or type(model).__name__, *errors))
    return Numerics(dtype, rows)


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # a module of electra_fast
            module.dropout = 0.0
    return model


def _double(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _with_ops(model: nn.Module, ops: Ops) -> None:
    if hasattr(model, "mask"):
        rule, got = "be one half, Generator or Discriminator", "Electra, whose samples depend on rounding"
        remedy = "pass model.generator or model.discriminator"
        raise TypeError(must("numerics: model", rule, got, remedy))
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops


def _with_patch(model: nn.Module, ops: Ops) -> None:
    from electra_fast import hf

    patched = hf.patch(model)
    if ops is not FUSED:
        patched.undo()


def _observe(model: nn.Module, batch: Mapping, dtype: torch.dtype | None) -> dict[str, tuple]:
    """Run a model forward and backward; return the output and the parameters' gradient of each module."""
    outputs: dict[str, Tensor] = {}
    mask = batch.get("attention_mask", batch.get("key_mask"))

    def keep(name):
        def hook(module, args, y):
            y = y[0] if isinstance(y, tuple) else y
            if isinstance(y, Tensor):
                real = mask is not None and mask.dim() == 2 and y.shape[:2] == mask.shape
                outputs[name] = (y[mask.bool()] if real else y).detach()

        return hook

    # Leaf modules get no hook: an op reads their parameters only if they have none.
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
