"""WordPiece tokenizers: read, trained, written. Special pieces in a text are text, without special ids."""

import bisect
import hashlib
import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from electra_fast.data.cache_folder import cached
from electra_fast.data.lines import lines_of
from electra_fast.data.text import corpus_hash
from electra_fast.errors import must
from electra_fast.local import json_object

SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}  # BERT's
OPTIONS = {"lowercase": "--lowercase/--cased", "strip_accents": "--strip-accents/--keep-accents"}
OPTIONS["max_word_chars"] = "--max-word-chars"
COVERAGE = 0.9999  # share of the characters of a text that become pieces of a trained vocabulary


def load_tokenizer(
    vocab: str | os.PathLike,
    *,
    lowercase: bool | None = None,
    strip_accents: bool | None = None,
    max_word_chars: int | None = None,
    special_ids: Mapping[str, int] | None = SPECIAL_IDS,
):
    """Return a ``tokenizers.Tokenizer`` from a ``vocab.txt``, a ``tokenizer.json`` or a Hugging Face folder.

    A ``vocab.txt`` has one piece per line, in order of id, the special ones at ``special_ids`` (None:
    anywhere). It is normalised by transformers' BertNormalizer. ``lowercase`` and ``strip_accents`` are the
    caller's, else those in the folder's ``tokenizer_config.json``, else true and the same as ``lowercase``. A
    word of more than ``max_word_chars`` characters (None: 100) is [UNK]. A ``tokenizer.json`` contains all of
    these settings; in a folder it has precedence over ``vocab.txt``.

    Raises:
        ValueError: a line is blank or repeated, a special piece is missing or not at its id, or the JSON is
            not a valid WordPiece model or has ids that are far apart; the message names the file.
    """
    given = {"lowercase": lowercase, "strip_accents": strip_accents, "max_word_chars": max_word_chars}
    given = {name: value for name, value in given.items() if value is not None}
    if max_word_chars is not None and max_word_chars < 1:
        raise ValueError(must("load_tokenizer: max_word_chars", "be 1 or more", max_word_chars))
    path = Path(vocab)
    if path.is_dir():
        path, said = _in_folder(path)
        given = said | given
    if path.suffix == ".json":
        for name, value in given.items():
            subject = f"load_tokenizer: {name} ({OPTIONS[name]} on the command line)"
            raise ValueError(must(subject, "be left out", value, f"{path} contains this setting"))
        return _from_json(path)
    pieces = list(lines_of(path))
    numbers = {}
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip() or piece in numbers:
            fault = f"{piece!r} is already on line {numbers[piece]}" if piece in numbers else "blank"
            remedy = "a vocabulary has one piece per line, each once"
            raise ValueError(f"{path}, line {number}: {fault}; {remedy}")
        numbers[piece] = number
    _require_special(path, numbers)
    for piece, i in (special_ids or {}).items():
        if numbers[piece] != i + 1:
            rule, got = f"be on line {i + 1}", f"line {numbers[piece]}"
            remedy = "if that is intended, pass special_ids here, to the model and to Batches"
            raise ValueError(must(f"{path}: {piece}", rule, got, remedy))
    return _wordpiece(pieces, **given)


def _in_folder(folder: Path) -> tuple[Path, dict[str, bool]]:
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json", {}
    if not (folder / "vocab.txt").exists():
        raise FileNotFoundError(must(str(folder), "contain tokenizer.json or vocab.txt", "neither"))
    file, said = folder / "tokenizer_config.json", {}
    config = json_object("load_tokenizer", file) if file.exists() else {}
    names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
    names["tokenize_chinese_chars"] = "handle_chinese_chars"
    for theirs, ours in names.items():
        if not isinstance(value := config.get(theirs), bool | None):
            raise ValueError(must(f"{file}: {theirs}", "be true, false or null", repr(value)))
        if value is not None:
            said[ours] = value
    return folder / "vocab.txt", said


def _from_json(path: Path):
    tokenizers = _tokenizers()
    state = json_object("load_tokenizer", path)
    model, added = state.get("model"), state.get("added_tokens") or []
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "WordPiece":
        raise ValueError(must(str(path), "contain a WordPiece model", kind))
    tokens = added if isinstance(added, list) else [None]
    types = {"id": int, "content": str, "special": bool}
    if not all(isinstance(t, dict) and all(type(t.get(k)) is types[k] for k in types) for t in tokens):
        raise ValueError(f"{path}: added_tokens must be objects with an id, a content and special")
    _require_ids(path, model.get("vocab"), [token["id"] for token in tokens])
    _require_special(path, model["vocab"])
    # The special pieces stay in the model; as added tokens they would be recognised in a text.
    tokens = [token for token in tokens if not token["special"] and token["content"] not in SPECIAL_IDS]
    state |= {"added_tokens": tokens, "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(state))
    except BaseException as error:  # The package's panics are not subclasses of Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def _require_ids(path: Path, vocab: object, added: list[object]) -> None:
    """Raise an error for invalid ids, or ids so sparse that most rows of the word table would be unused."""
    ids = [*vocab.values(), *added] if isinstance(vocab, dict) else [None]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path}: model.vocab must give each piece an id, 0 or more")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{path}: model.vocab must give each piece an id of its own")
    limit = 2 * len(ids) + 1024
    if ids and max(ids) >= limit:
        raise ValueError(must(f"{path}: ids", f"be below {limit} for {len(ids)} pieces", max(ids)))


def _require_special(source: str | Path, pieces: Container[str]) -> None:
    missing = [piece for piece in SPECIAL_IDS if piece not in pieces]
    if missing:
        raise ValueError(f"{source} must contain {', '.join(SPECIAL_IDS)}, {', '.join(missing)} missing")


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
    # The special pieces are not registered as special tokens, so they are not recognised in a text.
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
    """Return the ids of the five special pieces, in the form of ``SPECIAL_IDS``, which are BERT's."""
    ids = {piece: tokenizer.token_to_id(piece) for piece in SPECIAL_IDS}  # get_vocab() takes milliseconds
    _require_special("special_ids: the tokenizer", [piece for piece, i in ids.items() if i is not None])
    return ids


def require_rows(subject: str, tokenizer, rows: int) -> None:
    """Raise a ValueError if the word table of a model, with this number of rows, has none for some piece."""
    size = max(tokenizer.get_vocab().values()) + 1
    if size > rows:
        raise ValueError(must(subject, f"have {size} rows in its word table, for its tokenizer", rows))


def vocab_hash(tokenizer) -> str:
    """Return the SHA-256 of everything that determines ids: normaliser, splitting, pieces in order."""
    state = json.loads(tokenizer.to_str())
    determining = [state[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    return hashlib.sha256(json.dumps(determining).encode()).hexdigest()


def save_vocab(tokenizer, path: str | os.PathLike) -> None:
    """Write the ``vocab.txt`` that `load_tokenizer` and Hugging Face's tokenizers read."""
    Path(path).write_text("".join(f"{piece}\n" for piece in pieces(tokenizer)), "utf-8")


def save_tokenizer(tokenizer, folder: str | os.PathLike) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained(folder)`` reads in addition to ``config.json``.

    Hugging Face's tokenizer then gives ``[CLS] ids [SEP]`` with the same ids, except that special pieces in a
    text get their special ids, as its users expect.
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
    # The BertTokenizer of transformers has no other limit.
    default_limit = tokenizer.model.max_input_chars_per_word == 100
    if default_limit and isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        config |= {"tokenizer_class": "BertTokenizer", "do_lower_case": normalizer.lowercase}
        config |= {"strip_accents": normalizer.strip_accents}
        config |= {"tokenize_chinese_chars": normalizer.handle_chinese_chars}
    else:  # Only tokenizer.json can express it.
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
    """Train a WordPiece vocabulary with BERT's special ids; the same text gives the same vocabulary.

    ``lowercase``, ``strip_accents`` and ``max_word_chars`` are those of `load_tokenizer`. The vocabulary has
    fewer than ``vocab_size`` pieces if fewer occur twice or more in the text. It is cached under a hash of
    the text, in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if isinstance(documents, Iterator):  # can be read only once
        documents = list(documents)
    how = {"lowercase": lowercase, "strip_accents": strip_accents, "max_word_chars": max_word_chars}
    key = f"vocab 2 {vocab_size} {sorted(how.items())} {corpus_hash(documents)[0]}"
    learned = cached(key, lambda: "\n".join(_train(documents, vocab_size, how))).split("\n")
    strips = lowercase if strip_accents is None else strip_accents
    if strips and any("\u1100" <= piece.removeprefix("##")[:1] <= "\u11ff" for piece in learned):
        warnings.warn(
            "train_tokenizer: stripping accents splits each Korean syllable of the text into its letters; "
            "use --keep-accents (strip_accents=False) to keep the syllables",
            stacklevel=2,
        )
    return _wordpiece(learned, **how)


def _train(documents: Iterable[str], vocab_size: int, how: dict) -> list[str]:
    tokenizer = _wordpiece(["[UNK]"], **how)
    counts = Counter()
    for document in documents:
        counts.update(tokenizer.normalizer.normalize_str(document).replace(" ", ""))
    kept = _alphabet(counts, vocab_size)
    # The trainer numbers characters in the order of a randomly seeded hash table and breaks ties by number,
    # so each run would give another vocabulary. Here it gets all characters in order.
    first = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    first += [*kept, *(f"##{c}" for c in kept)]
    if not kept:
        raise ValueError(must("train_tokenizer: documents", "contain text", "none"))
    if len(first) > vocab_size:
        rule = f"be {len(first)} or more, as the text has {len(kept)} characters"
        raise ValueError(must("train_tokenizer: vocab_size", rule, vocab_size))
    trainer = _tokenizers().trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # A piece that occurs once teaches nothing.
        special_tokens=first,
        initial_alphabet=kept,
        limit_alphabet=len(kept),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return pieces(tokenizer)


def _alphabet(counts: Counter[str], vocab_size: int) -> list[str]:
    """Return the characters that become pieces, in order; a word with any other character is [UNK].

    These are the 1000 most frequent, as in BERT. If they cover less than COVERAGE of the text, as in Chinese,
    there are more, but at most so many that their pieces fill half of the vocabulary.
    """
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    covered = list(itertools.accumulate(counts[c] for c in ranked))
    enough = bisect.bisect_left(covered, COVERAGE * counts.total()) + 1
    return sorted(ranked[: max(1000, min(enough, vocab_size // 4))])
