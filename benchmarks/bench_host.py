"""The host's work for a step of transformers' pre-training models, over a stub of the CUDA driver.

`huggingface` is forward and backward of the unpatched models, `fused` of the patched ones, in a process of
their own in which no kernel runs (`static/host.py`). On a GPU, a step of few tokens takes as long as this
work. `python -m benchmarks host` prints the numbers of operators and launches, and the same for each op.
"""

import functools
import json
import subprocess
from collections.abc import Callable
from typing import Any

from benchmarks.harness.cases import Case, Run, parametrize
from benchmarks.harness.inputs import CUDA
from benchmarks.static import on_stub
from benchmarks.static.host import HEADS, B, L

SIZE = "12 layers, stub driver"
STEPS = {"fused": "patched", "huggingface": "unpatched"}


class HostCase(Case):
    name = f"host, {SIZE}, step"
    providers = headline = tuple(STEPS)
    threads = 1
    seconds = 3.0

    def require(self, provider: str) -> None:
        if CUDA:
            raise ImportError("the stub replaces a driver; measured on a machine without a GPU")

    @functools.cached_property
    def process(self) -> subprocess.Popen:
        """The process that takes a step for each line that it reads, and answers with the step's CPU time."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(**on_stub.process("host_serve"), **pipes, bufsize=1)

    def prepare(self, provider: str) -> Callable[[], float]:
        def take() -> float:
            self.process.stdin.write(STEPS[provider] + "\n")
            answer = self.process.stdout.readline()
            assert answer, "the process of the stub driver ended early; run python -m benchmarks host"
            return json.loads(answer)["seconds"]

        for _ in range(3):  # compiles the kernels, and enters them into the launcher's table
            take()
        take.elsewhere = "CPU time of a process over the stub driver"
        return take

    def info(self, provider: str) -> dict[str, Any]:
        facts = {"op": "host", "size": SIZE, "passes": "step", "served_by": None}
        return facts | {"unit": "tokens/s", "work": len(HEADS) * B * L}


@functools.cache
def case(size: str, passes: str) -> HostCase:
    return HostCase()


bench_host = parametrize(case, [Run(SIZE, "step", p, 96) for p in STEPS])
