"""`python -m electra_fast doctor`: whether this installation computes what it should, here.

What serves each op is held against the reference, by the error budget that the tests apply; patched models of
the installed transformers are held against unpatched ones. A short timing follows, and a block to paste into
a bug report.
"""

import functools
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from electra_fast import installation, ops, testing, versions
from electra_fast.ops import _register

SECONDS = 0.3  # that an op is timed for
DTYPES = (torch.float32, torch.bfloat16)
# What of the environment changes which code runs. Nothing else is printed, for it may be secret.
VARIABLES = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TORCH_CUDA_ARCH_LIST", "TORCH_COMPILE_DISABLE")
VARIABLES += ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS")
VARIABLES += ("OMP_WAIT_POLICY", "LD_PRELOAD")


class Verdict(NamedTuple):
    op: str
    by: str  # what ran
    words: str  # "right", "right: …" or "wrong: …"

    @property
    def wrong(self) -> bool:
        return self.words.startswith("wrong")


def verdicts(names: tuple[str, ...] = testing.OPS) -> Iterator[Verdict]:
    """Hold what serves each op against the reference, and on a GPU the kernel that does not serve it too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in names:
        by = _register.served_by(op, device.upper())
        yield Verdict(op, by, _judge(op, getattr(ops, op), device))
        other = {"Triton": "cuda", "compiled from csrc/": "triton"}.get(by) if device == "cuda" else None
        function = testing.implementations(op, device).get(other) if other else None
        if function:
            yield Verdict(op, f"{other}, not in use", _judge(op, function, device))


def _judge(op: str, function: Callable, device: str) -> str:
    return _words(lambda: testing.check_op(op, function, seed=0, device=device, dtypes=DTYPES))


def _words(check: Callable[[], str | None]) -> str:
    """Run a check that raises an error if something is wrong, and may return a remark."""
    try:
        remark = check()
    except Exception as error:  # whatever it is, the report says so
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return f"wrong: {kind}{lines[-1]}"
    return f"right: {remark}" if remark else "right"


def transformers_verdicts() -> Iterator[Verdict]:
    """Try `hf.patch`, `hf.ElectraPretrainer` and torch.export on the installed transformers."""
    version = versions.installed("transformers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    by = f"transformers {version}"
    try:
        from electra_fast.hf.trial import TRIALS
    except Exception as error:  # transformers' own errors of import have many types
        yield Verdict("import", by, f"wrong: {type(error).__name__}: {error}")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export and transformers, about themselves
        for name, trial in TRIALS.items():
            yield Verdict(name, by, _words(functools.partial(trial, device)))


def timings(names: tuple[str, ...] = testing.OPS) -> Iterator[tuple[str, float, float]]:
    """Yield of each op the milliseconds of one call, fused and by plain PyTorch, with its gradient."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = _arguments(device)
    for op in names:
        gradients = next(iter(testing.examples(op))).gradients
        pair = (getattr(table, op) for table in (ops.FUSED, testing.TORCH))
        yield op, *(_milliseconds(function, arguments[op], gradients, device) for function in pair)


def _milliseconds(function: Callable, args: dict, gradients: tuple[str, ...], device: str) -> float:
    given = [name for name in gradients if args.get(name) is not None]
    args = args | {name: args[name].detach().clone().requires_grad_() for name in given}

    def call():
        y = function(**args)
        if given:
            y = y if isinstance(y, Tensor) else y.loss
            torch.autograd.grad(y.sum(), [args[name] for name in given])
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _arguments(device: str) -> dict[str, dict]:
    """Return the arguments of each op at ELECTRA-small, 8 sequences of 128 tokens."""
    B, L, W, E, F, H, V, M = 8, 128, 256, 128, 1024, 4, 30_522, 152
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).mul_(0.5).to(dtype)

    ids = torch.randint(1000, V, (B, L), generator=generator, device=device)
    rng, weights = torch.tensor([0, 1], device=device), torch.ones(M, dtype=torch.float32, device=device)
    slots = torch.arange(M, device=device) * 6
    norm = {"weight": x(W), "bias": x(W), "eps": 1e-12}
    tables = {"word": x(V, E), "position": x(512, E), "type": x(2, E), "norm_weight": x(E), "norm_bias": x(E)}
    head = {"x": x(M, E), "table": x(V, E), "bias": x(V), "targets": ids.flatten()[slots]}
    return {
        "mask_tokens": {"ids": ids, "candidates": ids > 0, "rng": rng, "mask_id": 103},
        "embed": {"ids": ids, "type_ids": None, "position_ids": None, **tables, "eps": 1e-12},
        "linear": {"x": x(B, L, W), "weight": x(F, W), "bias": x(F)},
        "attention": {name: x(B, L, H, W // H) for name in "qkv"},
        "attention_qkv": {"qkv": x(B, L, 3, H, W // H)},
        "add_norm": {"x": x(B, L, W), "residual": x(B, L, W), **norm},
        "bias_gelu": {"x": x(B, L, F), "bias": x(F)},
        "mlm_head": {**head, "weights": weights, "rng": rng},
        "replace_tokens": {"ids": ids, "positions": slots, "samples": head["targets"], "weights": weights},
        "rtd_loss": {"logits": x(B, L), "replaced": ids % 7 == 0},
    }


def environment() -> dict[str, str]:
    """Return what a maintainer wants to know of the machine, and which variables the user set."""
    facts = {name: str(value) for name, value in installation.info().items() if name != "ops"}
    facts |= {"system": platform.platform(), "cpu": torch.backends.cpu.get_cpu_capability()}
    facts |= {"threads": str(torch.get_num_threads()), "cuda": str(torch.version.cuda)}
    for package in ("transformers", "numpy"):
        facts[package] = versions.installed(package) or "not installed"
    names = [name for name in VARIABLES if name in os.environ and name not in testing.SET_HERE]
    return facts | {name: os.environ[name] for name in names}


def _print(verdict: Verdict) -> Verdict:
    print(f"  {verdict.op:<15} {verdict.by:<27} {verdict.words}", flush=True)
    return verdict


def examine(names: tuple[str, ...] = testing.OPS) -> int:
    """Print the report as it comes; return 1 if anything is wrong."""
    if not __debug__:
        raise ValueError("doctor: python must run without -O, got it; the checks are assertions")
    print(installation.report())
    print(f"\nInstalled, and in brackets what the tests run with:\n{versions.report()}")
    device = "the GPU" if torch.cuda.is_available() else "the CPU"
    print(f"\nOn {device}, against the reference, values and gradients:")
    found = []
    for verdict in verdicts(names):
        found.append(_print(verdict))
    if device == "the CPU":
        print("  Triton's kernels need a GPU; `make test` runs them in its interpreter.")
    print("\nModels of transformers, patched and not, values and gradients:")
    if not versions.installed("transformers"):
        print("  transformers is not installed; pip install transformers, if you want it patched")
    elif versions.standing("transformers", versions.installed("transformers")) == "older than tested":
        print(f"  transformers must be {versions.TESTED['transformers'][0]} or newer to be patched")
    else:
        found += map(_print, transformers_verdicts())
    wrong = [verdict for verdict in found if verdict.wrong]
    if not wrong:
        print(
            "\nA call and its gradient, ELECTRA-small, 8 x 128, in ms (no benchmark: that is `make bench`):"
        )
        print(f"  {'op':<15} {'fused':>8} {'torch':>8}")
        for op, fused, plain in timings(names):
            print(f"  {op:<15} {fused:8.2f} {plain:8.2f}", flush=True)
    summary = f"{len(wrong)} wrong" if wrong else "everything that can run here is right"
    print(f"\n{summary}. For a bug report:\n\n```")
    for name, value in environment().items():
        print(f"{name}: {value}")
    for verdict in wrong:
        print(f"{verdict.op}, {verdict.by}: {verdict.words}")
    print("```")
    return 1 if wrong else 0
