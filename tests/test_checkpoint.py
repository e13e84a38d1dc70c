"""A checkpoint is complete and unchanged, or it is not loaded."""

import errno
import fcntl
import hashlib
import json
import os
import shutil

import pytest
import torch

from electra_fast.train import checkpoint

pytest.importorskip("safetensors")

TENSORS = {
    "model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"a": torch.full((5,), 2.0)},
}


def saved(folder, *steps, keep=3):
    return [checkpoint.save(folder, step, TENSORS, {"step is": step}, keep) for step in steps]


def test_a_saved_checkpoint_is_loaded_unchanged(tmp_path):
    saved(tmp_path, 7)
    found = checkpoint.load(tmp_path)
    assert (found.step, found.facts) == (7, {"step is": 7})
    for group, named in TENSORS.items():
        assert found.tensors[group].keys() == named.keys()
        assert all(torch.equal(x, named[name]) for name, x in found.tensors[group].items())


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 10, 11, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000010", "step-000000011"]
    assert checkpoint.load(tmp_path).step == 11


def flip(file, offset=-1, bit=1):
    data = bytearray(file.read_bytes())
    data[offset] ^= bit
    file.write_bytes(data)


def change_manifest(folder, seal=True, **changes):
    """Change a manifest and, with `seal`, its checksum, as if it had been written in this form."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text()) | changes
    manifest = {name: value for name, value in manifest.items() if value is not None and name != "sha256"}
    if seal:
        text = json.dumps(manifest, sort_keys=True)
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(manifest))


def pipe(file):
    file.unlink()
    os.mkfifo(file)


DAMAGES = {
    "one bit of a number": lambda f: flip(f / "model.safetensors"),
    "one bit of the header": lambda f: flip(f / "model.safetensors", 12),
    "the header's size": lambda f: flip(f / "model.safetensors", 3, 0x7F),
    "cut off": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
    "empty": lambda f: (f / "optimizer.safetensors").write_bytes(b""),
    "another file": lambda f: shutil.copy(f / "optimizer.safetensors", f / "model.safetensors"),
    "a pickle": lambda f: torch.save(TENSORS, f / "model.safetensors"),
    "a file missing": lambda f: (f / "model.safetensors").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "half a manifest": lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:40]),
    "a manifest that is not an object": lambda f: (f / "manifest.json").write_text("[]"),
    "a newer format": lambda f: change_manifest(f, format=2),
    "another step": lambda f: change_manifest(f, step=1),
    "a step that is text": lambda f: change_manifest(f, step="2"),
    "a step that is not an integer": lambda f: change_manifest(f, step=2.0),
    "a negative step": lambda f: change_manifest(f, step=-4),
    "no step": lambda f: change_manifest(f, step=None),
    "no facts": lambda f: change_manifest(f, facts=None),
    "facts of another type": lambda f: change_manifest(f, facts=[]),
    "another fact": lambda f: change_manifest(f, facts={"other": 1}),
    "a fact of another type": lambda f: change_manifest(f, facts={"step is": "2"}),
    "no files": lambda f: change_manifest(f, files=None),
    "files of another type": lambda f: change_manifest(f, files=[1]),
    "a file left out": lambda f: change_manifest(f, files={}),
    "a pipe for the manifest": lambda f: pipe(f / "manifest.json"),
    "a pipe for a file": lambda f: pipe(f / "model.safetensors"),
    "one bit of the manifest": lambda f: flip(f / "manifest.json", -80),
    "a path outside": lambda f: change_manifest(f, files={"../x.safetensors": {"bytes": 1, "sha256": ""}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, damage):
    _, folder = saved(tmp_path, 1, 2)
    wanted = ("model", "optimizer"), {"step is": int}
    DAMAGES[damage](folder)
    with pytest.raises(checkpoint.Damaged, match="step-000000002"):
        checkpoint.read(folder, *wanted)
    with pytest.warns(UserWarning, match="step-000000002.*; the previous one is loaded"):
        assert checkpoint.load(tmp_path, *wanted).step == 1
    saved(tmp_path, 2)  # the resumed run writes this step again
    assert checkpoint.load(tmp_path, *wanted).step == 2


def test_every_flipped_bit_is_found(tmp_path):
    (folder,) = saved(tmp_path, 1)
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    for bit in torch.randint(file.stat().st_size * 8, (200,), generator=generator).tolist():
        flip(file, bit // 8, 1 << bit % 8)
        with pytest.raises(checkpoint.Damaged, match=r"model\.safetensors is damaged"):
            checkpoint.read(folder)
        flip(file, bit // 8, 1 << bit % 8)
    checkpoint.read(folder)


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path):
    (folder,) = saved(tmp_path, 1)
    file, generator = folder / "manifest.json", torch.Generator().manual_seed(0)
    written = json.loads(file.read_text())
    for bit in torch.randint(file.stat().st_size * 8, (200,), generator=generator).tolist():
        flip(file, bit // 8, 1 << bit % 8)
        try:
            same = json.loads(file.read_bytes()) == written  # for example a space that became a line break
        except ValueError:
            same = False
        if not same:
            with pytest.raises(checkpoint.Damaged, match="step-000000001"):
                checkpoint.read(folder)
        flip(file, bit // 8, 1 << bit % 8)
    checkpoint.read(folder)


def test_a_manifest_of_an_older_version_is_read(tmp_path):
    (folder,) = saved(tmp_path, 1)
    change_manifest(folder, seal=False)
    assert "sha256" not in json.loads((folder / "manifest.json").read_text())
    assert checkpoint.load(tmp_path, ("model", "optimizer"), {"step is": int}).step == 1


def test_the_next_save_removes_the_files_of_a_killed_one(tmp_path):
    for name in (".step-000000007", ".gone-step-000000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    saved(tmp_path, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000008"]


def test_a_lock_is_held_until_it_is_closed(tmp_path):
    held = checkpoint.lock(tmp_path)
    with pytest.raises(OSError, match=r"pretrain: .* is locked by another training process"):
        checkpoint.lock(tmp_path)
    assert checkpoint.holds(held, tmp_path)
    os.close(held)
    again = checkpoint.lock(tmp_path)
    shutil.rmtree(tmp_path)
    assert not checkpoint.holds(again, tmp_path)
    tmp_path.mkdir()
    os.close(checkpoint.lock(tmp_path))
    assert not checkpoint.holds(again, tmp_path)
    os.close(again)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_causes_only_a_warning(tmp_path, monkeypatch, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=f"cannot be locked.*{os.strerror(number)}.*no other process trains"):
        os.close(checkpoint.lock(tmp_path))


def test_a_file_system_that_cannot_flush_folders_is_used(tmp_path, monkeypatch):
    flush = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    saved(tmp_path, 1)
    assert checkpoint.load(tmp_path).step == 1


def test_a_folder_without_a_complete_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must contain a complete"):
        checkpoint.load(tmp_path)
    (tmp_path / "step-000000001").mkdir()  # as another program may leave it
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="must contain a complete"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("call", ["_flush", "_measure"])
def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    saved(tmp_path, 1)
    calls = iter(range(1))
    function = getattr(checkpoint, call)

    def full(path):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(path)

    monkeypatch.setattr(checkpoint, call, full)
    with pytest.raises(OSError, match=r"step-000000002 must be writable, got .*No space left"):
        saved(tmp_path, 2)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*"))
    assert checkpoint.load(tmp_path).step == 1


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
def test_tensors_that_do_not_fit_the_model_are_refused(change, message):
    own = {name: torch.zeros_like(x) for name, x in TENSORS["model"].items()}
    state = {name: x for name, x in (TENSORS["model"] | change).items() if x is not None}
    with pytest.raises(ValueError, match=f"weights: state must fit this model, got {message}"):
        checkpoint.restore("weights", own, state)
    assert all((x == 0).all() for x in own.values())
    checkpoint.restore("weights", own, TENSORS["model"])
    assert torch.equal(own["a"], TENSORS["model"]["a"])
