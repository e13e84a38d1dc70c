"""What is a small discriminator good for? Numbers for each function of `electra_fast.use`.

    python -m benchmarks.learning.uses runs/wiki TEXT DATA --default runs/demo

TEXT was not in the training of the run, and DATA has goemotions/, blimp/, crows_pairs/, snips/ and
banking77/. LEARNING.md has the result.

- detect: a seventh of the tokens of a passage of TEXT is masked and replaced, by any piece of the vocabulary
  or by a sample of the last checkpoint's generator. The number is the area under the ROC curve (AUC) of a
  passage. Every checkpoint of the run reads the same passages; the default model reads passages that its own
  generator has changed.
- suggest: a word per passage is replaced by another one; is the original among the suggestions?
- choose: the sentiment of GoEmotions. score: the minimal pairs of BLiMP. pairs: CrowS-Pairs.
- intent and rank: the discriminator, fine-tuned on SNIPS and on Banking77, and called with texts.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import machine
from benchmarks.learning import results
from benchmarks.learning.checkpoints import discriminators, recipe_of
from benchmarks.learning.planted import detected, passages
from benchmarks.learning.probes import minimal_pairs, sentiment
from benchmarks.learning.runs import collect
from benchmarks.learning.transfer import DROPOUT, OPTIONS, TASKS, existing, require_files
from electra_fast.tasks.entities import entities
from electra_fast.tasks.items import Text, Utterance
from electra_fast.tasks.readers import texts as read_texts
from electra_fast.tasks.tagged import utterances
from electra_fast.train.fine_tune import fine_tune
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.use import IntentReader, Pretrained, Ranker, choose, load, score, suggest
from electra_fast.use.pairs import pairs

CROWS = "crows_pairs/crows_pairs_anonymized.csv*"
NEEDED = {CROWS, "blimp/blimp_data.tar.xz", "goemotions/group_test.tsv.xz"}  # in DATA
NEEDED |= {file for name in ("snips", "banking77") for file in (TASKS[name].train, TASKS[name].test)}
CHOSEN = 1000  # texts of GoEmotions
QUERIES = 500  # of Banking77's test set
# Labels per query. With ten of them in training, a model that has learned nothing yet is right for nine.
CANDIDATES = {"train": 2, "test": 10}
FINE_TUNING = OPTIONS | {"epochs": 4.0, "set": DROPOUT}
RANKING = FINE_TUNING | {"epochs": 6.0, "lr": 2e-4}  # with 1e-3 it learns nothing


def suggested(model: Pretrained, ids: np.ndarray) -> dict[str, float]:
    """Return how often the original of a replaced word is the first suggestion, and is among five."""
    random, pieces = np.random.default_rng(2), model.tokenizer.get_vocab()
    words = sorted(piece for piece in pieces if piece.isalpha() and len(piece) > 1)
    texts, spans, originals = [], [], []
    for text in model.tokenizer.decode_batch(ids.tolist()):
        split = text.split(" ")
        known = [n for n, word in enumerate(split) if word in pieces and word.isalpha()]
        if not known:
            continue
        n = int(random.choice(known))
        originals.append(split[n])
        split[n] = str(random.choice(words))
        start = len(" ".join(split[:n])) + (n > 0)
        texts.append(" ".join(split))
        spans.append([(start, start + len(split[n]))])
    found = [each.suggestions[0].candidates for each in suggest(texts, model, spans)]
    five = [{c.text for c in candidates} for candidates in found]
    of_generator = [max(candidates, key=lambda c: c.generator).text for candidates in found]
    return {
        "first": accuracy([candidates[0].text for candidates in found], originals),
        "among five": float(np.mean([word in among for word, among in zip(originals, five, strict=True)])),
        "first of the generator": accuracy(of_generator, originals),
    }


def accuracy(found: Iterable, wanted: Iterable) -> float:
    """Return the share of answers that are the wanted ones."""
    return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


def chosen(model: Pretrained, file: Path) -> dict[str, float]:
    """Return the accuracy of `choose` on GoEmotions, and that of the most frequent label."""
    texts, labels = zip(*sentiment(file)[:CHOSEN], strict=True)
    found = choose(list(texts), None, model)
    positive = np.mean(labels)
    return {
        "accuracy": accuracy((each.option == "great" for each in found), (label == 1 for label in labels)),
        "majority": float(max(positive, 1 - positive)),
    }


def scored(model: Pretrained, archive: Path) -> dict[str, float]:
    """Return how often the good sentence of a pair of BLiMP has the higher score, by each half."""
    pairs = minimal_pairs(archive)
    found = score([pair[name] for name in ("sentence_good", "sentence_bad") for pair in pairs], model)
    both = list(zip(found[: len(pairs)], found[len(pairs) :], strict=True))
    return {
        "generator": float(np.mean([good.generator > bad.generator for good, bad in both])),
        "discriminator": float(np.mean([good.discriminator > bad.discriminator for good, bad in both])),
        "pairs": len(pairs),
    }


def biased(model: Pretrained, file: Path) -> dict[str, Any]:
    """Return how often each half prefers the stereotypical sentence of CrowS-Pairs, with an interval."""
    return {by: pairs([file], model, by=by).overall._asdict() for by in ("generator", "discriminator")}


def understood(model: Path, folder: Path) -> dict[str, float]:
    """Fine-tune a discriminator on SNIPS; return its share of right intents, and of texts with right slots.

    The words of a text are joined, so the reader must split them again.
    """
    train, test = (sorted(map(str, folder.glob(f"{name}*.json*"))) for name in ("train", "validate"))
    with tempfile.TemporaryDirectory() as out:
        files = {"train": tuple(train), "dev": tuple(test)}
        recipe = FineTuneRecipe(task="intent", model=str(model), **files, **FINE_TUNING)
        fine_tune(recipe, Path(out), device="cpu")
        items = utterances(test)
        found = IntentReader(out, device="cpu")([" ".join(item.words) for item in items])
    slots = ([(slot.type, slot.text) for slot in each.slots] for each in found)
    return {
        "intent": accuracy((each.intent for each in found), (item.intent for item in items)),
        "slots": accuracy(slots, map(slot_texts, items)),
    }


def slot_texts(item: Utterance) -> list[tuple[str, str]]:
    """Return the type and the text of each slot, in the order of the text."""
    found = sorted(entities(item.slots), key=lambda each: each[1])
    return [(kind, " ".join(item.words[start:end])) for kind, start, end in found]


def ranked(model: Path, folder: Path) -> dict[str, float]:
    """Fine-tune a discriminator on Banking77, where labels are documents; return the metrics of queries."""
    random = np.random.default_rng(3)
    train, test = (read_texts(existing(folder, f"{name}.csv*")[:1]) for name in CANDIDATES)
    labels = sorted({item.label for item in train})
    items = {"train": train, "test": test[:: max(1, len(test) // QUERIES)]}
    rows = {name: [query(item, labels, CANDIDATES[name], random) for item in items[name]] for name in items}
    with tempfile.TemporaryDirectory() as out:
        files = {name: Path(out) / f"{name}.jsonl" for name in rows}
        for name, file in files.items():
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]))
        options = RANKING | {"train": (str(files["train"]),), "dev": (str(files["test"]),)}
        recipe = FineTuneRecipe(task="rank", model=str(model), **options)
        fine_tune(recipe, Path(out) / "model", device="cpu")
        ranker = Ranker(Path(out) / "model", device="cpu")
        orders = [ranker(row["query"], row["candidates"]) for row in rows["test"]]
    both = zip(rows["test"], orders, strict=True)
    ranks = np.array([1 + [row["relevance"][each.number] for each in order].index(1) for row, order in both])
    return {
        "mrr": float(np.mean(1 / ranks)),
        "first": float(np.mean(ranks == 1)),
        "mrr by chance": float(np.mean(1 / np.arange(1, CANDIDATES["test"] + 1))),
    }


def query(item: Text, labels: list[str], count: int, random: np.random.Generator) -> dict[str, Any]:
    """Return a row of `finetune rank`: a text with `count` labels in a random order, one of them its own."""
    others = [label for label in labels if label != item.label]
    found = random.permutation([item.label, *random.choice(others, count - 1, replace=False)])
    return {
        "query": item.text,
        "candidates": [label.replace("_", " ") for label in found],
        "relevance": [int(label == item.label) for label in found],
    }


def pretraining(run: Path) -> dict[str, Any]:
    """Return what LEARNING.md says about a run of pre-training."""
    recipe, found = recipe_of(run), collect(run)
    facts = {name: getattr(recipe, name) for name in ("preset", "set", "seq", "steps")}
    facts |= {name: found[name] for name in ("vocabulary", "train_tokens", "seconds")}
    return facts | {"batch_tokens": recipe.batch_tokens * recipe.accumulate}


def measure(run: Path, default: Path, text: Path, folder: Path) -> dict[str, Any]:
    """Return all numbers about a run; of the default run, those of `detect`."""
    require_files("learning: DATA", folder, NEEDED)
    model, other = load(run, device="cpu"), load(default, device="cpu")
    ids = passages(run, model, text)
    by_step = {f"{step:,} steps": each for step, each in discriminators(run)}
    found: dict[str, Any] = {"pretraining": pretraining(run), "default": pretraining(default)}
    found["detect"] = detected(model, ids, by_step)
    found["detect by default"] = detected(other, passages(default, other, text), {"default": other})
    measured = {
        "suggest": lambda: suggested(model, ids),
        "choose": lambda: chosen(model, folder / "goemotions" / "group_test.tsv.xz"),
        "score": lambda: scored(model, folder / "blimp" / "blimp_data.tar.xz"),
        "pairs": lambda: biased(model, existing(folder, CROWS)[0]),
        "intent": lambda: understood(run / "discriminator", folder / "snips"),
        "rank": lambda: ranked(run / "discriminator", folder / "banking77"),
    }
    for name, function in measured.items():
        begin = time.process_time()
        found[name] = function() | {"seconds": time.process_time() - begin}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.uses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, help="a run of pre-training")
    p.add_argument("text", type=Path, help="a text that was not in its training")
    p.add_argument("data", type=Path, help="the folder with goemotions/, blimp/ and the others")
    p.add_argument("--default", type=Path, required=True, help="a run of README's first command")
    options = p.parse_args()
    torch.set_num_threads(1)
    found = measure(options.run, options.default, options.text, options.data)
    found |= {"machine": machine.cpu_model(), "torch": torch.__version__}
    results.write(results.read() | {"uses": found})


if __name__ == "__main__":
    results.run(main)
