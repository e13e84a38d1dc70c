"""The pieces of the fixture `tokenizer`: letters, and the words of the texts in the tests of tasks."""

import json
import string

WORDS = "who what where when is the in of red green blue cat dog bird sat ran flew play rain".split()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *string.ascii_lowercase]
PIECES += [*(f"##{letter}" for letter in string.ascii_lowercase), *WORDS]


def more_pieces(folder, rows):
    """Give the tokenizer of a folder more pieces than a word table of `rows` rows has."""
    state = json.loads((folder / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab |= {f"##more{i}": i for i in range(len(vocab), rows + 1)}
    (folder / "tokenizer.json").write_text(json.dumps(state))
