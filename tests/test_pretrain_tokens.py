"""Pre-training on a folder of tokens is pre-training on its text, bit for bit."""

import shutil

import numpy as np
import pytest
import trainings
from small_tokens import SHARD, content, in_this_process

from electra_fast import data
from electra_fast.__main__ import main
from electra_fast.data import stored, tokenizing
from electra_fast.train import corpus as corpus_of_run
from electra_fast.train import tokens
from electra_fast.train.recipe import TokenizeRecipe

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus", "tokens_folder"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]


@pytest.fixture(scope="module")
def tokenized(corpus, tmp_path_factory):
    """The tokens of the corpus of `trainings`, in three shards."""
    out = tmp_path_factory.mktemp("tokenized") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "SHARD", SHARD)
        patch.setattr(tokenizing, "results", in_this_process)
        tokens.tokenize(TokenizeRecipe(data=(str(corpus),), vocab="300"), str(out), 1)
    return out


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_on_tokens_is_a_run_on_the_text(corpus, tokenized, tmp_path, packed):
    options = {"steps": 4, "packed": packed}
    trainings.small(corpus, tmp_path / "text", **options).run()
    run = trainings.small(tokenized, tmp_path / "tokens", vocab=None, **options)
    assert run.recipe.vocab is None and len(run.train_text.ids.arrays) == 3
    run.run()
    assert trainings.state(tmp_path / "tokens", 4) == trainings.state(tmp_path / "text", 4)


def test_a_run_may_change_between_text_and_tokens(corpus, tokenized, tmp_path):
    trainings.small(corpus, tmp_path / "run", steps=2).run()
    options = ["--steps", "4", "--device", "cpu"]
    main(["pretrain", "--resume", str(tmp_path / "run"), "--data", str(tokenized), "--verify", *options])
    trainings.small(corpus, tmp_path / "whole", steps=4).run()
    assert "verify" not in (tmp_path / "run" / "recipe.json").read_text()
    main(["pretrain", "--resume", str(tmp_path / "run"), "--data", str(corpus), "--steps", "5", *options[2:]])


def test_verify_computes_a_stored_index_again(tokenized, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "MANY", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = trainings.recipe(tokenized, vocab=None)
    tokenizer = data.tokenizer_of(tokenized)

    def starts(**options):
        texts = corpus_of_run.tokenized(recipe, tokenizer, **options)
        return [data.Batches(text, seq_len=16)._sequences.start.tolist() for text in texts]

    expected = starts()
    for file in (tmp_path / "electra_fast").glob("*-start.npy"):
        np.save(file, np.load(file) + 1)
    assert starts() != expected
    assert starts(verify=True) == starts() == expected


def test_held_out_tokens(corpus, tokenized, tmp_path):
    run = trainings.small(tokenized, tmp_path / "run", vocab=None, held_out=(str(tokenized),), steps=1)
    assert run.held_out_text.num_tokens == run.train_text.num_tokens
    run = trainings.small(corpus, tmp_path / "mixed", held_out=(str(tokenized),), steps=1)
    assert run.held_out_text.num_tokens == run.train_text.num_tokens


def test_other_tokens_are_refused(corpus, tokenized, folder, tmp_path):
    trainings.small(tokenized, tmp_path / "run", vocab=None, steps=2).run()
    with pytest.raises(ValueError, match=r"--vocab\) must be the vocabulary of .*tokens, got another one"):
        trainings.small(folder, tmp_path / "run", vocab=None, steps=4)
    with pytest.raises(ValueError, match=r"--vocab\) must be the vocabulary of .*tokens, got another one"):
        trainings.small(tokenized, tmp_path / "other", vocab=str(folder / "tokenizer"))
    with pytest.raises(ValueError, match="--vocab must be left out, because the data is tokens, got 300"):
        trainings.small(tokenized, tmp_path / "other", vocab="300")
    with pytest.raises(
        ValueError, match=r"lowercase .* must be left out, got False; .*tokenizer\.json contains"
    ):
        trainings.small(tokenized, tmp_path / "other", vocab=None, lowercase=False)
    for option in ("data", "held_out"):
        both = {"data": (str(tokenized),), "vocab": None} | {option: (str(tokenized), str(corpus))}
        name = option.replace("_", "-")
        with pytest.raises(ValueError, match=f"--{name} must name one folder of tokens, or only text, got"):
            trainings.small(corpus, tmp_path / "other", **both)


def test_tokens_of_another_text_and_damaged_ones_are_refused(corpus, tokenized, tmp_path, serial):
    trainings.small(tokenized, tmp_path / "run", vocab=None, steps=2).run()
    text = (corpus / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("reads a", "reads the", 1))
    recipe = TokenizeRecipe(data=(str(tmp_path / "text.txt"),), vocab=str(tokenized / "tokenizer"))
    tokens.tokenize(recipe, str(tmp_path / "other"), 1)
    with pytest.raises(ValueError, match=r"--data must be the text with which .*run was started"):
        trainings.small(tmp_path / "other", tmp_path / "run", vocab=None, steps=4)
    (tmp_path / "other" / "tokens-000001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens-000001\.safetensors: missing; run tokenize again"):
        trainings.small(tmp_path / "other", tmp_path / "new", vocab=None)
    tokens.tokenize(recipe, str(tmp_path / "other"), 1)
    trainings.small(tmp_path / "other", tmp_path / "new", vocab=None, steps=1)


def test_a_moved_folder_is_found_by_its_new_name(tokenized, tmp_path):
    moved = shutil.copytree(tokenized, tmp_path / "moved")
    assert content(moved) == content(tokenized) and data.is_tokens_folder(moved)
    trainings.small(moved, tmp_path / "run", vocab=None, steps=1).run()
    again = shutil.move(moved, tmp_path / "again")
    trainings.small(again, tmp_path / "run", vocab=None, steps=2).run()
