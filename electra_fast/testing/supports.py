"""What a function supports, as its author declares it or as its signature shows.

A declaration maps names to what is supported; everything else is supported:

    {"dropout": False, "packed": False, "head_dims": (64, 128), "dtypes": (torch.bfloat16,)}

False: never; a collection: only these values. The names are those of `FEATURES`, of `SPECIAL`, and of the
op's own arguments, for which False means that the argument must have its default.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.errors import must
from electra_fast.testing.adapters import ADAPTERS, adapter_of
from electra_fast.testing.example import Example
from electra_fast.testing.layouts import LAYOUTS

Supports = Mapping[str, Any]
OWN = "draws its own random numbers, which are judged as a distribution"


def dtype_of(example: Example) -> str:
    """Return the dtype of the tensors that get a gradient, or of the first tensor: "float32"."""
    tensors = [example.args[name] for name in example.gradients] or [*example.tensors().values()]
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else ""


def _layout(example: Example) -> str:
    plain = all(x.is_contiguous() for x in example.tensors().values())
    return "contiguous" if plain else "transposed"


def _has_other_keys(example: Example) -> bool:
    """Return whether the keys of attention are those of other tokens than the queries."""
    if example.op != "attention":
        return False
    q, k = example.args["q"], example.args["k"]
    return q.shape[:-2] != k.shape[:-2] or example.args.get("cu_seqlens_k") is not None


FEATURES: dict[str, Callable[[Example], Any]] = {
    "dropout": lambda example: example.args.get("dropout", 0) > 0,
    "packed": lambda example: example.args.get("cu_seqlens") is not None,
    "padding": lambda example: example.args.get("key_mask") is not None,
    "other_keys": _has_other_keys,
    "empty": lambda example: any(not x.numel() for x in example.tensors().values()),
    "dtypes": dtype_of,
    "head_dims": lambda example: next(iter(example.args.values())).shape[-1],
    "layouts": lambda example: example.layout or _layout(example),
    "extremes": lambda example: example.special,
}
SPECIAL = {
    "gradients": "False, or the names of the arguments that get one",
    "results": "the names of the results that are returned",
    "random": '"own" if it does not use the counters of docs/usage.md; then it is judged as a distribution',
}
VALUES = {
    "dtypes": ("float32", "bfloat16", "float16", "float64"),
    "layouts": ("contiguous", *LAYOUTS),
}


@functools.cache
def defaults(op: str) -> dict[str, Any]:
    """Return the default of each argument of an op, `inspect.Parameter.empty` if it has none."""
    return {p.name: p.default for p in inspect.signature(getattr(reference, op)).parameters.values()}


def checked(call: str, op: str, supports: Supports | None) -> dict[str, Any]:
    """Return a declaration after checking its names and values."""
    if not isinstance(supports, Mapping | None):
        rule, remedy = "be a dict", 'for example {"dropout": False}'
        raise TypeError(must(f"{call}: supports", rule, repr(supports), remedy))
    supports, arguments = dict(supports or {}), defaults(op) if hasattr(reference, op) else {}
    known = {*FEATURES, *SPECIAL, *arguments}
    for name, value in supports.items():
        if name not in known:
            rule = f"name one of {', '.join(sorted(known))}"
            raise ValueError(must(f"{call}: supports", rule, repr(name)))
        title = f"{call}: supports[{name!r}]"
        if name == "random":
            if value != "own":
                raise ValueError(must(title, "be 'own'", repr(value)))
        elif name == "results" and isinstance(value, bool):
            raise ValueError(must(title, "be names of results", repr(value)))
        elif not isinstance(value, bool) and (isinstance(value, str) or not isinstance(value, Collection)):
            rule, remedy = "be a bool or a collection of the supported values", f"for example ({value!r},)"
            raise ValueError(must(title, rule, repr(value), remedy))
        elif not isinstance(value, bool):
            supports[name] = tuple(
                str(one).removeprefix("torch.") if name == "dtypes" else one for one in value
            )
            legal = VALUES.get(name) or (tuple(arguments) if name == "gradients" else ())
            if legal and (other := [one for one in supports[name] if one not in legal]):
                raise ValueError(must(title, f"have only {', '.join(legal)}", repr(other[0])))
    return supports


def _given(example: Example, name: str) -> Any:
    """Return the value of an argument if it differs from the op's default and is used, else None."""
    value = example.args.get(name)
    if name in ("rng", "stream") and not example.args.get("dropout", 1):
        return None  # not used without dropout
    default = defaults(example.op).get(name)
    return None if not isinstance(value, Tensor) and value == default else value


def unsupported(example: Example, supports: Supports) -> str:
    """Return what the example has that is not supported, or an empty string."""
    for name, allowed in supports.items():
        if allowed is True or name in SPECIAL:
            continue
        value = FEATURES[name](example) if name in FEATURES else _given(example, name)
        if allowed is False and value is not None and value is not False:
            return name
        if allowed is not False and value not in allowed:
            return f"{name}={value}"
    return ""


def not_compared(example: Example, supports: Supports) -> str:
    """Return why the values of the example cannot be compared, or an empty string."""
    if supports.get("random") == "own" and (example.exact or example.args.get("dropout", 0) > 0):
        return OWN
    return unsupported(example, supports)


def declaration(
    call: str, op: str, adapter: str | Callable | None, supports: Supports | None
) -> dict[str, Any]:
    """Return what is declared by the user, or else by the adapter."""
    known = {} if adapter is None else adapter_of(call, op, adapter)[1]
    return {**known, **checked(call, op, supports)}


def fit(
    call: str,
    op: str,
    function: Callable,
    adapter: str | Callable | None = None,
    supports: Supports | None = None,
) -> tuple[Callable, dict[str, Any]]:
    """Return a function that is called with the op's arguments by name, and what it supports.

    Args:
        call: the caller's name, for errors.
        op: a name in `electra_fast.ops.Ops`.
        function: has the op's signature, or lacks some of its optional arguments.
        adapter: a name in `ADAPTERS[op]`, or a function that returns `function` with the op's signature.
        supports: a declaration, as at the top of this file; it precedes that of the adapter.

    Raises:
        TypeError: the signature is another one; the message shows the difference.
        ValueError: the adapter or a name in `supports` is unknown.
    """
    declared = declaration(call, op, adapter, supports)
    if adapter is not None:
        function = adapter_of(call, op, adapter)[0](function)
        if not callable(function):
            raise TypeError(must(f"{call}: adapter", "return a function", type(function).__name__))
    names = parameters(function)
    if names is None:
        return function, declared
    wanted = defaults(op)
    own = ("rng", "stream") if declared.get("random") == "own" else ()
    required = [n for n, default in wanted.items() if default is inspect.Parameter.empty and n not in own]
    lacking = [name for name in required if name not in names]
    unknown = [name for name, p in names.items() if p.default is p.empty and name not in wanted]
    if lacking or unknown:
        wants = f"accept {', '.join(required)} by name"
        got = f"({', '.join(names)})"
        got += f", which lacks {', '.join(lacking)}" if lacking else ""
        got += f", which also requires {', '.join(unknown)}" if unknown else ""
        others = ", ".join(ADAPTERS.get(op, {}))
        remedy = "give a function with the op's signature, or an adapter"
        remedy += f": {others}, or your own function of the function" if others else ""
        raise TypeError(must(f"{call}: the function for {op}", wants, got, remedy))
    absent = [name for name in wanted if name not in names]
    if not absent:
        return function, declared

    @functools.wraps(function)
    def with_known_arguments(**args):
        return function(**{name: x for name, x in args.items() if name in names})

    return with_known_arguments, {**declared, **{name: False for name in absent if name not in own}}


def parameters(function: Callable) -> dict[str, inspect.Parameter] | None:
    """Return the parameters that can be passed by name; None if any can, or if there is no signature."""
    function = getattr(function, "_init_fn", function)  # of a torch.library.custom_op
    function = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of C
        return _documented(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _documented(function: Callable) -> dict[str, inspect.Parameter] | None:
    """Return the parameters of the signature with which the docstring of a function of C begins."""
    begin = re.match(r"\s*\w+\((.*?)\)", getattr(function, "__doc__", "") or "", re.DOTALL)
    if begin is None:
        return None
    found = {}
    for part in begin[1].split(","):
        name, _, default = part.partition("=")
        name = name.strip().lstrip("*").partition(":")[0]
        if name.isidentifier():
            value = default or inspect.Parameter.empty
            found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
    return found or None
