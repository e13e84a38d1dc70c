"""The generator of Electric: two causal models, one in each direction, over text without masks.

    h_t = [left-to-right state at t - 1, right-to-left state at t + 1]
    q(x_t | x without x_t) = softmax(head(h_t))

(Clark et al. 2020b, section 3; Baevski et al. 2019.) It gives the probabilities of all tokens of a text in
one pass. A masked language model gives those of the masked tokens. The two models share the embedding and
its projection.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.generators import Generator, GeneratorHead, Proposal, candidate_weights
from electra_fast.modules import (
    FIRST_STREAM,
    UNPADDED,
    Encoder,
    EncoderLayer,
    Layout,
    Tower,
    check_layout,
    dropout_now,
)
from electra_fast.ops import FUSED, Ops
from electra_fast.packing import sequence_of
from electra_fast.pretrained import TWO_TOWER, PretrainedHalf
from electra_fast.results import Embedded, MaskedTokens


class TwoTowerEncoder(Tower):
    """A tower with causal layers in both directions.

    `layers` read from left to right, `reversed_layers` from right to left; `reversed_stream` is the first
    stream of the latter.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED, reversed_stream: int = FIRST_STREAM):
        super().__init__(config, ops)
        self.reversed_stream = reversed_stream
        self.layers, self.reversed_layers = (
            nn.ModuleList(EncoderLayer(config, ops, causal=True) for _ in range(config.layers))
            for _ in ("left to right", "right to left")
        )

    def forward(
        self,
        ids: Tensor,  # [B, L] or [T]
        layout: Layout = UNPADDED,
        *,
        type_ids: Tensor | None = None,
        rng: Tensor | None = None,
    ) -> Embedded:
        """Return the states of both neighbours of each token, ``[.., 2 W]``, and the word table.

        A state is 0 if the token has no neighbour there: at the ends of a sequence, and next to padding.
        """
        check_layout(self, layout)
        _, rng = dropout_now(self, ids, rng)
        x, words = self.embed(ids, layout, type_ids, rng=rng, stream=FIRST_STREAM)
        before = _run(self.layers, x, layout, rng, FIRST_STREAM + 1)
        after = _run(self.reversed_layers, x.flip(-2), _flipped(layout), rng, self.reversed_stream).flip(-2)
        has_before, has_after = neighbours(ids, layout)
        before = before.roll(1, -2).masked_fill(~has_before[..., None], 0)
        after = after.roll(-1, -2).masked_fill(~has_after[..., None], 0)
        return Embedded(torch.cat([before, after], -1), words)


def _run(layers: nn.ModuleList, x: Tensor, layout: Layout, rng: Tensor | None, stream: int) -> Tensor:
    for i, layer in enumerate(layers):
        x = layer(x, layout, rng=rng, stream=stream + 3 * i)
    return x


def _flipped(layout: Layout) -> Layout:
    """Return the layout of a batch whose tokens are in the reverse order."""
    key_mask, cu_seqlens, max_seqlen = layout
    key_mask = None if key_mask is None else key_mask.flip(-1)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens[-1] - cu_seqlens.flip(0)
    return Layout(key_mask, cu_seqlens, max_seqlen)


def neighbours(ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return whether each token has a real neighbour in its sequence before and after it, shape of ids."""
    if layout.cu_seqlens is not None:
        sequence = sequence_of("two_tower", layout.cu_seqlens, len(ids), layout.max_seqlen)
        before = after = sequence[1:] == sequence[:-1]
    else:
        real = torch.ones_like(ids, dtype=torch.bool) if layout.key_mask is None else layout.key_mask
        before, after = real[:, :-1], real[:, 1:]
    return F.pad(before, (1, 0)), F.pad(after, (0, 1))


class TwoTowerGenerator(PretrainedHalf):
    """The generator in two directions. transformers has no such class, so only this one reads its files."""

    hugging_face_class: ClassVar[str] = "ElectraTwoTowerGenerator"
    model_type: ClassVar[str] = TWO_TOWER
    head_names: ClassVar[dict[str, str]] = {
        "encoder.reversed_layers.": "electra.encoder.reversed_layer."
    } | Generator.head_names
    everywhere: ClassVar[bool] = True

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.config = sizes = config.for_generator()
        # After the streams of the left-to-right layers and of the discriminator, which has its own ones.
        stream = FIRST_STREAM + Encoder.streams(sizes) + Encoder.streams(config)
        self.encoder = TwoTowerEncoder(sizes, ops, stream)
        self.head = GeneratorHead(sizes, ops, width=2 * sizes.hidden)

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
        """Return the logits of every token at every position, ``[B, L, V]`` or ``[T, V]``, for inspection.

        Those at a position do not depend on the token there. Arguments as in `Electra`.
        """
        x, words = self.encoder(ids, Layout(key_mask, cu_seqlens, max_seqlen), type_ids=type_ids, rng=rng)
        return self.head.logits(x, words)

    def propose(
        self, ids: Tensor, masked: MaskedTokens, layout: Layout, *, type_ids: Tensor | None, rng: Tensor
    ) -> Proposal:
        """Predict all tokens of `ids` that are not special."""
        x, words = self.encoder(ids, layout, type_ids=type_ids, rng=rng)
        states = self.head.transform(x.flatten(0, -2))  # [T, E]
        weights = candidate_weights(self.config, ids, layout)
        mlm = self.head.predict(states, words, ids.flatten(), weights, rng, return_table=True)
        return Proposal(mlm.samples, mlm.loss, mlm.correct, weights, mlm.table, states, mlm.lse)

    def log_q(self, proposal: Proposal, tokens: Tensor) -> Tensor:
        """Return log q of a token at each position, float32 ``[T]``."""
        return self.head.log_q(proposal.states, self.encoder.embedding.words, tokens, proposal.lse)

    def described(self) -> dict[str, Any]:
        return super().described() | {"model_type": self.model_type}
