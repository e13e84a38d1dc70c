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
from electra_fast.ops import FUSED, Ops
from electra_fast.reference import MLMHead

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


def _dense(inputs: int, outputs: int, std: float | None = None) -> nn.Linear:
    """A linear layer with bias 0; weights truncated-normal, or Glorot-uniform if `std` is None."""
    dense = nn.Linear(inputs, outputs)
    if std is None:
        nn.init.xavier_uniform_(dense.weight)
    else:
        _truncated_normal(dense.weight, std)
    nn.init.zeros_(dense.bias)
    return dense


class SharedEmbedding(nn.Module):
    """``dropout(LayerNorm(word[id] + position[place] + type[type_id]))``, one for both towers."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.dropout = config.dropout
        E, std = config.embedding, config.initializer
        self.words = _table(config.vocab_size, E, std)
        self.positions = _table(config.max_positions, E, std)
        self.types = _table(config.type_vocab, E, std)
        self.norm = nn.LayerNorm(E, eps=config.eps)

    def forward(
        self,
        ids: Tensor,  # [B, L] or [T]
        type_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
    ) -> Tensor:  # [.., E]
        dropout, rng = _dropout_now(self, ids, rng)
        tables = (self.words, self.positions, self.types, self.norm.weight, self.norm.bias)
        return self.ops.embed(
            ids,
            type_ids,
            None,  # positions: each token's place in its sequence
            *tables,
            eps=self.norm.eps,
            dropout=dropout,
            rng=rng,
            stream=stream,
            cu_seqlens=cu_seqlens,
        )


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
        self.qkv = _dense(W, 3 * W, std)  # rows: query, key, value
        self.out = _dense(W, W, std)
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
        self.dense_in = _dense(config.hidden, config.ffn, config.initializer)
        self.dense_out = _dense(config.ffn, config.hidden, config.initializer)
        self.norm = AddNorm(config, ops)

    def forward(self, x: Tensor, rng: Tensor | None = None, stream: int = FIRST_STREAM) -> Tensor:
        h = self.ops.bias_gelu(F.linear(x, self.dense_in.weight), self.dense_in.bias)  # [.., F]
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
            self.project = _dense(config.embedding, config.hidden)
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
    ) -> Tensor:  # [.., W]
        _, rng = _dropout_now(self, ids, rng)
        x = self.embedding(ids, type_ids, cu_seqlens=cu_seqlens, rng=rng, stream=stream)  # [.., E]
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
        return x

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
        self.dense = _dense(config.hidden, config.embedding, config.initializer)
        self.norm = nn.LayerNorm(config.embedding, eps=config.eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self,
        x: Tensor,  # [M, W] the encoder's output at the masked positions
        table: Tensor,  # [V, E]
        targets: Tensor,  # [M]
        weights: Tensor,  # [M]
        rng: Tensor,
    ) -> MLMHead:
        """Return the loss at the masked positions and a sample for each of them."""
        return self.ops.mlm_head(
            self.transform(x),
            table,
            self.bias,
            targets,
            weights,
            rng,
            temperature=self.temperature,
            disallow_correct=self.disallow_correct,
        )

    def logits(self, x: Tensor, table: Tensor) -> Tensor:
        """Return all logits, ``[.., W]`` to ``[.., V]``: for looking at, not for training."""
        return F.linear(self.transform(x), table, self.bias)

    def transform(self, x: Tensor) -> Tensor:  # [.., W] -> [.., E]
        h = self.ops.bias_gelu(F.linear(x, self.dense.weight), self.dense.bias)
        return self.ops.add_norm(h, None, self.norm.weight, self.norm.bias, eps=self.norm.eps)


class DiscriminatorHead(nn.Module):
    """``gelu(x W + b) w + c``: one logit a token, positive where it looks replaced."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.dense = _dense(config.hidden, config.hidden, config.initializer)
        self.score = _dense(config.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:  # [.., W] -> [..]
        h = self.ops.bias_gelu(F.linear(x, self.dense.weight), self.dense.bias)
        return self.score(h).squeeze(-1)
