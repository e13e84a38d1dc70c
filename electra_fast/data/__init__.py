"""Text to batches: documents, a WordPiece vocabulary, token ids, padded and packed batches.

    docs = documents("corpus.txt.xz")  # or nothing: the English that every CPython carries
    tokenizer = train_tokenizer(docs)  # or load_tokenizer("vocab.txt")
    train, held = held_out(tokenize(docs, tokenizer))  # memory-mapped; encode(docs, tokenizer) in memory
    batches = Batches(train, seq_len=128, batch_size=32)
    batch = batches.padded(0)  # model(**batch._asdict())

`tokenize_folder` and `open_tokens` are for corpora that one process would tokenize for hours.

A batch is a pure function of (seed, index).
"""

from electra_fast.data.batches import Batches, Packed, Padded
from electra_fast.data.cache import open_cache, tokenize
from electra_fast.data.check import check_batch
from electra_fast.data.encoded import Encoded, encode, held_out
from electra_fast.data.stored import forget_index
from electra_fast.data.text import Documents, documents
from electra_fast.data.tokenizing import Work, tokenize_folder
from electra_fast.data.tokens_folder import (
    is_tokens_folder,
    open_tokens,
    read_manifest,
    tokenizer_of,
    unknown_of,
)
from electra_fast.data.unknown import Unknown, require_known
from electra_fast.data.wordpiece import (
    SPECIAL_IDS,
    load_tokenizer,
    require_rows,
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
    "Work",
    "check_batch",
    "documents",
    "encode",
    "forget_index",
    "held_out",
    "is_tokens_folder",
    "load_tokenizer",
    "open_cache",
    "open_tokens",
    "read_manifest",
    "require_known",
    "require_rows",
    "save_tokenizer",
    "save_vocab",
    "special_ids",
    "tokenize",
    "tokenize_folder",
    "tokenizer_of",
    "train_tokenizer",
    "unknown_of",
    "vocab_hash",
]
