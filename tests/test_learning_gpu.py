"""`make gpu-learn` without a GPU: what travels, what is left out, and a rehearsal."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks.harness.machine import ROOT
from benchmarks.learning import (
    equal_compute,
    gpu_rehearsal,
    gpu_stages,
    on_gpu,
    parts,
    pretend_data,
    transfer,
)
from benchmarks.learning.gpu_stages import Session
from benchmarks.learning.on_gpu import Folders
from benchmarks.learning.probes import Probes
from benchmarks.learning.runs import pooled_until
from electra_fast import data
from electra_fast.train.recipe import Recipe
from electra_fast.train.task_data import TaskData


def folders_in(folder: Path) -> Folders:
    return Folders(folder / "packed", folder / "runs", folder / "out")


def session_in(folder: Path, seconds: float = 60.0) -> Session:
    return Session(folders_in(folder), time.monotonic() + seconds, {})


def written(session: Session) -> dict:
    return json.loads((session.folders.out / on_gpu.RESULT).read_text())


def test_parts_are_below_the_limit_and_come_back_bit_for_bit(tmp_path):
    contents = {"fused/a": os.urandom(30_000), "fused/b/c": os.urandom(7), "log": b""}
    for name, content in contents.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    parts.write(tmp_path / "run", ("fused", "log"), tmp_path / "x.tar.xz", size=1_000)  # replaced
    files = parts.write(tmp_path / "run", ("fused", "log"), tmp_path / "x.tar.xz", size=2_500)
    assert set(tmp_path.glob("x.tar.xz.*")) == set(files)
    assert len(files) > 11 and max(file.stat().st_size for file in files) <= 2_500  # 10 comes after 9
    parts.read(tmp_path / "x.tar.xz", tmp_path / "new")
    assert {name: (tmp_path / "new" / name).read_bytes() for name in contents} == contents
    files[-1].unlink()
    with pytest.raises(ValueError, match=r"x\.tar\.xz\.\* must be all parts of one file"):
        parts.read(tmp_path / "x.tar.xz", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"y\.0 does not exist"):
        parts.read(tmp_path / "y", tmp_path / "other")


def test_a_part_fits_into_what_comes_back():
    assert parts.PART <= gpu_rehearsal.BYTES


def test_the_pack_names_all_missing_files(tmp_path):
    pretend_data.write(tmp_path / "data")
    for name in ("wiki/extra.txt.xz", "blimp/blimp_data.tar.xz"):
        (tmp_path / "data" / name).unlink()
    rule = r"DATA must contain blimp/blimp_data\.tar\.xz, wiki/extra\.txt\.xz, got"
    with pytest.raises(ValueError, match=rule):
        on_gpu.pack(tmp_path / "data", folders_in(tmp_path))
    assert not (tmp_path / "packed").exists()


def test_all_tasks_and_probes_can_read_the_pretended_data(tmp_path):
    pretend_data.write(tmp_path)
    tokenizer = data.train_tokenizer(data.documents([tmp_path / text for text in on_gpu.TEXTS]), 400)
    data.save_tokenizer(tokenizer, tmp_path / "vocabulary")
    for name in transfer.TASKS:
        run = transfer.Run(name, transfer.NEW_WEIGHTS, 0, tmp_path / "vocabulary", "tiny", tmp_path)
        splits = TaskData(transfer.recipe(run, tmp_path).resolved()).splits
        assert all(len(split.items) == pretend_data.ITEMS for split in splits.values())
    probes = Probes(tokenizer, tmp_path)
    assert {split: len(labels) for split, labels in probes.labels.items()} == dict.fromkeys(
        ("train", "dev", "test"), pretend_data.ITEMS
    )
    assert probes.words()["sentiment_words"].accuracy == 1


def test_a_stage_that_fails_or_has_no_time_is_named_and_the_others_continue(tmp_path):
    session = session_in(tmp_path)

    def fails() -> None:
        raise ValueError("the reason")

    session.optional("probes", 0.0, fails)
    session.optional("long", 1000.0, fails)
    session.optional("later", 0.0, lambda: session.found.update(result=7))
    found = written(session)
    assert found["left_out"]["probes"] == "the reason" and found["result"] == 7
    assert found["left_out"]["long"].startswith("it needs 1000 s, and ")
    assert found["seconds"].keys() == {"probes", "later"}


class Arrived:
    """Stands for `pooled_until`: one run ends, one fails, and the others do not end in time."""

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, end, function, items):
        self.asked = [name for name, _ in items]
        (first, run), (second, _), *_ = items
        yield first, {"task": run.task, "start": run.start, "seed": run.seed, "value": 0.5}
        yield second, "the loss is not finite"


def test_fine_tuning_without_a_result_is_named_and_the_next_command_makes_up_for_it(tmp_path, monkeypatch):
    session, arrived = session_in(tmp_path), Arrived()
    monkeypatch.setattr(gpu_stages, "pooled_until", arrived)
    (tmp_path / "runs" / "fused" / "discriminator").mkdir(parents=True)
    comparison = equal_compute.Comparison(tmp_path / "runs", Recipe(preset="tiny"), tmp_path, seeds=2)
    gpu_stages.fine_tune(session, comparison)
    first, second, *others = arrived.asked
    assert len(arrived.asked) == 2 * 2 * len(transfer.TASKS)
    assert [name.endswith("seed 0") for name in arrived.asked] == [True] * 8 + [False] * 8
    found = written(session)
    assert [each["value"] for each in found["tasks"]] == [0.5] and first not in found["left_out"]
    assert found["left_out"] == {second: "the loss is not finite"} | dict.fromkeys(others, "no time was left")
    (tmp_path / "runs" / "masked" / "generator").mkdir(parents=True)
    gpu_stages.fine_tune(session, comparison)
    assert first not in arrived.asked and set(others) < {second, *arrived.asked}
    assert len(arrived.asked) == 2 * 3 * len(transfer.TASKS) - 1


def test_processes_that_have_not_ended_are_stopped():
    began = time.monotonic()
    for seconds in (0.0, 3.0):  # while the processes start, and later
        assert set(pooled_until(began + seconds, time.sleep, (600.0,) * 20)) == set()
    assert multiprocessing.active_children() == [] and time.monotonic() - began < 300
    assert sorted(pooled_until(began + 1e6, math.sqrt, (9.0, 4.0, 1.0))) == [1.0, 2.0, 3.0]


def test_the_second_command_needs_the_first(tmp_path):
    folders = folders_in(tmp_path)
    with pytest.raises(ValueError, match="the first command must have trained ELECTRA, got no result"):
        on_gpu.first_result(folders)
    folders.packed.mkdir()
    (folders.packed / on_gpu.RESULT).write_text(json.dumps({"models": {"fused": {}}}))
    with pytest.raises(FileNotFoundError, match=r"fused\.tar\.xz\.0 does not exist"):
        on_gpu.first_result(folders)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "gpu-learn: torch must see a GPU, got none"),
        (["--more"], "gpu-learn: torch must see a GPU, got none"),
        (["--pack", "/no/such"], "gpu-learn-pack: DATA must contain banking77/test.csv*, "),
    ],
)
def test_what_cannot_be_done_is_refused(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu.machine, "device", lambda: "cpu")
    for name in ("OMP_NUM_THREADS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # so that their old values come back
    assert on_gpu.main(words) == 2
    assert says in capsys.readouterr().err


BEFORE_THE_BUILD = """
import pathlib, sys
from benchmarks.learning import on_gpu

on_gpu.machine.device = lambda: "cuda"
folders = on_gpu.Folders(*map(pathlib.Path, sys.argv[1:]))
on_gpu.required(folders, False, 480.0)
print(on_gpu.required(folders, True, 480.0)["models"], "electra_fast.ops" in sys.modules)
"""


def test_no_op_is_imported_before_its_extension_is_built(tmp_path):
    folders = folders_in(tmp_path)
    folders.data.mkdir(parents=True)
    (folders.data / on_gpu.WORDS).write_text("{}")
    folders.runs.mkdir()
    result = {"models": {"fused": {}}, "seconds": {"training fused": 240.0}}
    (folders.runs / on_gpu.RESULT).write_text(json.dumps(result))
    program = [sys.executable, "-c", BEFORE_THE_BUILD, *map(str, folders)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "{'fused': {}} False\n"


def test_files_that_cannot_come_back_are_found(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with (tmp_path / "b").open("wb") as file:
        file.truncate(gpu_rehearsal.BYTES + 1)
    wrong = gpu_rehearsal.wrong_files(tmp_path, {"a", "c"})
    assert wrong == [f"{tmp_path}/c does not exist", f"{tmp_path}/b has 16,777,217 bytes"]
    for number in range(gpu_rehearsal.FILES):
        (tmp_path / str(number)).write_bytes(b"")
    assert gpu_rehearsal.wrong_files(tmp_path, set())[-1].startswith(f"{tmp_path} has 10 files of ")


@pytest.mark.slow
def test_the_rehearsal_is_complete():
    command = [sys.executable, "-m", "benchmarks.learning.on_gpu", "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "the rehearsal is complete" in done.stdout, done.stdout + done.stderr
