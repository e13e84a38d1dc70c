"""WordPiece tokenizers: read, learnt, written. A special piece in a text is text, never the special id."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from electra_fast.data.files import cached, text_hash
from electra_fast.data.text import lines

SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}  # BERT's


def load_tokenizer(
    vocab: str | os.PathLike,
    *,
    lowercase: bool | None = None,
    special_ids: Mapping[str, int] | None = SPECIAL_IDS,
):
    """Make a ``tokenizers.Tokenizer`` of a ``vocab.txt``, a ``tokenizer.json`` or a Hugging Face folder.

    A ``vocab.txt`` has one piece a line, in order of id, the special ones at ``special_ids`` (None:
    anywhere); ``lowercase`` is true where neither the caller nor the folder's ``tokenizer_config.json`` says
    otherwise. A ``tokenizer.json`` says both itself, and in a folder it is the one that is read.

    Raises:
        ValueError: a line is blank or repeated, a special piece missing or not at its id, the JSON no
            WordPiece.
    """
    path = Path(vocab)
    if path.is_dir():
        path, lowercase = _in_folder(path, lowercase)
    if path.suffix == ".json":
        if lowercase is not None:
            raise ValueError(f"load_tokenizer: lowercase must be left out, got {lowercase}; {path} says it")
        return _from_json(path)
    pieces = list(lines(path))
    numbers = {}
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            raise ValueError(f"{path}, line {number}: blank, so it would be a piece")
        if piece in numbers:
            raise ValueError(f"{path}, line {number}: {piece!r} is already on line {numbers[piece]}")
        numbers[piece] = number
    _require_special(path, numbers)
    for piece, place in (special_ids or {}).items():
        if numbers[piece] != place + 1:
            remedy = "pass special_ids if so intended, and the same to the model and Batches"
            found = f"it is on line {numbers[piece]}"
            raise ValueError(f"{path}, line {place + 1}: must be {piece}, {found}; {remedy}")
    return _wordpiece(pieces, lowercase is not False)


def _in_folder(folder: Path, lowercase: bool | None) -> tuple[Path, bool | None]:
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json", lowercase
    if not (folder / "vocab.txt").exists():
        raise FileNotFoundError(f"{folder}: neither tokenizer.json nor vocab.txt in this folder")
    config = folder / "tokenizer_config.json"
    if lowercase is None and config.exists():
        lowercase = _json(config).get("do_lower_case", True)
    return folder / "vocab.txt", lowercase


def _json(path: Path) -> dict:
    try:
        state = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(state).__name__}")
    return state


def _from_json(path: Path):
    tokenizers = _tokenizers()
    state = _json(path)
    model = state.get("model") or {}
    if model.get("type") != "WordPiece":
        raise ValueError(f"{path}: must hold a WordPiece model, got {model.get('type')}")
    _require_special(path, model["vocab"])
    # As added tokens the special pieces would be found in a text. The model's own entries stay.
    added = [token for token in state.get("added_tokens", []) if not token["special"]]
    state["added_tokens"] = [token for token in added if token["content"] not in SPECIAL_IDS]
    state |= {"post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the package raises no other
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def _require_special(source: str | Path, pieces: Container[str]) -> None:
    missing = [piece for piece in SPECIAL_IDS if piece not in pieces]
    if missing:
        raise ValueError(f"{source}: must hold {', '.join(SPECIAL_IDS)}, {', '.join(missing)} missing")


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ImportError("WordPiece needs a package: pip install tokenizers") from None
    return tokenizers


def _wordpiece(pieces: list[str], lowercase: bool = True):
    tokenizers = _tokenizers()
    ids = {piece: i for i, piece in enumerate(pieces)}
    # The special pieces are not registered as such, so that they are not looked for in a text.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def pieces(tokenizer) -> list[str]:
    """Return the vocabulary in order of id."""
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.get)


def special_ids(tokenizer) -> dict[str, int]:
    """Return the ids of the five special pieces, as ``SPECIAL_IDS`` has BERT's."""
    _require_special("special_ids: the tokenizer", tokenizer.get_vocab())
    return {piece: tokenizer.token_to_id(piece) for piece in SPECIAL_IDS}


def vocab_hash(tokenizer) -> str:
    """Return the SHA-256 of all that decides a text's ids: normaliser, splitting, pieces in order."""
    state = json.loads(tokenizer.to_str())
    decides = [state[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def save_vocab(tokenizer, path: str | os.PathLike) -> None:
    """Write the ``vocab.txt`` that `load_tokenizer` and Hugging Face's tokenizers read."""
    Path(path).write_text("".join(f"{piece}\n" for piece in pieces(tokenizer)), "utf-8")


def save_tokenizer(tokenizer, folder: str | os.PathLike) -> None:
    """Write what ``AutoTokenizer.from_pretrained(folder)`` reads, beside a model's ``config.json``.

    There a text comes as ``[CLS] ids [SEP]``, with our ids between them, except that special pieces in a text
    are taken for what they name, as Hugging Face's users expect.
    """
    tokenizers, folder, special = _tokenizers(), Path(folder), special_ids(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    save_vocab(tokenizer, folder / "vocab.txt")

    theirs = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    theirs.add_special_tokens(list(special))
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(piece, special[piece]) for piece in ("[CLS]", "[SEP]")],
    )
    theirs.save(str(folder / "tokenizer.json"))

    config = {f"{piece.strip('[]').lower()}_token": piece for piece in special}
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        config |= {"tokenizer_class": "BertTokenizer", "do_lower_case": normalizer.lowercase}
        config |= {"strip_accents": normalizer.strip_accents}
        config |= {"tokenize_chinese_chars": normalizer.handle_chinese_chars}
    else:  # only tokenizer.json can say it
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def train_tokenizer(documents: Iterable[str], vocab_size: int = 30522):
    """Learn an uncased WordPiece vocabulary with BERT's special ids; equal text, equal vocabulary.

    It has fewer than ``vocab_size`` pieces where the text does not repeat so many. It is cached
    under a hash of the text, in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if isinstance(documents, Iterator):  # it can be read once only
        documents = list(documents)
    key = f"vocab 1 {vocab_size} {text_hash(documents)[0]}"
    return _wordpiece(cached(key, lambda: "\n".join(_train(documents, vocab_size))).split("\n"))


def _train(documents: Iterable[str], vocab_size: int) -> list[str]:
    tokenizer = _wordpiece(["[UNK]"])
    counts = Counter()
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
    trainer = _tokenizers().trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a piece seen once teaches nothing
        special_tokens=first,
        initial_alphabet=kept,
        limit_alphabet=len(kept),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return pieces(tokenizer)
