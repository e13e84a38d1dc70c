"""`make gpu` without a GPU: the same stages at small sizes, and two stages that must fail.

Triton's kernels run in the interpreter, and are launched with the stub driver (`benchmarks.static`). The
harness runs with a pretended GPU (`pretend.py`), without torch.compile. A stage that hangs and a kernel that
is broken on purpose show that neither affects the results of other stages.
"""

import sys

from benchmarks.gpu.stages import PYTHON, Stage

HANG = Stage("a", "hangs on purpose", (PYTHON, "-c", "import time; time.sleep(3600)"), 6, together=True)
BROKEN = ("add_norm", "cpu", "float32")
LIMIT = 300.0  # time limit of the other stages in seconds, on two cores


def altered(plan: list[Stage], short: bool) -> list[Stage]:
    """Return the plan, changed so that a CPU can run it, with the two planted faults."""
    broken = (PYTHON, "-m", "benchmarks.gpu.check", *BROKEN, "--most", "4", "--fault", "the last results")
    launched = LAUNCHED[:1] if short else LAUNCHED
    extra = [HANG, Stage("a", "broken on purpose", broken, LIMIT, together=True)]
    for op in launched:
        command = (PYTHON, "-m", "benchmarks.static.on_stub", "examples", op)
        environment = (("TRITON_INTERPRET", "0"),)
        extra.append(Stage("a", f"launch {op}", command, LIMIT, together=True, environment=environment))
    if short:
        plan = [stage for stage in plan if stage.name in SHORT]
    plan = [stage for stage in plan if "tune" not in stage.command]  # it only compares times
    return extra + [stage._replace(command=adapted(stage), limit=LIMIT) for stage in plan]


LAUNCHED = ("add_norm", "attention", "bias_gelu", "embed", "mlm_head", "rtd_loss")
# One stage of each kind.
SHORT = ("check add_norm triton bfloat16", "check replace_tokens triton any", "graph against eager")
SHORT += ("step small", "pretrain small", "sanitize rtd_loss", "tests")


def adapted(stage: Stage) -> tuple[str, ...]:
    """Return a stage's command without the sanitizer; the harness runs with a pretended GPU."""
    python, flag, module, *rest = stage.command[stage.command.index(PYTHON) :]
    pretended = module in ("benchmarks", "benchmarks.gpu.capture") and "compile" not in stage.name
    return (python, flag, *(["benchmarks.gpu.pretend"] if pretended else []), module, *rest)


def verdict(run: dict, plan: list[Stage], ops: set[str]) -> int:
    """Print whether all results and both planted faults were reported; return the exit status.

    Args:
        run: the JSON of the run.
        plan: its stages; each letter has results that must not be missing.
        ops: the ops that the plan times.
    """
    letters = {stage.letter for stage in plan}
    wanted = {"c": {"step"}, "f": ops, "k": {"linear_gelu"}}
    timed = {op for letter in letters for op in wanted.get(letter, ())}
    ends = {stage["stage"]: stage for stage in run["stages"]}
    missing = [stage.name for stage in plan if stage.name not in ends]
    missing += [f"{name}: {end['why'] or end['rc']}" for name, end in ends.items() if bad(name, end)]
    seen = {(c["op"], c["implementation"]): c for c in run["checks"]}
    planted = seen.get((BROKEN[0], f"{BROKEN[1]}, broken on purpose"))
    if "a" in letters and not (planted and planted["wrong"]):
        missing.append("the kernel that is broken on purpose was not reported as wrong")
    missing += [f"wrong: {key[0]}, {key[1]}" for key, c in seen.items() if c["wrong"] and c is not planted]
    extras = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    without = timed - {extra["op"] for extra in extras if extra["provider"] == "fused"}
    missing += [f"no time of {op}" for op in sorted(without)]
    refused = [line for word in ("wrong", "fails", "dropped") for line in run[word]]
    missing += [line for line in refused if ", candidate: " in line]
    parts = (("b", "capture"), ("f", "pretrain"), ("i", "tests"))
    missing += [f"nothing of {part}" for letter, part in parts if letter in letters and not run[part]]
    if missing:
        print("the rehearsal is incomplete:\n  " + "\n  ".join(missing), file=sys.stderr)
        return 1
    print("a rehearsal's times mean nothing; it refuses rivals that compile or need kernels of a GPU")
    found = ", the hang was stopped, the broken kernel was found" if "a" in letters else ""
    print(f"the rehearsal is complete: all stages reported{found}")
    return 0


def bad(name: str, end: dict) -> bool:
    """Whether a stage did not end as it must."""
    if name == HANG.name:
        return not end["why"].startswith("stopped after")
    if name == "broken on purpose":
        return end["rc"] != 1
    # Rivals that compile or need kernels of a GPU are refused, so these stages may exit with 1.
    refused = end["letter"] in "cdefgk" and not name.startswith("pretrain")
    return end["rc"] not in ((0, 1) if refused else (0,))
