"""The objectives with which ELECTRA is compared (Clark et al. 2020, section 3.4 and figure 3).

Each class has the interface of `Electra`, so `Pretraining(make_model=…)` trains it. `MODELS` names them.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.generators import Generator, GeneratorHead, Proposal
from electra_fast.model import Electra, ElectraOutput
from electra_fast.modules import Layout, draw_rng, make_linear
from electra_fast.ops import FUSED, REFERENCE, Ops
from electra_fast.results import MaskedTokens


class MaskedLM(nn.Module):
    """A masked language model of the discriminator's size: `Electra` without the discriminator."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        sizes = {f"generator_{name}": getattr(config, name) for name in ("layers", "hidden", "heads", "ffn")}
        self.config, self.ops = dataclasses.replace(config, **sizes), ops
        self.generator = Generator(self.config, ops)

    candidates, mask = Electra.candidates, Electra.mask

    def forward(
        self, ids, *, type_ids=None, key_mask=None, cu_seqlens=None, max_seqlen=None, rng=None
    ) -> ElectraOutput:
        rng = draw_rng(ids) if rng is None else rng
        layout = Layout(key_mask, cu_seqlens, max_seqlen)
        masked = self.mask(ids, rng, layout)
        mlm = self.generator.propose(ids, masked, layout, type_ids=type_ids, rng=rng)
        nothing = torch.zeros((), device=ids.device)
        return ElectraOutput(mlm.loss, mlm.loss, nothing, mlm.correct, mlm.weights.sum(), nothing.expand(4))


class GeneratorOnly(MaskedLM):
    """A masked language model of the generator's size."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config, ops)
        self.config, self.generator = config, Generator(config, ops)


class UnigramGenerator(nn.Module):
    """Proposes tokens by their frequency, which it learns: its logits are `SCALE` times one bias per piece.

    Adam moves a parameter by at most its rate per step, and the logits of pieces differ by 7 and more.
    """

    SCALE: ClassVar[float] = 30.0
    everywhere: ClassVar[bool] = False

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.config, self.ops = config, ops
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def propose(self, ids: Tensor, masked: MaskedTokens, layout: Layout, *, type_ids, rng) -> Proposal:
        width = self.config.embedding
        states = self.bias.new_zeros(len(masked.positions), width)
        table = self.bias.new_zeros(len(self.bias), width)
        mlm = self.ops.mlm_head(states, table, self.SCALE * self.bias, masked.targets, masked.weights, rng)
        return Proposal(mlm.samples, mlm.loss, mlm.correct, masked.weights)


def unigram(config: ElectraConfig, ops: Ops = FUSED) -> Electra:
    """Return an `Electra` whose generator is a `UnigramGenerator`."""
    electra = Electra(dataclasses.replace(config, generator="uniform"), ops)
    electra.generator = UnigramGenerator(config, ops)
    return electra


class MaskedOnly(Electra):
    """ELECTRA 15 %: the discriminator's loss is over the masked tokens only."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config, ops)
        rtd_loss = ops.rtd_loss
        self.ops = ops._replace(
            rtd_loss=lambda logits, replaced, real: rtd_loss(logits, replaced, self.chosen)
        )

    def mask(self, ids: Tensor, rng: Tensor, layout: Layout) -> MaskedTokens:
        masked = super().mask(ids, rng, layout)
        chosen = torch.zeros(ids.numel(), device=ids.device)
        self.chosen = chosen.index_put((masked.positions,), masked.weights, accumulate=True).view(ids.shape)
        return masked


class ReplaceMLM(Electra):
    """Replace MLM: a masked language model that reads the generator's samples instead of [MASK].

    The encoder of the discriminator's size predicts the original tokens at the masked positions, by the word
    table. `mlm_loss` is the generator's loss and `rtd_loss` that of this model, so ``rtd_weight`` must be 1.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config, ops)
        self.head = GeneratorHead(config, ops, config.hidden)

    def forward(
        self, ids, *, type_ids=None, key_mask=None, cu_seqlens=None, max_seqlen=None, rng=None
    ) -> ElectraOutput:
        rng = draw_rng(ids) if rng is None else rng
        layout = Layout(key_mask, cu_seqlens, max_seqlen)
        masked = self.mask(ids, rng, layout)
        generated = self.generator.propose(ids, masked, layout, type_ids=type_ids, rng=rng)
        corrupt = self.ops.replace_tokens(ids, masked.positions, generated.samples, masked.weights)
        half = self.discriminator
        x = half.encoder(corrupt.ids, layout, type_ids=type_ids, rng=rng, stream=half.stream)
        loss = self.predicted(x, corrupt.ids, ids, masked, layout, rng)
        total = self.config.mlm_weight * generated.loss + self.config.rtd_weight * loss
        counts = torch.zeros((4,), device=ids.device)
        return ElectraOutput(total, generated.loss, loss, generated.correct, masked.weights.sum(), counts)

    def predicted(
        self, x: Tensor, corrupt: Tensor, ids: Tensor, masked: MaskedTokens, layout: Layout, rng: Tensor
    ) -> Tensor:
        """Return the loss of the original tokens `ids`.

        `x` is ``[B, L, W]`` or ``[T, W]``, the states of the encoder that reads `corrupt`, the text with
        samples.
        """
        x = x.flatten(0, -2).index_select(0, masked.positions)
        words = self.discriminator.encoder.embedding.words
        return self.head(x, words, masked.targets, masked.weights, rng).loss


class AllTokensMLM(ReplaceMLM):
    """All-Tokens MLM: Replace MLM that predicts every token, and may copy the one that it reads.

    With the copy probability D_t = sigmoid(w . h_t + b) and the token y_t that is read, the loss is the mean
    of ``-log(D_t [y_t = x_t] + (1 - D_t) p(x_t))`` over the real tokens.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config, ops)
        self.copy = make_linear(ops, config.hidden, 1)

    def predicted(
        self, x: Tensor, corrupt: Tensor, ids: Tensor, masked: MaskedTokens, layout: Layout, rng: Tensor
    ) -> Tensor:
        logits = self.head.logits(x, self.discriminator.encoder.embedding.words).float()
        log_p = -nn.functional.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none")
        copy = self.copy(x).flatten().float()
        never = torch.full_like(copy, -torch.inf)
        copied = torch.where((corrupt == ids).flatten(), nn.functional.logsigmoid(copy), never)
        loss = -torch.logaddexp(copied, nn.functional.logsigmoid(-copy) + log_p)
        real = ids.flatten() != self.config.pad_id
        return torch.where(real, loss, 0.0).sum() / real.sum()


MODELS = {
    "fused": (Electra, FUSED),
    "reference": (Electra, REFERENCE),
    "masked": (MaskedLM, FUSED),
    "generator": (GeneratorOnly, FUSED),
    "unigram": (unigram, FUSED),
    "masked only": (MaskedOnly, FUSED),
    "replace": (ReplaceMLM, FUSED),
    "all tokens": (AllTokensMLM, FUSED),
}
