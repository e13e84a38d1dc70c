"""Electric's discriminator in use: scores by energies, and a reason for everything that it cannot do."""

import numpy as np
import pytest
from small_use import LONG, TEXTS, alone, ids_of, saved
from test_use_command import objects, printed, refused

from electra_fast.use import choose, detect, load, pairs, score, suggest
from electra_fast.use.likelihood import electric_log_probs

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest_plugins = ["small_tokenizer", "small_run"]
PAIR = ("the cat sat in the rain", "the dog sat in the rain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return saved(tmp_path_factory.mktemp("electric"), tokenizer, objective="electric")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.ElectraForPreTraining.from_pretrained(folder / "discriminator").eval()


def test_a_score_is_the_negative_sum_of_transformers_logits(model, theirs, tokenizer):
    for text, found in zip(TEXTS, score(TEXTS, model), strict=True):
        ids = ids_of(tokenizer, text)
        np.testing.assert_allclose(found.electric, -alone(theirs, ids).sum().item(), rtol=1e-5)
        assert (found.tokens, found.generator, found.discriminator) == (len(ids), None, None)
        assert score(text, model, "electric").electric == pytest.approx(found.electric, rel=1e-6)
    with pytest.warns(UserWarning, match="more than 22 tokens"):
        ids = np.array(ids_of(tokenizer, LONG), np.int32)
        assert len(electric_log_probs(model, [ids])[0]) == len(ids)


def test_options_and_pairs_are_compared_by_energies(model, theirs, tokenizer):
    options = ["red", "green"]
    (chosen,) = choose(["the cat"], options, model, "{text} is {option}")
    wanted = {}
    for option in options:
        ids = ids_of(tokenizer, f"the cat is {option}")
        wanted[option] = -alone(theirs, ids)[-len(ids_of(tokenizer, option)) :].mean().item()
    assert chosen.scores == pytest.approx(wanted, rel=1e-5)
    (found,) = pairs([PAIR], model).pairs
    for text, got in zip(PAIR, found[-2:], strict=True):
        energies = alone(theirs, ids_of(tokenizer, text))
        assert got == pytest.approx(-(energies.sum() - energies[1]).item(), abs=1e-5)  # without cat or dog


def test_an_energy_is_not_a_probability(model, small_run):
    message = "must have a discriminator of replaced tokens, got .* of objective=electric; .* use score"
    for call, function in {
        "detect": lambda: detect("the cat", model),
        "score": lambda: score("the cat", model, "discriminator"),
        "pairs": lambda: pairs([PAIR], model, "discriminator"),
    }.items():
        with pytest.raises(ValueError, match=f"^{call}: model {message}"):
            function()
    with pytest.raises(ValueError, match=r"have been trained with objective=electric, .*; pre-train"):
        score("the cat", small_run, "electric")
    with pytest.raises(ValueError, match="must have a discriminator"):
        score("the cat", small_run / "generator", "electric")


def test_a_generator_without_masks_is_not_used(folder, model):
    assert model.generator is None and load(folder / "discriminator").electric
    with pytest.raises(ValueError, match="suggest: model must have a generator, got"):
        suggest("the cat", model)
    (folder / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match=r"generator that predicts masked tokens, .* --set generator=m"):
        score("the cat", model, "generator")
    with pytest.raises(ValueError, match=r"be the folder of .* with ElectraTwoTowerGenerator"):
        load(folder / "generator")


def test_a_masked_generator_of_electric_is_used(tmp_path, tokenizer, small_run):
    model = load(saved(tmp_path, tokenizer, objective="electric", generator="masked"))
    assert model.electric and model.generator is not None
    assert score("the cat", model, "generator").generator < 0
    assert score("the cat", model).generator is None


def test_the_command(folder, small_run, capsys):
    (found,) = objects(capsys, "score", "--model", folder, TEXTS[0])
    assert found["electric"] == pytest.approx(score(TEXTS[0], folder).electric, rel=1e-5)
    assert objects(capsys, "score", "--model", folder, TEXTS[0], "--electric") == [found]
    head, _ = printed(capsys, "score", "--model", folder, TEXTS[0]).splitlines()
    assert head.split()[:2] == ["tokens", "electric"]
    assert "pre-train with --set objective=electric" in refused(
        "score", "--model", small_run, "--electric", TEXTS[0]
    )
    refused("score", "--model", folder, "--electric", "--by", "generator", TEXTS[0])
