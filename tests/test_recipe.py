"""The options of a run are checked before it starts, and most of them cannot change when it is resumed."""

import dataclasses
import math

import pytest
import trainings

from electra_fast.config import ElectraConfig
from electra_fast.train.recipe import NORMALIZATION, PAPER, Recipe


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "huge"}, "--preset must be one of tiny, small, base, large, got 'huge'"),
        ({"steps": 0}, "--steps must be 1 or more"),
        ({"lr": math.nan}, "--lr must be positive"),
        ({"warmup": 30}, r"--warmup must be in \[0, 24\]"),
        ({"batch_tokens": 31}, "--batch-tokens must be 32 or more"),
        ({"batch_tokens": 63, "packed": True}, "--batch-tokens must be 64 or more"),
        ({"seq": 33, "batch_tokens": 99}, "--seq must be at most max_positions"),
        ({"set": ("layer=1",)}, "--set must be FIELD=VALUE with one of .*got 'layer=1'"),
        ({"set": ("vocab_size=1000",)}, "--set must be FIELD=VALUE with one of .*got 'vocab_size=1000'"),
        ({"set": ("layers=two",)}, "--set must have a value of type int, got 'layers=two'"),
        ({"set": ("disallow_correct=1",)}, "--set must have a value of type bool"),
        ({"set": ("dropout=2",)}, "dropout must be"),
        ({"seed": -1}, "--seed must be"),
        ({"precision": "fp8"}, "--precision must be"),
    ],
)
def test_a_bad_recipe_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trainings.recipe("text.txt", **options).resolved()


def test_a_resumed_run_keeps_most_options(tmp_path):
    trainings.recipe("text.txt").resolved().save(tmp_path / "recipe.json")
    recipe = Recipe.load(tmp_path / "recipe.json")
    assert recipe.changed(steps=9, lr=1e-4).steps == 9
    for option, value in {"seq": 16, "seed": 4, "accumulate": 2, "packed": True, "preset": "small"}.items():
        with pytest.raises(
            ValueError, match=f"--{option} must stay .* got {value!r}; start another run with --init"
        ):
            recipe.changed(**{option: value})


@pytest.mark.parametrize("preset", PAPER)
def test_options_that_are_not_given_are_the_presets(preset):
    recipe = Recipe(preset=preset, lr=1e-3).resolved()
    assert recipe.lr == 1e-3 and recipe.steps == PAPER[preset]["steps"]
    assert recipe.warmup == min(10_000, recipe.steps // 10)
    # The device, the data and the vocabulary's folder decide these.
    unset = {name for name, value in dataclasses.asdict(recipe).items() if value is None}
    assert unset == {"precision", "text_column", *NORMALIZATION}
    assert Recipe(preset=preset, lr=1e-3).given() == Recipe(preset=preset).given() | {"lr": 1e-3}


def test_fields_of_a_preset_are_those_that_set_does_not_name(tmp_path):
    recipe = Recipe(preset="tiny", set=("rtd_weight=3",)).resolved()
    assert recipe.set == ("dropout=0", "initial_attention=local", "rtd_weight=3")
    assert recipe.resolved() == recipe and Recipe(preset="small").resolved().set == ()
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json").changed(set=("rtd_weight=3",), steps=5000).set == recipe.set
    with pytest.raises(ValueError, match=r"--set must stay .*rtd_weight=3.* in a resumed run"):
        recipe.changed(set=("rtd_weight=4",))


def test_a_run_of_an_earlier_version_keeps_its_model(tmp_path):
    """Such a run of tiny had the dropout, the weights and the initial values of the sizes."""
    recipe = Recipe(preset="tiny", set=("generator_hidden=32",)).resolved()
    dataclasses.replace(recipe, set=("generator_hidden=32",)).save(tmp_path / "recipe.json")
    config = Recipe.load(tmp_path / "recipe.json").changed(steps=900).model(1000, {})
    assert config == dataclasses.replace(ElectraConfig.tiny(), vocab_size=1000, generator_hidden=32)
