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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.learning.checkpoints import initial_weights, tokenizer_of
from electra_fast.errors import must
from electra_fast.model import Discriminator, Generator
from electra_fast.modules import Layout

FILES = ("blimp/blimp_data.tar.xz", *(f"goemotions/group_{s}.tsv.xz" for s in ("train", "dev", "test")))
PAIRS = 20  # from each of BLiMP's 67 paradigms
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)  # one is chosen on the development set


class Probed(NamedTuple):
    accuracy: float
    low: float
    high: float


class Probes:
    """The texts of both probes as token ids; `folder` has goemotions/ and blimp/.

    The classifiers are fitted on `device`, where the encoders must be.
    """

    def __init__(self, tokenizer: Any, folder: Path, device: str = "cpu"):
        self.tokenizer, self.pairs = tokenizer, folder / "blimp" / "blimp_data.tar.xz"
        self.device = device
        files = {name: folder / "goemotions" / f"group_{name}.tsv.xz" for name in ("train", "dev", "test")}
        texts = {split: sentiment(file) for split, file in files.items()}
        self.ids = {split: [_encode(tokenizer, text) for text, _ in rows] for split, rows in texts.items()}
        self.labels = {split: torch.tensor([label for _, label in rows]) for split, rows in texts.items()}

    def of(self, half: Discriminator | Generator) -> dict[str, Probed]:
        """Return the scores of an encoder."""
        return {
            "sentiment": self.classified(_of_encoder(half.encoder, self.ids)),
            "pairs": preferred(half, self.tokenizer, self.pairs),
        }

    def words(self) -> dict[str, Any]:
        """Return the scores of a bag of words and of the most frequent label."""
        size = self.tokenizer.get_vocab_size()
        words = {split: _bag(x, size) for split, x in self.ids.items()}
        majority = self.labels["test"].float().mean().item()
        return {"sentiment_words": self.classified(words), "sentiment_majority": majority}

    def classified(self, x: dict[str, Tensor]) -> Probed:
        """Return the score of a classifier of features."""
        on_device = ({split: t.to(self.device) for split, t in each.items()} for each in (x, self.labels))
        return linear_probe(*on_device)


def probe(run: Path, make_model: Callable, folder: Path) -> dict[str, Any]:
    """Return the scores of a run's encoder, of its initial weights and of a bag of words."""
    torch.set_num_threads(1)
    probes = Probes(tokenizer_of(run), folder)
    untrained = probes.of(initial_weights(run, make_model).eval())
    return probes.of(_half(run)) | {"sentiment_untrained": untrained["sentiment"]} | probes.words()


def _half(run: Path) -> Discriminator | Generator:
    if (run / "discriminator").exists():
        return Discriminator.from_pretrained(run / "discriminator")
    return Generator.from_pretrained(run / "generator")


def _encode(tokenizer: Any, text: str, longest: int = 128) -> list[int]:
    return [101, *tokenizer.encode(text, add_special_tokens=False).ids[: longest - 2], 102]


def sentiment(file: Path) -> list[tuple[str, int]]:
    """Return the comments whose only group is negative (0) or positive (1).

    Raises:
        OSError, ValueError: the file cannot be read, or a line has other columns; the message names it.
    """
    rows = [line.split("\t") for line in text_lines(file)]
    if wrong := [number for number, row in enumerate(rows, 1) if len(row) != 3]:
        raise ValueError(must(f"{file}, line {wrong[0]}:", "have three columns", len(rows[wrong[0] - 1])))
    return [(text, int(group == "3")) for text, group, _ in rows if group in ("1", "3")]


def text_lines(file: Path) -> list[str]:
    """Return the lines of a text, which may be packed by xz.

    Raises:
        OSError, ValueError: the file cannot be read; the message names it.
    """
    opened = lzma.open if file.suffix == ".xz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            return stream.read().splitlines()
    except (lzma.LZMAError, EOFError, UnicodeError) as error:
        raise ValueError(must(str(file), "be a whole text in UTF-8", error)) from error


def minimal_pairs(archive: Path) -> list[dict[str, str]]:
    """Return the first `PAIRS` minimal pairs of each of BLiMP's paradigms, in the order of their names.

    Raises:
        OSError, ValueError: the archive cannot be read, or a paradigm has fewer; the message names it.
    """
    pairs = []
    try:
        with tarfile.open(archive) as tar:
            for member in sorted((m for m in tar if m.name.endswith(".jsonl")), key=lambda m: m.name):
                lines = tar.extractfile(member).read().splitlines()[:PAIRS]
                if len(lines) < PAIRS:
                    raise ValueError(must(f"{archive}: {member.name}", f"have {PAIRS} pairs", len(lines)))
                pairs += map(json.loads, lines)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(must(str(archive), "be a whole archive", error)) from error
    return pairs


def _padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(s) for s in sequences])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def by_length(
    model: nn.Module,
    sequences: list[list[int]],
    score: Callable[[Tensor, Tensor], Tensor],
    rows: int = 256,
) -> Tensor:
    """Return the results of `score` for each sequence, in their order, on the CPU.

    `score`, (ids, key_mask) -> ``[rows, ..]``, is applied to batches of sequences of similar length, on the
    device of `model`.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found = []
    with torch.inference_mode():
        for first in range(0, len(order), rows):
            ids, key_mask = _padded([sequences[i] for i in order[first : first + rows]])
            found.append(score(ids.to(device), key_mask.to(device)).cpu())
    result = torch.cat(found)
    return torch.empty_like(result).index_copy_(0, torch.tensor(order), result)


def features(encoder: nn.Module, sequences: list[list[int]]) -> Tensor:
    """Return the mean of the last hidden states over the real tokens, ``[sequences, W]``."""

    def mean(ids: Tensor, key_mask: Tensor) -> Tensor:
        x = encoder(ids, Layout(key_mask)).masked_fill(~key_mask[..., None], 0)
        return x.sum(1) / key_mask.sum(1, keepdim=True)

    return by_length(encoder, sequences, mean)


def _of_encoder(encoder: nn.Module, ids: dict[str, list[list[int]]]) -> dict[str, Tensor]:
    """Return the features of each split, standardised with mean and deviation of `train`."""
    x = {split: features(encoder, sequences) for split, sequences in ids.items()}
    mean, scale = x["train"].mean(0), x["train"].std(0).clamp(min=1e-6)
    return {split: (values - mean) / scale for split, values in x.items()}


def _bag(sequences: list[list[int]], vocab_size: int) -> Tensor:
    """Return which pieces occur in each sequence, float32 ``[sequences, V]`` of 0 and 1."""
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
    w, b = (torch.zeros(shape, device=x.device, requires_grad=True) for shape in (x.shape[1], ()))
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


def preferred(half: Discriminator | Generator, tokenizer: Any, archive: Path) -> Probed:
    """Return the accuracy on BLiMP's pairs, with an interval from the spread of the paradigms."""
    score = discriminator_scores if isinstance(half, Discriminator) else masked_scores
    pairs = minimal_pairs(archive)
    good, bad = ([_encode(tokenizer, pair[f"sentence_{kind}"]) for pair in pairs] for kind in ("good", "bad"))
    right = (score(half, good) > score(half, bad)).double().view(-1, PAIRS).mean(1)  # by paradigm
    p, half_width = right.mean().item(), 1.96 * right.std().item() / math.sqrt(len(right))
    return Probed(p, p - half_width, p + half_width)


def discriminator_scores(half: nn.Module, sequences: list[list[int]]) -> Tensor:
    """Return sum_t log p(token t is the original) = sum_t -softplus(logit_t), one per sequence."""

    def score(ids: Tensor, key_mask: Tensor) -> Tensor:
        return -F.softplus(half(ids, key_mask=key_mask).float()).masked_fill(~key_mask, 0).sum(1)

    return by_length(half, sequences, score)


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
    return torch.zeros(len(sequences)).index_add_(0, owner, by_length(half, marked, score))
