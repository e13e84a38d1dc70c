"""The definition that an example is compared with, and the results of a call by name."""

import functools
from typing import Any, get_args, get_type_hints

from torch import Tensor

from electra_fast import baseline, philox, reference
from electra_fast.ops import TORCH, Ops
from electra_fast.testing.example import Definition, Example

# Plain PyTorch with the dropout masks of the kernels, so that results can be compared.
_with_dropout = ("embed", "attention", "attention_qkv", "add_norm")
REPLAYED = TORCH._replace(
    **{op: functools.partial(getattr(baseline, op), drop=philox.drop) for op in _with_dropout}
)


def check_function(call: str, op: str, function) -> None:
    """Check the name of an op and that a function is callable; `call` begins the error message."""
    if op not in Ops._fields:
        raise ValueError(f"{call}: op must be one of {', '.join(Ops._fields)}, got {op}")
    if not callable(function):
        raise TypeError(f"{call}: function must be callable, got {type(function).__name__}")


def definition_of(example: Example) -> Definition:
    """Return the example's own definition, or that of its op."""
    return example.definition or _definition_of_op(example.op)


@functools.cache
def _definition_of_op(op: str) -> Definition:
    hint = get_type_hints(getattr(reference, op)).get("return", Tensor)
    kinds = get_args(hint) or (hint,)  # `embed` returns two kinds, with and without its table
    return Definition(getattr(reference, op), getattr(REPLAYED, op), kinds)


def results_by_name(example: Example, result) -> dict[str, Any]:
    """Return the results of a call by name; a plain tuple or list gets the names of the op's definition.

    Raises:
        AssertionError: the function returned something else.
    """
    kinds = definition_of(example).kinds
    tuples = [kind for kind in kinds if kind is not Tensor]
    if isinstance(result, Tensor) and (Tensor in kinds or not kinds):
        return {"result": result}
    if not kinds and isinstance(result, dict):
        return _tensors(example, result)
    if isinstance(result, tuple | list):
        if not kinds:
            names = getattr(result, "_fields", [f"result {i}" for i in range(len(result))])
            return _tensors(example, dict(zip(names, result, strict=True)))
        for kind in tuples:
            required = len(kind._fields) - len(kind._field_defaults)
            fields = getattr(result, "_fields", kind._fields)
            if fields == kind._fields and required <= len(result) <= len(kind._fields):
                return _tensors(example, kind(*result)._asdict())
    wanted = [f"{kind.__name__}({', '.join(kind._fields)})" for kind in tuples]
    wanted = " or ".join(["a Tensor"] * (Tensor in kinds) + wanted)
    length = f" of {len(result)}" if isinstance(result, tuple | list) else ""
    got = "None" if result is None else type(result).__name__ + length
    wanted = wanted or "a Tensor, or a tuple or dict of Tensors"
    raise AssertionError(f"{example.op}: must return {wanted}, got {got}")


def _tensors(example: Example, results: dict[str, Any]) -> dict[str, Tensor]:
    """Return the results other than None, which was not asked for."""
    for name, y in results.items():
        if not isinstance(y, Tensor | None):
            raise AssertionError(f"{example.op}: {name} must be a Tensor, got {type(y).__name__}")
    return {name: y for name, y in results.items() if y is not None}
