"""Fixtures: the folder of a small pre-trained model, and both of its halves as transformers loads them."""

import pytest
from small_use import saved


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, tokenizer):
    return saved(tmp_path_factory.mktemp("small_run"), tokenizer)


@pytest.fixture(scope="session")
def their_halves(small_run):
    """The discriminator and the generator as transformers loads them."""
    transformers = pytest.importorskip("transformers")
    discriminator = transformers.ElectraForPreTraining.from_pretrained(small_run / "discriminator")
    return discriminator.eval(), transformers.ElectraForMaskedLM.from_pretrained(
        small_run / "generator"
    ).eval()
