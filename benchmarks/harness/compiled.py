"""torch.compile in the ways that are timed."""

import os
import shutil
from collections.abc import Callable

import torch

from benchmarks.harness.machine import device

OPTIONS = {
    "compile_max": {"mode": "max-autotune"},
    "huggingface_reduce": {"mode": "reduce-overhead"},  # CUDA graphs
    # Four random numbers per Philox call, as TORCHINDUCTOR_USE_RAND4X=1 sets it.
    "compile_rand4x": {"options": {"use_rand4x": True}},
}
LONGER = {"compile_max": 4.0}  # its expected time to compile over that of the default; on 16 cores, a guess


def compiled(function: Callable, provider: str) -> Callable:
    """Return the function compiled in the way that the provider names."""
    return torch.compile(function, dynamic=False, **OPTIONS.get(provider, {}))


def require(provider: str) -> None:
    """Raise ImportError if torch.compile cannot compile in this way here."""
    if provider in OPTIONS and device() == "cpu":
        raise ImportError("timed on a GPU only")
    if provider == "compile_rand4x":
        from torch._inductor import config

        if not hasattr(config, "use_rand4x"):
            raise ImportError(f"torch {torch.__version__} has no such switch")
    compiler = os.environ.get("CXX", "g++")
    if device() == "cpu" and shutil.which(compiler.split()[0]) is None:
        raise ImportError(f"torch.compile needs a C++ compiler for the CPU, got none ({compiler})")
