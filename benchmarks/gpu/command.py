"""The command: `python -m benchmarks gpu`, which is `make gpu`, and its rehearsal on a CPU."""

import argparse
import datetime
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import STARTED
from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description="All evidence from a few minutes on a GPU: what is right, and how fast it is.",
        epilog="Results go to $OUT, else to benchmarks/results: <device>.json, .jsonl and .log.",
    )
    p.add_argument("--budget", type=float, metavar="SECONDS", help="default 480, of a rehearsal 1800")
    p.add_argument(
        "--more", action="store_true", help="what a second command is for: large, max-autotune, tune"
    )
    p.add_argument("--only", metavar="LETTERS", help="only these stages, such as abd")
    p.add_argument(
        "--assemble",
        type=Path,
        nargs="+",
        metavar="FILE.jsonl",
        help="only make the JSON of earlier commands",
    )
    p.add_argument("--rehearse", action="store_true", help="without a GPU, with faults planted on purpose")
    p.add_argument("--short", action="store_true", help="a rehearsal of a minute or two")
    return p


def prepare() -> list[str]:
    """Make the package importable and its extension present, as far as that can be done; say how."""
    from benchmarks.gpu import pack

    said = pack.use()
    if (
        importlib.util.find_spec("electra_fast.kernels") is None
    ):  # not installed: kernels/ is mapped to this name
        (ROOT / "electra_fast" / "kernels").symlink_to("../kernels")
        importlib.invalidate_caches()
    if importlib.util.find_spec("electra_fast._C") is None:
        import torch

        arch = "{}.{}".format(*torch.cuda.get_device_capability())
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        try:
            environment = os.environ | {"TORCH_CUDA_ARCH_LIST": arch}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=150)
            said.append("the extension was built here")
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said.append(f"the extension could not be built, Triton and PyTorch serve every op: {error}")
    return said


def git(*words: str) -> str:
    """Return what git says, nothing where there is no repository."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def machine() -> dict:
    """Return the line that says what was measured, and where."""
    from benchmarks.machine import info

    facts = info() | {"python_version": sys.version.split()[0]}
    commit = {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return {"kind": "machine", "machine_info": facts, "commit_info": commit, "datetime": now}


def implementations() -> dict[str, list[str]]:
    """Return the kernels of each op that can run here."""
    from electra_fast import testing

    return {op: [name for name in testing.implementations(op) if name != "reference"] for op in testing.OPS}


def folder_of(options: argparse.Namespace) -> Path:
    """Return where the results go; those of a rehearsal or of a part take no result's place."""
    if options.rehearse:
        return ROOT / "build" / "rehearsal"
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return RESULTS if options.only is None else ROOT / "build" / "gpu"


def execute(options: argparse.Namespace) -> int:
    from benchmarks.machine import device, device_slug

    if not options.rehearse and device() != "cuda":
        raise ValueError("gpu: needs a GPU that torch sees, got none; `make gpu-rehearse` does without")
    said = [] if options.rehearse else prepare()

    from benchmarks.gpu import lines, pack, rehearsal, results, stages
    from benchmarks.gpu.run import Run

    folder = folder_of(options)
    folder.mkdir(parents=True, exist_ok=True)
    name = "rehearsal" if options.rehearse else f"{device_slug()}-more" if options.more else device_slug()
    file, log, target = (folder / f"{name}{suffix}" for suffix in (".jsonl", ".log", ".json"))
    for old in (file, log):
        old.unlink(missing_ok=True)
    lines.write(file, **machine())
    kernels = implementations()
    said.append(f"{sum(map(len, kernels.values()))} kernels of {len(kernels)} ops; results in {folder}")
    print("\n".join(said), flush=True)

    scratch = Path(tempfile.mkdtemp(prefix="electra_fast-"))
    environment = {"TMPDIR": str(scratch)}
    environment |= (
        {"ELECTRA_FAST_REHEARSAL": "1"} if options.rehearse else {"TRITON_CACHE_DIR": str(pack.CACHE)}
    )
    budget = options.budget or (1800.0 if options.rehearse else 480.0)
    workers = max(2, min(14, (os.cpu_count() or 2) - 2))  # two cores for what runs beside the checks
    run = Run(file, log, STARTED + budget, workers, environment)
    if options.more:
        plan = stages.more(scratch)
    else:
        plan = stages.plan(kernels, scratch, rehearse=options.rehearse, short=options.short)
    plan = rehearsal.altered(plan, options.short) if options.rehearse else plan
    plan = [stage for stage in plan if stage.letter in (options.only or stage.letter)]
    compiles = not options.rehearse and any(stage.name == "step small, compile" for stage in plan)

    def after(end: dict) -> None:
        if end["stage"].startswith("pretrain"):
            for line in lines.read(scratch / "pretrain" / "log.jsonl"):
                line |= {"stage": end["stage"], "log": line.get("kind"), "kind": "pretrain"}
                lines.write(file, **line)
        results.write(lines.read(file), target, budget, time.monotonic() - STARTED)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: stopped"))  # so that no stage is left behind
    warm = run.beside(stages.warm_up()) if compiles else None
    try:
        run.all([stage for stage in plan if stage.letter in "ab"], after)
        if warm is not None:  # what is timed next shares the GPU with nothing
            after(warm.result())
        run.all([stage for stage in plan if stage.letter not in "ab"], after)
    finally:
        run.kill()
        shutil.rmtree(scratch, ignore_errors=True)
        result = results.write(lines.read(file), target, budget, time.monotonic() - STARTED)
        print(f"\n{results.summary(result)}\n{target}", flush=True)
    if options.rehearse:
        return rehearsal.verdict(result, plan, {"step"} if options.short else {"step", *kernels})
    wrong = any(check["wrong"] for check in result["checks"])
    return int(wrong or any(stage["rc"] != 0 for stage in result["stages"]))


def assemble(files: list[Path]) -> int:
    """Make one JSON of the lines of several commands on one machine, such as `make gpu` and its MORE=1."""
    from benchmarks.gpu import lines, results

    found = [line for file in files for line in lines.read(file)]
    machines = [line["machine_info"] for line in found if line["kind"] == "machine"]
    same = {(m["device"], m["torch"], m["sources"]) for m in machines}
    if len(same) != 1:
        raise ValueError(f"gpu: --assemble must get lines of one GPU, torch and source, got {sorted(same)}")
    target = RESULTS / f"{machines[0]['device']}.json"
    run = results.write(found, target, 0.0, 0.0)
    print(f"{results.summary(run)}\n{target}")
    return 0


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    return assemble(options.assemble) if options.assemble else execute(options)
