"""Texts of real lengths as strings, and a folder with a classifier that reads them; neither data nor network.

The vocabulary has the size of BERT's. Its words have four letters each, and every word is one token.
"""

import atexit
import functools
import itertools
import shutil
import string
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import lengths
from benchmarks.harness.inputs import REHEARSAL

VOCABULARY = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLER = {"num_hidden_layers": 2} if REHEARSAL else {}  # the default has 12
LABELS = 77


def words() -> list[str]:
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    return ["".join(word) for word in itertools.islice(letters, VOCABULARY - len(SPECIAL))]


def texts(data: str, count: int) -> list[str]:
    """Return texts in random order with the lengths of a data set, which include [CLS] and [SEP]."""
    random, known = np.random.default_rng(0), np.array(words())
    of = random.permutation(lengths.sample(data, count))
    return [" ".join(random.choice(known, length - 2)) for length in of]


@functools.cache
def folder() -> Path:
    """Return a folder with an ElectraForSequenceClassification of random weights and its tokenizer.

    It is removed at the end of the process.
    """
    import transformers  # imported late, because it takes seconds

    path = Path(tempfile.mkdtemp(prefix="electra_fast-"))
    atexit.register(shutil.rmtree, path)
    vocabulary = path / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *words()]) + "\n")
    transformers.ElectraTokenizerFast(str(vocabulary), do_lower_case=True).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.ElectraConfig(num_labels=LABELS, vocab_size=VOCABULARY, **SMALLER)
    transformers.ElectraForSequenceClassification(config).save_pretrained(path)
    return path
