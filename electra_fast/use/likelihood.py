"""The log-probability of each token, by the discriminator in one pass and by the generator in one per token.

    discriminator:  log p_D(x_t is the original | x)         = -softplus(logit_t)
    generator:      log p_G(x_t | x without x_t)             x_t is replaced by [MASK]
    electric:       log p_E(x_t | x without x_t) + log Z     = -energy_t, and Z is near 1

The sum of the second over the tokens is the pseudo-log-likelihood of a text (Salazar et al. 2020). The third
is a faster estimate of the same (Clark et al. 2020b, section 4). A text
that is longer than the model is cut into windows that overlap; the log-probability of a token comes from the
window in which it has the most context.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from electra_fast import data
from electra_fast.errors import must
from electra_fast.model import Generator
from electra_fast.modules import Layout
from electra_fast.tasks.examples import Examples, assemble
from electra_fast.tasks.task import EVALUATION_TOKENS, predict
from electra_fast.use.pretrained import Pretrained, most_tokens
from electra_fast.use.texts import warn_windows, windows

MOST_ROWS = 1024  # masked positions per batch: each has one logit per piece of the vocabulary


class Windows(NamedTuple):
    """Texts as sequences that fit into the model."""

    examples: Examples  # one sequence per window
    sequence: list[np.ndarray]  # for each text [n], the window from which each token's result is taken
    position: list[np.ndarray]  # for each text [n], the position of the token in that window; [CLS] has 0


def in_windows(ids: Sequence[np.ndarray], most: int, tokenizer: Any, call: str) -> Windows:
    """Cut texts into windows; `ids` are the tokens of each text, without [CLS] and [SEP]."""
    parts, sequence, position, numbers = [], [], [], []
    for each in ids:
        found = windows(np.ones(len(each), int), most)
        owned = [window.last - window.first for window in found]
        sequence.append(np.repeat(np.arange(len(found)) + len(parts), owned))
        position.append(np.arange(len(each)) - np.repeat([w.begin for w in found], owned) + 1)
        numbers.append(len(found))
        parts += [each[window.begin : window.end].tolist() for window in found]
    warn_windows(call, numbers, most)
    return Windows(assemble(parts, None, tokenizer, most + 2), sequence, position)


def replaced_logits(model: Pretrained, ids: Sequence[np.ndarray], call: str = "detect") -> list[np.ndarray]:
    """Return the discriminator's logits, float32 ``[n]`` per text: positive if a token seems replaced.

    Raises:
        ValueError: there is no discriminator, or it is Electric's.
    """
    if model.electric:
        rule, got = "have a discriminator of replaced tokens", f"{model.folder} of objective=electric"
        remedy = "its output is an energy, which is no probability without the generator's log q; use score"
        raise ValueError(must(f"{call}: model", rule, got, remedy))
    return _outputs(model, ids, call)


def electric_log_probs(model: Pretrained, ids: Sequence[np.ndarray], call: str = "score") -> list[np.ndarray]:
    """Return the negative energy of each token, float32 ``[n]`` per text.

    Raises:
        ValueError: there is no discriminator, or it is not Electric's.
    """
    model.require(call, "discriminator")
    if not model.electric:
        rule, got = "have been trained with objective=electric", f"{model.folder}, whose output is no energy"
        remedy = "pre-train with --set objective=electric, or score by the generator or the discriminator"
        raise ValueError(must(f"{call}: model", rule, got, remedy))
    return [-energies for energies in _outputs(model, ids, call)]


def _outputs(model: Pretrained, ids: Sequence[np.ndarray], call: str) -> list[np.ndarray]:
    """Return the discriminator's output for each token, float32 ``[n]`` per text."""
    discriminator = model.require(call, "discriminator")
    if not ids:
        return []
    found = in_windows(ids, most_tokens(discriminator), model.tokenizer, call)
    with _autocast(model):
        outputs = predict(discriminator, found.examples, _tokens(model), progress=True, desc=call)
    begin = found.examples.offsets[:-1]
    return [outputs[begin[s] + p] for s, p in zip(found.sequence, found.position, strict=True)]


def original_log_probs(model: Pretrained, ids: Sequence[np.ndarray], call: str = "score") -> list[np.ndarray]:
    """Return the discriminator's log p(original) of each token, float64 ``[n]`` per text."""
    logits = replaced_logits(model, ids, call)
    return [-np.logaddexp(0, each.astype(np.float64)) for each in logits]


def masked_log_probs(
    model: Pretrained,
    ids: Sequence[np.ndarray],
    positions: Sequence[np.ndarray] | None = None,
    call: str = "score",
) -> list[np.ndarray]:
    """Return the generator's log-probability of tokens, each masked alone.

    Args:
        model: with a generator.
        ids: the tokens of each text, int ``[n]``, without [CLS] and [SEP].
        positions: for each text, the numbers of the tokens to score; None: all.
        call: begins the errors.

    Returns:
        for each text, float32 ``[number of positions]``.
    """
    if positions is None:
        positions = [np.arange(len(each)) for each in ids]
    generator = model.require(call, "generator")
    if not ids:
        return []
    found = in_windows(ids, most_tokens(generator), model.tokenizer, call)
    sequence = [s[p] for s, p in zip(found.sequence, positions, strict=True)]
    position = [s[p] for s, p in zip(found.position, positions, strict=True)]
    table = generator.encoder.embedding.words

    def log_probs(x: Tensor, original: Tensor) -> Tensor:
        logits = generator.head.logits(x, table).float()
        return logits.gather(1, original[:, None]).squeeze(1) - logits.logsumexp(1)

    where = np.concatenate(sequence), np.concatenate(position)
    result = at_masks(model, generator, found.examples, *where, log_probs, call)
    return np.split(result, np.cumsum([len(each) for each in positions])[:-1])


# By the name of a score: its log-probabilities.
LOG_PROBS = {
    "generator": masked_log_probs,
    "discriminator": original_log_probs,
    "electric": electric_log_probs,
}


def scorers(model: Pretrained) -> list[str]:
    """Return the names in LOG_PROBS of the scores of a model: Electric's alone, or those of its halves."""
    halves = [half for half in ("generator", "discriminator") if getattr(model, half) is not None]
    return ["electric"] if model.electric else halves


def at_masks(
    model: Pretrained,
    generator: Generator,
    examples: Examples,
    sequence: np.ndarray,
    position: np.ndarray,
    function: Callable[[Tensor, Tensor], Tensor],
    call: str,
) -> np.ndarray:
    """Apply a function to the generator's output at one [MASK] per sequence.

    Args:
        sequence: int ``[M]``, the sequence of `examples` of each mask; one sequence may have several masks.
        position: int ``[M]``, the position of the mask in it.
        function: called with the encoder's output at the masks, ``[m, W]``, and the ids that they hide, int64
            ``[m]``; it returns one row per mask.
    """
    from tqdm import tqdm

    device, mask_id = model.device, data.special_ids(model.tokenizer)["[MASK]"]
    lengths = np.diff(examples.offsets)[sequence]
    parts: list[np.ndarray] = []
    order = np.argsort(
        -lengths, kind="stable"
    )  # the longest first: if the memory is too small, the first batch shows it
    bar = tqdm(total=len(order), unit=" tokens", desc=call, delay=1.0, leave=False, disable=None)
    with bar, torch.inference_mode(), _autocast(model):
        for chosen in _batches(order, lengths, _tokens(model)):
            batch = examples.batch(sequence[chosen])
            rows = batch["cu_seqlens"][:-1].long() + torch.from_numpy(position[chosen])
            original = batch["ids"][rows]
            batch["ids"][rows] = mask_id
            batch = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items()}
            layout = Layout(None, batch["cu_seqlens"], batch["max_seqlen"])
            x = generator.encoder(batch["ids"], layout, type_ids=batch["type_ids"], rows=rows.to(device))
            parts.append(function(x, original.to(device)).float().cpu().numpy())
            bar.update(len(chosen))
    if not parts:
        return np.empty(0, np.float32)
    found = np.concatenate(parts)
    result = np.empty_like(found)
    result[order] = found
    return result


def _batches(order: np.ndarray, lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Yield the numbers in `order` in groups of at most `tokens` tokens and MOST_ROWS sequences."""
    begin = 0
    while begin < len(order):
        end = begin + max(1, min(MOST_ROWS, tokens // int(lengths[order[begin]])))
        yield order[begin:end]
        begin = end


def _tokens(model: Pretrained) -> int:
    return EVALUATION_TOKENS[model.device.type]


def _autocast(model: Pretrained) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bf16")
