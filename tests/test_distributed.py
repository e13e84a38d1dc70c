"""Several processes train the model that one process trains, and end together."""

import atexit
import faulthandler
import json
import os
import re
import signal
import time
from copy import deepcopy

import fine_tunings
import processes
import pytest
import torch
import torch.distributed as dist
import trainings
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import electra_fast
from electra_fast.__main__ import _processes, main
from electra_fast.distributed import ALONE, World
from electra_fast.model import Electra
from electra_fast.train.gradients import GradientBuckets
from electra_fast.train.recipe import Recipe

pytest.importorskip("tokenizers")
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]


def log(out):
    """Return the lines of the log without times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


SMALL = {"vocab_size": 200, "max_positions": 16, "embedding": 8, "layers": 1, "hidden": 16, "heads": 2}
SMALL |= {"ffn": 32, "generator_hidden": 8, "generator_heads": 1, "generator_ffn": 16}
OPTIONS = [{}, {"packed": True}, {"pairs": False, "precision": "bf16"}, {"accumulate": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_processes_train_the_model_of_one(corpus, tmp_path, options):
    held_out = {"held_out": (str(corpus),), "eval_batches": 3}  # the last process has fewer of these batches
    recipe = trainings.recipe(corpus, **{"accumulate": 2, "log_every": 3} | held_out | options)
    assert trainings.finish(recipe, tmp_path / "one") == 0
    assert processes.pretrain(2, recipe, tmp_path / "two").codes == [0, 0]
    if options.get("accumulate") == 4:  # (a + c) + (b + d) in place of ((a + b) + c) + d
        assert_close(tmp_path / "one", tmp_path / "two")
    else:
        assert trainings.state(tmp_path / "one", 24) == trainings.state(tmp_path / "two", 24)
        assert log(tmp_path / "one") == log(tmp_path / "two")


def assert_close(first, second):
    """Compare two runs whose gradients were added in another order; they differ by 1e-6."""
    a, b = (load_file(out / "checkpoints/step-000000024/model.safetensors") for out in (first, second))
    for name, x in a.items():
        assert (x - b[name]).norm() <= 1e-4 * x.norm()


def test_four_processes_give_the_same_bits_each_time(corpus, tmp_path):
    recipe = trainings.recipe(corpus, accumulate=4, steps=8)
    for name in ("first", "second"):
        assert processes.pretrain(4, recipe, tmp_path / name).codes == [0] * 4
    assert trainings.state(tmp_path / "first", 8) == trainings.state(tmp_path / "second", 8)


def test_the_default_batch_is_divided(corpus, tmp_path):
    recipe = trainings.recipe(corpus, steps=2, batch_tokens=None)
    assert processes.pretrain(2, recipe, tmp_path).codes == [0, 0]
    found = Recipe.load(tmp_path / "recipe.json")
    assert (found.batch_tokens, found.accumulate) == (1024 // 2, 2)


@pytest.mark.parametrize(("packed", "numbers"), [(False, "1, 2, 4, 8, 16 or 32"), (True, "1, 2, 4, 8 or 16")])
def test_a_default_batch_that_cannot_be_divided_is_refused(packed, numbers):
    with pytest.raises(ValueError, match=f"must divide the 32 sequences of a step, .*; start {numbers}, or"):
        Recipe(preset="tiny", packed=packed).resolved(64)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_process_stops_all_at_one_step(corpus, tmp_path, rank):
    recipe = trainings.recipe(corpus, accumulate=2)
    of_rank = {f"rank{rank}": {"signal_at": (signal.SIGTERM, 7, 1)}}
    ended = processes.pretrain(2, recipe, tmp_path / "run", **of_rank)
    assert ended.codes == [128 + signal.SIGTERM] * 2
    assert (tmp_path / "run/checkpoints/step-000000009").exists()  # known after one more step
    assert trainings.finish(recipe, tmp_path / "run") == 0
    assert trainings.finish(recipe, tmp_path / "undisturbed") == 0
    assert trainings.state(tmp_path / "run", 24) == trainings.state(tmp_path / "undisturbed", 24)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other_and_nothing_is_lost(corpus, tmp_path, rank):
    recipe = trainings.recipe(corpus, accumulate=2)
    of_rank = {f"rank{rank}": {"signal_at": (signal.SIGKILL, 10, 1)}}
    ended = processes.pretrain(2, recipe, tmp_path / "run", **of_rank)
    assert ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] == 1
    assert f"ProcessLost: pretrain: process {1 - rank} must reach the other" in ended.errors[1 - rank]
    # Rank 0 saves the state when another process is lost. If it is killed, its last save may be unfinished.
    possible = (10,) if rank == 1 else (6, 9)
    newest = max((tmp_path / "run/checkpoints").glob("step-*"))
    assert newest.name in [f"step-{step:09d}" for step in possible]
    assert processes.pretrain(1 + rank, recipe, tmp_path / "run").codes == [0] * (1 + rank)
    assert trainings.finish(recipe, tmp_path / "undisturbed") == 0
    assert trainings.state(tmp_path / "run", 24) == trainings.state(tmp_path / "undisturbed", 24)


def test_a_process_that_hangs_ends_the_other_in_time(corpus, tmp_path):
    recipe = trainings.recipe(corpus, accumulate=2)
    stopped = {"signal_at": (signal.SIGSTOP, 6, 1)}
    ended = processes.pretrain(2, recipe, tmp_path, hangs=True, rank0={"timeout": 2.0}, rank1=stopped)
    assert ended.codes == [1, -signal.SIGKILL]  # the latter by this test
    # The second message is that of an operation whose connection the timeout of another one has closed.
    timeout = r"must reach the other processes, got .*(Timed out|Application timeout caused pair closure)"
    assert re.search(timeout, ended.errors[0]), ended.errors[0]
    assert (tmp_path / "checkpoints/step-000000006").exists()


def test_a_thread_ends_a_process_that_waits_for_ever(corpus, tmp_path):
    """The host waits so for a GPU whose queue has a collective operation in a CUDA graph."""
    recipe = trainings.recipe(corpus, accumulate=2)
    waits = {"timeout": 1.0, "grace": 1.0, "sleep_at": 6}
    ended = processes.pretrain(2, recipe, tmp_path, rank1=waits)
    assert ended.codes[1] == 1


def test_a_full_disk_at_the_end_gives_one_error(corpus, tmp_path):
    recipe = trainings.recipe(corpus, accumulate=2, steps=2)
    ended = processes.pretrain(2, recipe, tmp_path, rank0={"full_at": 2})
    assert ended.codes == [1, 1]
    assert "No space left on device" in ended.errors[0] and ended.errors[1] == "SystemExit: 1"


def test_the_watchdog_waits_for_the_gpu(monkeypatch):
    """The queue of a GPU may wait for a process that hangs, so the watchdog stays on until its end."""
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: done.append("off"))
    World("test", 0, 2, torch.device("cuda", 1)).unwatch()
    assert done == [torch.device("cuda", 1), "off"]


def test_a_wrong_port_is_named(monkeypatch):
    numbers = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "x", "MASTER_ADDR": "a"}
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="test: MASTER_PORT must be a number, got 'x'"):
        World.join("test", "cpu")


def test_processes_disconnect_at_their_end(tmp_path):
    """A process that ends while it is connected may be aborted by a thread of gloo."""
    assert processes.run(2, _with_a_wrong_option, tmp_path).codes == [0, 0]


def _with_a_wrong_option(folder):
    with pytest.raises(SystemExit):
        main(["pretrain", "--device", "cpu", "--seq", "0", "--out", str(folder / "run")])
    assert dist.is_initialized()
    atexit._run_exitfuncs()
    assert not dist.is_initialized()


def test_no_thread_of_gloo_is_left():
    """Such a thread could abort the process while the interpreter ends."""
    assert processes.run(2, _close).codes == [0, 0]


def _close():
    def threads():
        return len(os.listdir("/proc/self/task"))

    before = threads()
    world = World.join("test", "cpu")
    world.wait()
    assert threads() > before
    world.close()
    end = time.monotonic() + 10  # the kernel shows a thread for a moment after its end
    while threads() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() <= before


def test_a_lost_process_ends_the_command_at_once():
    """Without the end of Python, which would wait for the threads and the GPU that wait for the process."""
    ended = processes.run(2, _lose_one)
    assert ended.codes == [1, -signal.SIGKILL]
    assert ended.errors[0] == ""  # no code ran after the command, also not that of tests/processes.py


def _lose_one():
    with _processes("test", "cpu", 600.0, {}) as world:
        if not world.first:
            os.kill(os.getpid(), signal.SIGKILL)
        world.wait()


def test_a_gradient_that_is_not_finite_ends_all(corpus, tmp_path):
    recipe = trainings.recipe(corpus, accumulate=2, lr=1e30, warmup=0, log_every=1)
    ended = processes.pretrain(2, recipe, tmp_path)
    assert ended.codes == [1, 1]
    assert "NotFinite: pretrain: the gradient was not finite 5 times in a row, first" in ended.errors[0]
    assert "process 0 says more" in ended.errors[1]
    assert (tmp_path / "not_finite.json").exists()


def test_processes_that_differ_are_refused_before_the_first_step(corpus, tmp_path):
    recipe = trainings.recipe(corpus, accumulate=4)
    for of_rank, sentence in {
        "torch": "in process 0, '9.9' in process 1",
        "text": "the text of --data must be the same in all processes",
        "lr": "'lr': 0.5",
    }.items():
        ended = processes.pretrain(2, recipe, tmp_path / of_rank, rank1={"differs": of_rank})
        assert ended.codes == [1, 1]
        assert sentence in ended.errors[0]
    ended = processes.pretrain(3, recipe, tmp_path / "three")
    rule = "the number of processes must divide the 4 micro-batches of a step (--accumulate), got 3"
    assert f"ValueError: pretrain: {rule}; start 1, 2 or 4" in ended.errors[0]
    assert ended.codes == [1] * 3 and ended.errors[1:] == ["SystemExit: 1"] * 2
    assert not (tmp_path / "three").exists()


def test_two_processes_fine_tune_the_model_of_one(tmp_path):
    paths = fine_tunings.files(tmp_path)
    recipe = fine_tunings.recipe(paths, batch=6, accumulate=2, seeds=2)
    for count in (1, 2):
        ended = processes.fine_tune(count, recipe, tmp_path / str(count))
        assert ended.codes == [0] * count
    for name in ("model.safetensors", "predictions.jsonl", "metrics.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert log(tmp_path / "1/seed-1") == log(tmp_path / "2/seed-1")


def test_only_rank_0_uses_the_folder_if_all_seeds_diverge(tmp_path):
    paths = fine_tunings.files(tmp_path)
    recipe = fine_tunings.recipe(paths, batch=6, accumulate=2, seeds=2, steps=8, lr=1e30, warmup=0)
    other = tmp_path / "other machine"
    of_rank = {"rank0": {"machine": tmp_path / "first"}, "rank1": {"machine": other}}
    ended = processes.run(2, _fine_tune_on, recipe, **of_rank)
    assert ended.codes == [1, 1]
    assert "NotFinite: finetune: --seeds must have a run with finite weights" in ended.errors[0]
    assert ended.errors[1] == "SystemExit: 1" and not any(other.iterdir())


def _fine_tune_on(recipe, machine):
    machine.mkdir()
    os.chdir(machine)
    fine_tunings.train(recipe, "run", None, None)


@pytest.mark.parametrize("size", [1, 100, 10**9], ids="{} bytes per bucket".format)
def test_buckets_add_the_gradients_of_all_processes(tmp_path, size):
    """The sum of four numbers in any order has an error of at most 3 u (|a| + |b| + |c| + |d|)."""
    assert processes.run(4, _add, tmp_path, size).codes == [0] * 4
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for name, x in found[0]["sums"].items():
        own = torch.stack([of_rank["own"][name] for of_rank in found]).double()
        error = (x.double() - own.sum(0)).abs()
        assert (error <= 3 * 2.0**-24 * own.abs().sum(0)).all()
        assert all(torch.equal(x, of_rank["sums"][name]) for of_rank in found)


def _add(folder, size):
    world = World.join("test", "cpu")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    copy = deepcopy(model)
    buckets = GradientBuckets(model, world, size)
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(world.rank))
    for step in range(2):  # the second one begins with the gradients of the first
        for half, last in ((x[0], False), (x[1], True)):
            buckets.before(last)
            (step + model(half)).square().sum().backward()
        buckets.wait()
        sums = {name: p.grad.clone() for name, p in model.named_parameters()}
        buckets.zero()
    for half in x:
        (1 + copy(half)).square().sum().backward()
    own = {name: p.grad for name, p in copy.named_parameters()}
    torch.save({"sums": sums, "own": own}, folder / f"{world.rank}.pt")
    world.close()


def test_two_processes_have_the_gradients_of_DistributedDataParallel(tmp_path):
    assert processes.run(2, _compare_with_ddp).codes == [0, 0]


def test_processes_with_one_seed_draw_other_masks(tmp_path):
    assert processes.run(2, _draw, tmp_path).codes == [0, 0]
    assert (tmp_path / "0").read_text() != (tmp_path / "1").read_text()


def _draw(folder):
    world = World.join("test", "cpu")
    torch.manual_seed(0)
    out = Electra(electra_fast.ElectraConfig(**SMALL))(torch.arange(104, 120)[None])
    (folder / str(world.rank)).write_text(str(out.loss.item()))
    world.close()


def _compare_with_ddp():
    world = World.join("test", "cpu")
    torch.manual_seed(0)
    model = Electra(electra_fast.ElectraConfig(**SMALL))
    theirs = DistributedDataParallel(deepcopy(model))
    buckets = GradientBuckets(model, world, size=1000)
    ids = torch.randint(104, 200, (2, 8), generator=torch.Generator().manual_seed(world.rank))
    rng = torch.tensor([0, world.rank])
    buckets.before(last=True)
    (model(ids, rng=rng).loss / 2).backward()
    buckets.wait()
    theirs(ids, rng=rng).loss.backward()  # it divides the gradients by 2, which is exact too
    for p, other in zip(model.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(p.grad, other.grad)
    del theirs  # as the last owner of the group it could block for ever (test_sharing.py)
    world.close()


def test_a_parameter_without_a_gradient_is_reported():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    buckets = GradientBuckets(model, ALONE)
    buckets.before(last=True)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="must have a gradient in each micro-batch, got none for unused"):
        buckets.wait()
