"""What a user would choose today instead of our kernels: one file per op, and `models` for whole models.

Nothing here is a dependency. A rival names what it needs; where that is missing, a run drops the rival with
the reason.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch

from benchmarks.harness.machine import device

Requirement = Callable[[], None]  # raises ImportError if it is not met


def needs(*requirements: Requirement) -> Callable[[Callable], Callable]:
    """Name the requirements of a rival; the first one that is not met is the reason why it is absent."""

    def mark(rival: Callable) -> Callable:
        rival.needs = requirements
        return rival

    return mark


def require(rival: Callable) -> None:
    """Raise ImportError if a requirement of this rival is not met."""
    for requirement in getattr(rival, "needs", ()):
        requirement()


def gpu() -> None:
    if device() != "cuda":
        raise ImportError("needs a GPU")


def cpu() -> None:
    if device() != "cpu":
        raise ImportError("timed on a CPU only")


def package(name: str) -> Requirement:
    """Return the requirement that a package, or a module in it, is installed; it is not imported."""

    def installed() -> None:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # the package that contains the module
            found = None
        if found is None:
            raise ImportError(f"{name} is not installed")

    return installed


def torch_has(module: str, name: str) -> Requirement:
    """Return the requirement that the installed torch has this name in this module."""

    def has() -> None:
        try:
            found = hasattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ImportError(f"torch {torch.__version__} has no {module}.{name}")

    return has
