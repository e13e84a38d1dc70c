"""Does Electric learn energies? Its loss next to constant answers, and its scores of shuffled words.

    python -m electra_fast pretrain --preset tiny --set objective=electric --data TRAIN --out runs/electric
    python -m benchmarks.learning.electric runs/electric TEXT

TEXT was not in the training of the run.

- The NCE loss on passages of TEXT, and that of constant answers: the same probability of noise for every
  token (the share of noise in training), and the same energy for every token, the best one. The discriminator
  cannot give the first answer without knowing log q. A loss below it means that the energies say something
  about a text that the generator does not know.
- How often a sentence has a higher score than the same words in a random order.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.learning import results
from benchmarks.learning.checkpoints import final_model
from benchmarks.learning.planted import passages
from benchmarks.learning.probes import text_lines
from electra_fast.model import Electra
from electra_fast.tasks.examples import assemble
from electra_fast.train.evaluation import SEED, Judged, area_under_curve, recorded
from electra_fast.use import Pretrained, load, score

SENTENCES = 500
WORDS = range(6, 31)  # of a sentence
PASSAGES_PER_BATCH = 20
CONSTANTS = torch.linspace(-10, 30, 401)  # energies, of which the best one is found


def batches(count: int) -> list[np.ndarray]:
    """Return the numbers of the passages of each batch."""
    return np.array_split(np.arange(count), max(1, count // PASSAGES_PER_BATCH))


def judged(electra: Electra, model: Pretrained, ids: np.ndarray) -> Judged:
    """Return what a discriminator says about passages, at the tokens that count in its loss."""
    examples = assemble(ids.tolist(), None, model.tokenizer, ids.shape[1] + 2)
    with torch.no_grad(), recorded(electra) as seen:
        for index, numbers in enumerate(batches(len(ids))):
            electra(**examples.batch(numbers), rng=torch.tensor([SEED, index]))
    chosen = ([x[each.weights > 0] for x in (each.output, each.replaced, each.log_q)] for each in seen)
    output, replaced, log_q = map(torch.cat, zip(*chosen, strict=True))
    return Judged(output, replaced, None, log_q, seen[0].log_odds)


def losses(found: Judged) -> dict[str, float]:
    """Return the NCE loss, and those of constant answers."""
    noise, logits = found.replaced.float(), found.logits()

    def loss(logits: Tensor) -> float:
        return F.binary_cross_entropy_with_logits(logits, noise).item()

    known = logits - found.output  # log q + log odds
    return {
        "tokens": len(noise),
        "NCE loss": loss(logits),
        "of a constant probability": loss(torch.full_like(noise, found.log_odds)),
        "of a constant energy": min(loss(known + constant) for constant in CONSTANTS),
        "AUC": area_under_curve(logits, found.replaced, None).item(),
    }


def sentences(file: Path) -> list[str]:
    """Return sentences of a text, evenly chosen."""
    split = (s for line in text_lines(file) for s in re.split(r"(?<=[a-z0-9][.!?]) (?=[A-Z])", line))
    found = [s for s in split if len(s.split()) in WORDS and s.endswith((".", "!", "?"))]
    return found[:: max(1, len(found) // SENTENCES)][:SENTENCES]


def shuffled(texts: list[str]) -> list[str]:
    """Return the texts with their words in a random order; the last one has no full stop to move."""
    random = np.random.default_rng(0)
    return [" ".join(random.permutation(text[:-1].split())) + text[-1] for text in texts]


def preferred(model: Pretrained, texts: list[str]) -> float:
    """Return how often a text has a higher score than with shuffled words."""
    both = zip(score(texts, model), score(shuffled(texts), model), strict=True)
    return float(np.mean([a.electric > b.electric for a, b in both]))


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.electric",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, help="a run of pre-training with objective=electric")
    p.add_argument("text", type=Path, help="a text that was not in its training")
    options = p.parse_args()
    torch.set_num_threads(1)
    model, texts = load(options.run, device="cpu"), sentences(options.text)
    ids = passages(options.run, model, options.text)
    found = losses(judged(final_model(options.run), model, ids))
    found |= {"sentences": len(texts), "preferred to shuffled words": preferred(model, texts)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    results.run(main)
