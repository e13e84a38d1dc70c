"""`make gpu` without a GPU: its rehearsal, and the effect of a hang, a wrong kernel or a killed process."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks.gpu import lines, pack, results
from benchmarks.gpu.run import RESERVE, Run
from benchmarks.gpu.stages import PYTHON, Stage, expected, plan
from benchmarks.harness.machine import ROOT
from benchmarks.report import markdown, runs
from benchmarks.report.page import page
from electra_fast import testing


def test_a_short_rehearsal_is_complete(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--short"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the rehearsal is complete" in done.stdout and "WRONG in 4 of 4" in done.stdout
    assert "graph equal to eager bit for bit: True (eager to eager: True)" in done.stdout
    names = [f"rehearsal{suffix}" for suffix in (".json", ".jsonl", ".log")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    result = runs.read(tmp_path / "rehearsal.json")
    kinds = {line["kind"] for line in lines.read(tmp_path / "rehearsal.jsonl")}
    assert kinds == {"machine", "check", "benchmark", "capture", "pretrain", "test", "end"}
    assert "Error budget: " in markdown.tables(result, "")
    assert "Each kernel on this machine" in page([result], "")

    command[4:] = ["--assemble", str(tmp_path / "rehearsal.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "got those of a rehearsal" in done.stderr


def start(tmp_path, seconds=60.0, workers=4) -> Run:
    deadline = time.monotonic() + RESERVE + seconds
    return Run(tmp_path / "lines.jsonl", tmp_path / "log", tmp_path, deadline, workers, {})


def say(text: str) -> tuple[str, ...]:
    return (PYTHON, "-c", f"print({text!r})")


def test_a_stage_that_hangs_costs_itself_alone(tmp_path):
    sleep = f"import time; time.sleep(600)  # of {tmp_path.name}-{os.getpid()}"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    leaves = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}])"
    stages = [
        Stage("a", "hangs", (PYTHON, "-c", child), 1, together=True),
        Stage("a", "leaves a child", (PYTHON, "-c", leaves), 60, together=True),
        Stage("a", "fails", (PYTHON, "-c", "raise SystemExit(3)"), 60),
        Stage("b", "missing", ("/no/such/program",), 60),
        Stage("b", "last", say("the last"), 60),
    ]
    started, ends = time.monotonic(), []
    start(tmp_path).all(stages, ends.append)
    assert time.monotonic() - started < 30
    assert [end["rc"] for end in ends] == [None, 0, 3, None, 0]
    assert ends[0]["why"] == "stopped after 1 s" and "No such file" in ends[3]["why"]
    assert ends[4]["tail"] == ["the last"] and "the last" in (tmp_path / "log").read_text()
    written = {line["stage"]: line for line in lines.read(tmp_path / "lines.jsonl")}
    assert written == {end["stage"]: end for end in ends}
    marked = ["pgrep", "-f", f"# of {tmp_path.name}-{os.getpid()}"]
    assert not subprocess.run(marked, capture_output=True, text=True).stdout, "a child still runs"


def test_a_signal_ends_what_runs_and_starts_nothing_more(tmp_path):
    sleep = (PYTHON, "-c", "import time; time.sleep(600)")
    run, ends = start(tmp_path, workers=2), []
    stages = [Stage("a", f"{i}", sleep, 500, together=True) for i in range(5)]
    stages.insert(0, Stage("a", "first", say("first"), 60, together=True))

    def interrupted(end):
        ends.append(end)
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run.all(stages, interrupted)
    assert time.monotonic() - started < 30 and not run.live
    said = [line["why"] for line in lines.read(tmp_path / "lines.jsonl")]
    assert [end["stage"] for end in ends] == ["first"] and "stopped" in said


def test_a_stage_for_which_no_time_is_left_is_named(tmp_path):
    ends = []
    start(tmp_path, seconds=1).all([Stage("a", "late", say("late"), 60)], ends.append)
    assert ends[0]["rc"] is None and ends[0]["why"] == "no time was left"


def test_lines_that_are_torn_or_not_numbers(tmp_path):
    file = tmp_path / "lines.jsonl"
    lines.write(file, kind="check", ratio=float("inf"), values=[float("nan"), 1.5])
    file.write_text(file.read_text() + '{"kind": "check", "rat')
    lines.write(None, kind="nothing is written")
    assert lines.read(file) == [{"kind": "check", "ratio": None, "values": [None, 1.5]}]
    assert lines.read(tmp_path / "none") == []


def check(tmp_path, *arguments: str, program: str = "") -> tuple[int, list[dict]]:
    """Run a check after `program`; return its exit code and lines."""
    file = tmp_path / "lines.jsonl"
    words = [*arguments, "--lines", str(file), "--stage", "s"]
    command = [sys.executable, "-m", "benchmarks.gpu.check", *words]
    if program:
        start = f"import runpy, sys; sys.argv[1:] = {words!r}\n"
        run = "\nrunpy.run_module('benchmarks.gpu.check', run_name='__main__', alter_sys=True)"
        command = [sys.executable, "-c", start + program + run]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, lines.read(file)


def test_a_wrong_example_does_not_stop_the_others(tmp_path):
    rc, found = check(tmp_path, "add_norm", "cpu", "float32", "--fault", "the last results lost")
    assert rc == 1 and len(found) == found[0]["examples"] > 5
    wrong = [line for line in found if not line["right"]]
    assert wrong and all(line["implementation"] == "cpu, broken on purpose" for line in found)
    assert any(line["ratio"] and line["ratio"] > 1 for line in wrong) and all(line["why"] for line in wrong)


def test_after_a_lost_context_a_new_process_continues(tmp_path):
    lose = """
from electra_fast import testing
judge = testing.judge_example
def lost(function, example):
    if len(calls) == 1:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    calls.append(1)
    return judge(function, example)
calls, testing.judge_example = [], lost
"""
    rc, found = check(tmp_path, "rtd_loss", "reference", "float32", program=lose)
    assert [line["number"] for line in found] == list(range(found[0]["examples"]))
    assert [line["right"] for line in found].count(False) == 1 and not found[1]["right"]
    assert rc == 0  # the exit code of the process that ran the rest; the lines name the fault


def test_the_summary_names_what_is_wrong_and_how_fast_the_rest_is():
    def line(op, number, right, ratio, examples=3):
        facts = {"op": op, "implementation": "triton", "dtype": "bfloat16", "example": f"e{number}"}
        facts |= {
            "right": right,
            "ratio": ratio,
            "why": "" if right else "error 3 exceeds",
            "examples": examples,
        }
        return facts | {"kind": "check", "stage": "check"}

    def timed(provider, median, ratio):
        extra = {"op": "add_norm", "size": "small", "passes": "forward+backward", "provider": provider}
        extra |= {"bound": 5e-6, "implementation": "triton" if provider == "fused" else None, "ratio": ratio}
        benchmark = {
            "group": "add_norm, small, forward+backward",
            "extra_info": extra,
            "stats": {"median": median},
        }
        return {"kind": "benchmark", "stage": "ops", "benchmark": benchmark}

    found = [line("add_norm", i, True, 0.5 + i / 10) for i in range(3)]
    found += [line("embed", 0, False, 3.0), line("embed", 1, True, 0.4)]
    found += [timed("fused", 1e-5, {"torch": 3.0, "compile": 1.5}), timed("torch", 3e-5, {"fused": 1 / 3})]
    found += [
        timed("compile", 1.5e-5, {"fused": 1 / 1.5}),
        {"kind": "refused", "word": "fails", "line": "x: y"},
    ]
    found += [
        {"kind": "end", "letter": "a", "stage": "check", "rc": None, "why": "stopped after 9 s"},
        {"kind": "end", "letter": "f", "stage": "train", "rc": -6, "why": "", "tail": ["a", "ended"]},
    ]
    found += [line("rtd_loss", 0, False, None), line("rtd_loss", 1, True, 0.4)]
    found += [
        {"kind": "pretrain", "stage": "f", "loss": 9.0},
        {"kind": "pretrain", "stage": "f", "loss": None},
    ]
    run = results.assemble(found, 10)
    text = results.summary(run)
    assert "add_norm, triton  right in 3" in text and "0.70" in text
    assert "embed, triton     WRONG in 1 of 2, 1 not run" in text
    assert "10.0" in text and "50%" in text and "1.50x torch.compile" in text
    assert "rtd_loss, triton  WRONG in 1 of 2, 1 not run  inf" in text
    assert "loss 9.000 to not finite" in text
    assert "fails: x: y" in text and "stage check: stopped after 9 s" in text
    assert "stage train: exit code -6, ended" in text


def test_every_kernel_has_a_check_and_every_op_a_time():
    every = {op: ["triton"] for op in testing.OPS}
    stages = plan(every, Path("/nowhere"))
    names = [stage.name for stage in stages]
    assert names[:2] == ["check mask_tokens triton any", "check replace_tokens triton any"]
    assert {name.split()[1] for name in names if name.startswith("check ")} == set(testing.OPS)
    assert [s.letter for s in stages] == sorted(s.letter for s in stages)
    with_cuda = {**every, "embed": ["triton", "cuda"], "mlm_head": ["triton", "cuda"]}
    stages = plan(with_cuda, Path("/nowhere"))
    assert expected(stages) <= 330
    assert sum(stage.expected for stage in stages if stage.letter == "a") / 14 <= 40


def test_a_pack_is_used_where_it_fits(tmp_path, monkeypatch):
    cache, folder = tmp_path / "cache", tmp_path / "pack"
    (cache / "KEY").mkdir(parents=True)
    (cache / "KEY" / "k.cubin").write_bytes(b"binary")
    (cache / "KEY" / "k.ttir").write_text("an intermediate form, which no launch reads")
    index = {"child_paths": {"k.cubin": str(cache / "KEY" / "k.cubin")}}
    (cache / "KEY" / "__grp__k.json").write_text(json.dumps(index))
    folder.mkdir()
    pack.save_cache(cache, folder / pack.ARCHIVE)
    with tarfile.open(folder / "triton.tar.xz") as tar:
        assert sorted(tar.getnames()) == ["KEY/__grp__k.json", "KEY/k.cubin"]

    tree = tmp_path / "tree"
    (tree / "electra_fast").mkdir(parents=True)
    monkeypatch.setattr(pack, "ROOT", tree)
    (folder / pack.extension_name()).write_bytes(b"extension")
    sums = {name: pack.checksum(folder / name) for name in (pack.extension_name(), pack.ARCHIVE)}
    facts = pack.versions() | {"sha256": sums}
    (folder / "manifest.json").write_text(json.dumps(facts))
    said = pack.use(folder, tmp_path / "there")
    assert said == ["the extension of the pack is installed", "1 kernels of the pack in Triton's cache"]
    assert (tree / "electra_fast" / pack.extension_name()).read_bytes() == b"extension"
    moved = json.loads((tmp_path / "there" / "KEY" / "__grp__k.json").read_text())
    assert Path(moved["child_paths"]["k.cubin"]).read_bytes() == b"binary"

    (tree / "electra_fast" / pack.extension_name()).unlink()
    (folder / "manifest.json").write_text(json.dumps(facts | {"torch": "1.0"}))
    assert "built for torch 1.0, here" in pack.use(folder, tmp_path / "there")[0]
    assert not (tree / "electra_fast" / pack.extension_name()).exists()
    assert pack.use(tmp_path / "none", cache)[0].startswith("no pack")

    for name in sums:  # a file that was cut on its way
        (folder / name).write_bytes(b"cut")
    (folder / "manifest.json").write_text(json.dumps(facts))
    said = pack.use(folder, tmp_path / "there")
    assert len(said) == 2 and all("differs from the file in its manifest" in words for words in said)
    (folder / "manifest.json").write_text('{"torch": ')
    assert pack.use(folder, cache)[0].startswith("no pack")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "gpu: torch must see a GPU, got none"),
        (["--more"], "gpu: torch must see a GPU, got none"),
        (["--rehearse", "--only", "axy"], "--only must be some of abcdefghijk, got xy"),
        (["--assemble", "/no/such.jsonl"], "--assemble must name existing files, got /no/such.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused(words, says, tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks", "gpu", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr
    assert not list(tmp_path.iterdir())
