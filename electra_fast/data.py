"""Text to batches: documents, a WordPiece vocabulary, token ids, padded and packed batches.

    docs = documents()  # the English that every CPython carries, or your own files
    tokenizer = train_tokenizer(docs)  # or load_tokenizer("vocab.txt")
    batches = Batches(encode(docs, tokenizer), seq_len=128, batch_size=32)
    ids, key_mask = batches.padded(0)

A batch is a pure function of (seed, index).
"""

import ast
import collections
import contextlib
import functools
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}  # BERT's


def documents(path: str | os.PathLike | None = None) -> list[str]:
    """Read a corpus; a document has one paragraph a line and no blank line.

    ``path`` is a UTF-8 file or a folder, whose ``.txt`` files are read in order of name; a blank
    line ends a document, the end of a file too. ``None`` takes Python's own manual: the topics of
    ``help()`` and the standard library's docstrings, 2 MB that vary a little with the version.

    Raises:
        ValueError: a file is not text, or holds none; the message names it and the byte's offset.
    """
    if path is None:
        # Read in 4 seconds. The version says when it was built, so any other build is read anew.
        manual = _cached(f"manual 1 {sys.version} {sys.base_prefix}", _python_manual)
        return _split(manual)
    path = Path(path)
    files = sorted(f for f in path.rglob("*.txt") if f.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no .txt file in this folder")
    result = []
    for file in files:
        found = _split(_read_text(file))
        if not found:
            raise ValueError(f"{file}: no document, only blank lines or none at all")
        result += found
    return result


def _split(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.strip()) if text.strip() else []


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte {error.start} (0x{data[error.start]:02x})"
        raise ValueError(f"{file}: not UTF-8 at {bad}") from None
    if "\0" in text:
        raise ValueError(f"{file}: NUL at byte {data.index(0)}; is it a binary or UTF-16 file?")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _python_manual() -> str:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        # Tests are code more than prose, partly malformed on purpose, and not installed everywhere.
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        subfolders[:] = sorted(set(subfolders) - skip)
        for name in sorted(names):
            if name.endswith(".py"):
                texts.append("\n\n".join(_docstrings(Path(folder, name).read_bytes())))
    # Hard-wrapped paragraphs become one line each.
    paragraphs = ("\n".join(" ".join(p.split()) for p in _split(text)) for text in texts)
    return "\n\n".join(document for document in paragraphs if document)


def _docstrings(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about other people's code
        try:
            nodes = [ast.parse(source)]
        except (SyntaxError, ValueError):  # some distributions leave files of an older Python there
            return
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""
        # Expressions are most of the tree and hold no definition.
        nodes += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)][::-1]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cached(key: str, make: Callable[[], str]) -> str:
    """Return ``make()``, kept in the user's cache folder where there is one that can be used.

    The number in a key is to be raised when its recipe changes.
    """
    file = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "electra_fast", _hash(key)[:32])
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: no home
        checksum, text = file.expanduser().read_text("utf-8").split("\n", 1)
        if checksum == _hash(text):
            return text
    text = make()
    with contextlib.suppress(OSError, RuntimeError):
        file = file.expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{_hash(text)}\n{text}", "utf-8")
        os.replace(temporary, file)  # so another process sees all of it or nothing
    return text


def load_tokenizer(vocab, *, lowercase=True, special_ids: Mapping[str, int] = SPECIAL_IDS):
    """Make a ``tokenizers.Tokenizer`` of a ``vocab.txt``: one piece a line, in order of id.

    Raises:
        ValueError: a line is blank or repeated, or a special piece is not at its id.
    """
    pieces = _read_text(Path(vocab)).removesuffix("\n").split("\n")
    lines = {}
    for line, piece in enumerate(pieces, start=1):
        if not piece.strip():
            raise ValueError(f"{vocab}, line {line}: blank, so it would be a piece")
        if piece in lines:
            raise ValueError(f"{vocab}, line {line}: {piece!r} is already on line {lines[piece]}")
        lines[piece] = line
    for piece, place in special_ids.items():
        if lines.get(piece) != place + 1:
            found = f"on line {lines[piece]}" if piece in lines else "missing"
            remedy = "pass special_ids if so intended, and the same to the model and Batches"
            raise ValueError(f"{vocab}, line {place + 1}: must be {piece}, it is {found}; {remedy}")
    return _wordpiece(pieces, lowercase)


def _wordpiece(pieces: list[str], lowercase: bool = True):
    try:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    except ImportError:
        raise ImportError("WordPiece needs a package: pip install tokenizers") from None
    # The special pieces are not registered as such: "[MASK]" in a text is text, never [MASK]'s id.
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _pieces(tokenizer) -> list[str]:
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.get)


def save_vocab(tokenizer, path: str | os.PathLike) -> None:
    """Write the ``vocab.txt`` that `load_tokenizer` and Hugging Face's tokenizers read."""
    Path(path).write_text("".join(f"{piece}\n" for piece in _pieces(tokenizer)), "utf-8")


def train_tokenizer(documents: Iterable[str], vocab_size: int = 30522):
    """Learn an uncased WordPiece vocabulary with BERT's special ids; equal text, equal vocabulary.

    It has fewer than ``vocab_size`` pieces where the text does not repeat so many. It is cached
    under a hash of the text, in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    documents = list(documents)
    key = f"vocab 1 {vocab_size} {_hash(chr(0).join(documents))}"
    return _wordpiece(_cached(key, lambda: "\n".join(_train(documents, vocab_size))).split("\n"))


def _train(documents: list[str], vocab_size: int) -> list[str]:
    tokenizer = _wordpiece(["[UNK]"])
    from tokenizers.trainers import WordPieceTrainer

    counts = collections.Counter()
    for document in documents:
        counts.update(tokenizer.normalizer.normalize_str(document).replace(" ", ""))
    # BERT's limit; a word with any other character is [UNK].
    kept = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:1000])
    # The trainer numbers characters in the order of a randomly seeded hash table and breaks ties
    # by number, so that each run gives another vocabulary; unless it is given them all in order.
    first = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    first += [*kept, *(f"##{c}" for c in kept)]
    if not kept:
        raise ValueError("train_tokenizer: the documents hold no text")
    if len(first) > vocab_size:
        need = f"{len(first)} or more, as the text has {len(kept)} characters"
        raise ValueError(f"train_tokenizer: vocab_size must be {need}, got {vocab_size}")
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a piece seen once teaches nothing
        special_tokens=first,
        initial_alphabet=kept,
        limit_alphabet=len(kept),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _pieces(tokenizer)


class Encoded(NamedTuple):
    """Documents end to end, no special ids: document d is ``ids[offsets[d]:offsets[d + 1]]``."""

    ids: Tensor  # [T] int32
    offsets: Tensor  # [documents + 1] int64


def encode(documents: Iterable[str], tokenizer) -> Encoded:
    """Turn documents into token ids, every one whole."""
    documents = list(documents)
    ids, offsets = array("i"), array("q", [0])
    for start in range(0, len(documents), 256):  # so that the tokenizer's own objects stay few
        part = documents[start : start + 256]
        for encoding in tokenizer.encode_batch_fast(part, add_special_tokens=False):
            ids.extend(encoding.ids)
            offsets.append(len(ids))
    return Encoded(torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int64))


class Padded(NamedTuple):
    ids: Tensor  # [B, L] int64
    key_mask: Tensor  # [B, L] bool, True = real


class Packed(NamedTuple):
    ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int


@functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(seed: int, epoch: int, count: int) -> Tensor:
    # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
    generator = torch.Generator().manual_seed(int(_hash(f"{seed} {epoch}")[:15], 16))
    return torch.randperm(count, generator=generator)


@dataclass(eq=False)
class Batches:
    """An endless stream of batches of ``[CLS] tokens [SEP]``, a pure function of (seed, index).

    A document is cut every ``seq_len - 2`` tokens; its tail is as short as it comes, so padding is
    real. An epoch is all ``num_sequences`` sequences in an order of its own. Batches run on from
    one into the next: none is partial, and a corpus smaller than a batch repeats within it.
    Rank r of R takes the indices r, R + r, 2R + r, …; to resume is to go on at an index.
    """

    documents: Encoded
    _: KW_ONLY
    seq_len: int = 128
    batch_size: int = 32
    seed: int = 0
    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102

    def __post_init__(self):
        if self.seq_len < 3 or self.batch_size < 1:
            got = f"{self.seq_len} and {self.batch_size}"
            raise ValueError(f"Batches: seq_len must be 3 or more, batch_size 1 or more, got {got}")
        ids, offsets = self.documents
        if not len(ids):
            raise ValueError("Batches: the documents hold no token")
        cut = self.seq_len - 2  # the places that [CLS] and [SEP] leave
        cuts = (offsets.diff() + cut - 1) // cut
        document = torch.repeat_interleave(cuts)
        nth = torch.arange(len(document)) - (cuts.cumsum(0) - cuts)[document]
        self._starts = offsets[document] + nth * cut
        self._lengths = (offsets[document + 1] - self._starts).clamp(max=cut)
        self.num_sequences = len(document)

    def padded(self, index: int) -> Padded:
        """Return batch ``index``, each sequence padded to ``seq_len``."""
        if index < 0:
            raise IndexError(f"Batches: index must be 0 or more, got {index}")
        first, n = index * self.batch_size, self.num_sequences
        numbers = range(first, first + self.batch_size)
        rows = torch.stack([_order(self.seed, number // n, n)[number % n] for number in numbers])
        starts, lengths = self._starts[rows, None], self._lengths[rows, None]  # [B, 1]

        place = torch.arange(self.seq_len)  # tokens stand at 1 … length, [SEP] behind them
        token = (place >= 1) & (place <= lengths)
        ids = torch.full(token.shape, self.pad_id)
        ids[:, 0] = self.cls_id
        ids[token] = self.documents.ids[(starts + place - 1)[token]].long()
        ids.scatter_(1, lengths + 1, self.sep_id)
        return Padded(ids, place < lengths + 2)

    def packed(self, index: int) -> Packed:
        """Return the same sequences end to end, without padding."""
        ids, key_mask = self.padded(index)
        lengths = key_mask.sum(1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return Packed(ids[key_mask], cu_seqlens, int(lengths.max()))


def check_batch(
    ids: Tensor,
    vocab_size: int,
    *,
    type_ids: Tensor | None = None,
    type_vocab_size=2,
    position_ids: Tensor | None = None,
    max_positions=512,
) -> None:
    """Find the first id outside its table, on any device; it synchronises, so not in a hot loop.

    Raises:
        IndexError: names the id, its row and column, and the table's size.
        TypeError: a tensor is neither int32 nor int64.
    """
    for name, tensor, size in (
        ("ids", ids, vocab_size),
        ("type_ids", type_ids, type_vocab_size),
        ("position_ids", position_ids, max_positions),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"check_batch: {name} must be int32 or int64, got {tensor.dtype}")
        bad = ((tensor < 0) | (tensor >= size)).nonzero()
        if len(bad):
            *row, column = bad[0].tolist()
            place = f"row {row[-1]}, column {column}" if row else f"place {column}"
            value = tensor[tuple(bad[0])].item()
            raise IndexError(f"check_batch: {name}: {value} at {place} is outside [0, {size})")
