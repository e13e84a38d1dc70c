"""Check one implementation of one op in one dtype against the error budget, and write one line per example.

    python -m benchmarks.gpu.check add_norm triton bfloat16 --lines FILE

A wrong example does not stop the others. After an illegal access a process cannot launch kernels any more, so
the remaining examples run in a new process.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu import lines

LOST = ("CUDA error", "Triton Error [CUDA]", "illegal memory access")  # the context may be unusable


def examples_of(op: str, dtype: str) -> list:
    """Return an op's examples with gradients in a dtype; "any" means all, for ops without gradients."""
    import torch

    from electra_fast import testing

    def dtypes(example):
        return {x.dtype for name, x in example.args.items() if name in example.gradients}

    every = list(testing.examples(op, 0))
    return every if dtype == "any" else [e for e in every if dtypes(e) & {getattr(torch, dtype)}]


def judged(function, example) -> dict:
    """Return the worst ratio to the budget among an example's results and gradients, and the first fault."""
    from electra_fast import testing

    try:
        found = testing.judge_example(function, example)
    except Exception as error:  # any error is reported
        text = (str(error).strip().splitlines() or [""])[0]
        return {"right": False, "ratio": None, "why": f"{type(error).__name__}: {text}"[:500]}
    wrong = [judgement for judgement in found if judgement.why]
    worst = max(found, key=lambda judgement: judgement.ratio, default=None)
    return {
        "right": not wrong,
        "ratio": worst.ratio if worst else 0.0,
        "worst": worst.name if worst else "",
        "why": wrong[0].why if wrong else "",
    }


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("op")
    p.add_argument("implementation")
    p.add_argument("dtype")
    p.add_argument("--lines", type=Path)
    p.add_argument("--stage", default="")
    p.add_argument("--first", type=int, default=0, help="number of the first example to run")
    p.add_argument("--most", type=int, help="maximum number of examples, for a short rehearsal")
    p.add_argument("--fault", help="break the implementation: a name in testing.mutations, or its start")
    options = p.parse_args()

    import torch

    from electra_fast import testing

    testing.interpret()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    function = testing.implementations(options.op, device)[options.implementation]
    name = options.implementation
    if options.fault:
        faults = testing.mutations(options.op)
        function = next(fault for key, fault in faults.items() if key.startswith(options.fault))(function)
        name += ", broken on purpose"
    status, every = 0, examples_of(options.op, options.dtype)[: options.most]
    for number, example in list(enumerate(every))[options.first :]:
        start = time.monotonic()
        found = judged(function, example.to(device=device))
        facts = {"op": options.op, "implementation": name, "dtype": options.dtype, "example": example.name}
        facts |= {"number": number, "examples": len(every), "seconds": round(time.monotonic() - start, 3)}
        lines.write(options.lines, kind="check", stage=options.stage, **facts, **found)
        if not found["right"]:
            print(f"{example.name}: {found['why']}", flush=True)
            status = 1
            if any(words in found["why"] for words in LOST):
                rest = [a for a in sys.argv[1:] if not a.startswith("--first")]
                if number + 1 < len(every):
                    again = [sys.executable, "-m", "benchmarks.gpu.check", *rest, f"--first={number + 1}"]
                    os.execv(sys.executable, again)
    return status


if __name__ == "__main__":
    sys.exit(main())
