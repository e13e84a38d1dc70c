"""Check that a step of ELECTRA-small as a CUDA graph equals its kernels launched one by one, bit for bit.

    python -m benchmarks.gpu.capture --lines FILE

Without a GPU, a stand-in for the graph runs the step's body at each replay.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.gpu import lines

COMPARED = 8  # steps


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--lines", type=Path)
    p.add_argument("--stage", default="")
    options = p.parse_args()

    import torch

    from benchmarks.harness.inputs import REHEARSAL, STEPS, batches
    from electra_fast.capture import cuda_graph
    from electra_fast.model import Electra
    from electra_fast.train import optimizer
    from electra_fast.train.metrics import MetricBuffer
    from electra_fast.train.step import Step

    size = STEPS["small 128x128"][0]
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    graph = cuda_graph if cuda else lambda body: body
    timed = 50 if cuda and not REHEARSAL else 1  # steps
    capture = {"eager": None, "eager again": None, "graph": graph}
    given = [batches(size.B, size.L).padded(i) for i in range(4)]
    given = [{"ids": b.ids.to(device), "key_mask": b.key_mask.to(device)} for b in given]

    def synchronize() -> None:
        if cuda:
            torch.cuda.synchronize()

    ends, replayed = {}, False
    for mode in capture:
        torch.manual_seed(0)
        model = Electra(size.config).to(device)
        metrics = MetricBuffer(1, device)
        optim = optimizer.adamw(model)
        dtype = torch.bfloat16 if cuda else None
        step = Step(model, optim, clip=1.0, dtype=dtype, metrics=metrics, capture=capture[mode])

        def take(i: int, step=step) -> None:
            step([given[i % len(given)]], torch.tensor([[0, i]]), 1e-4, 0)

        stream = torch.cuda.Stream() if cuda else None  # the default stream cannot be captured
        synchronize()
        with torch.cuda.stream(stream):
            rows = []
            for i in range(COMPARED):
                take(i)
                rows.append(metrics.rows[0].tolist())
            synchronize()
            start = time.perf_counter()
            for i in range(COMPARED, COMPARED + timed):
                take(i)
            synchronize()
        ms = 1e3 * (time.perf_counter() - start) / timed
        ends[mode] = [torch.tensor(rows), *(p.detach().cpu() for p in model.parameters())]
        replayed = step._replay is not None
        facts = {"mode": mode, "ms": round(ms, 3), "losses": [row[0] for row in rows]}
        facts |= {"why_eager": step.why_eager}
        lines.write(options.lines, kind="capture", stage=options.stage, **facts)
        print(mode, f"{ms:.3f} ms per step", step.why_eager or "")

    def same(mode: str) -> bool:
        pairs = zip(ends["eager"], ends[mode], strict=True)
        return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)

    found = {"equal": same("graph"), "repeatable": same("eager again"), "replayed": replayed}
    found["finite"] = all(bool(x.isfinite().all()) for x in ends["eager"])
    lines.write(options.lines, kind="capture", stage=options.stage, **found)
    print(found)
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
