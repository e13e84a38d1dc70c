"""Text for the tests: real English, a vocabulary trained on it, and text that a model learns in seconds."""

import random

import pytest

from electra_fast import data


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Use a temporary cache folder instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def manual(cache):
    return list(data.documents())


@pytest.fixture(scope="session")
def topics(manual):
    return manual[:20]  # 50 kB


@pytest.fixture(scope="session")
def trained_tokenizer(topics):
    pytest.importorskip("tokenizers")
    return data.train_tokenizer(topics, vocab_size=1500)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of made-up text that a model learns in seconds."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the model reads a text and finds every token that another model put into it".split()
    rng = random.Random(0)
    texts = ["\n".join(" ".join(rng.choices(words, k=12)) for _ in range(6)) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(texts))
    return folder
