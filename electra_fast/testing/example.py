"""One call of an op with its inputs, and its variants: other memory layouts, empty batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from electra_fast.testing.layouts import LAYOUTS, copied

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RNG = (-7, 3)  # a negative seed, whose high half is all ones
# The elements of all but the last must differ. Equal rows of the table give ties, which rounding decides.
NEVER_EXPANDED = ("cu_seqlens", "cu_seqlens_k", "positions", "table")
KEYS = ("k", "v", "key_mask")  # of attention, which may have other numbers of tokens than the first argument
# The number of axes of an op's first argument after those of its tokens.
CHANNEL_AXES = {"linear": 1, "add_norm": 1, "bias_gelu": 1, "mlm_head": 1, "attention": 2, "attention_qkv": 3}


class Definition(NamedTuple):
    """What a function is compared with."""

    reference: Callable  # computes in the dtype of its inputs; it is run in float64
    low: Callable  # the same mathematics in plain PyTorch, run in the inputs' own dtype
    kinds: tuple[type, ...] = ()  # what may be returned, Tensor or a NamedTuple; empty: any tensors


@dataclass(frozen=True)
class Example:
    """The arguments of one call by name, and which of them need a gradient."""

    op: str
    name: str
    args: dict[str, Any]
    gradients: tuple[str, ...] = ()
    exact: bool = field(default=False, kw_only=True)  # every result is determined by integers
    layout: str = field(default="", kw_only=True)  # of the upstream gradients, a key of LAYOUTS
    plain: "Example | None" = field(default=None, kw_only=True)  # the contiguous example of this variant
    results: tuple[str, ...] | None = field(default=None, kw_only=True)  # those compared; None: all
    special: bool = field(default=False, kw_only=True)  # constant rows or extreme values
    extreme: bool = field(default=False, kw_only=True)  # not judged if plain PyTorch overflows
    stable: bool = field(default=False, kw_only=True)  # as far away as a rounding of the inputs is right
    nudge: float = field(default=0.0, kw_only=True)  # relative change of the upstream gradients
    definition: Definition | None = field(default=None, kw_only=True)  # None: that of the op

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> "Example":
        """Return the example with its floating tensors in `dtype`, on `device`, in the same memory layout."""

        def moved(x):
            if not isinstance(x, Tensor):
                return x
            return copied(x, dtype if x.is_floating_point() else None, device)

        plain = self.plain and self.plain.to(dtype, device)
        return replace(self, args={name: moved(x) for name, x in self.args.items()}, plain=plain)

    def as_stable(self) -> "Example":
        """Return the example for a function that may be as far away as a rounding of the inputs."""
        return replace(self, stable=True, plain=self.plain and self.plain.as_stable())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the call reads, by name."""
        unused = () if self.args.get("dropout", 1) else ("rng",)
        return {n: x for n, x in self.args.items() if isinstance(x, Tensor) and n not in unused}

    def laid_out(self, layout: str, *names: str) -> "Example":
        """Return the example with some arguments in another layout, by default all and the gradients."""
        legal = [n for n, x in self.tensors().items() if not (layout == "expanded" and n in NEVER_EXPANDED)]
        args = {name: LAYOUTS[layout](self.args[name]) for name in legal if not names or name in names}
        who = " and ".join(names) or "every argument"
        title = f"{self.name}, {who} {layout}"
        upstream = "" if names else layout
        return replace(self, name=title, args=self.args | args, layout=upstream, plain=self)


def _smallest(found: list[Example]) -> list[Example]:
    """Return small examples, float32 if possible, that together have every argument of the op."""

    def order(example):
        tensors = example.tensors()
        narrow = any(tensors[name].element_size() < 4 for name in example.gradients)
        return narrow, -len(tensors), sum(x.numel() for x in tensors.values())

    chosen: list[Example] = []
    for example in sorted(found, key=order):
        names = example.tensors().keys()
        large = min(x.numel() for x in example.tensors().values()) > 1
        if large and not any(names <= other.tensors().keys() for other in chosen):
            chosen.append(example)
    return chosen


def _without_tokens(example: Example) -> Iterator[Example]:
    """Yield the example with L = 0 and with B = 0, or without tokens or slots if these are one axis."""
    first = next(iter(example.args.values()))
    axes = first.dim() - CHANNEL_AXES.get(example.op, 0)
    cuts = {"no token": (slice(0),)}
    if axes == 2:
        cuts = {"L = 0": (slice(None), slice(0)), "no sequence": (slice(0),)}
    slots = ("positions", "samples", "weights") if "positions" in example.args else ()
    for name, cut in cuts.items():
        args = dict(example.args)
        for key, x in example.tensors().items():
            if key == "cu_seqlens":
                args[key] = torch.zeros_like(x)
            elif key in slots:
                args[key] = x[:0]
            elif x.shape[:axes] == first.shape[:axes] or (name == "no sequence" and key in KEYS):
                args[key] = x[cut]
        yield replace(example, name=f"{example.name}, {name}", args=args)


def variants(found: list[Example]) -> Iterator[Example]:
    """Yield variants of an op's examples: without tokens, and in other memory layouts."""
    chosen = _smallest(found)
    for example in chosen:
        yield from _without_tokens(example)
    for example in chosen:
        for layout in ("strided", "expanded", "offset"):
            yield example.laid_out(layout)
