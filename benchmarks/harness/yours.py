"""Functions of a user that are checked and timed as providers: `--provider NAME=MODULE:FUNCTION`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.harness.providers import ORDER
from electra_fast.errors import must
from electra_fast.testing import OPS
from electra_fast.testing.importing import imported
from electra_fast.testing.supports import fit

OPTION = "benchmarks: --provider"


class Yours(NamedTuple):
    source: str  # "my_module:attention"
    adapter: str | None  # the value of --adapter
    function: Callable  # with the signature of its op
    supports: dict[str, Any]  # as in electra_fast.testing.supports


# By op and by name. `give` fills it before pytest imports the bench files, which make their cases of it.
GIVEN: dict[str, dict[str, Yours]] = {}


def give(options: list[str], only: str | None, adapter: str | None) -> None:
    """Replace `GIVEN` by the providers of a command line.

    Args:
        options: the values of `--provider`.
        only: that of `--only`; if it is the name of an op, the functions are implementations of this op.
        adapter: that of `--adapter`.

    Raises:
        ValueError: an option cannot be understood, or a function has another signature.
    """
    GIVEN.clear()
    if adapter and not options:
        raise ValueError(must("benchmarks: --adapter", "be given with --provider", f"{adapter} without it"))
    wrap = imported("benchmarks: --adapter", adapter) if ":" in (adapter or "") else adapter
    taken = set(ORDER)
    for option in options:
        name, separator, source = option.partition("=")
        if not separator:
            raise ValueError(must(OPTION, "be NAME=MODULE:FUNCTION", repr(option)))
        if not name.isidentifier() or name in taken:
            rule = "have a name of letters, digits and _ that no other provider has"
            raise ValueError(must(OPTION, rule, repr(name)))
        taken.add(name)
        function = imported(OPTION, source)
        op = only if only in OPS else getattr(function, "__name__", None)
        if op not in OPS:
            remedy = f"name the op by --only, one of {', '.join(OPS)}"
            raise ValueError(must(OPTION, "name a function that is called as an op", source, remedy))
        try:
            fitted, supports = fit(f"benchmarks: {name}", op, function, wrap)
        except TypeError as error:  # another signature
            raise ValueError(error) from None
        GIVEN.setdefault(op, {})[name] = Yours(source, adapter, fitted, supports)


def facts() -> dict[str, Any]:
    """Return what the results of a run say about the given providers: their sources, and their adapter."""
    every = {name: yours for of in GIVEN.values() for name, yours in of.items()}
    sources = {name: yours.source for name, yours in every.items()}
    return {"yours": sources, "adapter": next((yours.adapter for yours in every.values()), None)}
