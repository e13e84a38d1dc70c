"""Write titles: train an encoder and a decoder for some minutes on a CPU, and show what they write.

    python examples/titles.py --minutes 5
    python examples/titles.py --minutes 60 --data articles.txt --model runs/demo/discriminator --out runs/t

A file of --data is plain text, also packed: the first line of a document is its title, then come its
paragraphs, and a blank line separates documents. In an encyclopedia the title is usually in the first
sentence. That is allowed, so the model is compared with the first five words. Without --data the texts are
the docstrings of Python's standard library, and a title is the name of the function or class, in words:
nothing is downloaded.
"""

import argparse
import ast
import dataclasses
import random
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from electra_fast import data
from electra_fast.config import ElectraConfig
from electra_fast.tasks.examples import TaskBatches
from electra_fast.tasks.items import Writing
from electra_fast.tasks.task import TaskModel, evaluate
from electra_fast.tasks.write import Write
from electra_fast.train import optimizer

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # of a name: getLineNo has three
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folders
HELD_OUT = 100  # documents for the metrics, which are not trained on
READ = 4000  # characters of a text; the model reads fewer tokens
WARM_UP = 0.1  # the share of the time in which the rate rises


def articles(paths: list[str]) -> Iterator[Writing]:
    """Yield the documents of files."""
    for number, document in enumerate(data.documents(paths), start=1):
        title, _, paragraphs = document.partition("\n")
        if paragraphs:
            yield Writing(" ".join(paragraphs[:READ].split()), title, f"document {number}")


def docstrings() -> Iterator[Writing]:
    """Yield the docstrings of Python's standard library, once each, with the names of what they describe."""
    seen = set()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if SKIPPED.isdisjoint(file.parts):
            for node in ast.walk(parsed(file)):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    name = " ".join(WORD.findall(node.name)).lower()
                    if name and len(text) > 20 and text not in seen and not node.name.startswith("_"):
                        seen.add(text)
                        yield Writing(text, name, f"{file}, line {node.lineno}")


def parsed(file: Path) -> ast.AST:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The compiler warns about the code that it parses.
        try:
            return ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # Some distributions include files for an older Python.
            return ast.Module([], [])


def train(model: TaskModel, batches: TaskBatches, minutes: float, peak: float) -> int:
    """Train for some minutes; return the number of steps."""
    optim = optimizer.adamw(model.train(), betas=(0.9, 0.98), bias_correction=True)
    begin, total, step = time.monotonic(), 60 * minutes, 0
    bar = tqdm(total=round(total), unit="s", bar_format="{l_bar}{bar}| {n:.0f} of {total} s{postfix}")
    while (passed := time.monotonic() - begin) < total:
        out = model(**batches.make(step), rng=torch.tensor([0, step]))
        out.loss.backward()
        share = passed / total
        optimizer.step(optim, peak * min(share / WARM_UP, (1 - share) / (1 - WARM_UP)), 1.0)
        optim.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            bar.set_postfix(step=step, loss=f"{out.loss.item():.3f}")
            bar.update(min(round(passed), bar.total) - bar.n)
    bar.close()
    return step


def new_config(tokenizer) -> ElectraConfig:
    """Return the sizes of a tiny model with the ids of a tokenizer."""
    special = data.special_ids(tokenizer)
    ids = {f"{name.strip('[]').lower()}_id": i for name, i in special.items() if name != "[UNK]"}
    return dataclasses.replace(
        ElectraConfig.tiny(), layers=args.layers, vocab_size=tokenizer.get_vocab_size(), **ids
    )


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--minutes", type=float, default=5.0, help="of training (default: 5)")
parser.add_argument("--data", nargs="+", metavar="FILE", help="default: Python's docstrings")
parser.add_argument(
    "--model", metavar="FOLDER", help="a discriminator to start from; default: a new tiny model"
)
parser.add_argument("--out", metavar="FOLDER", help="for the model, which `use write` and transformers load")
parser.add_argument("--layers", type=int, default=2, help="of each half of a new model (default: 2)")
parser.add_argument("--vocab", type=int, default=2000, help="pieces of a new vocabulary (default: 2000)")
parser.add_argument("--max-len", type=int, default=32, help="tokens of a text that are read (default: 32)")
parser.add_argument("--batch", type=int, default=16, help="texts per step on average (default: 16)")
parser.add_argument("--lr", type=float, default=1e-3, help="the largest rate (default: 1e-3)")
args = parser.parse_args()

torch.manual_seed(0)
items = list(articles(args.data) if args.data else docstrings())
random.Random(0).shuffle(items)
if len(items) < 2 * HELD_OUT:
    raise SystemExit(f"titles: --data must have {2 * HELD_OUT} documents or more, got {len(items)}")
held_out, items = items[:HELD_OUT], items[HELD_OUT:]

task = Write(SimpleNamespace(beams=1))
task.max_len, task.max_target = args.max_len, 16
if args.model:
    tokenizer = data.load_tokenizer(args.model, special_ids=None)
    writer = task.started(args.model)
else:
    tokenizer = data.train_tokenizer(list(task.texts(items)), args.vocab)
    writer = task.head(new_config(tokenizer))
model = TaskModel(writer, task)
batches = TaskBatches(task.examples(items, tokenizer), args.batch, seed=0, pad_id=writer.config.pad_id)
print(f"{len(items)} documents, {sum(p.numel() for p in model.parameters())} parameters")
steps = train(model, batches, args.minutes, args.lr)

found, metrics = evaluate(task, writer.eval(), held_out, task.examples(held_out, tokenizer))
for item, written in list(zip(held_out, found, strict=True))[:10]:
    print(f"\n{item.source[:100]}\n   title:   {item.target}\n   written: {written.text}")
print(f"\nAfter {steps} steps, on {HELD_OUT} documents that were not trained on:")
for name, scores in ((task.baseline, task.majority(held_out, items)), ("the model", metrics)):
    print(f"   {name:<36} ROUGE-L {scores['rouge_l']:.3f}, BLEU {scores['bleu']:.3f}")
print(f"   the model's perplexity per token: {metrics['perplexity']:.1f}")
if args.out:
    writer.save_pretrained(args.out)
    data.save_tokenizer(tokenizer, args.out)
