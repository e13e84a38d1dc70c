"""Wrong input of the experiments of benchmarks/learning is named at once, and no result is lost or mixed."""

import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks.learning import __main__ as command
from benchmarks.learning import (
    electric,
    equal_compute,
    fine_tune,
    gpu_stages,
    on_gpu,
    parts,
    planted,
    pretend_data,
    probes,
    report,
    results,
    transfer,
)
from benchmarks.learning.runs import Run, require_same, save
from electra_fast.train.recipe import Recipe

TEXT = ("text",)


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Return the file of the results, and keep the page in the same folder."""
    monkeypatch.setattr(results, "FILE", tmp_path / "learning.json")
    monkeypatch.setattr(report, "CURVES", tmp_path / "learning.svg")
    monkeypatch.setattr(report, "PAGE", tmp_path / "LEARNING.md")
    return results.FILE


def refused(argv, monkeypatch, main):
    """Return the message with which a command ends."""
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as ended:
        results.run(main)
    return ended.value.code


def test_results_that_arrive_while_another_command_measures_are_kept(found, monkeypatch):
    monkeypatch.setattr(report, "write", lambda everything: None)
    results.write({"runs": [{"corpus": "old"}], "kept": 1})

    def measure(options):
        results.write(results.read() | {"uses": "of another command"})
        return [{"corpus": "wiki"}]

    monkeypatch.setattr(command, "measure", measure)
    command.main(["wiki", "text.txt"])
    assert results.read() == {
        "runs": [{"corpus": "old"}, {"corpus": "wiki"}],
        "kept": 1,
        "uses": "of another command",
    }


def test_a_full_disk_leaves_the_old_results(found, monkeypatch):
    results.write({"runs": []})
    before = found.read_bytes()

    def full(path, text):
        path.write_bytes(text.encode()[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        results.write({"runs": [], "uses": {}})
    assert found.read_bytes() == before


@pytest.mark.parametrize("seeds", ["0", "-1"])
def test_no_seeds_do_not_delete_a_result(seeds, found, monkeypatch, capsys):
    for main, argv in ((command.main, ["manual"]), (fine_tune.main, ["folder"])):
        assert refused([*argv, "--seeds", seeds], monkeypatch, main) == 2
        assert "must be 1 or more" in capsys.readouterr().err
    assert not found.exists()


@pytest.mark.parametrize("argv", [["manual", "text.txt"], ["wiki"]])
def test_the_name_of_a_corpus_is_that_of_its_text(argv, found, monkeypatch):
    said = refused(argv, monkeypatch, command.main)
    assert said.startswith("learning: a corpus must have files, and `manual` none, got ")
    assert not found.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "must be a regular file, got nothing there"),
        ("{", "must contain JSON"),
        ("[]", "must contain a JSON object, got list"),
        ('{"preset": "tiny", "device": "cpu"}', "must be a result of equal_compute, got KeyError 'models'"),
    ],
)
def test_what_is_no_result_is_not_added(content, says, found, tmp_path, monkeypatch):
    results.write({"runs": []})
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    said = refused(["report", str(file)], monkeypatch, command.main)
    assert str(file) in said and says in said and results.read() == {"runs": []}


def test_damaged_results_are_named_and_kept(found, monkeypatch):
    found.write_text('{"runs": [')
    assert f"learning: {found} must contain JSON" in refused(["report"], monkeypatch, command.main)
    assert found.read_text() == '{"runs": ['


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 2e-3}, "learning: lr must be 0.001, as in "),
        ({"set": ()}, r"learning: set must be \('dropout=0', 'initial_attention=local', 'mask_prob=0.25'"),
        ({"steps": 8}, "learning: steps must be 7, as in .*, got 8; or remove that folder"),
        ({"eval_batches": 5}, "learning: eval_batches must be 20, as in "),
        ({"data": ("other",)}, "learning: data must be "),
    ],
)
def test_a_run_with_other_options_is_not_continued(changes, says, tmp_path):
    options = {"preset": "tiny", "steps": 7, "data": TEXT, "set": ("mask_prob=0.25",), "precision": "bf16"}
    require_same(Run(tmp_path, "fused", Recipe(**options)))  # it is new
    Recipe(**options).resolved().save(tmp_path / "recipe.json")
    require_same(Run(tmp_path, "fused", Recipe(**options)))
    (tmp_path / "checkpoints" / "step-000000007").mkdir(parents=True)
    with pytest.raises(ValueError, match=says):
        require_same(Run(tmp_path, "fused", Recipe(**options | changes)))


def test_a_complete_run_with_other_options_is_no_result(tmp_path, monkeypatch):
    recipe = Recipe(preset="tiny", steps=10, data=TEXT, set=("mask_prob=0.25",), precision="bf16")
    comparison = equal_compute.Comparison(tmp_path, recipe, tmp_path)
    run = comparison.run("fused")
    (run.folder / "checkpoints" / "step-000000010").mkdir(parents=True)
    run.recipe.resolved().save(run.folder / "recipe.json")
    equal_compute.pretrain(comparison, "fused")
    other = comparison._replace(recipe=Recipe(preset="tiny", steps=10, data=TEXT, precision="bf16"))
    with pytest.raises(ValueError, match="learning: set must be "):
        equal_compute.pretrain(other, "fused")


def test_probes_of_other_files_are_made_again(tmp_path):
    pretend_data.write(tmp_path / "data")
    comparison = equal_compute.Comparison(tmp_path, Recipe(), tmp_path / "data")
    (tmp_path / "fused").mkdir()
    assert not equal_compute.has_probes(comparison, "fused")
    files = equal_compute.machine.source_hash(tmp_path / "data", probes.FILES)
    save(tmp_path / "fused" / "probes.json", {"files": files})
    assert equal_compute.has_probes(comparison, "fused")
    (tmp_path / "data" / "goemotions" / "group_dev.tsv.xz").write_bytes(b"other")
    assert not equal_compute.has_probes(comparison, "fused")


@pytest.mark.parametrize("tokens", ["0", "-5e6", "nan", "inf", "10239"])
def test_a_comparison_has_ten_steps_or_more(tokens, monkeypatch):
    argv = ["text", "--data", "data", "--out", "out", f"--tokens={tokens}"]
    said = refused(argv, monkeypatch, equal_compute.main)
    assert said == "learning: TEXT must be a folder that `tokenize` made, got text"
    monkeypatch.setattr(equal_compute.data, "is_tokens_folder", lambda folder: True)
    said = refused(argv, monkeypatch, equal_compute.main)
    assert said.startswith("learning: --tokens must be 10 steps of 1,024 or more, got ")


def test_missing_files_are_named_before_the_training(tmp_path):
    pretend_data.write(tmp_path)
    for name in ("blimp/blimp_data.tar.xz", "banking77/test.csv"):
        (tmp_path / name).unlink()
    comparison = equal_compute.Comparison(tmp_path / "out", Recipe(), tmp_path)
    rule = r"--data must contain banking77/test\.csv\*, blimp/blimp_data\.tar\.xz, got"
    with pytest.raises(ValueError, match=rule):
        equal_compute.compare(comparison)
    with pytest.raises(FileNotFoundError, match=r"test\.csv\* does not exist"):
        transfer.existing(tmp_path, "banking77/test.csv*")


def test_damaged_files_of_probes_are_named(tmp_path):
    pretend_data.write(tmp_path)
    file = tmp_path / "goemotions" / "group_dev.tsv.xz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"group_dev\.tsv\.xz must be a whole text"):
        probes.sentiment(file)
    file.write_bytes(lzma.compress(b"fine\t1\tid\nno group\n"))
    with pytest.raises(ValueError, match=r"group_dev\.tsv\.xz, line 2: must have three columns, got 1"):
        probes.sentiment(file)
    archive = tmp_path / "blimp" / "blimp_data.tar.xz"
    assert len(probes.minimal_pairs(archive)) == 2 * probes.PAIRS
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"blimp_data\.tar\.xz must be a whole archive"):
        probes.minimal_pairs(archive)
    (tmp_path / "few.jsonl").write_text("{}\n" * 19)
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tmp_path / "few.jsonl", "few.jsonl")
    with pytest.raises(ValueError, match=r"few\.jsonl must have 20 pairs, got 19"):
        probes.minimal_pairs(archive)


def test_a_text_without_a_long_paragraph_is_refused(tmp_path):
    Recipe(preset="tiny", steps=7).resolved().save(tmp_path / "recipe.json")
    (tmp_path / "text.txt").write_text("short\n")

    class Model:
        class tokenizer:
            encode_batch = staticmethod(lambda lines, add_special_tokens: [])

    with pytest.raises(ValueError, match=r"text\.txt must have a paragraph of 30 tokens or more, got none"):
        planted.passages(tmp_path, Model, tmp_path / "text.txt")


def test_a_pack_is_not_made_from_itself(tmp_path):
    folders = on_gpu.Folders(tmp_path, tmp_path / "runs", tmp_path)
    pretend_data.write(folders.data)
    before = sorted(folders.data.rglob("*"))
    with pytest.raises(ValueError, match="DATA must be another folder"):
        on_gpu.pack(folders.data, folders)
    assert sorted(folders.data.rglob("*")) == before


def test_a_damaged_result_of_the_first_command_is_named(tmp_path):
    folders = on_gpu.Folders(tmp_path, tmp_path / "runs", tmp_path)
    (tmp_path / on_gpu.RESULT).write_text('{"models": {')
    with pytest.raises(ValueError, match=r"gpu-learn: .*equal_compute\.json must contain JSON"):
        on_gpu.first_result(folders)


def test_other_files_do_not_count_as_parts(tmp_path):
    (tmp_path / "log").write_bytes(b"a" * 100)
    parts.write(tmp_path, ("log",), tmp_path / "x.tar.xz")
    (tmp_path / "x.tar.xz.part").write_bytes(b"")  # of a copy that was interrupted
    parts.read(tmp_path / "x.tar.xz", tmp_path / "new")
    assert (tmp_path / "new" / "log").read_bytes() == b"a" * 100


def test_two_machines_are_both_named(monkeypatch):
    monkeypatch.setattr(equal_compute, "facts", lambda comparison: {"machine": "B", "seq": 128})
    for before, wanted in ({}, "B"), ({"machine": "A"}, "A and B"), ({"machine": "A and B"}, "A and B"):
        assert gpu_stages.facts(None, before) == {"machine": wanted, "seq": 128}


def test_passages_are_in_batches_whatever_their_number():
    for count in (1, 19, 20, 47, 500):
        batches = electric.batches(count)
        assert np.concatenate(batches).tolist() == list(range(count))
    assert {len(batch) for batch in electric.batches(500)} == {electric.PASSAGES_PER_BATCH}
