"""Small pre-training runs in processes of their own, which can be killed.

The processes are forked from one that has imported everything: starting one takes 50 ms, not 5 s.
"""

import functools
import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch

from electra_fast.pretrain import Pretraining
from electra_fast.recipe import Recipe

CONTEXT = multiprocessing.get_context("forkserver")
USED = ["electra_fast.pretrain", "tokenizers", "safetensors.torch", "tqdm", "torch._dynamo"]  # an optimizer's
CONTEXT.set_forkserver_preload(USED)

SIZES = ("layers=1", "hidden=32", "heads=1", "ffn=64", "generator_layers=1", "generator_hidden=16")
SIZES += ("generator_heads=1", "generator_ffn=32", "embedding=16", "max_positions=32")


def recipe(corpus, **changes) -> Recipe:
    """Return a run of 24 steps of 20 ms with a checkpoint every third."""
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
) -> None:
    """Run to the end, or be killed at the `die_at`-th call that makes a checkpoint durable.

    `signal_at` = (number, step, times): that signal comes in the middle of that step. `hang_at`: the batch of
    that number is never made, and SIGTERM comes meanwhile.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the bar
    torch.set_num_threads(1)
    if die_at is not None:
        _kill_at(die_at)
    training = Pretraining(recipe, out, device="cpu")
    if signal_at is not None:
        training.model.register_forward_hook(functools.partial(_signal, training, *signal_at))
    if hang_at is not None:
        training.feed._make = functools.partial(_hang, training.feed._make, hang_at)
    training.run()


def _hang(make, hang_at, index):
    if index == hang_at:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3600)
    return make(index)


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


def _kill_at(count: int) -> None:
    """Have the process killed before the `count`-th fsync or rename, which are all that a save hangs on."""
    calls = iter(range(count))

    def dying(function):
        def call(*args, **kwargs):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync = dying(os.fsync)
    for name in ("rename", "replace"):
        setattr(Path, name, dying(getattr(Path, name)))
