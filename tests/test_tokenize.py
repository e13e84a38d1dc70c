"""A folder of tokens: the same bytes for any number of processes, and the same batches as the text."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trainings
from small_tokens import SHARD, assert_same, content, in_this_process, made

from electra_fast import data
from electra_fast.data import Batches, open_tokens, tokenize_folder, tokenizing, workers
from electra_fast.data.parts import Parts
from electra_fast.train import tokens
from electra_fast.train.recipe import TokenizeRecipe

pytest.importorskip("safetensors")
pytest_plugins = ["corpus", "tokens_folder"]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("pairs", [False, True], ids=["one segment", "pairs"])
@pytest.mark.parametrize("form", [{"batch_size": 16}, {"batch_tokens": 1000}], ids=str)
def test_the_batches_are_those_of_the_text(folder, text, wordpiece, tmp_path, pairs, form):
    of_text, of_tokens = (
        data.tokenize(data.documents(text), wordpiece, tmp_path),
        open_tokens(folder, wordpiece),
    )
    assert len(of_tokens.ids.arrays) == len(list(folder.glob("tokens-*"))) > 4
    assert_same(of_tokens, of_text)
    for a, b in zip(data.held_out(of_text, 5), data.held_out(of_tokens, 5), strict=True):
        assert torch.equal(a.first_tokens(500), b.first_tokens(500)) and a.num_tokens == b.num_tokens
        one, other = (Batches(part, seq_len=32, pairs=pairs, seed=3, **form) for part in (a, b))
        for index in range(one.num_batches + 1):
            for x, y in zip(one.packed(index), other.packed(index), strict=True):
                assert torch.equal(torch.as_tensor(x), torch.as_tensor(y)) if x is not None else y is None


def test_no_order_of_work_changes_a_byte(folder, text, wordpiece, tmp_path, serial, monkeypatch):
    expected = content(folder)
    for rank in (2, 0, 1):
        work = tokenize_folder(data.documents(text), wordpiece, tmp_path / "ranks", rank=rank, world=3)
        assert (work.missing == 0) == (rank == 1)
    assert content(tmp_path / "ranks") == expected
    manifest = (tmp_path / "ranks" / "manifest.json").read_bytes()
    monkeypatch.setattr(tokenizing, "_is_complete", lambda *_: False)
    for rank in range(3):  # each rank would write the same bytes, with the times of the files
        tokenize_folder(data.documents(text), wordpiece, tmp_path / "ranks", rank=rank, world=3)
        assert (tmp_path / "ranks" / "manifest.json").read_bytes() == manifest
    backwards = lambda jobs, *rest: in_this_process(reversed(list(jobs)), *rest)  # noqa: E731
    monkeypatch.setattr(tokenizing, "results", backwards)
    assert content(made(text, wordpiece, tmp_path / "backwards")) == expected


def test_processes_write_the_same_bytes(folder, text, wordpiece, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "SHARD", SHARD)
    assert content(made(text, wordpiece, tmp_path / "two", workers=2)) == content(folder)


def die(jobs, count, prepare, *arguments):
    """Make two shards; then kill the process in the middle of a file."""
    make = prepare(*arguments)
    for number, job in enumerate(jobs):
        if number == 2:
            tokenizing.WordEncoder.encode = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        yield make(job)


def killed(text, tokenizer_json, out):
    from tokenizers import Tokenizer

    tokenizing.SHARD, tokenizing.results = SHARD, die
    tokenize_folder(data.documents(text), Tokenizer.from_str(tokenizer_json), out)


def test_a_killed_run_is_continued(folder, text, wordpiece, tmp_path, serial):
    out = tmp_path / "tokens"
    process = trainings.CONTEXT.Process(target=killed, args=(text, wordpiece.to_str(), out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    shards = {file: file.stat().st_mtime_ns for file in out.glob("tokens-*.safetensors")}
    assert len(shards) == 2 and len(list(out.glob("*.part"))) == 1
    with pytest.raises(ValueError, match="must be complete, got a part of the shards; run tokenize again"):
        open_tokens(out)
    work = tokenize_folder(data.documents(text), wordpiece, out)
    assert work.shards == len(list(out.glob("tokens-*"))) - 2 and not list(out.glob("*.part"))
    assert content(out) == content(folder)
    assert {file: file.stat().st_mtime_ns for file in shards} == shards


def test_a_complete_folder_is_not_made_again(folder, text, wordpiece, monkeypatch):
    monkeypatch.setattr(data.Documents, "__iter__", lambda _: pytest.fail("read again"))
    assert tokenize_folder(data.documents(text), wordpiece, folder).was_complete


def prepare(*_):
    return lambda job: job() if callable(job) else job


def fails():
    raise ValueError("this text")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "job, message",
    [
        (fails, "tokenize: a worker failed: ValueError: this text; the same command continues"),
        (is_killed, "tokenize: a worker was ended by SIGKILL, perhaps because the memory was full; the same"),
    ],
)
def test_a_worker_that_fails_or_dies_ends_the_work(job, message):
    found = workers.results([1, job, 2], 1, prepare)
    assert next(found) == 1
    with pytest.raises(OSError, match=message):
        list(found)


def sleeps():
    time.sleep(600)


def slow_tokenize(text, vocab, out):
    tokenizing._prepare = prepare
    tokenizing._jobs = lambda *_: iter([sleeps])
    tokens.tokenize(TokenizeRecipe(data=(str(text),), vocab=str(vocab)), str(out), 1)


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes(text, folder, tmp_path, number):
    arguments = (text, folder / "tokenizer", tmp_path / "tokens")
    process = trainings.CONTEXT.Process(target=slow_tokenize, args=arguments)
    process.start()
    end = time.monotonic() + 60
    while not (found := children(process.pid)) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 128 + number and found
    while any(Path("/proc", pid).exists() for pid in found) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(Path("/proc", pid).exists() for pid in found)


def test_positions_in_several_arrays():
    whole = np.arange(100, 150, dtype=np.uint16)
    one, several = Parts([whole]), Parts(np.split(whole, [10, 10, 30]))
    starts = np.array([0, 9, 10, 29, 30, 45])
    rows = starts[:, None] + np.arange(8)
    assert one.take(rows)[1].tolist() == [109, *range(110, 117)]
    assert (
        several.take(rows)[1].tolist() == [109] * 8
    )  # nothing of the next array, which has another document
    lengths = np.array([3, 1, 5, 0, 2, 5])
    for parts in (one, several):
        wanted = [i + 100 for start, n in zip(starts, lengths, strict=True) for i in range(start, start + n)]
        assert parts.take_runs(starts, lengths).tolist() == wanted
    calls = []
    several._madvise = lambda address, size, advice: calls.append((address.value, size.value, advice))
    several.announce(starts, np.full(6, 3))
    wanted = [array.ctypes.data for array in (several.arrays[i] for i in (0, 0, 2, 2, 3, 3))]
    assert all(a <= w + 40 < a + size + 4096 + 40 for (a, size, _), w in zip(calls[:6], wanted, strict=True))
    several.read_only_announced()
    assert [advice for *_, advice in calls] == [3] * 6 + [1] * 4
    assert all(address % 4096 == 0 for address, *_ in calls)


def test_a_loader_announces_the_batches_of_its_rank():
    from electra_fast.train.loader import AHEAD, Loader

    seen = []
    batches = type("", (), {"pad_id": 0})
    loader = Loader(batches, lambda i: {"ids": torch.ones(1)}, torch.device("cpu"), seen.append)
    found = loader.prefetch(1, every=4)
    next(found), next(found)
    found.close()
    assert seen[: AHEAD + 2] == [1 + 4 * i for i in range(AHEAD + 2)]


@pytest.mark.slow
def test_two_gigabytes(tmp_path, wordpiece):
    """The memory of each process stays below 1 GB, and no token is lost."""
    import resource

    line = "the function returns a list of the names of all modules\n" * 40
    with open(tmp_path / "text.txt", "w") as file:
        for number in range(2_000_000_000 // (len(line) + 12)):
            file.write(f"{number:010}\n{line}\n")
    made(tmp_path / "text.txt", wordpiece, tmp_path / "tokens", workers=os.cpu_count())
    for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF):
        assert resource.getrusage(who).ru_maxrss < 2**20
    found, expected = open_tokens(tmp_path / "tokens"), data.encode([line], wordpiece)
    last = found.first_tokens(1 << 60)[-len(expected.ids) :]
    assert torch.equal(last, expected.ids.long())
    assert len(found.offsets) - 1 == number + 1
    shutil.rmtree(tmp_path)
