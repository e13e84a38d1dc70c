"""A checkpoint that a thread writes is that of its step, and errors, signals and ends wait for the thread."""

import math
import signal
import threading
from pathlib import Path

import pytest
import trainings

from electra_fast.model import Electra
from electra_fast.train.pretrain import Pretraining

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]


class Faulty(Electra):
    """A model whose step of index 4 is skipped."""

    def forward(self, ids, *, rng, **layout):
        out = super().forward(ids, rng=rng, **layout)
        poison = math.nan if self.training and int(rng[1]) == 4 else 1.0
        return out._replace(loss=out.loss * poison)


class Blocked:
    """Makes a run wait before it writes the checkpoint of step 3, until `released` is set."""

    def __init__(self, training, then=lambda: None):
        self.released, self.then = threading.Event(), then
        self.write, training._write = training._write, self

    def __call__(self, state):
        if state.step == 3:
            assert self.released.wait(60)
        self.write(state)
        if state.step == 3:
            self.then()


def call_after(training, method, call):
    """Call ``call(training.step)`` after each call of a method of the run."""
    original = getattr(training, method)

    def calls(*args):
        result = original(*args)
        call(training.step)
        return result

    setattr(training, method, calls)


def release_at_the_next_wait(training, blocked):
    wait = training.saver.wait
    training.saver.wait = lambda: blocked.released.set() or wait()


def content(out):
    """Return the files of the checkpoint of step 3 and of the exported models, not of the tokenizer."""
    files = [*out.glob("checkpoints/step-000000003/*"), *out.glob("*or/model.safetensors")]
    assert len(files) == 5
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def steps(out):
    return [int(folder.name[5:]) for folder in sorted(Path(out).glob("checkpoints/step-*"))]


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16"}, *({"set": (*trainings.SIZES, f"sharing={s}")} for s in ("none", "gdes"))],
)
def test_steps_during_a_write_do_not_change_what_it_writes(corpus, tmp_path, device, options):
    recipe = trainings.recipe(corpus, steps=6, warmup=0, **options)
    stopped, blocked_run = (
        Pretraining(recipe, tmp_path / name, device=device, make_model=Faulty, graph=False) for name in "ab"
    )
    call_after(stopped, "_one_step", lambda step: stopped._stop(signal.SIGTERM) if step == 3 else None)
    with pytest.raises(SystemExit):
        stopped.run()

    found = []
    blocked = Blocked(blocked_run, lambda: found.append(content(tmp_path / "b")))
    call_after(blocked_run, "_one_step", lambda step: blocked.released.set() if step == 5 else None)
    blocked_run.run()
    assert found == [content(tmp_path / "a")]
    assert blocked_run.skipped.steps == 1 and steps(tmp_path / "b") == [0, 3, 6]


def test_a_signal_waits_for_the_write_and_saves_its_own_step(corpus, tmp_path):
    training, before = trainings.small(corpus, tmp_path), set(threading.enumerate())
    release_at_the_next_wait(training, Blocked(training))
    call_after(training, "_one_step", lambda step: training._stop(signal.SIGTERM) if step == 5 else None)
    with pytest.raises(SystemExit):
        training.run()
    assert steps(tmp_path) == [0, 3, 5] and set(threading.enumerate()) <= before


def broken(step):
    if step == 5:
        raise RuntimeError("out of memory")


def test_an_error_waits_for_the_write(corpus, tmp_path):
    training, before = trainings.small(corpus, tmp_path), set(threading.enumerate())
    release_at_the_next_wait(training, Blocked(training))
    call_after(training, "_one_step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        training.run()
    assert steps(tmp_path) == [0, 3] and set(threading.enumerate()) <= before
    trainings.small(corpus, tmp_path).close()  # the folder is not locked


def fail_once(training, error):
    """Make the first write of step 3 fail."""
    write, errors = training._write, [error]

    def fails(state):
        if state.step == 3 and errors:
            raise errors.pop()
        write(state)

    training._write = fails


@pytest.mark.parametrize("end", ["the last step", "a signal", "an error"])
def test_a_failed_write_is_reported_at_the_end(corpus, tmp_path, capsys, end):
    training = trainings.small(corpus, tmp_path, steps=5)
    fail_once(training, OSError(28, "No space left on device"))
    if end == "an error":
        call_after(training, "_one_step", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            training.run()
    elif end == "a signal":
        call_after(training, "_one_step", lambda step: training._stop(signal.SIGTERM) if step == 3 else None)
        with pytest.raises(SystemExit):
            training.run()
    else:
        training.run()
    warning = "step 3: not all was saved, [Errno 28] No space left on device; the previous checkpoint is kept"
    assert capsys.readouterr().out.count(warning) == 1
    assert steps(tmp_path) == {"the last step": [0, 5], "a signal": [0, 3], "an error": [0]}[end]


def test_another_error_of_the_thread_ends_the_run(corpus, tmp_path):
    training = trainings.small(corpus, tmp_path)
    fail_once(training, MemoryError("no room"))
    with pytest.raises(MemoryError, match="no room"):
        training.run()
    assert training.step == 6
    trainings.small(corpus, tmp_path).close()
