"""Probes of a frozen encoder: sentiment by a linear classifier, grammar by minimal pairs.

Both probes work for a discriminator and for a masked language model.

- GoEmotions (Demszky et al. 2020), the comments that are only positive or only negative: a logistic
  regression on the mean of the last hidden states.
- BLiMP (Warstadt et al. 2020), zero-shot: does the good sentence of a pair get the higher score? A masked
  language model's score is the sum of log p(token | all others), each token masked in turn (Salazar et al.
  2020). A discriminator's score is the sum of log p(token is the original).
"""

import json
import lzma
import math
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_fast import data
from electra_fast.model import Discriminator, Generator
from electra_fast.modules import Layout
from electra_fast.train.recipe import Recipe
from electra_fast.train.run_folder import find_recipe

PAIRS = 20  # from each of BLiMP's 67 paradigms
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)  # one is chosen on the development set


class Probed(NamedTuple):
    accuracy: float
    low: float
    high: float


def probe(run: Path, make_model: Callable, folder: Path) -> dict:
    """Return all scores of a run's encoder, of its initial weights and of a bag of words."""
    torch.set_num_threads(1)
    tokenizer = data.load_tokenizer(run / "tokenizer")
    half, untrained = _half(run), initial_weights(run, make_model).eval()
    texts = {
        split: sentiment(folder / "goemotions" / f"group_{split}.tsv.xz")
        for split in ("train", "dev", "test")
    }
    ids = {split: [_encode(tokenizer, text) for text, _ in rows] for split, rows in texts.items()}
    labels = {split: torch.tensor([label for _, label in rows]) for split, rows in texts.items()}
    words = {split: _bag(x, tokenizer.get_vocab_size()) for split, x in ids.items()}
    return {
        "sentiment": linear_probe(_of_encoder(half.encoder, ids), labels),
        "sentiment_untrained": linear_probe(_of_encoder(untrained.encoder, ids), labels),
        "sentiment_words": linear_probe(words, labels),
        "sentiment_majority": labels["test"].float().mean().item(),
        "pairs": minimal_pairs(half, tokenizer, folder / "blimp" / "blimp_data.tar.xz"),
    }


def _half(run: Path) -> Discriminator | Generator:
    if (run / "discriminator").exists():
        return Discriminator.from_pretrained(run / "discriminator")
    return Generator.from_pretrained(run / "generator")


def initial_weights(run: Path, make_model: Callable) -> Discriminator | Generator:
    """Return the half before its first step, made from the run's seed as `Pretraining` does."""
    recipe, tokenizer = Recipe.load(find_recipe(run)), data.load_tokenizer(run / "tokenizer")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    torch.manual_seed(recipe.seed)
    model = make_model(recipe.model(vocab_size, data.special_ids(tokenizer)))
    return model.discriminator if hasattr(model, "discriminator") else model.generator


def _encode(tokenizer, text: str, longest: int = 128) -> list[int]:
    return [101, *tokenizer.encode(text, add_special_tokens=False).ids[: longest - 2], 102]


def sentiment(file: Path) -> list[tuple[str, int]]:
    """Return the comments whose only group is negative (0) or positive (1)."""
    rows = [line.split("\t") for line in lzma.open(file, "rt", encoding="utf-8").read().splitlines()]
    return [(text, int(group == "3")) for text, group, _ in rows if group in ("1", "3")]


def _padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(s) for s in sequences])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def by_length(
    sequences: list[list[int]], score: Callable[[Tensor, Tensor], Tensor], rows: int = 256
) -> Tensor:
    """Apply `score`, (ids, key_mask) -> [rows, ..], to batches of sequences of similar length."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found = []
    with torch.inference_mode():
        for first in range(0, len(order), rows):
            found.append(score(*_padded([sequences[i] for i in order[first : first + rows]])))
    result = torch.cat(found)
    return torch.empty_like(result).index_copy_(0, torch.tensor(order), result)


def features(encoder: nn.Module, sequences: list[list[int]]) -> Tensor:
    """Return the mean of the last hidden states over the real tokens, ``[sequences, W]``."""

    def mean(ids: Tensor, key_mask: Tensor) -> Tensor:
        x = encoder(ids, Layout(key_mask)).masked_fill(~key_mask[..., None], 0)
        return x.sum(1) / key_mask.sum(1, keepdim=True)

    return by_length(sequences, mean)


def _of_encoder(encoder: nn.Module, ids: dict[str, list[list[int]]]) -> dict[str, Tensor]:
    """Return the features of each split, standardised with mean and deviation of `train`."""
    x = {split: features(encoder, sequences) for split, sequences in ids.items()}
    mean, scale = x["train"].mean(0), x["train"].std(0).clamp(min=1e-6)
    return {split: (values - mean) / scale for split, values in x.items()}


def _bag(sequences: list[list[int]], vocab_size: int) -> Tensor:
    # Not standardised: rare words would weigh most, which costs 2 % of accuracy on `dev` and `test`.
    rows = [
        torch.bincount(torch.tensor(s), minlength=vocab_size).clamp(max=1).to(torch.int8) for s in sequences
    ]
    return torch.stack(rows).float()


def linear_probe(x: dict[str, Tensor], y: dict[str, Tensor]) -> Probed:
    """Fit a logistic regression on `train`, choose its decay on `dev`, return the accuracy on `test`."""
    fits = [_fit(x["train"], y["train"], decay) for decay in DECAYS]
    best = max(fits, key=lambda w: _accuracy(w, x["dev"], y["dev"]))
    p, n = _accuracy(best, x["test"], y["test"]), len(y["test"])
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    return Probed(p, p - half, p + half)


def _fit(x: Tensor, y: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w + b, y.float()) + decay * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


def _accuracy(weights: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    w, b = weights
    return ((x @ w + b > 0) == (y == 1)).double().mean().item()


def minimal_pairs(half: nn.Module, tokenizer, archive: Path) -> Probed:
    """Return the accuracy on BLiMP's pairs, with an interval from the spread of the paradigms."""
    score = discriminator_scores if isinstance(half, Discriminator) else masked_scores
    good, bad = [], []
    with tarfile.open(archive) as tar:
        for member in sorted((m for m in tar if m.name.endswith(".jsonl")), key=lambda m: m.name):
            pairs = [json.loads(line) for _, line in zip(range(PAIRS), tar.extractfile(member), strict=False)]
            good += [_encode(tokenizer, pair["sentence_good"]) for pair in pairs]
            bad += [_encode(tokenizer, pair["sentence_bad"]) for pair in pairs]
    right = (score(half, good) > score(half, bad)).double().view(-1, PAIRS).mean(1)
    half_width = 1.96 * right.std().item() / math.sqrt(len(right))
    return Probed(right.mean().item(), right.mean().item() - half_width, right.mean().item() + half_width)


def discriminator_scores(half: nn.Module, sequences: list[list[int]]) -> Tensor:
    """Return sum_t log p(token t is the original) = sum_t -softplus(logit_t), one per sequence."""

    def score(ids: Tensor, key_mask: Tensor) -> Tensor:
        return -F.softplus(half(ids, key_mask=key_mask).float()).masked_fill(~key_mask, 0).sum(1)

    return by_length(sequences, score)


def masked_scores(half: nn.Module, sequences: list[list[int]], mask_id: int = 103) -> Tensor:
    """Return sum_t log p(token t | the others, t masked), one per sequence, without [CLS] and [SEP]."""
    positions = [(i, t) for i, s in enumerate(sequences) for t in range(1, len(s) - 1)]
    # A negative id marks the token to be masked, until the batch is made.
    marked = [[*sequences[i][:t], -sequences[i][t], *sequences[i][t + 1 :]] for i, t in positions]

    def score(ids: Tensor, key_mask: Tensor) -> Tensor:
        masked = ids < 0  # one per row
        x = half.encoder(ids.masked_fill(masked, mask_id), Layout(key_mask))[masked]
        logits = half.head.logits(x, half.encoder.embedding.words)
        return -F.cross_entropy(logits.float(), -ids[masked], reduction="none")

    owner = torch.tensor([i for i, _ in positions])
    return torch.zeros(len(sequences)).index_add_(0, owner, by_length(marked, score))


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for one value."""
    x = torch.tensor(list(values), dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else math.nan
