"""The fixture `tokenizer`: letters, and words of which the texts in the tests of tasks consist."""

import string

import pytest

from electra_fast.data import load_tokenizer

WORDS = "who what where when is the in of red green blue cat dog bird sat ran flew play rain".split()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *string.ascii_lowercase]
PIECES += [*(f"##{letter}" for letter in string.ascii_lowercase), *WORDS]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("small_tokenizer") / "vocab.txt"
    path.write_text("\n".join(PIECES), "utf-8")
    return load_tokenizer(path, special_ids=None)
