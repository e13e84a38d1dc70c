"""Launch kernels with the stub driver (`stub.py`) and print the outcome as one JSON object per line.

TRITON_INTERPRET=0 python -m benchmarks.static.on_stub examples add_norm   every example, forward and backward
TRITON_INTERPRET=0 python -m benchmarks.static.on_stub steps small         a training step, padded and packed
TRITON_INTERPRET=0 python -m benchmarks.static.on_stub host                host work per call of every op
TRITON_INTERPRET=0 python -m benchmarks.static.on_stub host_step           the same for a step of transformers
TRITON_INTERPRET=0 python -m benchmarks.static.on_stub host_layer          the same for layers of this package
TRITON_INTERPRET=0 python -m benchmarks.static.on_stub host_serve          such a step for each line of stdin
TRITON_INTERPRET=0 python -m benchmarks.static.on_stub same add_norm       examples of ops, launched twice
TRITON_INTERPRET=0 python -m benchmarks.static.on_stub arguments 7         a kernel of all types of arguments
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from benchmarks.harness.machine import ROOT


def process(part: str, *arguments: str) -> dict:
    """Return how `subprocess` starts a part."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k == "TRITON_CACHE_DIR"}
    command = [sys.executable, "-m", "benchmarks.static.on_stub", part, *arguments]
    return {"args": command, "cwd": ROOT, "env": kept | {"TRITON_INTERPRET": "0"}, "text": True}


def lines(part: str, *arguments: str) -> list[dict]:
    """Run a part in a process of its own and return its lines, parsed."""
    done = subprocess.run(**process(part, *arguments), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"static: {part} {' '.join(arguments)} ended early\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def examples(launches: Callable[[], int], op: str) -> Iterator[dict]:
    """Call an op's Triton implementation on every example; yield the number of launches, or the error."""
    from electra_fast import testing

    function = testing.implementations(op, device="cuda")["triton"]
    for example in testing.examples(op, 0):
        before, error = launches(), None
        try:
            testing.run(function, example)
        except Exception as e:  # any error: the other examples still run
            error = f"{type(e).__name__}: {e}"
        yield {"op": op, "example": example.name, "launches": launches() - before, "error": error}


def steps(launches: Callable[[], int], preset: str) -> Iterator[dict]:
    """Take one training step of a preset in bfloat16, padded and packed; yield the number of launches."""
    import torch

    from electra_fast import ops, testing
    from electra_fast.config import ElectraConfig
    from electra_fast.model import Electra
    from electra_fast.train import optimizer
    from electra_fast.train.metrics import MetricBuffer
    from electra_fast.train.step import Step

    table = {op: testing.implementations(op, device="cuda").get("triton") for op in testing.OPS}
    table = {op: function or getattr(ops, op) for op, function in table.items()}
    launched = table["mask_tokens"]

    def mask_tokens(*args, **kwargs):
        launched(*args, **kwargs)  # its positions are undefined, and PyTorch gathers rows by them
        return ops.mask_tokens(*args, **kwargs)

    model = Electra(getattr(ElectraConfig, preset)(), ops.Ops(**table | {"mask_tokens": mask_tokens}))
    B, L = 2, {"tiny": 64, "small": 128}.get(preset, 512)
    ids = torch.randint(1000, 30_000, (B, L))
    batches = {
        "padded": {"ids": ids, "key_mask": torch.ones(B, L, dtype=torch.bool)},
        "packed": {
            "ids": ids.flatten(),
            "cu_seqlens": torch.arange(0, B * L + 1, L, dtype=torch.int32),
            "max_seqlen": L,
        },
    }
    step = Step(
        model,
        optimizer.adamw(model),
        clip=1.0,
        dtype=torch.bfloat16,
        metrics=MetricBuffer(1, torch.device("cpu")),
        capture=None,
    )
    for layout, batch in batches.items():
        before = launches()
        step([batch], torch.tensor([[0, 1]]), 1e-4, 0)
        yield {"step": preset, "layout": layout, "launches": launches() - before}


def shapes(launches: Callable[[], int], part: str) -> Iterator[dict]:
    """Launch a part of launches.py, which has ELECTRA's sizes."""
    from benchmarks.static.launches import LAUNCHES

    before = launches()
    LAUNCHES[part]()
    yield {"part": part, "launches": launches() - before}


if __name__ == "__main__":
    from benchmarks.static import stub

    launches = stub.install()
    parts = {"examples": examples, "steps": steps, "shapes": shapes}
    if sys.argv[1] in ("same", "arguments"):
        from benchmarks.static import same

        parts |= {"same": same.examples, "arguments": same.arguments}
    elif sys.argv[1] not in parts:
        from benchmarks.static import host

        parts |= {"host": host.host, "host_layer": host.host_layer}
        parts |= {"host_step": host.host_step, "host_serve": host.host_serve}
    for line in parts[sys.argv[1]](launches, *sys.argv[2:]):
        print(json.dumps(line), flush=True)
