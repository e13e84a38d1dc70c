"""Hold a kernel against the reference: example inputs, an error budget, statistics, and proof that they bite.

Anybody's function with the signature of an op is held against the reference in one line:

    testing.check_op("rtd_loss", my_function)  # values and gradients, in every dtype
    testing.fuzz_op("rtd_loss", my_function, seconds=60)  # random shapes, layouts and extreme values
    testing.check_masker(my_mask_tokens)  # counts, uniformity, independence
"""

import os
import sys

import torch

if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    SET_HERE = ()
else:  # Triton decides at import whether it interprets its kernels
    SET_HERE = ("TRITON_INTERPRET",)
    os.environ["TRITON_INTERPRET"] = "1"

from electra_fast import ops
from electra_fast.ops import Ops, _register
from electra_fast.testing.baseline import TORCH
from electra_fast.testing.budget import (
    Judgement,
    assert_within_budget,
    check_example,
    check_op,
    judge_example,
    run,
)
from electra_fast.testing.cases import fuzz_op
from electra_fast.testing.distributions import check_dropout, check_masker, check_sampler
from electra_fast.testing.example import Example
from electra_fast.testing.examples import examples
from electra_fast.testing.memory import guarded_memory
from electra_fast.testing.mutations import mutations

OPS = Ops._fields
HOST_RUN: set[str] = set()  # ops whose implementation `cuda` was compiled for a CPU, as tests/host does


def implementations(op: str, device: str | None = None) -> dict:
    """Return every implementation of an op that can run here, by name, each with the op's public signature.

    `reference` is plain PyTorch with the backward written out. `cpu` and `cuda` are compiled from csrc/, or,
    on the CPU, another library's kernel. `triton` runs on a GPU, or in Triton's interpreter where there is
    none; it is missing where Triton was imported before this module, which is too late to interpret.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = _register.implementations(op, getattr(ops, op))
    runs = {
        "reference": True,
        "cpu": device == "cpu",
        "cuda": device == "cuda" or op in HOST_RUN,
        "triton": device == "cuda" or interpreted(),
    }
    return {name: function for name, function in found.items() if runs[name]}


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    core = sys.modules.get("triton.language.standard")
    return core is None or type(core.sum).__name__ == "InterpretedFunction"


__all__ = [
    "HOST_RUN",
    "OPS",
    "TORCH",
    "Example",
    "Judgement",
    "assert_within_budget",
    "check_dropout",
    "check_example",
    "check_masker",
    "check_op",
    "check_sampler",
    "examples",
    "fuzz_op",
    "guarded_memory",
    "implementations",
    "interpreted",
    "judge_example",
    "mutations",
    "run",
]
