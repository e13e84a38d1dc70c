"""WordPiece tokenizers: read, learnt, written. A special piece in a text is text, never the special id."""

import bisect
import hashlib
import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from electra_fast.data.files import cached, regular, text_hash
from electra_fast.data.lines import lines_of

SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}  # BERT's
OPTIONS = {"lowercase": "--lowercase/--cased", "strip_accents": "--strip-accents/--keep-accents"}
OPTIONS["max_word_chars"] = "--max-word-chars"
COVERAGE = 0.9999  # share of a text's characters that a trained vocabulary has as pieces


def load_tokenizer(
    vocab: str | os.PathLike,
    *,
    lowercase: bool | None = None,
    strip_accents: bool | None = None,
    max_word_chars: int | None = None,
    special_ids: Mapping[str, int] | None = SPECIAL_IDS,
):
    """Make a ``tokenizers.Tokenizer`` of a ``vocab.txt``, a ``tokenizer.json`` or a Hugging Face folder.

    A ``vocab.txt`` has one piece per line, in order of id, the special ones at ``special_ids`` (None:
    anywhere). Its normalisation is transformers' BertNormalizer: ``lowercase`` and ``strip_accents`` are
    what the caller says, else the folder's ``tokenizer_config.json``, else true and as ``lowercase``. A word
    of more than ``max_word_chars`` characters (None: 100) is [UNK]. A ``tokenizer.json`` says all of this
    itself, and in a folder it is the one that is read.

    Raises:
        ValueError: a line is blank or repeated, a special piece missing or not at its id, the JSON no
            WordPiece or not what it should hold, its ids far apart; the message names the file.
    """
    given = {"lowercase": lowercase, "strip_accents": strip_accents, "max_word_chars": max_word_chars}
    given = {name: value for name, value in given.items() if value is not None}
    if max_word_chars is not None and max_word_chars < 1:
        raise ValueError(f"load_tokenizer: max_word_chars must be 1 or more, got {max_word_chars}")
    path = Path(vocab)
    if path.is_dir():
        path, said = _in_folder(path)
        given = said | given
    if path.suffix == ".json":
        for name, value in given.items():
            rule = f"{name} ({OPTIONS[name]} on the command line) must be left out"
            raise ValueError(f"load_tokenizer: {rule}, got {value}; {path} says it")
        return _from_json(path)
    pieces = list(lines_of(path))
    numbers, rule = {}, "; a vocabulary has one piece per line, each once"
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            raise ValueError(f"{path}, line {number}: blank, so it would be a piece{rule}")
        if piece in numbers:
            raise ValueError(f"{path}, line {number}: {piece!r} is already on line {numbers[piece]}{rule}")
        numbers[piece] = number
    _require_special(path, numbers)
    for piece, place in (special_ids or {}).items():
        if numbers[piece] != place + 1:
            remedy = "pass special_ids if so intended, and the same to the model and Batches"
            found = f"it is on line {numbers[piece]}"
            raise ValueError(f"{path}, line {place + 1}: must be {piece}, {found}; {remedy}")
    return _wordpiece(pieces, **given)


def _in_folder(folder: Path) -> tuple[Path, dict[str, bool]]:
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json", {}
    if not (folder / "vocab.txt").exists():
        raise FileNotFoundError(f"{folder}: neither tokenizer.json nor vocab.txt in this folder")
    file, said = folder / "tokenizer_config.json", {}
    config = _json(file) if file.exists() else {}
    names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
    names["tokenize_chinese_chars"] = "handle_chinese_chars"
    for theirs, ours in names.items():
        if not isinstance(value := config.get(theirs), bool | None):
            raise ValueError(f"{file}: {theirs} must be true, false or null, got {value!r}")
        if value is not None:
            said[ours] = value
    return folder / "vocab.txt", said


def _json(path: Path) -> dict:
    try:
        state = json.loads(regular(path).read_bytes())
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(state).__name__}")
    return state


def _from_json(path: Path):
    tokenizers = _tokenizers()
    state = _json(path)
    model, added = state.get("model"), state.get("added_tokens") or []
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "WordPiece":
        raise ValueError(f"{path}: must hold a WordPiece model, got {kind}")
    tokens = added if isinstance(added, list) else [None]
    types = {"id": int, "content": str, "special": bool}
    if not all(isinstance(t, dict) and all(type(t.get(k)) is types[k] for k in types) for t in tokens):
        raise ValueError(f"{path}: added_tokens must be objects with an id, a content and special")
    _require_ids(path, model.get("vocab"), [token["id"] for token in tokens])
    _require_special(path, model["vocab"])
    # As added tokens the special pieces would be found in a text. The model's own entries stay.
    tokens = [token for token in tokens if not token["special"] and token["content"] not in SPECIAL_IDS]
    state |= {"added_tokens": tokens, "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(state))
    except BaseException as error:  # the package raises Exception, and its panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def _require_ids(path: Path, vocab: object, added: list[object]) -> None:
    """Refuse ids that are none, or so far apart that the table of embeddings would be mostly empty."""
    ids = [*vocab.values(), *added] if isinstance(vocab, dict) else [None]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path}: model.vocab must give each piece an id, 0 or more")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{path}: model.vocab must give each piece an id of its own")
    limit = 2 * len(ids) + 1024
    if ids and max(ids) >= limit:
        raise ValueError(f"{path}: ids must be below {limit} for {len(ids)} pieces, got {max(ids)}")


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


def _wordpiece(
    pieces: list[str],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
    max_word_chars: int = 100,
):
    tokenizers = _tokenizers()
    ids = {piece: i for i, piece in enumerate(pieces)}
    # The special pieces are not registered as such, so that they are not looked for in a text.
    model = tokenizers.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=max_word_chars)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=handle_chinese_chars
    )
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
    usual = tokenizer.model.max_input_chars_per_word == 100  # transformers' BertTokenizer knows no other
    if usual and isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        config |= {"tokenizer_class": "BertTokenizer", "do_lower_case": normalizer.lowercase}
        config |= {"strip_accents": normalizer.strip_accents}
        config |= {"tokenize_chinese_chars": normalizer.handle_chinese_chars}
    else:  # only tokenizer.json can say it
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int = 30522,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    max_word_chars: int = 100,
):
    """Learn a WordPiece vocabulary with BERT's special ids; equal text, equal vocabulary.

    ``lowercase``, ``strip_accents`` and ``max_word_chars`` are those of `load_tokenizer`. It has fewer than
    ``vocab_size`` pieces if the text has fewer that occur twice or more. It is cached under a hash of the
    text, in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if isinstance(documents, Iterator):  # it can be read once only
        documents = list(documents)
    how = {"lowercase": lowercase, "strip_accents": strip_accents, "max_word_chars": max_word_chars}
    key = f"vocab 2 {vocab_size} {sorted(how.items())} {text_hash(documents)[0]}"
    learnt = cached(key, lambda: "\n".join(_train(documents, vocab_size, how))).split("\n")
    strips = lowercase if strip_accents is None else strip_accents
    if strips and any("\u1100" <= piece.removeprefix("##")[:1] <= "\u11ff" for piece in learnt):
        warnings.warn(
            "train_tokenizer: stripping accents splits each Korean syllable of the text into its letters; "
            "use --keep-accents (strip_accents=False) to keep the syllables",
            stacklevel=2,
        )
    return _wordpiece(learnt, **how)


def _train(documents: Iterable[str], vocab_size: int, how: dict) -> list[str]:
    tokenizer = _wordpiece(["[UNK]"], **how)
    counts = Counter()
    for document in documents:
        counts.update(tokenizer.normalizer.normalize_str(document).replace(" ", ""))
    kept = _alphabet(counts, vocab_size)
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


def _alphabet(counts: Counter[str], vocab_size: int) -> list[str]:
    """Return the characters that become pieces, in order; a word with any other is [UNK].

    The 1000 most frequent, as BERT has them; more if these cover less than COVERAGE of the text, as in
    Chinese, but no more than fill half of the vocabulary.
    """
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    covered = list(itertools.accumulate(counts[c] for c in ranked))
    enough = bisect.bisect_left(covered, COVERAGE * counts.total()) + 1
    return sorted(ranked[: max(1000, min(enough, vocab_size // 4))])
