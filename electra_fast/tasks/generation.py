"""Texts that an `EncoderDecoder` writes, by transformers' `generate`, and how probable a text is to it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from electra_fast import data
from electra_fast.decoder import EncoderDecoder, Sequences
from electra_fast.distributed import ALONE, World
from electra_fast.errors import must
from electra_fast.modules import Layout
from electra_fast.tasks.written import WriteExamples

SOURCES = ("ids", "cu_seqlens", "max_seqlen")
TARGETS = ("target_ids", "target_cu_seqlens", "target_max_seqlen")
GENERATED_TOGETHER = {"cpu": 16, "cuda": 256}  # sources in a batch of `generate`


def sequences(batch: dict[str, Any]) -> tuple[Sequences, Sequences]:
    """Return the sources and the targets of a packed batch of `WriteExamples`."""
    return tuple(
        Sequences(batch[ids], Layout(None, batch[bounds], batch[longest]))
        for ids, bounds, longest in (SOURCES, TARGETS)
    )


def generator(model: EncoderDecoder) -> Any:
    """Return `hf.generating.generator`; raise ImportError if transformers is missing."""
    try:
        from electra_fast.hf import generating
    except ImportError as error:
        raise ImportError(f"writing needs packages: pip install electra_fast[write] ({error})") from None
    return generating.generator(model)


def require_new_tokens(subject: str, model: EncoderDecoder, tokens: int) -> None:
    """Raise a ValueError if the decoder does not have a position for each of `tokens` new tokens."""
    longest = model.config.max_positions
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= longest:
        raise ValueError(must(subject, f"be from 1 to {longest}, the positions of the decoder", tokens))


def generate(
    model: Any,
    sources: Sequence[np.ndarray],
    *,
    beams: int = 1,
    new_tokens: int,
    sample: bool = False,
    progress: bool = False,
    desc: str = "writing",
    world: World = ALONE,
) -> list[list[int]]:
    """Return the ids that a model writes for each source, without [CLS], with [SEP] if it has ended.

    Args:
        model: the result of `generator`.
        sources: the ids of each source, with [CLS] and [SEP].
        beams: hypotheses of the beam search; 1: the most probable token at each position.
        new_tokens: the longest result.
        sample: draw each token, by the defaults of transformers and PyTorch's default generator.
        progress, desc, world: as in `predict`.
    """
    from tqdm import tqdm

    found: dict[int, list[int]] = {}
    options = {"num_beams": beams, "max_new_tokens": new_tokens, "do_sample": sample}
    bar = tqdm(total=len(sources), disable=None if progress else True, desc=desc, unit=" items", leave=False)
    with bar, torch.inference_mode():
        for number, items in enumerate(_by_length(sources, GENERATED_TOGETHER[model.device.type])):
            if number % world.size != world.rank:
                continue
            ids, mask = _padded([sources[i] for i in items], model.config.pad_token_id)
            written = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **options)
            for i, row in zip(items, written.tolist(), strict=True):
                found[i] = _until(row[1:], model.config.eos_token_id)
            bar.update(len(items))
    return world.merged(found)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of ids, without special ones."""
    special = set(data.special_ids(tokenizer).values())
    return tokenizer.decode([i for i in ids if i not in special])


def target_log_probs(
    model: EncoderDecoder, examples: WriteExamples, tokens: int, world: World = ALONE
) -> list[float]:
    """Return log p of each target given its source, [SEP] included.

    Args:
        tokens: about how many are computed together, sources and targets.
    """
    found: dict[int, list[float]] = {}
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    with torch.inference_mode():
        for number, (_, batch) in enumerate(examples.in_order(tokens)):
            if number % world.size == world.rank:
                batch = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items()}
                of_tokens = model.log_probs(*sequences(batch), batch["labels"]).double().cpu().numpy()
                begins = batch["target_cu_seqlens"][:-1].cpu().numpy()
                found[number] = np.add.reduceat(of_tokens, begins).tolist()
    model.train(was_training)
    return [value for values in world.merged(found) for value in values]


def _by_length(sources: Sequence[np.ndarray], size: int) -> Iterator[list[int]]:
    """Yield the numbers of the sources in batches of similar lengths, the longest first."""
    order = np.argsort([-len(source) for source in sources], kind="stable").tolist()
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def _padded(sources: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask of some sources, int64 ``[B, L]``."""
    lengths = torch.tensor([len(source) for source in sources])[:, None]
    mask = torch.arange(int(lengths.max())) < lengths
    ids = torch.full(mask.shape, pad_id)
    return ids.masked_scatter(mask, torch.from_numpy(np.concatenate(sources)).long()), mask.long()


def _until(ids: list[int], end: int) -> list[int]:
    """Return ids up to the first `end`, with it; all ids without one."""
    return ids[: ids.index(end) + 1] if end in ids else ids
