"""ELECTRA: a generator that fills in masked tokens, a discriminator that finds what it filled in.

    x_masked = MASK(x)         L_MLM = mean over masked t of   -log p_G(x_t | x_masked)
    x_hat ~ p_G( . | x_masked) L_RTD = mean over real t of     -log p_D(x_corrupt_t is what it is)
    x_corrupt = x with x_hat   L = mlm_weight * L_MLM + rtd_weight * L_RTD

(Clark et al. 2020, section 2). Nothing flows back through a sample: the generator learns from
L_MLM, the discriminator from L_RTD, and the embedding that they share from both.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from electra_fast.checkpoint import PretrainedHalf
from electra_fast.config import ElectraConfig
from electra_fast.modules import (
    FIRST_STREAM,
    DifferenceEmbedding,
    DiscriminatorHead,
    Encoder,
    GeneratorHead,
    draw_rng,
)
from electra_fast.ops import FUSED, Ops
from electra_fast.reference import MaskedTokens
from electra_fast.vocabulary import resize


class ElectraOutput(NamedTuple):
    loss: Tensor  # [] float32, mlm_weight * mlm_loss + rtd_weight * rtd_loss
    mlm_loss: Tensor  # [] float32, mean over the masked positions
    rtd_loss: Tensor  # [] float32, mean over the real tokens
    mlm_correct: Tensor  # [] float32, masked positions whose most likely token is the original
    masked: Tensor  # [] float32, masked positions: mlm_correct / masked is the accuracy
    rtd_counts: Tensor  # [4] float32, true positives, false positives, false and true negatives


class Generator(PretrainedHalf):
    """The masked language model; Hugging Face's ``ElectraForMaskedLM`` by state dict and logits."""

    hugging_face_class: ClassVar[str] = "ElectraForMaskedLM"
    head_names: ClassVar[dict[str, str]] = {
        "head.dense.": "generator_predictions.dense.",
        "head.norm.": "generator_predictions.LayerNorm.",
        "head.bias": "generator_lm_head.bias",
    }

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.tower = config.for_generator()
        self.encoder = Encoder(self.tower, ops)
        self.head = GeneratorHead(self.tower, ops)

    def forward(
        self,
        ids: Tensor,
        *,
        type_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of every token at every position, ``[B, L, V]`` or ``[T, V]``.

        This is for looking into a generator. `Electra` trains it at the masked positions alone,
        where no logits are stored. Arguments as there.
        """
        x = self.encoder(
            ids,
            type_ids=type_ids,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            rng=rng,
        )
        return self.head.logits(x, self.encoder.embedding.words)


class Discriminator(PretrainedHalf):
    """The encoder one keeps; Hugging Face's ``ElectraForPreTraining`` by state dict and logits."""

    hugging_face_class: ClassVar[str] = "ElectraForPreTraining"
    head_names: ClassVar[dict[str, str]] = {
        "head.dense.": "discriminator_predictions.dense.",
        "head.score.": "discriminator_predictions.dense_prediction.",
    }

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.tower = config
        # Alone or beside a generator, a discriminator's dropout has the same streams.
        self.stream = FIRST_STREAM + Encoder.streams(config.for_generator())
        self.encoder = Encoder(config, ops)
        self.head = DiscriminatorHead(config, ops)

    def forward(
        self,
        ids: Tensor,
        *,
        type_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
        words: Tensor | None = None,
    ) -> Tensor:
        """Return one logit a token, ``[B, L]`` or ``[T]``, positive where it looks replaced.

        Arguments as in `Electra`; `words` is the word table where the generator has handed it on.
        """
        x = self.encoder(
            ids,
            type_ids=type_ids,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            rng=rng,
            stream=self.stream,
            words=words,
        )
        return self.head(x)


class Electra(nn.Module):
    """Both halves and the pre-training task.

    ``.generator`` and ``.discriminator`` are models of their own, with Hugging Face's state dicts.
    With ``sharing="embeddings"`` one `SharedEmbedding` is part of both, with ``"all"`` one `Encoder`;
    ``parameters()`` lists what is shared once. With ``"gdes"`` the discriminator's `DifferenceEmbedding` adds
    to the generator's tables what it learns itself. The generator's head always has its embedding's table.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.config = config
        self.ops = ops
        self.generator = Generator(config, ops)
        self.discriminator = Discriminator(config, ops)
        if config.sharing == "embeddings":
            self.discriminator.encoder.embedding = self.generator.encoder.embedding
        elif config.sharing == "all":
            self.discriminator.encoder = self.generator.encoder
        elif config.sharing == "gdes":
            difference = DifferenceEmbedding(self.generator.encoder.embedding, config, ops)
            self.discriminator.encoder.embedding = difference
        self.register_load_state_dict_pre_hook(_refuse_unequal_twins)

    def forward(
        self,
        ids: Tensor,
        *,
        type_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
    ) -> ElectraOutput:
        """Mask, generate, discriminate: the losses of one micro-batch. The host waits for nothing.

        Args:
            ids: ``[B, L]`` padded or ``[T]`` packed, int32 or int64.
            type_ids: the segment of each token, shape of ids; None: 0 everywhere.
            key_mask: bool ``[B, L]``, True = real; None: every token is.
            cu_seqlens: int32 ``[B + 1]``, from 0 to T, where the sequences of a packed batch begin. What is
                ``config.pad_id`` there is no token either: a batch may be filled up to a fixed T.
            max_seqlen: the longest sequence of a packed batch, or more.
            rng: int64 ``[2]`` = (seed, step) on the device of ids; it decides masks, samples and
                dropout. It is read once, so that it may be advanced in place before backward. None:
                drawn from PyTorch's default generator.

        Returns:
            ElectraOutput; `mlm_loss` and `rtd_loss` carry gradients too, the counts do not.
        """
        self.check_sharing()
        config = self.config
        rng = draw_rng(ids) if rng is None else rng.clone()
        layout = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}

        masked = self.mask(ids, rng, **layout)

        # The word table goes from user to user, and its gradient back the same way (SharedEmbedding).
        x, words = self.generator.encoder(
            masked.ids, type_ids=type_ids, rng=rng, return_words=True, **layout
        )  # [.., W]
        x = x.flatten(0, -2).index_select(0, masked.positions)  # [M, W]
        mlm = self.generator.head(x, words, masked.targets, masked.weights, rng, return_table=True)

        corrupt = self.ops.replace_tokens(ids, masked.positions, mlm.samples, masked.weights)
        words = mlm.table if config.sharing in ("embeddings", "all") else None
        logits = self.discriminator(corrupt.ids, type_ids=type_ids, rng=rng, words=words, **layout)
        real = key_mask
        if cu_seqlens is not None:  # a packed batch may be filled up with sequences of padding
            real = ids != config.pad_id
        real = None if real is None else real.float()
        rtd = self.ops.rtd_loss(logits, corrupt.replaced, real)

        return ElectraOutput(
            loss=config.mlm_weight * mlm.loss + config.rtd_weight * rtd.loss,
            mlm_loss=mlm.loss,
            rtd_loss=rtd.loss,
            mlm_correct=mlm.correct,
            masked=masked.weights.sum(),
            rtd_counts=rtd.counts,
        )

    def check_sharing(self) -> None:
        """Refuse a model in which something was exchanged that `config.sharing` says is shared.

        Raises:
            ValueError: a tower has another embedding than it must, or a table another number of rows.
        """
        generator, discriminator = self.generator.encoder, self.discriminator.encoder
        shared = {
            "none": lambda: not _is(generator.embedding, discriminator.embedding),
            "embeddings": lambda: _is(generator.embedding, discriminator.embedding),
            "gdes": lambda: _is(discriminator.embedding.shared, generator.embedding),
            "all": lambda: _is(generator, discriminator),
        }
        if not shared[self.config.sharing]():
            raise ValueError(
                f"Electra: generator and discriminator must share what sharing={self.config.sharing!r} says, "
                "got an embedding that was exchanged in one of them; exchange it in both"
            )
        if len(generator.embedding.words) != self.config.vocab_size:
            raise ValueError(
                f"Electra: vocab_size must be the rows of the word table ({len(generator.embedding.words)}), "
                f"got {self.config.vocab_size}; Electra.resize_token_embeddings changes both"
            )

    def resize_token_embeddings(
        self, vocab_size: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Grow or shrink the vocabulary of both halves; arguments and errors as in `PretrainedHalf`."""
        config = dataclasses.replace(self.config, vocab_size=vocab_size)
        resize(self, vocab_size, optimizer)
        self.config = config
        for half in (self.generator, self.discriminator):
            half.tower = dataclasses.replace(half.tower, vocab_size=vocab_size)

    def mask(self, ids: Tensor, rng: Tensor, **layout) -> MaskedTokens:
        """Return `ops.mask_tokens` of a batch, as the config says."""
        config = self.config
        return self.ops.mask_tokens(
            ids,
            self.candidates(ids),
            rng,
            mask_id=config.mask_id,
            mask_prob=config.mask_prob,
            keep_prob=config.keep_prob,
            **layout,
        )

    def candidates(self, ids: Tensor) -> Tensor:
        """Return which tokens may be masked if they are real: all but the special ones, bool."""
        candidates = ids != self.config.pad_id
        for special in (self.config.cls_id, self.config.sep_id, self.config.mask_id):
            candidates = candidates & (ids != special)
        return candidates


def _is(first: nn.Module, second: nn.Module) -> bool:
    # Export makes a proxy of a module at each access; Dynamo does not, and cannot trace `vars(…) is`.
    if not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
        return vars(first) is vars(second)
    return first is second


def _refuse_unequal_twins(
    model: Electra,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """What is shared stands in a checkpoint twice; if the two differed, one would be lost."""
    shared = {"embeddings": "electra.embeddings.", "all": "electra."}.get(model.config.sharing)
    for name in [n for n in state_dict if shared and n.startswith(f"{prefix}generator.{shared}")]:
        twin = f"{prefix}discriminator." + name.removeprefix(f"{prefix}generator.")
        if twin in state_dict and not torch.equal(state_dict[name], state_dict[twin]):
            sharing = f"sharing={model.config.sharing!r} has one of them"
            error_msgs.append(f"{name} must equal {twin}: {sharing}")
