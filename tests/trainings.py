"""Small pre-training runs in separate processes, which a test can kill.

The processes are forked from one that has imported everything: a new one starts in 50 ms instead of 5 s.
"""

import dataclasses
import errno
import functools
import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch

from electra_fast import distributed
from electra_fast.distributed import World
from electra_fast.train import checkpoint, corpus
from electra_fast.train.pretrain import Pretraining
from electra_fast.train.recipe import Recipe

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["electra_fast.train.pretrain", "tokenizers", "safetensors.torch", "tqdm"]
PRELOADED += ["torch._dynamo"]  # imported by optimizers
PRELOADED += ["electra_fast.train.fine_tune", "sklearn.metrics"]
CONTEXT.set_forkserver_preload(PRELOADED)

SIZES = ("layers=1", "hidden=32", "heads=1", "ffn=64", "generator_layers=1", "generator_hidden=16")
SIZES += ("generator_heads=1", "generator_ffn=32", "embedding=16", "max_positions=32")


def recipe(corpus, **changes) -> Recipe:
    """Return the recipe of a run of 24 steps of 20 ms each, with a checkpoint every third step."""
    options = {"preset": "tiny", "set": SIZES, "data": (str(corpus),), "vocab": "300", "seq": 32}
    options |= {"batch_tokens": 256, "steps": 24, "save_every": 3, "eval_every": 8, "eval_batches": 2}
    return Recipe(**options | changes)


def small(corpus, out, **changes) -> Pretraining:
    """Return a small run in this process, on the CPU."""
    options = {name: changes.pop(name) for name in ("ops", "make_model") if name in changes}
    return Pretraining(recipe(corpus, **changes), out, device="cpu", **options)


def train(
    recipe: Recipe,
    out,
    die_at: int | None = None,
    signal_at: tuple[int, ...] | None = None,
    hang_at: int | None = None,
    sleep_at: int | None = None,
    full_at: int | None = None,
    differs: str | None = None,
    timeout: float = 600.0,
    grace: float = 30.0,
) -> None:
    """Train to the end, with a fault if one is given.

    `die_at`: the process is killed before the call of this index, from 0, that makes a checkpoint durable.
    `signal_at` = (number, step, times): the signal is sent `times` times in the middle of the step.
    `hang_at`: the batch of this index is never made, and SIGTERM is sent meanwhile.
    `sleep_at`: the main thread never returns from the step of this index.
    `full_at`: the disk is full when the checkpoint of this step is written.
    `differs`: this process has another version of torch, another rate or another text.
    `timeout` and `grace`: those of distributed.py.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the progress bar
    torch.set_num_threads(1)
    if die_at is not None:
        kill_at(die_at)
    if full_at is not None:
        checkpoint.save = functools.partial(_on_a_full_disk, checkpoint.save, full_at)
    distributed.GRACE = grace
    if differs == "torch":
        found = distributed.installed
        distributed.installed = lambda package: "9.9" if package == "torch" else found(package)
    if differs == "lr":
        recipe = dataclasses.replace(recipe, lr=0.5)
    if differs == "text":
        other = Path(out).with_suffix(".txt")
        other.write_text("another document\n")
        corpus.tokenized = functools.partial(_of_other_text, corpus.tokenized, other)
    world = World.join("pretrain", "cpu", timeout)
    training = Pretraining(recipe, out, world=world)
    if signal_at is not None:
        training.model.register_forward_hook(functools.partial(_signal, training, *signal_at))
    if sleep_at is not None:
        training.model.register_forward_hook(functools.partial(_sleep, training, sleep_at))
    if hang_at is not None:
        training.loader._make = functools.partial(_hang, training.loader._make, hang_at)
    training.run()


def _hang(make, hang_at, index):
    if index == hang_at:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3600)
    return make(index)


def _of_other_text(tokenized, other, recipe, *args):
    return tokenized(dataclasses.replace(recipe, data=(*recipe.data, str(other))), *args)


def _on_a_full_disk(save, full_at, folder, step, *args):
    if step == full_at:
        raise OSError(errno.ENOSPC, "No space left on device")
    save(folder, step, *args)


def _sleep(training, step, *_) -> None:
    if training.step == step:
        time.sleep(3600)


def _signal(training, number, step, times, *_) -> None:
    for _ in range(times if training.step == step else 0):
        os.kill(os.getpid(), number)


def start(*args, **kwargs):
    process = CONTEXT.Process(target=train, args=args, kwargs=kwargs)
    process.start()
    return process


def finish(*args, **kwargs) -> int:
    """Run to the end in another process; return its exit code."""
    process = start(*args, **kwargs)
    process.join(120)
    return process.exitcode


def state(out, step: int) -> dict[str, str]:
    """Return the hash of every tensor file of a checkpoint."""
    folder = Path(out, "checkpoints", f"step-{step:09d}")
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}


def kill_at(count: int) -> None:
    """Kill this process after `count` calls of fsync and rename, the calls that make a checkpoint durable."""
    calls = iter(range(count))

    def killing(function):
        def call(*args, **kwargs):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync = killing(os.fsync)
    for name in ("rename", "replace"):
        setattr(Path, name, killing(getattr(Path, name)))
