"""The command `python -m benchmarks gpu`, which `make gpu` runs, and its rehearsal on a CPU."""

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
from benchmarks.harness.machine import ROOT
from electra_fast.errors import must

RESULTS = ROOT / "build" / "gpu"
LETTERS = "abcdefghijk"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description="Check all kernels and measure their speed in a few minutes on a GPU.",
        epilog="Results are written to $OUT or build/gpu: <device>.json, .jsonl and .log.",
    )
    p.add_argument("--budget", type=float, metavar="SECONDS", help="default 480; for a rehearsal 1800")
    p.add_argument("--more", action="store_true", help="run the stages that do not fit into the first budget")
    p.add_argument("--only", metavar="LETTERS", help=f"run only these stages, some of {LETTERS}")
    p.add_argument(
        "--assemble",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE.jsonl",
        help="combine the lines of earlier commands into one JSON, and run nothing",
    )
    p.add_argument("--rehearse", action="store_true", help="run without a GPU, with two planted faults")
    p.add_argument("--short", action="store_true", help="a rehearsal of one or two minutes")
    return p


def prepare() -> list[str]:
    """Make the package importable and install or build its extension; return what was done."""
    from benchmarks.gpu import pack

    said = pack.use()
    mapped = importlib.util.find_spec("electra_fast.kernels")
    kernels = (ROOT / "kernels").resolve()
    if mapped is None or Path(mapped.origin).parent.resolve() != kernels:  # another or no installation
        link = ROOT / "electra_fast" / "kernels"
        link.unlink(missing_ok=True)
        link.symlink_to("../kernels")
        importlib.invalidate_caches()
    extension = ROOT / "electra_fast" / pack.extension_name()
    if not up_to_date(extension):
        said.append(build_in_place())
    program = [sys.executable, "-c", "import electra_fast.ops"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and extension.exists():  # for example, a system library is too old
        extension.unlink()
        said.append(f"the extension does not load and was removed: {done.stderr.strip()[-300:]}")
    return said


def up_to_date(extension: Path) -> bool:
    sources = [*ROOT.glob("csrc/**/*"), ROOT / "setup.py"]
    newest = max(file.stat().st_mtime for file in sources if file.is_file())
    return extension.exists() and extension.stat().st_mtime >= newest


def build_in_place(limit: float = 150.0) -> str:
    """Compile the extension for this machine's GPU; return the outcome."""
    import torch

    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}
    environment |= {"ELECTRA_FAST_BUILD": "strict"}  # it must contain csrc/cuda
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0)
    try:
        rc = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # includes ninja and the compilers
        rc = f"stopped after {limit:.0f} s"
    failed = f"the extension was not built ({rc}): Triton and PyTorch serve the ops"
    return "the extension was built here" if rc == 0 else failed


def git(*words: str) -> str:
    """Return git's output, empty without a repository."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def machine(rehearsal: bool) -> dict:
    """Return the line with the machine, the commit and the date."""
    from benchmarks.gpu import pack
    from benchmarks.harness.machine import info

    facts = info() | {"python_version": sys.version.split()[0], "rehearsal": rehearsal}
    commit = {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    commit = commit if commit["id"] else pack.manifest().get("commit", {})  # without a repository
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return {"kind": "machine", "machine_info": facts, "commit_info": commit, "datetime": now}


def implementations() -> dict[str, list[str]]:
    """Return the kernels of each op that can run here."""
    from electra_fast import testing

    testing.interpret()
    return {op: [name for name in testing.implementations(op) if name != "reference"] for op in testing.OPS}


def files_of(options: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Return the paths of lines, log and JSON. Rehearsals and parts of the stages have their own names."""
    from benchmarks.harness.machine import device_slug

    parts = ["rehearsal" if options.rehearse else device_slug(), *["more"] * options.more]
    parts += [options.only] if options.only else []
    folder = Path(os.environ.get("OUT") or RESULTS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{'-'.join(parts)}{suffix}" for suffix in (".jsonl", ".log", ".json")]
        for old in files[:2]:
            old.write_text("")
    except OSError as error:
        raise ValueError(must("gpu: OUT", "be a writable folder", f"{folder}: {error}")) from error
    return tuple(files)


def execute(options: argparse.Namespace) -> int:
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from benchmarks.harness.machine import device

    if not options.rehearse and device() != "cuda":
        raise ValueError(must("gpu: torch", "see a GPU", "none", "`make gpu-rehearse` needs none"))
    if unknown := set(options.only or "") - set(LETTERS):
        raise ValueError(must("gpu: --only", f"be some of {LETTERS}", "".join(sorted(unknown))))
    file, log, target = files_of(options)
    said = [] if options.rehearse else prepare()

    from benchmarks.gpu import lines, pack, rehearsal, results, stages
    from benchmarks.gpu.run import Run

    budget = options.budget if options.budget is not None else 1800.0 if options.rehearse else 480.0
    lines.write(file, **machine(options.rehearse), budget=budget)
    kernels = implementations()
    said.append(
        f"{sum(map(len, kernels.values()))} kernels of {len(kernels)} ops; results in {target.parent}"
    )
    print("\n".join(said), flush=True)

    scratch = Path(tempfile.mkdtemp(prefix="electra_fast-"))
    environment = {"TMPDIR": str(scratch)}
    environment |= (
        {"ELECTRA_FAST_REHEARSAL": "1"} if options.rehearse else {"TRITON_CACHE_DIR": str(pack.CACHE)}
    )
    workers = max(2, min(14, (os.cpu_count() or 2) - 2))  # two cores are for the background stage
    run = Run(file, log, scratch, STARTED + budget, workers, environment)
    if options.more:
        plan = stages.second(kernels, scratch)
    else:
        plan = stages.plan(kernels, scratch, rehearse=options.rehearse, short=options.short)
    plan = rehearsal.altered(plan, options.short) if options.rehearse else plan
    plan = [stage for stage in plan if stage.letter in (options.only or LETTERS)]
    compiles = not options.rehearse and any(stage.name == "step small, compile" for stage in plan)

    def after(end: dict) -> None:
        if end["stage"].startswith("pretrain"):
            for line in lines.read(scratch / "pretrain" / "log.jsonl"):
                line |= {"stage": end["stage"], "log": line["kind"], "kind": "pretrain"}
                lines.write(file, **line)
        try:
            results.write(lines.read(file), target, time.monotonic() - STARTED)
        except Exception as error:  # the lines are written, so the next stages go first
            print(f"{target} could not be written: {error!r}", file=sys.stderr)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: stopped"))  # so that `finally` stops the stages
    warm = run.in_background(stages.warm_up()) if compiles else None
    try:
        run.all([stage for stage in plan if stage.letter in "ab"], after)
        if warm is not None:  # the next stages are timed, so they must have the GPU for themselves
            after(warm.result())
        run.all([stage for stage in plan if stage.letter not in "ab"], after)
    finally:
        run.stop()
        shutil.rmtree(scratch, ignore_errors=True)
        result = results.write(lines.read(file), target, time.monotonic() - STARTED)
        print(f"\n{results.summary(result)}\n{target}", flush=True)
    if options.rehearse:
        seconds = stages.expected(stages.plan(kernels, scratch))
        print(f"expected on a GPU machine with 16 cores: {seconds:.0f} s until the end of (f)")
        return rehearsal.verdict(result, plan, set() if options.short else set(kernels))
    wrong = any(check["wrong"] for check in result["checks"])
    return int(wrong or any(stage["rc"] != 0 for stage in result["stages"]))


def assemble(files: list[Path]) -> int:
    """Combine the lines of several commands on one machine, like `make gpu` and its MORE=1, into one JSON."""
    from benchmarks.gpu import lines, results

    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(must("gpu: --assemble", "name existing files", ", ".join(missing)))
    found = [line for file in files for line in lines.read(file)]
    machines = [line["machine_info"] for line in found if line["kind"] == "machine"]
    if any(m.get("rehearsal") for m in machines):
        raise ValueError(must("gpu: --assemble", "get lines of a GPU", "those of a rehearsal"))
    same = {(m["device"], m["torch"], m["sources"]) for m in machines}
    if len(same) != 1:
        rule = "get lines of one GPU, torch version and source"
        raise ValueError(must("gpu: --assemble", rule, sorted(same)))
    target = Path(os.environ.get("OUT") or RESULTS) / f"{machines[0]['device']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    run = results.write(found, target, sum(line["seconds"] for line in found if line["kind"] == "end"))
    print(f"{results.summary(run)}\n{target}")
    return 0


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    return assemble(options.assemble) if options.assemble else execute(options)
