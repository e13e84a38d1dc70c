"""Passages with replaced tokens, and how well a discriminator finds them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.learning.checkpoints import recipe_of
from benchmarks.learning.numbers import mean_and_error
from benchmarks.learning.probes import text_lines
from electra_fast.errors import must
from electra_fast.modules import Layout
from electra_fast.tasks.examples import assemble
from electra_fast.use import Pretrained
from electra_fast.use.likelihood import replaced_logits

PASSAGES = 500
SHARE = 0.15  # of the tokens that are masked


class Planted(NamedTuple):
    """Passages with replaced tokens."""

    ids: np.ndarray  # [passages, tokens]
    replaced: np.ndarray  # bool, whether a token differs from the original


def passages(run: Path, model: Pretrained, file: Path) -> np.ndarray:
    """Return the first tokens of long paragraphs of a text, as many as fit into a sequence of the run.

    Returns:
        int ``[PASSAGES, tokens]``; fewer passages if the text is short.

    Raises:
        OSError, ValueError: the text cannot be read, or has no such paragraph.
    """
    tokens = recipe_of(run).seq - 2  # without [CLS] and [SEP]
    lines = [line for line in text_lines(file) if len(line) > 4 * tokens]
    encoded = model.tokenizer.encode_batch(lines, add_special_tokens=False)
    found = np.array([e.ids[:tokens] for e in encoded if len(e.ids) >= tokens])
    if not len(found):
        raise ValueError(must(f"learning: {file}", f"have a paragraph of {tokens} tokens or more", "none"))
    return found[:: max(1, len(found) // PASSAGES)][:PASSAGES]


def masked(ids: np.ndarray) -> np.ndarray:
    """Return which tokens of each passage are masked, bool."""
    order = np.random.default_rng(0).random(ids.shape).argsort(1)
    return order < round(SHARE * ids.shape[1])


def by_any_piece(ids: np.ndarray, pieces: int) -> Planted:
    """Replace tokens by pieces that are not special, all equally probable."""
    others = np.random.default_rng(1).integers(104, pieces, ids.shape)
    changed = np.where(masked(ids), others, ids)
    return Planted(changed, changed != ids)


def by_generator(model: Pretrained, ids: np.ndarray) -> Planted:
    """Replace tokens by samples of a generator, as in pre-training."""
    generator, mask, length = model.generator, masked(ids), ids.shape[1] + 2  # with [CLS] and [SEP]
    batch = assemble(ids.tolist(), None, model.tokenizer, length).batch(np.arange(len(ids)))
    passages, tokens = torch.from_numpy(mask).nonzero().unbind(1)
    positions = passages * length + 1 + tokens  # in the packed batch
    batch["ids"][positions] = generator.config.mask_id
    layout = Layout(None, batch["cu_seqlens"], batch["max_seqlen"])
    with torch.inference_mode():
        x = generator.encoder(batch["ids"], layout, rows=positions)
        logits = generator.head.logits(x, generator.encoder.embedding.words)
        samples = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    changed = ids.copy()
    changed[mask] = samples[:, 0].numpy()
    return Planted(changed, changed != ids)


def auc(model: Pretrained, planted: Planted) -> list[float]:
    """Return the area under the ROC curve of each passage that has a replaced token."""
    from sklearn.metrics import roc_auc_score

    logits = replaced_logits(model, list(planted.ids))
    both = zip(planted.replaced, logits, strict=True)
    return [float(roc_auc_score(replaced, found)) for replaced, found in both if replaced.any()]


def detected(model: Pretrained, ids: np.ndarray, models: dict[str, Pretrained]) -> list[dict]:
    """Return the AUC of models on passages that are corrupted once, in both ways."""
    corrupted = {
        "any piece": by_any_piece(ids, model.tokenizer.get_vocab_size()),
        "the generator": by_generator(model, ids),
    }
    return [
        {"model": name, "by": by, "auc": mean_and_error(auc(each, found))}
        for name, each in models.items()
        for by, found in corrupted.items()
    ]
