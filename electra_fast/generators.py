"""The generators of pre-training: a masked language model, or the uniform distribution.

The model in two directions is in `electra_fast.two_tower`. `Electra` uses three things of a generator:

    propose(ids, masked, layout, …)   samples, and its own loss: a `Proposal`
    log_q(proposal, tokens)           the log-probability that it would have proposed these tokens
    everywhere                        q is known at each of the T positions; otherwise at the M masked slots
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.dtypes import autocast, wide
from electra_fast.modules import Encoder, Layout, make_linear
from electra_fast.ops import FUSED, Ops
from electra_fast.philox import uniforms
from electra_fast.pretrained import TIED_TABLE, WORD_TABLE, PretrainedHalf
from electra_fast.resize import TokenRows
from electra_fast.results import MaskedTokens, MLMHead


class Proposal(NamedTuple):
    """What a generator says about a batch; N = M masked slots, or N = T tokens if it knows q everywhere."""

    samples: Tensor  # [N], a token for each
    loss: Tensor  # [] float32, mean over the predicted tokens
    correct: Tensor  # [] float32, number of predicted tokens that are the most likely one
    weights: Tensor  # [N] float32, 1 where a token is predicted, else 0
    table: Tensor | None = None  # the word table, for its next use
    states: Tensor | None = None  # [N, E], whose products with the word table are the logits
    lse: Tensor | None = None  # [N], the log of the sum of the exponentials of the logits


def candidates(config: ElectraConfig, ids: Tensor) -> Tensor:
    """Return a bool mask of the tokens that may be masked: all except special ones."""
    found = ids != config.pad_id
    for special in (config.cls_id, config.sep_id, config.mask_id):
        found = found & (ids != special)
    return found


def candidate_weights(config: ElectraConfig, ids: Tensor, layout: Layout) -> Tensor:
    """Return 1 for each candidate that is not padding, else 0: float32 ``[T]``."""
    found = candidates(config, ids)
    return (found if layout.key_mask is None else found & layout.key_mask).flatten().float()


class GeneratorHead(nn.Module):
    """``softmax(LayerNorm(gelu(x W + b)) table^T + bias)``; the table is the embedding's.

    `width` is that of x; None: the generator's.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED, width: int | None = None):
        super().__init__()
        self.ops = ops
        self.temperature = config.temperature
        self.disallow_correct = config.disallow_correct
        self.dense = make_linear(ops, width or config.hidden, config.embedding, config.initializer)
        self.norm = nn.LayerNorm(config.embedding, eps=config.eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self,
        x: Tensor,  # [M, W], the encoder's output at the predicted positions
        table: Tensor,  # [V, E]
        targets: Tensor,  # [M]
        weights: Tensor,  # [M]
        rng: Tensor,
        return_table: bool = False,
    ) -> MLMHead:
        """Return the loss and a sample for each position; with `return_table` also the table."""
        return self.predict(self.transform(x), table, targets, weights, rng, return_table)

    def predict(
        self,
        states: Tensor,  # [M, E], the result of `transform`
        table: Tensor,
        targets: Tensor,
        weights: Tensor,
        rng: Tensor,
        return_table: bool = False,
    ) -> MLMHead:
        """Return what `forward` returns, from transformed states."""
        return self.ops.mlm_head(
            states,
            table,
            self.bias,
            targets,
            weights,
            rng,
            temperature=self.temperature,
            disallow_correct=self.disallow_correct,
            return_table=return_table,
        )

    def token_rows(self) -> list[TokenRows]:
        return [TokenRows(self.bias, Tensor.zero_)]

    def logits(self, x: Tensor, table: Tensor) -> Tensor:
        """Return all logits, ``[.., W]`` to ``[.., V]``: for inspection, not for training."""
        return F.linear(self.transform(x), table, self.bias)

    @torch.no_grad()
    def log_q(self, states: Tensor, table: Tensor, tokens: Tensor, lse: Tensor) -> Tensor:
        """Return the log-probability of a token at each position, float32 ``[M]``, without a gradient.

        Only the rows of these tokens are read: ``states . table[token] + bias[token] - lse``. The factors are
        rounded as `predict` rounds them under autocast, so they are those of `lse`.
        """
        tokens = tokens.clamp(0, len(table) - 1)  # for an id that is not in the table the states are NaN
        states, rows = map(wide, autocast(states, table.index_select(0, tokens)))
        return ((states * rows).sum(-1) + self.bias.index_select(0, tokens) - lse).float()

    def transform(self, x: Tensor) -> Tensor:  # [.., W] -> [.., E]
        h = self.ops.bias_gelu(self.dense(x, with_bias=False), self.dense.bias)
        return self.ops.add_norm(h, None, self.norm.weight, self.norm.bias, eps=self.norm.eps)


class Generator(PretrainedHalf):
    """The masked language model, with the state dict and the logits of ``ElectraForMaskedLM``."""

    hugging_face_class: ClassVar[str] = "ElectraForMaskedLM"
    head_names: ClassVar[dict[str, str]] = {
        "head.dense.": "generator_predictions.dense.",
        "head.norm.": "generator_predictions.LayerNorm.",
        "head.bias": "generator_lm_head.bias",
    }
    tied: ClassVar[dict[str, str]] = {TIED_TABLE: WORD_TABLE}
    everywhere: ClassVar[bool] = False

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.config = config.for_generator()
        self.encoder = Encoder(self.config, ops)
        self.head = GeneratorHead(self.config, ops)

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

        This is for inspection: `Electra` trains the generator at the masked positions only and stores no
        logits. Arguments as in `Electra`.
        """
        layout = Layout(key_mask, cu_seqlens, max_seqlen)
        x = self.encoder(ids, layout, type_ids=type_ids, rng=rng)
        return self.head.logits(x, self.encoder.embedding.words)

    def propose(
        self, ids: Tensor, masked: MaskedTokens, layout: Layout, *, type_ids: Tensor | None, rng: Tensor
    ) -> Proposal:
        """Predict the masked tokens of ``masked.ids``."""
        # Each use passes the word table on to the next (see `SharedEmbedding`).
        x, words = self.encoder(masked.ids, layout, type_ids=type_ids, rng=rng, return_words=True)
        states = self.head.transform(x.flatten(0, -2).index_select(0, masked.positions))  # [M, E]
        mlm = self.head.predict(states, words, masked.targets, masked.weights, rng, return_table=True)
        return Proposal(mlm.samples, mlm.loss, mlm.correct, masked.weights, mlm.table, states, mlm.lse)

    def log_q(self, proposal: Proposal, tokens: Tensor) -> Tensor:
        """Return log q of a token for each masked slot, float32 ``[M]``."""
        return self.head.log_q(proposal.states, self.encoder.embedding.words, tokens, proposal.lse)


class UniformGenerator(nn.Module):
    """Proposes any token of the vocabulary with the same probability. It has no parameters."""

    everywhere: ClassVar[bool] = True

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.config = config

    def propose(
        self, ids: Tensor, masked: MaskedTokens, layout: Layout, *, type_ids: Tensor | None, rng: Tensor
    ) -> Proposal:
        """Draw a token for each position; the loss is log V, without a gradient."""
        exclude = self.config.disallow_correct
        samples = (uniforms(rng, ids.numel()) * (self.config.vocab_size - exclude)).to(ids.dtype)
        if exclude:
            samples = samples + (samples >= ids.flatten())
        loss = torch.full((), math.log(self.config.vocab_size), device=ids.device)
        weights = candidate_weights(self.config, ids, layout)
        return Proposal(samples, loss, torch.zeros_like(loss), weights)

    def log_q(self, proposal: Proposal, tokens: Tensor) -> Tensor:
        """Return log q of a token at each position, float32 ``[T]``."""
        return torch.full(tokens.shape, -math.log(self.config.vocab_size), device=tokens.device)
