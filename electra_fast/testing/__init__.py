"""Check kernels against a definition: reports, an error budget, statistics, planted faults.

Any function with the signature of an op can be checked, and any other function with its own reference:

    print(testing.report("rtd_loss", my_function))  # what is right, wrong and not supported
    testing.check_op("rtd_loss", my_function)  # the same as an assertion
    testing.check(my_softmax, reference, testing.inputs({"x": testing.Floats("T", "W")}))
    testing.fuzz_op("rtd_loss", my_function, seconds=60)  # random shapes, layouts and extreme values
    testing.check_masker(my_mask_tokens)  # counts, uniformity, independence
    testing.bites(my_function, check)  # faults in the source of its Triton kernels: which does a check find?

Without a GPU, call `testing.interpret()` before Triton is imported, to run Triton kernels on the CPU.
"""

import os
import sys

import torch

from electra_fast import ops
from electra_fast.errors import must
from electra_fast.ops import TORCH, Ops, _public
from electra_fast.testing.bites import bites
from electra_fast.testing.budget import Judgement, assert_within_budget
from electra_fast.testing.cases import fuzz_op
from electra_fast.testing.check import check, check_example, check_op, report
from electra_fast.testing.checks import CHECKS
from electra_fast.testing.distributions import check_dropout, check_masker, check_sampler
from electra_fast.testing.example import DTYPES, Example
from electra_fast.testing.examples import examples
from electra_fast.testing.inputs import Booleans, Floats, Integers, inputs
from electra_fast.testing.judge import judge_example, run
from electra_fast.testing.memory import guarded_memory
from electra_fast.testing.mutations import mutations
from electra_fast.testing.report import Report

OPS = Ops._fields
HOST_RUN: set[str] = set()  # ops whose implementation `cuda` was compiled for the CPU, by tests/host


def interpret() -> None:
    """Run Triton kernels in Triton's interpreter if there is no GPU. Call it before Triton is imported.

    It sets the environment variable TRITON_INTERPRET, which Triton reads once, unless that is set already.

    Raises:
        RuntimeError: Triton was imported before.
    """
    if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
        return
    if "triton.language.standard" in sys.modules:
        rule, got = "be called before Triton is imported", "a call after it (transformers imports Triton)"
        remedy = "call it at the start of the program, or set TRITON_INTERPRET=1"
        raise RuntimeError(must("testing.interpret", rule, got, remedy))
    os.environ["TRITON_INTERPRET"] = "1"


def interpreted() -> bool:
    """Return whether Triton kernels run in the interpreter in this process."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    core = sys.modules.get("triton.language.standard")
    return core is None or type(core.sum).__name__ == "InterpretedFunction"


def implementations(op: str, device: str | None = None) -> dict:
    """Return every implementation of an op that can run here, by name, each with the op's public signature.

    `reference` is plain PyTorch with the backward pass written out, `cpu` and `cuda` are compiled from csrc/.
    `triton` runs on a GPU or in Triton's interpreter (see `interpret`), and is absent otherwise.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = _public.implementations(op, getattr(ops, op))
    runs = {
        "reference": True,
        "cpu": device == "cpu",
        "cuda": device == "cuda" or op in HOST_RUN,
        "triton": device == "cuda" or interpreted(),
    }
    return {name: function for name, function in found.items() if runs[name]}


__all__ = [
    "CHECKS",
    "DTYPES",
    "HOST_RUN",
    "OPS",
    "TORCH",
    "Booleans",
    "Example",
    "Floats",
    "Integers",
    "Judgement",
    "Report",
    "assert_within_budget",
    "bites",
    "check",
    "check_dropout",
    "check_example",
    "check_masker",
    "check_op",
    "check_sampler",
    "examples",
    "fuzz_op",
    "guarded_memory",
    "implementations",
    "inputs",
    "interpret",
    "interpreted",
    "judge_example",
    "mutations",
    "report",
    "run",
]
