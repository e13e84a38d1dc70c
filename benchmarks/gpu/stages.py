"""The stages of `make gpu` in the order of their value, with their time limits."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

PYTHON = sys.executable
# Test files that do not depend on a GPU.
WITHOUT_A_GPU = ("aot", "static", "launches", "cuda_host", "packaging", "report", "learning", "compare")
WITHOUT_A_GPU += ("readme", "benchmarks", "bench_gate", "gpu", "layering", "info")


class Stage(NamedTuple):
    """A process with its own time limit."""

    letter: str  # stages with the same letter belong together
    name: str
    command: tuple[str, ...]
    limit: float  # seconds after which it is killed
    expected: float = 0.0  # seconds on 16 cores with the pack; calculated, until a GPU has run it
    together: bool = False  # runs in parallel with the others of its letter
    environment: tuple[tuple[str, str], ...] = ()


def checks(implementations: dict[str, list[str]], short: bool) -> list[Stage]:
    """Return one stage per op, implementation and dtype; bfloat16, in which models train, is first."""
    found = []
    for dtype in ("any", "bfloat16", "float32", "float16"):
        for op, names in implementations.items():
            exact = op in ("mask_tokens", "replace_tokens")
            if (dtype == "any") != exact:
                continue
            for name in names:
                command = (PYTHON, "-m", "benchmarks.gpu.check", op, name, dtype)
                command += ("--most", "2") if short else ()
                found.append(Stage("a", f"check {op} {name} {dtype}", command, 90, 16, together=True))
    return found


def timed(letter: str, name: str, only: str, limit: float, expected: float, *more: str) -> Stage:
    """Return a stage that times the cases whose names contain `only`.

    The harness runs fewer rounds if time is short, and drops a compilation that may not fit. So a stage that
    only times a compiled provider gets a budget that is never used up.
    """
    budget = "900" if "compile" in name or "autotune" in name else str(limit - 15)
    command = (PYTHON, "-m", "benchmarks", "--only", only, "--budget", budget, *more)
    return Stage(letter, name, command, limit, expected)


def warm_up() -> Stage:
    """Fill the cache of torch.compile while the checks run; its times are discarded."""
    return timed("a", "warm torch.compile", "bench_step[small 128x128-step-compile]", 100, 90)


def plan(
    implementations: dict[str, list[str]], scratch: Path, *, rehearse: bool = False, short: bool = False
) -> list[Stage]:
    """Return the stages of `make gpu`. A rehearsal trains and tests less, and a `short` one checks less."""
    quick = ("--quick",)
    others = "|".join(
        f"bench_{op}[small 128x128-f" for op in implementations if op not in ("attention", "mlm_head")
    )
    run = scratch / "pretrain"
    steps, logged = ("8", "2") if rehearse else ("1000", "50")
    pretrain = (PYTHON, "-m", "electra_fast", "pretrain", "--preset", "tiny" if rehearse else "small")
    pretrain += ("--steps", steps, "--eval-every", steps, "--save-every", steps, "--log-every", logged)
    pretrain += ("--vocab", "1000", "--eval-batches", "1") if rehearse else ()
    return [
        *checks(implementations, short),
        Stage("b", "graph against eager", (PYTHON, "-m", "benchmarks.gpu.capture"), 90, 20),
        timed("c", "step small", "bench_step[small 128x128-step-", 110, 45, *quick),
        timed("c", "step small, compile", "bench_step[small 128x128-step-compile]", 130, 45),
        timed("d", "attention small", "bench_attention[small 128x128-forward+backward", 80, 40),
        timed("e", "mlm_head small", "bench_mlm_head[small 128x128-forward+backward", 70, 35),
        Stage("f", "pretrain small", (*pretrain, "--out", str(run)), 80, 35),
        timed("f", "other ops small", others, 80, 40, *quick),
        timed("g", "step base", "bench_step[base ", 120, 60, *quick),
        timed("g", "attention base", "bench_attention[base 256x512-forward+backward", 70, 45),
        timed("g", "mlm_head base", "bench_mlm_head[base 256x512-forward+backward", 60, 40, *quick),
        *sanitized(implementations),
        suite(rehearse),
    ]


def expected(stages: list[Stage], workers: int = 14) -> float:
    """Return the expected seconds from the first stage to the end of (f), on 16 cores with the pack.

    Stages that run together share the workers, and torch.compile warms up during (a) and (b).
    """

    def seconds(letters: str) -> float:
        chosen = [stage for stage in stages if stage.letter in letters]
        return sum(stage.expected / (workers if stage.together else 1) for stage in chosen)

    return max(seconds("ab"), warm_up().expected) + seconds("cdef")


def sanitized(implementations: dict[str, list[str]]) -> list[Stage]:
    # PyTorch and Triton make driver calls that fail without being errors.
    tool = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
    found = []
    for op in implementations:
        command = (PYTHON, "-m", "benchmarks.gpu.sanitize", op)
        # Without PyTorch's cache every tensor is a separate allocation, so reads outside of it are found.
        environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        found.append(Stage("h", f"sanitize {op}", (*tool, *command), 60, 25, True, environment))
    return found


def suite(rehearse: bool) -> Stage:
    ignored = [f"--ignore=tests/test_{name}.py" for name in WITHOUT_A_GPU]
    command = (PYTHON, "-m", "pytest", "-q", "--tb=line", "-p", "benchmarks.gpu.failures", "--seed", "1")
    if rehearse:
        command += ("tests/test_replace_tokens.py",)
    else:
        command += ("-n", str(max(1, min(12, os.cpu_count() or 1))), "--dist", "worksteal", *ignored)
    return Stage("i", "tests", command, 300, 120)


def second(implementations: dict[str, list[str]], scratch: Path) -> list[Stage]:
    """Return the stages of `make gpu MORE=1`, for which the first budget is too short."""
    return [
        *sanitized(implementations),
        suite(rehearse=False),
        Stage("j", "tune", (PYTHON, "-m", "benchmarks", "tune", "attention"), 150, 120),
        timed("j", "step large", "bench_step[large ", 150, 100, "--quick"),
        timed("j", "step small, max-autotune", "bench_step[small 128x128-step-compile_max]", 150, 120),
        timed("j", "step small, compile, rand4x", "bench_step[small 128x128-step-compile_rand4x]", 130, 60),
        timed("j", "step base, compile", "bench_step[base 8 of 32x512-step-compile]", 150, 120),
        timed("j", "patched models", "bench_patch[", 100, 70),
        timed("j", "inference", "bench_infer[|bench_infer_texts[", 150, 120),
        timed("j", "fine-tuning", "bench_fine_tune[banking77", 100, 70),
        timed("j", "embed", "bench_embed[", 60, 40),
        timed("j", "attention, all sizes", "bench_attention[", 150, 100),
        Stage("k", "tune linear_gelu", (PYTHON, "-m", "benchmarks", "tune", "linear_gelu"), 170, 130),
        timed("k", "linear_gelu", "bench_linear_gelu[", 300, 180),
    ]
