"""The index of a large corpus in the cache folder: the same batches, built once, and again if damaged."""

import errno
import fcntl
import itertools
import os
import threading

import numpy as np
import pytest
import torch

from electra_fast import data
from electra_fast.data import Batches, Encoded, order, stored

LINES = np.random.default_rng(0).geometric(0.05, 3000)
FORMS = [{"batch_size": 7}, {"batch_size": None, "batch_tokens": 100}]
SUBSETS = {"all": lambda text: text, "training": lambda text: data.held_out(text, 5)[0]}
SUBSETS["held out"] = lambda text: data.held_out(text, 5)[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, in which an index of any size is stored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stored, "MANY", 1)
    return tmp_path / "electra_fast"


def corpus(text="text", vocab="vocabulary"):
    """Documents of ten lines; without `text` they are in no file, so that their index is not stored."""
    lines = torch.from_numpy(np.concatenate([[0], LINES.cumsum()]))
    ids = torch.arange(1000, 1000 + int(lines[-1]), dtype=torch.int32)
    return Encoded(ids, lines[::10].clone(), lines, text=text, vocab=vocab)


def files(folder, ending="*.npy"):
    return sorted(folder.glob(ending)) if folder.exists() else []


def content(batches):
    """The first batches, those around the end of the first epoch, and the number of tokens in an epoch."""
    indices = (0, 1, *(batches.num_batches + n for n in (-1, 0, 1)), 0)
    return [x.tolist() for i in indices for x in batches.padded(i) if x is not None], batches.num_tokens


def computed(monkeypatch):
    """A list to which each computation of sequences or of an order adds its name."""
    found, permuted, cut = [], order._permuted, Batches._cut
    monkeypatch.setattr(order, "_permuted", lambda *a, **o: found.append("order") or permuted(*a, **o))
    monkeypatch.setattr(Batches, "_cut", lambda batches: found.append("cut") or cut(batches))
    return found


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=["padded", "packed"])
def test_batches_from_the_files_are_the_computed_ones(folder, monkeypatch, form, pairs, subset):
    options = {"seq_len": 16, "pairs": pairs, "seed": 3} | form
    expected = content(Batches(SUBSETS[subset](corpus(text=None)), **options))
    assert not files(folder)
    assert content(Batches(SUBSETS[subset](corpus()), **options)) == expected
    times = computed(monkeypatch)
    assert content(Batches(SUBSETS[subset](corpus()), **options)) == expected
    assert not times and len(files(folder)) == 4 + (4 if "batch_tokens" in form else 2)
    assert not files(folder, "*.part")


def test_arrays_are_mapped_and_cannot_be_written():
    batches = Batches(corpus(), seq_len=16, batch_size=None, batch_tokens=100)
    for array in (*batches._sequences, batches._order.sizes, *order._epoch(batches._order, 0)):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable


def test_another_text_vocabulary_part_or_option_has_another_index(folder, monkeypatch):
    train, held = data.held_out(corpus(), 5)
    reverse = corpus()._replace(subset=held.subset.flip(0))
    texts = [corpus(), corpus(text="b"), corpus(vocab="b"), train, held, reverse]
    options = [{}, {"seq_len": 17}, {"pairs": True}, {"seed": 1}]
    for text, option in itertools.product(texts, options):
        before = len(files(folder))
        Batches(text, **{"seq_len": 16} | option)
        assert len(files(folder)) == before + 4
    monkeypatch.setattr(stored, "VERSION", "another")
    Batches(corpus(), seq_len=16)
    assert len(files(folder)) == before + 8


def test_a_small_corpus_is_not_stored(folder, monkeypatch):
    monkeypatch.setattr(stored, "MANY", corpus().num_tokens // 16 + 1)
    content(Batches(corpus(), seq_len=16))
    assert not files(folder)


def cut_short(file):
    os.truncate(file, file.stat().st_size - 1)


def lengthened(file):
    file.write_bytes(file.read_bytes() + b"1")


def emptied(file):
    file.write_bytes(b"")


def of_another_dtype(file):
    np.save(file, np.load(file).astype(np.float32))


def of_another_shape(file):
    np.save(file, np.load(file)[:, None])


def with_a_bad_header(file):
    file.write_bytes(file.read_bytes().replace(b"(", b"[", 1))


def a_folder(file):
    file.unlink()
    file.symlink_to(file.parent.parent)


DAMAGES = [cut_short, lengthened, emptied, of_another_dtype, of_another_shape, with_a_bad_header, a_folder]


@pytest.mark.parametrize("damage", [*DAMAGES, os.unlink], ids=lambda damage: damage.__name__)
def test_damaged_files_are_built_again(folder, monkeypatch, damage):
    options = {"seq_len": 16, "batch_size": None, "batch_tokens": 100}
    expected = content(Batches(corpus(), **options))
    times = computed(monkeypatch)
    for file in files(folder):
        good = file.read_bytes()
        damage(file)
        assert content(Batches(corpus(), **options)) == expected
        assert file.read_bytes() == good and bool(times) != ("lengths" in file.name)
        times.clear()


def test_arrays_of_different_lengths_are_built_again(folder):
    expected = content(Batches(corpus(), seq_len=16))
    (file,) = files(folder, "*-first.npy")
    good = file.read_bytes()
    np.save(file, np.load(file)[:-1])
    assert content(Batches(corpus(), seq_len=16)) == expected
    assert file.read_bytes() == good


def test_the_order_of_epochs_that_are_over_is_deleted(folder):
    one, other = (Batches(corpus(), seq_len=16, batch_size=1) for _ in range(2))
    Batches(corpus(), seq_len=16, seed=1, batch_size=1).padded(0)
    early = other.padded(3).ids
    for epoch in range(12):
        one.padded(epoch * one.num_sequences)
        found = [file.name.split("-epoch-")[1] for file in files(folder, "*-epoch-*")]
        mine = sorted(f"{n}-numbers.npy" for n in (epoch - 1, epoch) if n >= 0)
        assert sorted(found) == sorted([*mine, "0-numbers.npy"])
    assert torch.equal(other.padded(3).ids, early)  # still mapped


def test_one_process_computes_while_others_wait(folder, monkeypatch):
    inside, go_on, found = threading.Event(), threading.Event(), []

    def make():
        inside.set()
        go_on.wait()
        return [np.arange(3)]

    def start(make):
        thread = threading.Thread(target=lambda: found.append(stored.stored("key", {"a": np.int64}, make)))
        thread.start()
        return thread

    first = start(make)
    inside.wait()
    second = start(lambda: pytest.fail("made twice"))
    go_on.set()
    first.join()
    second.join()
    assert [[array.tolist() for array in arrays] for arrays in found] == [[[0, 1, 2]]] * 2


def test_a_file_system_without_locks_works(folder, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    expected = content(Batches(corpus(text=None), seq_len=16))
    monkeypatch.setattr(fcntl, "flock", flock)
    write, endings = stored._write, []
    monkeypatch.setattr(stored, "_write", lambda *a: endings.append(a[2]) or write(*a))
    assert content(Batches(corpus(), seq_len=16)) == expected
    assert len(endings) == len(set(endings)) == 6  # Two processes never write one file.
    times = computed(monkeypatch)
    assert content(Batches(corpus(), seq_len=16)) == expected
    assert not times and not files(folder, "*.part")


@pytest.mark.parametrize("case", ["no folder", "no home", "a full disk"])
def test_without_a_cache_the_index_is_computed(tmp_path, folder, monkeypatch, case):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_home():
        raise RuntimeError("no home")

    expected = content(Batches(corpus(text=None), seq_len=16))
    if case == "no folder":
        folder.touch()
    elif case == "no home":
        monkeypatch.setattr(stored, "cache_folder", no_home)
    else:
        monkeypatch.setattr(os, "fsync", full)
    times = computed(monkeypatch)
    with pytest.warns(UserWarning, match=r"cannot be written .*each process has the index .* Set XDG_CACHE"):
        assert content(Batches(corpus(), seq_len=16)) == expected
    assert times == ["cut", "order", "order"]  # once each
    assert not files(folder, "*.npy") and not files(folder, "*.part")


def test_a_forgotten_index_is_computed_again(folder, monkeypatch):
    content(Batches(corpus(text="another"), seq_len=16))
    others = files(folder)
    train, held = data.held_out(corpus(), 5)
    expected = [content(Batches(part, seq_len=16)) for part in (train, held)]
    for file in {*files(folder, "*-start.npy")} - {*others}:
        np.save(file, np.load(file)[::-1])
    assert [content(Batches(part, seq_len=16)) for part in (train, held)] != expected
    data.forget_index(corpus())
    assert files(folder) == others
    assert [content(Batches(part, seq_len=16)) for part in (train, held)] == expected
    monkeypatch.setattr(stored, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    data.forget_index(corpus())
