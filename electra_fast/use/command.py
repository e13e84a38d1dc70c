"""`python -m electra_fast use NAME`: what a trained model says about texts."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from electra_fast import local
from electra_fast.errors import must
from electra_fast.tables import text_table

# By name: what it does, and whether its model is a fine-tuned one.
USES = {
    "detect": ("the words that do not belong, by the discriminator", False),
    "suggest": ("better words, by the generator and the discriminator", False),
    "score": ("how probable texts are, to choose among hypotheses", False),
    "choose": ("the option that fits best, without training", False),
    "pairs": ("bias, from pairs of sentences such as CrowS-Pairs", False),
    "classify": ("the labels of texts, by a model of finetune classify", True),
    "tag": ("the entities in texts, by a model of finetune tag", True),
    "answer": ("the answer to a question in each text, by a model of finetune answer", True),
    "rank": ("the texts that answer a query, by a model of finetune rank", True),
    "reply": ("the best of the texts as a reply, by a model of finetune rank", True),
    "intent": ("intents and slots of texts, by a model of finetune intent", True),
    "write": ("a text for each text, by a model of finetune write", True),
}
PAIR_COLUMNS = {"text": "first sentence", "pair": "second sentence", "category": "category"}
MOST_WORDS = 25  # words of a text in a table; of a longer text, those that belong least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_subparsers(dest="use", required=True, metavar="NAME").add_parser
    for name, (help_text, fine_tuned) in USES.items():
        _add_use(add(name, help=help_text, description=help_text), name, fine_tuned)


def _add_use(parser: argparse.ArgumentParser, name: str, fine_tuned: bool) -> None:
    folder = f"a folder of finetune {name}" if fine_tuned else "a run of pre-training, or an ELECTRA's folder"
    parser.add_argument("--model", required=name != "pairs", metavar="FOLDER", help=folder)
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    parser.add_argument("--precision", default="float32", help="float32 (default) or bf16")
    parser.add_argument("--int8", action="store_true", help="multiply in int8, on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    if name != "pairs":
        parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts")
        files = "files with a text per line, or tables with a column of texts"
        parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help=files)
        parser.add_argument("--text", help="the column of the texts; default: text, sentence, utterance, …")
    if name in ("detect", "suggest"):
        threshold = "the probability from which a word does not belong (default: 0.5)"
        parser.add_argument("--threshold", type=float, default=0.5, metavar="P", help=threshold)
    if name in ("detect", "pairs"):
        parser.add_argument("--html", metavar="FILE", help="write the results there as a page")
    if name == "suggest":
        spans = "characters to replace, such as 4:7, in each text; default: the words that detect finds"
        parser.add_argument("--span", type=_span, action="append", dest="spans", metavar="A:B", help=spans)
        parser.add_argument("--top", type=int, default=5, help="candidates per word (default: 5)")
    if name == "score":
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--by", help="generator, discriminator or electric; default: what the model has")
        electric = "by energies, the default for a model of objective=electric"
        which.add_argument("--electric", dest="by", action="store_const", const="electric", help=electric)
    if name == "pairs":
        _add_pairs(parser)
    if name == "choose":
        parser.add_argument("--options", nargs="+", help="the options; default: those of the template")
        template = "sentiment (default), topic, intent, or a text such as '{text} It is {option}.'"
        parser.add_argument("--template", default="sentiment", help=template)
    if fine_tuned:
        length = "the longest sequence in tokens; default: that of the run"
        parser.add_argument("--max-len", type=int, default=argparse.SUPPRESS, metavar="N", help=length)
    if name == "answer":
        for option in ("stride", "max-query", "max-answer"):
            help_ = "as in finetune answer; default: that of the run"
            parser.add_argument(f"--{option}", type=int, default=argparse.SUPPRESS, metavar="N", help=help_)
    if name == "write":
        beams = "hypotheses of the beam search; default: as the run evaluated"
        parser.add_argument("--beams", type=int, metavar="N", help=beams)
        longest = "the longest result in tokens; default: the longest target of the run"
        parser.add_argument("--max-new-tokens", type=int, metavar="N", help=longest)
        parser.add_argument("--sample", action="store_true", help="draw each token at random")
    if name in ("answer", "rank"):
        option = {"answer": "--question", "rank": "--query"}[name]
        parser.add_argument(option, required=True, help="a text")
    if name == "reply":
        context = "the turns of the conversation, the last one at the end"
        parser.add_argument("--context", nargs="+", required=True, metavar="TEXT", help=context)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    files = "CrowS-Pairs, GAP, two files of WinoBias, or a table with two columns of sentences"
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help=files)
    for name in ("text", "pair", "category"):
        parser.add_argument(f"--{name}", help=f"the column with the {PAIR_COLUMNS[name]} of your own pairs")
    by = "generator (default), discriminator, electric, or the folder of a classifier, with --label"
    parser.add_argument("--by", help=by)
    parser.add_argument("--label", help="of the classifier; its probability is the score")
    tokens = "which tokens are scored: shared or differing; default: shared, for GAP differing"
    parser.add_argument("--tokens", help=tokens)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def _span(text: str) -> tuple[int, int]:
    start, colon, end = text.partition(":")
    if colon and start.isdecimal() and end.isdecimal() and int(start) < int(end):
        return int(start), int(end)
    raise argparse.ArgumentTypeError(f"must be two numbers such as 4:7, got {text!r}")


def run(use: str, data: Sequence[str] = (), text: str | None = None, **options: Any) -> None:
    from electra_fast.use.files import read_texts

    for path in data:
        local.existing(f"{use}: --data", path, hub=False)
    if use == "pairs":
        _pairs(data, text, **options)
        return
    options["texts"] = [*options["texts"], *(read_texts(data, text) if data else [])]
    if not options["texts"]:
        remedy = "texts are before the options or after --, or name a file with --data"
        raise ValueError(must(f"{use}: TEXT", "be given", "none", remedy))
    commands = {"detect": _detect, "suggest": _suggest, "score": _score, "choose": _choose}
    commands |= {"rank": _rank, "reply": _reply, "answer": _answer}
    commands |= {"classify": _classify, "tag": _tag, "intent": _intent, "write": _write}
    commands[use](**options)


def _print(results: Sequence[Any], as_json: bool, shown: Callable[[Any], str]) -> None:
    for result in results:
        print(json.dumps(_plain(result), ensure_ascii=False) if as_json else shown(result))


def _plain(value: Any) -> Any:
    """Return named tuples as objects of JSON, at any depth."""
    if hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _load(call: str, model: str, device: str | None, precision: str, int8: bool) -> Any:
    from electra_fast.use.pretrained import load

    return load(model, device=device, precision=precision, int8=int8, call=call)


def _detect(texts: list[str], threshold: float, html: str | None, json: bool, **of_model: Any) -> None:
    from electra_fast.use.detect import detect, marked, page, require_threshold

    require_threshold("detect: --threshold", threshold)
    model = _load("detect", **of_model)
    found = detect(texts, model)
    if html is not None:
        _save("detect: --html", html, page(found, str(model.folder)))

    def shown(each: Any) -> str:
        words = sorted(each.words, key=lambda word: -word.probability)
        if len(each.words) <= MOST_WORDS:
            words = each.words
        rows = [["word", "does not belong"]] + [
            [word.text, f"{word.probability:.3f} {'#' * round(30 * word.probability)}"]
            for word in words[:MOST_WORDS]
        ]
        none = "" if each.flagged(threshold) else f"(no word is above {threshold:g})\n"
        return f"{marked(each, threshold)}\n{none}{text_table(rows)}\n"

    _print(found, json, shown)


def _save(argument: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(must(argument, "be a file that can be written", f"{path}: {error.strerror}")) from None


def _suggest(
    texts: list[str], spans: list[Any] | None, top: int, threshold: float, json: bool, **of_model: Any
) -> None:
    from electra_fast.use.suggest import suggest

    model = _load("suggest", **of_model)
    found = suggest(texts, model, spans and [spans] * len(texts), top=top, threshold=threshold)

    def shown(each: Any) -> str:
        if not each.suggestions:
            return f"{each.text}\n(no word is above {threshold}; lower --threshold, or name --span)\n"
        rows = [["word", "does not belong", "candidates (generator's probability, does not belong)"]]
        for one in each.suggestions:
            words = (f"{c.text} ({c.generator:.3f}, {c.discriminator:.3f})" for c in one.candidates)
            rows.append([one.word, f"{one.probability:.3f}", ", ".join(words)])
        return f"{each.corrected()}\n{text_table(rows)}\n"

    _print(found, json, shown)


def _score(texts: list[str], by: str | None, json: bool, **of_model: Any) -> None:
    from electra_fast.use.likelihood import LOG_PROBS
    from electra_fast.use.score import score

    found = score(texts, _load("score", **of_model), by)
    if json:
        _print(found, True, str)
        return
    halves = [half for half in LOG_PROBS if getattr(found[0], half) is not None]
    rows = [["tokens", *(title for half in halves for title in (half, "per token")), "text"]]
    for each in found:
        sums = [getattr(each, half) for half in halves]
        cells = [cell for x in sums for cell in (f"{x:.2f}", f"{x / each.tokens:.4f}")]
        rows.append([str(each.tokens), *cells, each.text])
    print(text_table(rows, right=range(len(rows[0]) - 1)))


def _choose(texts: list[str], options: list[str] | None, template: str, json: bool, **of_model: Any) -> None:
    from electra_fast.use.choose import choose

    found = choose(texts, options, _load("choose", **of_model), template)

    def shown(each: Any) -> str:
        shares = sorted(each.probabilities.items(), key=lambda item: -item[1])
        return f"{each.option}  ({', '.join(f'{option} {share:.3f}' for option, share in shares)})"

    _print(found, json, shown)


def _pairs(
    data: Sequence[str],
    text: str | None,
    pair: str | None,
    category: str | None,
    by: str | None,
    label: str | None,
    tokens: str | None,
    seed: int,
    html: str | None,
    json: bool,
    model: str | None,
    **of_model: Any,
) -> None:
    from electra_fast.use import pairs_page
    from electra_fast.use.fine_tuned import Classifier
    from electra_fast.use.likelihood import LOG_PROBS
    from electra_fast.use.pairs import pairs
    from electra_fast.use.pairs_files import read_pairs

    found = read_pairs(data, text, pair, category)
    if by is None or by in LOG_PROBS:
        if model is None:
            raise ValueError(must("pairs: --model", "be given", "none"))
        bias = pairs(found, _load("pairs", model, **of_model), by, tokens=tokens, label=label, seed=seed)
    else:
        classifier = Classifier(local.existing("pairs: --by", by, hub=False), **of_model)
        bias = pairs(found, None, classifier, tokens=tokens, label=label, seed=seed)
    if html is not None:
        _save("pairs: --html", html, pairs_page.page(bias, model or by))
    _print([bias], json, pairs_page.text)


def _classify(texts: list[str], json: bool, model: str, **of_model: Any) -> None:
    from electra_fast.use.fine_tuned import Classifier

    def shown(each: Any) -> str:
        return f"{each.score:.4f}  {', '.join(each.labels) or 'none'}"

    _print(Classifier(model, **of_model)(texts), json, shown)


def _tag(texts: list[str], json: bool, model: str, **of_model: Any) -> None:
    from electra_fast.use.fine_tuned import Tagger

    _print(Tagger(model, **of_model)(texts), json, _entities)


def _entities(found: Sequence[Any]) -> str:
    return ", ".join(f"{each.text} ({each.type} {each.score:.3f})" for each in found) or "none"


def _answer(texts: list[str], question: str, json: bool, model: str, **of_model: Any) -> None:
    from electra_fast.use.fine_tuned import Answerer

    found = Answerer(model, **of_model)([(question, context) for context in texts])
    _print(found, json, lambda each: f"{each.score:.3f}  {each.text or '(no answer)'}")


def _rank(texts: list[str], query: str, json: bool, model: str, **of_model: Any) -> None:
    from electra_fast.use.fine_tuned import Ranker

    found = Ranker(model, **of_model)(query, texts)
    _print(found, json, lambda each: f"{each.score:.4f}  {each.text}")


def _reply(texts: list[str], context: list[str], json: bool, model: str, **of_model: Any) -> None:
    from electra_fast.use.fine_tuned import Ranker
    from electra_fast.use.understand import reply

    found = reply(context, texts, Ranker(model, **of_model))
    _print([found], json, lambda each: f"{each.score:.4f}  {each.text}")


def _intent(texts: list[str], json: bool, model: str, **of_model: Any) -> None:
    from electra_fast.use.fine_tuned import IntentReader

    def shown(each: Any) -> str:
        return f"{each.score:.4f}  {each.intent}  {_entities(each.slots)}"

    _print(IntentReader(model, **of_model)(texts), json, shown)


def _write(
    texts: list[str],
    beams: int | None,
    max_new_tokens: int | None,
    sample: bool,
    json: bool,
    model: str,
    **of_model: Any,
) -> None:
    from electra_fast.use.write import Writer

    options = {"beams": beams, "max_new_tokens": max_new_tokens, "sample": sample}
    found = Writer(model, **of_model)(texts, **options)
    _print(found, json, lambda each: f"{each.log_prob:.3f}  {each.text}")
