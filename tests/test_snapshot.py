"""A snapshot is whole and what was written, or it is not loaded."""

import errno
import json
import shutil

import pytest
import torch

from electra_fast import snapshot

pytest.importorskip("safetensors")

TENSORS = {
    "model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"a": torch.full((5,), 2.0)},
}


def saved(folder, *steps, keep=3):
    return [snapshot.save(folder, step, TENSORS, {"step is": step}, keep) for step in steps]


def test_what_is_saved_is_loaded(tmp_path):
    saved(tmp_path, 7)
    found = snapshot.load(tmp_path)
    assert (found.step, found.facts) == (7, {"step is": 7})
    for group, named in TENSORS.items():
        assert found.tensors[group].keys() == named.keys()
        assert all(torch.equal(x, named[name]) for name, x in found.tensors[group].items())


def test_the_newest_stay(tmp_path):
    saved(tmp_path, 1, 2, 10, 11, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000010", "step-000000011"]
    assert snapshot.load(tmp_path).step == 11


def flip(file, place=-1, bit=1):
    data = bytearray(file.read_bytes())
    data[place] ^= bit
    file.write_bytes(data)


def change_manifest(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "one bit of a number": lambda f: flip(f / "model.safetensors"),
    "one bit of the header": lambda f: flip(f / "model.safetensors", 12),
    "the header's size": lambda f: flip(f / "model.safetensors", 3, 0x7F),
    "cut off": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
    "empty": lambda f: (f / "optimizer.safetensors").write_bytes(b""),
    "another file": lambda f: shutil.copy(f / "optimizer.safetensors", f / "model.safetensors"),
    "a pickle": lambda f: torch.save(TENSORS, f / "model.safetensors"),
    "file missing": lambda f: (f / "model.safetensors").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "half a manifest": lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:40]),
    "manifest of no object": lambda f: (f / "manifest.json").write_text("[]"),
    "a newer format": lambda f: change_manifest(f, format=2),
    "a path outside": lambda f: change_manifest(f, files={"../x.safetensors": {"bytes": 1, "sha256": ""}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_passed_over(tmp_path, damage):
    _, place = saved(tmp_path, 1, 2)
    DAMAGES[damage](place)
    with pytest.raises(snapshot.Damaged, match="step-000000002"):
        snapshot.read(place)
    with pytest.warns(UserWarning, match="step-000000002.*; taking the one before"):
        assert snapshot.load(tmp_path).step == 1
    saved(tmp_path, 2)  # in its place, when the run comes there again
    assert snapshot.load(tmp_path).step == 2


def test_every_flipped_bit_is_found(tmp_path):
    (place,) = saved(tmp_path, 1)
    file, generator = place / "model.safetensors", torch.Generator().manual_seed(0)
    for at in torch.randint(file.stat().st_size * 8, (200,), generator=generator).tolist():
        flip(file, at // 8, 1 << at % 8)
        with pytest.raises(snapshot.Damaged, match=r"model\.safetensors is not what was written"):
            snapshot.read(place)
        flip(file, at // 8, 1 << at % 8)
    snapshot.read(place)


def test_without_a_whole_one_it_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold a whole snapshot"):
        snapshot.load(tmp_path)
    (tmp_path / "step-000000001").mkdir()  # as a kill of somebody else's writer leaves it
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="must hold a whole snapshot"):
        snapshot.load(tmp_path)


@pytest.mark.parametrize("call", ["_flush", "_measure"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, call):
    saved(tmp_path, 1)
    calls = iter(range(1))
    function = getattr(snapshot, call)

    def full(path):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(path)

    monkeypatch.setattr(snapshot, call, full)
    with pytest.raises(OSError, match=r"step-000000002 must be written whole, got .*No space left"):
        saved(tmp_path, 2)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*"))
    assert snapshot.load(tmp_path).step == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": None}, "a is missing"),
        ({"c": torch.ones(1)}, "c is unknown"),
        ({"a": torch.zeros(4, 3)}, r"a is \[4, 3\] torch.float32, the model has \[3, 4\]"),
        ({"a": torch.zeros(3, 4).double()}, "a is .* torch.float64, the model has"),
        ({"b": torch.tensor([1.0, torch.nan], dtype=torch.bfloat16)}, "b is not finite"),
    ],
)
def test_only_the_models_own_tensors_are_restored(change, message):
    mine = {name: torch.zeros_like(x) for name, x in TENSORS["model"].items()}
    given = {name: x for name, x in (TENSORS["model"] | change).items() if x is not None}
    with pytest.raises(ValueError, match=f"weights: state must be this model's, got: {message}"):
        snapshot.restore("weights", mine, given)
    assert all((x == 0).all() for x in mine.values())
    snapshot.restore("weights", mine, TENSORS["model"])
    assert torch.equal(mine["a"], TENSORS["model"]["a"])
