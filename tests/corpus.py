"""Text for the tests of electra_fast.data: real English, and a vocabulary learnt from it."""

import pytest

from electra_fast import data


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Keep the user's own cache out of the tests."""
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
def tokenizer(topics):
    pytest.importorskip("tokenizers")
    return data.train_tokenizer(topics, vocab_size=1500)
