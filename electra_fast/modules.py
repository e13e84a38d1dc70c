"""The layers of ELECTRA as thin modules: parameters, and a call of one op for each fused step.

A module is given an `ElectraConfig` and reads one tower's sizes from it: `layers`, `hidden`,
`heads`, `ffn`. The generator's modules are given ``config.for_generator()``. Tokens come padded,
``[B, L]`` with a bool ``key_mask`` (True = real), or packed, ``[T]`` with ``cu_seqlens`` and
``max_seqlen``.

Dropout is a function of ``rng`` = (seed, step) and of a stream number that tells its places apart.
A module takes its first number as ``stream`` and hands consecutive ones to what it contains. In
training without an ``rng`` the outermost module draws one from PyTorch's default generator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.dense import Dense
from electra_fast.ops import FUSED, Ops
from electra_fast.reference import Embedded, MLMHead
from electra_fast.vocabulary import Rows

FIRST_STREAM = 2  # dropout's; stream 0 chooses the masked positions, stream 1 the samples


def draw_rng(like: Tensor) -> Tensor:
    """Draw (seed, step), int64 ``[2]``, on the device of `like`; ``torch.manual_seed`` decides."""
    return torch.randint(2**32, (2,), device=like.device)


def _dropout_now(module: nn.Module, x: Tensor, rng: Tensor | None) -> tuple[float, Tensor | None]:
    """Return the probability of dropout in this call, and the rng it needs."""
    if not module.training or module.dropout == 0.0:
        return 0.0, rng
    return module.dropout, draw_rng(x) if rng is None else rng


def _truncated_normal(tensor: Tensor, std: float) -> Tensor:
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def _table(rows: int, columns: int, std: float) -> nn.Parameter:
    return nn.Parameter(_truncated_normal(torch.empty(rows, columns), std))


def _dense(ops: Ops, inputs: int, outputs: int, std: float | None = None) -> Dense:
    """A linear layer with bias 0; weights truncated-normal, or Glorot-uniform if `std` is None."""
    dense = Dense(inputs, outputs, ops)
    if std is None:
        nn.init.xavier_uniform_(dense.weight)
    else:
        _truncated_normal(dense.weight, std)
    nn.init.zeros_(dense.bias)
    return dense


class SharedEmbedding(nn.Module):
    """``dropout(LayerNorm(word[id] + position[place] + type[type_id]))``, one for both towers.

    Its word table has three users: each tower's lookup and the generator's softmax. One hands it to the
    next, as `words`, and in the backward pass the gradient comes back the same way and grows, instead of
    three of the table's size being made and added up.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.dropout = config.dropout
        self.initializer = config.initializer
        E, std = config.embedding, config.initializer
        self.words = _table(config.vocab_size, E, std)
        self.positions = _table(config.max_positions, E, std)
        self.types = _table(config.type_vocab, E, std)
        self.norm = nn.LayerNorm(E, eps=config.eps)

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is looked up: words ``[V, E]``, positions ``[max positions, E]``, types ``[K, E]``."""
        return self.words, self.positions, self.types

    def token_rows(self) -> list[Rows]:
        """Return what has a row a token."""
        return [Rows(self.words, lambda new: _truncated_normal(new, self.initializer))]

    def forward(
        self,
        ids: Tensor,  # [B, L] or [T]
        type_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
        words: Tensor | None = None,  # the word table, where somebody has handed it on
        return_words: bool = False,
    ) -> Tensor | Embedded:  # [.., E], with `return_words` the pair of it and the table to hand on
        dropout, rng = _dropout_now(self, ids, rng)
        own, positions, types = self.tables()
        return self.ops.embed(
            ids,
            type_ids,
            None,  # positions: each token's place in its sequence
            own if words is None else words,
            positions,
            types,
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            dropout=dropout,
            rng=rng,
            stream=stream,
            cu_seqlens=cu_seqlens,
            return_word=return_words,
        )


class DifferenceEmbedding(SharedEmbedding):
    """The discriminator's embedding under gradient-disentangled sharing: stop_gradient(shared) + difference.

    The tables are the generator's, plus a difference that starts at 0 and that the discriminator alone
    learns (GDES: He, Gao & Chen 2021, DeBERTaV3, section 3.3), so that its loss does not pull at the
    generator's. The LayerNorm is its own. Each call adds two word tables, which moves three times their size.
    """

    NAMES = ("words", "positions", "types")

    def __init__(self, shared: SharedEmbedding, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config, ops)
        own = {name: torch.zeros_like(self._parameters.pop(name)) for name in self.NAMES}
        self.difference = nn.ParameterDict(own)
        self._shared = (shared,)  # in a tuple: its parameters belong to the generator

    @property
    def shared(self) -> SharedEmbedding:
        return self._shared[0]

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        shared = zip(self.NAMES, self.shared.tables(), strict=True)
        return tuple(table.detach() + self.difference[name] for name, table in shared)

    def token_rows(self) -> list[Rows]:
        return [Rows(self.difference["words"], Tensor.zero_)]


class AddNorm(nn.LayerNorm):
    """``LayerNorm(residual + dropout(x))``; one dropout stream."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config.hidden, eps=config.eps)
        self.ops = ops
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,  # [.., W]
        residual: Tensor,  # [.., W]
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
    ) -> Tensor:
        dropout, rng = _dropout_now(self, x, rng)
        return self.ops.add_norm(
            x,
            residual,
            self.weight,
            self.bias,
            eps=self.eps,
            dropout=dropout,
            rng=rng,
            stream=stream,
        )


class SelfAttention(nn.Module):
    """``LayerNorm(x + dropout(attention(x) W + b))``; dropout streams: probabilities, output."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.heads = config.heads
        self.dropout = config.dropout
        W, std = config.hidden, config.initializer
        self.qkv = _dense(ops, W, 3 * W, std)  # rows: query, key, value
        self.out = _dense(ops, W, W, std)
        self.norm = AddNorm(config, ops)

    def forward(
        self,
        x: Tensor,  # [B, L, W] or [T, W]
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
    ) -> Tensor:
        dropout, rng = _dropout_now(self, x, rng)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [.., 3, H, D]
        context = self.ops.attention_qkv(
            qkv,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            dropout=dropout,
            rng=rng,
            stream=stream,
        )
        return self.norm(self.out(context.flatten(-2)), x, rng, stream + 1)


class FeedForward(nn.Module):
    """``LayerNorm(x + dropout(gelu(x W_in + b_in) W_out + b_out))``; one dropout stream."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.dense_in = _dense(ops, config.hidden, config.ffn, config.initializer)
        self.dense_out = _dense(ops, config.ffn, config.hidden, config.initializer)
        self.norm = AddNorm(config, ops)

    def forward(self, x: Tensor, rng: Tensor | None = None, stream: int = FIRST_STREAM) -> Tensor:
        h = self.ops.bias_gelu(self.dense_in(x, with_bias=False), self.dense_in.bias)  # [.., F]
        return self.norm(self.dense_out(h), x, rng, stream)


class EncoderLayer(nn.Module):
    """One post-norm transformer layer: self-attention, then feed-forward; three dropout streams."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.dropout = config.dropout
        self.attention = SelfAttention(config, ops)
        self.feed_forward = FeedForward(config, ops)

    def forward(
        self,
        x: Tensor,  # [B, L, W] or [T, W]
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
    ) -> Tensor:
        _, rng = _dropout_now(self, x, rng)
        x = self.attention(
            x,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            rng=rng,
            stream=stream,
        )
        return self.feed_forward(x, rng, stream + 2)


class Encoder(nn.Module):
    """Embedding, projection to the tower's width where that differs, and the layers."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.dropout = config.dropout
        self.embedding = SharedEmbedding(config, ops)
        self.project = None
        if config.embedding != config.hidden:
            self.project = _dense(ops, config.embedding, config.hidden)
        self.layers = nn.ModuleList(EncoderLayer(config, ops) for _ in range(config.layers))

    def forward(
        self,
        ids: Tensor,  # [B, L] or [T]
        *,
        type_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
        words: Tensor | None = None,
        return_words: bool = False,
    ) -> Tensor | Embedded:  # [.., W], with `return_words` the pair of it and the word table
        _, rng = _dropout_now(self, ids, rng)
        x, words = self.embedding(  # [.., E]
            ids,
            type_ids,
            cu_seqlens=cu_seqlens,
            rng=rng,
            stream=stream,
            words=words,
            return_words=True,
        )
        if self.project is not None:
            x = self.project(x)
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                key_mask=key_mask,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                rng=rng,
                stream=stream + 1 + 3 * i,
            )
        return Embedded(x, words) if return_words else x

    @staticmethod
    def streams(config: ElectraConfig) -> int:
        """How many dropout streams an encoder of these sizes takes."""
        return 1 + 3 * config.layers


class GeneratorHead(nn.Module):
    """``softmax(LayerNorm(gelu(x W + b)) table^T + bias)``; the table is the embedding's."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.temperature = config.temperature
        self.disallow_correct = config.disallow_correct
        self.dense = _dense(ops, config.hidden, config.embedding, config.initializer)
        self.norm = nn.LayerNorm(config.embedding, eps=config.eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self,
        x: Tensor,  # [M, W] the encoder's output at the masked positions
        table: Tensor,  # [V, E]
        targets: Tensor,  # [M]
        weights: Tensor,  # [M]
        rng: Tensor,
        return_table: bool = False,
    ) -> MLMHead:
        """Return the loss at the masked positions, a sample for each of them, and the table to hand on."""
        return self.ops.mlm_head(
            self.transform(x),
            table,
            self.bias,
            targets,
            weights,
            rng,
            temperature=self.temperature,
            disallow_correct=self.disallow_correct,
            return_table=return_table,
        )

    def token_rows(self) -> list[Rows]:
        return [Rows(self.bias, Tensor.zero_)]

    def logits(self, x: Tensor, table: Tensor) -> Tensor:
        """Return all logits, ``[.., W]`` to ``[.., V]``: for looking at, not for training."""
        return F.linear(self.transform(x), table, self.bias)

    def transform(self, x: Tensor) -> Tensor:  # [.., W] -> [.., E]
        h = self.ops.bias_gelu(self.dense(x, with_bias=False), self.dense.bias)
        return self.ops.add_norm(h, None, self.norm.weight, self.norm.bias, eps=self.norm.eps)


class DiscriminatorHead(nn.Module):
    """``gelu(x W + b) w + c``: one logit a token, positive where it looks replaced."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.dense = _dense(ops, config.hidden, config.hidden, config.initializer)
        self.score = _dense(ops, config.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:  # [.., W] -> [..]
        h = self.ops.bias_gelu(self.dense(x, with_bias=False), self.dense.bias)
        return self.score(h).squeeze(-1)
