"""Text to batches: documents, a WordPiece vocabulary, token ids, padded and packed batches.

    docs = documents("corpus.txt.xz")  # or nothing: the English that every CPython carries
    tokenizer = train_tokenizer(docs)  # or load_tokenizer("vocab.txt")
    train, held = held_out(tokenize(docs, tokenizer))  # memory-mapped; encode(docs, tokenizer) in memory
    batches = Batches(train, seq_len=128, batch_size=32)
    batch = batches.padded(0)  # model(**batch._asdict())

A batch is a pure function of (seed, index).
"""

from electra_fast.data.batches import Batches, Packed, Padded
from electra_fast.data.cache import open_cache, tokenize
from electra_fast.data.check import check_batch
from electra_fast.data.encoded import Encoded, encode, held_out
from electra_fast.data.text import Documents, documents
from electra_fast.data.unknown import Unknown, require_known
from electra_fast.data.wordpiece import (
    SPECIAL_IDS,
    load_tokenizer,
    save_tokenizer,
    save_vocab,
    special_ids,
    train_tokenizer,
    vocab_hash,
)

__all__ = [
    "SPECIAL_IDS",
    "Batches",
    "Documents",
    "Encoded",
    "Packed",
    "Padded",
    "Unknown",
    "check_batch",
    "documents",
    "encode",
    "held_out",
    "load_tokenizer",
    "open_cache",
    "require_known",
    "save_tokenizer",
    "save_vocab",
    "special_ids",
    "tokenize",
    "train_tokenizer",
    "vocab_hash",
]
