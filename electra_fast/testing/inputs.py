"""Example inputs of any function: dtypes, block edges, empty axes, memory layouts and extreme values."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from electra_fast.errors import must
from electra_fast.testing.example import DTYPES, Example
from electra_fast.testing.examples import _ids, _normal
from electra_fast.testing.extremes import CONSTANTS
from electra_fast.testing.layouts import LAYOUTS

ODD = (11, 37, 5)  # the sizes of the first axes in most examples
SMALL = 3  # the size of the other axes, and of all axes but the one that an example varies
# The extreme values of an argument, by its dtype.
EXTREME = {torch.float32: (3e38, 1e30, 1e-40, 0), torch.bfloat16: (3e38,), torch.float16: (65504,)}


def _is_size(size: Any, least: int = 0) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= least


class Drawn:
    """An argument that is drawn from the seed. An axis is a name, whose size varies, or a fixed size."""

    dtype: torch.dtype | None = None

    def __init__(self, *axes: str | int):
        for axis in axes:
            if not isinstance(axis, str) and not _is_size(axis):
                raise ValueError(must(f"{type(self).__name__}: axes", "be names or sizes", repr(axis)))
        self.axes = axes

    def names(self) -> list[str]:
        """Return the names of the axes."""
        return [axis for axis in self.axes if isinstance(axis, str)]

    def shape(self, sizes: Mapping[str, int]) -> list[int]:
        return [sizes.get(axis, axis) for axis in self.axes]

    def draw(self, generator: torch.Generator, sizes: Mapping[str, int], dtype: torch.dtype | None) -> Tensor:
        raise NotImplementedError


class Floats(Drawn):
    """Normal numbers with outliers: `Floats("T", "W")`.

    Args:
        axes: names, or sizes that never change.
        scale: the standard deviation.
        dtype: the dtype in every example; None: that of the example.
    """

    def __init__(self, *axes: str | int, scale: float = 1.0, dtype: torch.dtype | None = None):
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(must("Floats: dtype", "be a floating dtype", dtype, "use Integers or Booleans"))
        super().__init__(*axes)
        self.scale, self.dtype = scale, dtype

    def draw(self, generator, sizes, dtype):
        return _normal(generator, *self.shape(sizes), scale=self.scale, dtype=self.dtype or dtype)


class Integers(Drawn):
    """Indices, small ones more often: `Integers("T", below="V")`.

    Args:
        axes: names, or sizes that never change.
        below: the integers are from 0 to `below` - 1; a number, or the name of an axis, which is never empty.
        dtype: their dtype.
    """

    def __init__(self, *axes: str | int, below: str | int, dtype: torch.dtype = torch.int64):
        if not isinstance(below, str) and not _is_size(below, least=1):
            raise ValueError(must("Integers: below", "be 1 or more, or the name of an axis", repr(below)))
        super().__init__(*axes)
        self.below, self.dtype = below, dtype

    def names(self):
        return [*super().names(), *([self.below] if isinstance(self.below, str) else [])]

    def draw(self, generator, sizes, dtype):
        return _ids(generator, self.shape(sizes), sizes.get(self.below, self.below), self.dtype)


class Booleans(Drawn):
    """Booleans, of which about this share is True: `Booleans("T", share=0.1)`."""

    def __init__(self, *axes: str | int, share: float = 0.5):
        super().__init__(*axes)
        self.share = share

    def draw(self, generator, sizes, dtype):
        return torch.rand(self.shape(sizes), generator=generator) < self.share


class _Maker:
    """Makes the examples of one call of `inputs`."""

    def __init__(
        self, arguments: Mapping[str, Any], listed: Mapping[str, tuple[int, ...]], rest: dict, seed: int
    ):
        self.arguments, self.listed, self.rest = arguments, listed, rest
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = {name: one for name, one in arguments.items() if isinstance(one, Drawn)}
        self.floats = {name: one for name, one in self.drawn.items() if isinstance(one, Floats)}
        self.axes = list(dict.fromkeys(axis for one in self.drawn.values() for axis in one.names()))
        _assert_legal(self, rest["gradients"])
        self.small = {axis: min(listed.get(axis, (SMALL,))) for axis in self.axes}
        self.odd = {**self.small, **dict(zip(self.axes, ODD, strict=False))}
        self.odd |= {axis: sizes[0] for axis, sizes in listed.items()}

    def __call__(self, title: str, dtype: torch.dtype | None, sizes: Mapping[str, int], **options) -> Example:
        args = {
            name: one.draw(self.generator, sizes, dtype) if isinstance(one, Drawn) else one
            for name, one in self.arguments.items()
        }
        return Example(name=_titled(title, dtype), args=args, **self.rest, **options)


def _titled(title: str, dtype: torch.dtype | None) -> str:
    return title if dtype is None else f"{title} {dtype}"


def _plain(make: _Maker, dtypes) -> Iterator[Example]:
    """Yield odd sizes, and the same with every tensor and upstream gradient in another layout."""
    for dtype in dtypes:
        plain = make("plain", dtype, make.odd)
        yield plain
        for layout in LAYOUTS:
            # The elements of a constant may have to differ.
            names = make.drawn if layout == "expanded" else plain.tensors()
            title = _titled(f"every tensor {layout}", dtype)
            yield replace(plain.laid_out(layout, *names), name=title, layout=layout)


def _edges(make: _Maker, dtypes, edges: Collection[int]) -> Iterator[Example]:
    """Yield each size of each axis in the first dtype, the largest in the others; and each axis empty."""
    around = {1, *(edge + i for edge in edges for i in (-1, 0, 1)), 2 * max(edges) + 1}
    for axis in make.axes:
        sizes = sorted(set(make.listed.get(axis, around)))
        for dtype in dtypes:
            for size in sizes if dtype == dtypes[0] else sizes[-1:]:
                yield make(f"{axis} = {size}", dtype, {**make.small, axis: size})
    never = {*make.listed, *(one.below for one in make.drawn.values() if isinstance(one, Integers))}
    for axis in make.axes:
        if axis not in never:
            yield make(f"{axis} = 0", dtypes[0], {**make.odd, axis: 0})


def _constant_rows(make: _Maker, dtypes) -> Iterator[Example]:
    """Yield floats that are constant along their last axis."""
    for dtype in dtypes:
        example = make("constant rows", dtype, make.odd, special=True)
        for name in make.floats:
            x = example.args[name]
            rows = CONSTANTS[torch.arange(prod(x.shape[:-1])) % len(CONSTANTS)]
            x.copy_(rows.view((*x.shape[:-1], 1)[: x.dim()]))
        yield example


def _extremes(make: _Maker, dtypes) -> Iterator[Example]:
    """Yield one argument after the other with the same magnitude in all elements, with both signs."""
    for name, one in make.floats.items():
        for dtype in dtypes if one.dtype is None else dtypes[:1]:
            for value in EXTREME.get(one.dtype or dtype, EXTREME[torch.float32]):
                example = make(f"|{name}| = {value:g}", dtype, make.odd, special=True, extreme=True)
                x = example.args[name]
                example.args[name] = torch.full_like(x, value).copysign(x)
                yield example


def _assert_legal(make: _Maker, gradients) -> None:
    """Check the arguments of `inputs` that depend on each other."""
    axes = ", ".join(make.axes) or "there is none"
    if not make.drawn:
        raise ValueError(must("inputs: arguments", "have Floats, Integers or Booleans", "constants only"))
    for axis in make.axes:
        if axis in make.arguments:
            rule, remedy = "have other names than the axes", "rename the axis or the argument"
            raise ValueError(must("inputs: arguments", rule, f"{axis} for both", remedy))
    for axis, sizes in make.listed.items():
        if axis not in make.axes:
            raise ValueError(must("inputs: sizes", f"have names of axes ({axes})", repr(axis)))
        if not sizes or not all(_is_size(size, least=1) for size in sizes):
            raise ValueError(must(f"inputs: sizes[{axis!r}]", "be one or more positive sizes", sizes))
    for name in gradients:
        if name not in make.floats:
            rule = f"name Floats ({', '.join(make.floats) or 'there are none'})"
            raise ValueError(must("inputs: gradients", rule, repr(name)))


def _listed(one: Any) -> tuple:
    """Return one element or several as a tuple."""
    return tuple(one) if isinstance(one, Collection) and not isinstance(one, str) else (one,)


def inputs(
    arguments: Mapping[str, Any], *, dtypes: torch.dtype | Collection[torch.dtype] = DTYPES,
    sizes: Mapping[str, int | Collection[int]] | None = None, edges: int | Collection[int] = (16, 64, 128),
    gradients: Collection[str] = (), name: str = "check", seed: int = 0,
) -> list[Example]:  # fmt: skip
    """Return examples of a function's arguments: about 60 for two axes, each of a few thousand elements.

        testing.inputs({"x": Floats("T", "W"), "weight": Floats("W"), "eps": 1e-5}, gradients=["x", "weight"])

    Odd sizes and every memory layout in every dtype; each axis around the edges of blocks, and empty, while
    the others are small; constant rows; and one argument after the other with extreme values.

    Args:
        arguments: by name, `Floats`, `Integers`, `Booleans`, or a constant of any type. Axes of the same name
            have the same size.
        dtypes: the dtypes of `Floats` without a dtype of their own. All edges are tried in the first one.
        sizes: the size or the sizes that an axis can have: ``{"W": 64, "D": (64, 128)}``. Such an axis is
            never empty.
        edges: the sizes of blocks. They, their neighbours, 1, and two of the largest and one are tried.
        gradients: the names of `Floats` whose gradients are compared.
        name: that of the function, for messages.
        seed: the seed of all random numbers.

    Raises:
        ValueError: an argument breaks these rules; the message names it.
    """
    for title, one in (("arguments", arguments), ("sizes", sizes or {})):
        if not isinstance(one, Mapping):
            raise ValueError(must(f"inputs: {title}", "be a dict", repr(one)))
    if isinstance(gradients, str):
        raise ValueError(must("inputs: gradients", "be a list of names", repr(gradients)))
    if not isinstance(seed, int):
        raise ValueError(must("inputs: seed", "be an integer", repr(seed)))
    dtypes, edges = _listed(dtypes), _listed(edges)
    if not dtypes or not all(isinstance(d, torch.dtype) and d.is_floating_point for d in dtypes):
        raise ValueError(must("inputs: dtypes", "be one or more floating dtypes", dtypes))
    if not edges or not all(_is_size(edge, least=2) for edge in edges):
        raise ValueError(must("inputs: edges", "be one or more sizes from 2 on", edges))
    listed = {axis: _listed(n) for axis, n in (sizes or {}).items()}
    make = _Maker(arguments, listed, {"op": name, "gradients": tuple(gradients)}, seed)
    if all(one.dtype for one in make.floats.values()):
        dtypes = (None,)  # there is nothing that could have another dtype
    found = [*_plain(make, dtypes), *_edges(make, dtypes, edges)]
    return found + [*_constant_rows(make, dtypes), *_extremes(make, dtypes)] * bool(make.floats)
