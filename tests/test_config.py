"""ElectraConfig: the paper's sizes, and an error for every value that cannot work."""

import dataclasses
import math

import pytest

from electra_fast.config import ElectraConfig

SIZES = ("layers", "hidden", "heads", "ffn")


@pytest.mark.parametrize(
    ("preset", "embedding", "discriminator", "generator", "mask_prob"),
    [
        ("tiny", 64, (4, 128, 2, 512), (4, 64, 1, 256), 0.15),
        ("small", 128, (12, 256, 4, 1024), (12, 64, 1, 256), 0.15),
        ("base", 768, (12, 768, 12, 3072), (12, 256, 4, 1024), 0.15),
        ("large", 1024, (24, 1024, 16, 4096), (24, 256, 4, 1024), 0.25),
    ],
)
def test_presets_have_the_sizes_of_the_paper(preset, embedding, discriminator, generator, mask_prob):
    config = getattr(ElectraConfig, preset)()
    assert (config.embedding, config.mask_prob) == (embedding, mask_prob)
    assert tuple(getattr(config, field) for field in SIZES) == discriminator
    assert tuple(getattr(config.for_generator(), field) for field in SIZES) == generator


def test_defaults_are_those_of_bert_and_of_the_published_code():
    config = ElectraConfig()
    assert config == ElectraConfig.small()
    assert (config.vocab_size, config.max_positions, config.type_vocab) == (30522, 512, 2)
    assert config.special_ids == (0, 101, 102, 103)
    assert (config.eps, config.initializer, config.dropout) == (1e-12, 0.02, 0.1)
    assert (config.keep_prob, config.temperature, config.disallow_correct) == (0.15, 1.0, False)
    assert (config.mlm_weight, config.rtd_weight, config.sharing) == (1.0, 50.0, "embeddings")


def test_each_objective_has_the_generator_of_its_paper():
    assert ElectraConfig().generator_kind == "masked"
    assert ElectraConfig(objective="electric").generator_kind == "two_tower"
    assert ElectraConfig(objective="electric", generator="masked", mask_prob=1.0).generator_kind == "masked"


def test_a_config_is_an_immutable_value():
    assert ElectraConfig() == ElectraConfig() and hash(ElectraConfig()) == hash(ElectraConfig())
    assert dataclasses.replace(ElectraConfig(), dropout=0.0).dropout == 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        ElectraConfig().hidden = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"generator_ffn": 2.5}, "generator_ffn must be a positive integer, got 2.5"),
        ({"heads": True}, "heads must be a positive integer, got True"),
        ({"hidden": 254}, r"hidden must be divisible by heads \(4\), got 254; change heads"),
        (
            {"generator_heads": 3},
            r"generator_hidden must be divisible by generator_heads \(3\), got 64",
        ),
        ({"vocab_size": 103}, r"mask_id must be in \[0, 103\), the vocabulary, got 103"),
        ({"pad_id": -1}, r"pad_id must be in \[0, 30522\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"mask_prob": 0.0}, r"mask_prob must be in \(0, 1\], got 0.0"),
        ({"mask_prob": math.nan}, r"mask_prob must be in \(0, 1\], got nan"),
        ({"keep_prob": 1.1}, r"keep_prob must be in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"eps": math.inf}, "eps must be positive and finite"),
        ({"rtd_weight": -1.0}, "rtd_weight must be finite, not negative"),
        ({"sharing": "some"}, "sharing must be one of none, embeddings, gdes, all, got 'some'"),
        ({"initial_attention": "near"}, "initial_attention must be one of random, local, got 'near'"),
        ({"objective": "bert"}, "objective must be one of electra, electric, got 'bert'"),
        ({"objective": None}, "objective must be one of electra, electric, got None"),
        ({"generator": "large"}, "generator must be None or one of masked, two_tower, uniform, got 'large'"),
        (
            {"generator": "two_tower", "sharing": "all"},
            "sharing must be none, embeddings or gdes with the generator two_tower, got 'all'",
        ),
        (
            {"generator": "uniform", "sharing": "gdes"},
            "sharing must be none or embeddings with the generator uniform, got 'gdes'",
        ),
        (
            {"objective": "electric", "temperature": 0.5},
            "temperature must be 1 with the objective electric, which needs the probabilities of",
        ),
        ({"objective": "electric", "disallow_correct": True}, "disallow_correct must be False with the obj"),
        (
            {"objective": "electric", "mask_prob": 1.0},
            "mask_prob must be less than 1 with the objective elec",
        ),
        ({"sharing": "all"}, r"generator_hidden must equal hidden \(256\) when sharing is 'all'"),
    ],
)
def test_values_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^ElectraConfig: {message}"):
        dataclasses.replace(ElectraConfig(), **change)
