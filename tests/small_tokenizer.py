"""The fixture `tokenizer`, with the pieces of `small_vocabulary`."""

import pytest
from small_vocabulary import PIECES

from electra_fast.data import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("small_tokenizer") / "vocab.txt"
    path.write_text("\n".join(PIECES), "utf-8")
    return load_tokenizer(path, special_ids=None)
