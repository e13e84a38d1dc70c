"""`python -m electra_fast doctor`: check that this installation computes correctly on this machine.

What serves each op is compared with the reference, by the error budget of the tests. Patched models of the
installed transformers are compared with unpatched ones. A short timing and a block for bug reports follow.
`info` only says which implementation serves each op, and why.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import electra_fast
from electra_fast import ops, testing, versions
from electra_fast.errors import must
from electra_fast.ops import _operators
from electra_fast.tables import text_table

SECONDS = 0.3  # of timing per op
DTYPES = (torch.float32, torch.bfloat16)
# The environment variables that change which code runs. Others are not printed, because they may be secret.
VARIABLES = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TORCH_CUDA_ARCH_LIST", "TORCH_COMPILE_DISABLE")
VARIABLES += ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS")
VARIABLES += ("OMP_WAIT_POLICY", "LD_PRELOAD")


# --- info ---------------------------------------------------------------------------------------------------


def info() -> dict[str, Any]:
    """Return the versions, the GPU and, for each op, what serves it on the CPU and on CUDA, as text."""
    devices = ("CPU", "CUDA")
    return {
        "electra_fast": electra_fast.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if _operators.HAS_TRITON else "not installed",
        "extension": _extension(),
        "launches by": _operators.launched_by(),
        "gpu": _gpu(),
        "ops": {op: {d: str(_operators.served_by(op, d)) for d in devices} for op in ops.Ops._fields},
    }


def _extension() -> str:
    file = Path(electra_fast.__file__).with_name("_left_out.json")  # written by setup.py
    left_out = json.loads(file.read_text()) if file.exists() else {}
    if importlib.util.find_spec("electra_fast._C") is None:
        return f"not built: {left_out.get('all', 'not installed by pip from here')}"
    if ("embed_fwd", "CUDA") in _operators.COMPILED:  # `linear_fwd` is registered for CUDA in every build
        return "built for CPU and CUDA"
    why = "nothing in csrc/cuda was built" if torch.version.cuda else "this torch is built without CUDA"
    return f"built for CPU; not for CUDA: {left_out.get('CUDA', why)}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none visible to torch"
    major, minor = capability = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return name if capability >= _operators.OLDEST_GPU else f"{name}: too old, the kernels need sm_80"


def report() -> str:
    """Return `info()` as the page that `python -m electra_fast info` prints."""
    facts = info()
    served = [(op, by["CPU"], by["CUDA"]) for op, by in facts.pop("ops").items()]
    table = text_table([("op", "on the CPU", "on CUDA"), *served])
    return f"{text_table(list(facts.items()))}\n\n{table}"


# --- checks -------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    subject: str  # the op, or the trial of `hf`
    by: str  # the implementation that ran
    words: str  # "right", "right: …" or "wrong: …"

    @property
    def wrong(self) -> bool:
        return self.words.startswith("wrong")


def verdicts(names: tuple[str, ...] = testing.OPS) -> Iterator[Verdict]:
    """Compare what serves each op with the reference; on a GPU also the kernel that does not serve it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in names:
        served = _operators.served_by(op, device.upper())
        yield Verdict(op, str(served), _judge(op, getattr(ops, op), device))
        other = {"triton": "cuda", "cuda": "triton"}.get(served.kind)
        function = testing.implementations(op, device).get(other) if other else None
        if function:
            yield Verdict(op, f"{other}, not in use", _judge(op, function, device))


def _judge(op: str, function: Callable, device: str) -> str:
    def check() -> None:
        testing.check_op(op, function, seed=0, device=device, dtypes=DTYPES)

    return _words(check)


def _words(check: Callable[[], str | None]) -> str:
    """Run a check, which raises an error if something is wrong and may return a remark."""
    try:
        remark = check()
    except Exception as error:  # every error belongs in the report
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return f"wrong: {kind}{lines[-1]}"
    return f"right: {remark}" if remark else "right"


def transformers_verdicts() -> Iterator[Verdict]:
    """Try `hf.patch`, `hf.ElectraPretrainer` and torch.export with the installed transformers."""
    version = versions.installed("transformers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    by = f"transformers {version}"
    try:
        from electra_fast.hf.trial import TRIALS
    except Exception as error:  # an import of transformers can fail with many types of errors
        yield Verdict("import", by, f"wrong: {type(error).__name__}: {error}")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch.export and transformers
        for name, trial in TRIALS.items():
            yield Verdict(name, by, _words(functools.partial(trial, device)))


# --- timing -------------------------------------------------------------------------------------------------


def timings(names: tuple[str, ...] = testing.OPS) -> Iterator[tuple[str, float, float]]:
    """Yield (op, milliseconds of the fused op, of plain PyTorch) for one call with its gradient."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = _arguments(device)
    for op in names:
        gradients = next(iter(testing.examples(op))).gradients
        pair = (getattr(table, op) for table in (ops.FUSED, ops.TORCH))
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
    """Return the arguments of each op at the sizes of ELECTRA-small, 8 sequences of 128 tokens."""
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
        "nce_loss": {"energies": x(B, L), "log_q": x(B, L).float() - 5, "noise": ids % 7 == 0},
    }


# --- the report ---------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return facts about the machine for a maintainer, and the variables of `VARIABLES` that are set."""
    facts = {name: str(value) for name, value in info().items() if name != "ops"}
    facts |= {"system": platform.platform(), "cpu": torch.backends.cpu.get_cpu_capability()}
    facts |= {"threads": str(torch.get_num_threads()), "cuda": str(torch.version.cuda)}
    for package in ("transformers", "numpy"):
        facts[package] = versions.installed(package) or "not installed"
    return facts | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _print(verdict: Verdict) -> Verdict:
    print(f"  {verdict.subject:<15} {verdict.by:<27} {verdict.words}", flush=True)
    return verdict


def examine(names: tuple[str, ...] = testing.OPS) -> int:
    """Print the report line by line; return 1 if anything is wrong, else 0."""
    if not __debug__:
        raise ValueError(must("doctor: python", "run without -O", "-O", "the checks are assertions"))
    print(report())
    print(f"\nInstalled versions, and in brackets those that are tested:\n{versions.report()}")
    device = "the GPU" if torch.cuda.is_available() else "the CPU"
    print(f"\nValues and gradients on {device}, compared with the reference:")
    found = []
    for verdict in verdicts(names):
        found.append(_print(verdict))
    if device == "the CPU":
        print("  Triton's kernels need a GPU; `make test` runs them in Triton's interpreter.")
    print("\nModels of transformers, values and gradients, patched compared with unpatched:")
    if not versions.installed("transformers"):
        print("  transformers is not installed; pip install transformers to use electra_fast.hf")
    elif versions.standing("transformers", versions.installed("transformers")) == "older than tested":
        print(f"  transformers must be {versions.TESTED['transformers'][0]} or newer to be patched")
    else:
        found += map(_print, transformers_verdicts())
    wrong = [verdict for verdict in found if verdict.wrong]
    if not wrong:
        print("\nMilliseconds per call with gradient, ELECTRA-small, 8 x 128 (`make bench` is a benchmark):")
        print(f"  {'op':<15} {'fused':>8} {'torch':>8}")
        for op, fused, plain in timings(names):
            print(f"  {op:<15} {fused:8.2f} {plain:8.2f}", flush=True)
    summary = f"{len(wrong)} wrong" if wrong else "everything that can run here is right"
    print(f"\n{summary}. For a bug report:\n\n```")
    for name, value in environment().items():
        print(f"{name}: {value}")
    for verdict in wrong:
        print(f"{verdict.subject}, {verdict.by}: {verdict.words}")
    print("```")
    return 1 if wrong else 0
