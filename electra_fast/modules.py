"""The layers of ELECTRA as thin modules: the parameters, and one call of an op per fused step.

A module reads the sizes of one tower from an `ElectraConfig`: `layers`, `hidden`, `heads`, `ffn`. The
generator's modules get ``config.for_generator()``. Tokens are padded, ``[B, L]``, or packed, ``[T]``; a
`Layout` describes the batch.

Dropout is a function of ``rng`` = (seed, step) and of a stream number, which differs between the uses of
dropout. A module passes consecutive numbers, from its argument ``stream`` on, to the modules that it
contains. In training without ``rng`` the outermost module draws one from PyTorch's default generator.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from electra_fast import inference
from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.linear import Linear
from electra_fast.ops import FUSED, Ops
from electra_fast.ops import _check as check
from electra_fast.ops.attention import check_options
from electra_fast.reference import Embedded
from electra_fast.resize import TokenRows

FIRST_STREAM = 2  # of dropout; streams 0 and 1 are those of masking and sampling
AMPLITUDE = 0.125  # of `sinusoids`


class Layout(NamedTuple):
    """How the tokens of a batch form sequences. Padded: `key_mask`; packed: `cu_seqlens` and `max_seqlen`."""

    key_mask: Tensor | None = None  # bool [B, L], True = real; None: every token is
    cu_seqlens: Tensor | None = None  # int32 [B + 1], from 0 to T
    max_seqlen: int | None = None  # the longest sequence, or more


UNPADDED = Layout()  # [B, L], every token is real


def check_layout(module: nn.Module, layout: Layout) -> None:
    if not isinstance(layout, Layout):
        subject, remedy = f"{type(module).__name__}: layout", "pass Layout(key_mask=…)"
        raise TypeError(must(subject, "be a Layout", type(layout).__name__, remedy))


def draw_rng(like: Tensor) -> Tensor:
    """Return (seed, step), int64 ``[2]`` on the device of `like`, from PyTorch's default generator."""
    return torch.randint(2**32, (2,), device=like.device)


def dropout_now(module: nn.Module, x: Tensor, rng: Tensor | None) -> tuple[float, Tensor | None]:
    """Return the probability of dropout in this call, and an rng if it needs one."""
    if not module.training or module.dropout == 0.0:
        return 0.0, rng
    return module.dropout, draw_rng(x) if rng is None else rng


def _truncated_normal(tensor: Tensor, std: float) -> Tensor:
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def _table(rows: int, columns: int, std: float) -> nn.Parameter:
    return nn.Parameter(_truncated_normal(torch.empty(rows, columns), std))


def sinusoids(rows: int, columns: int) -> Tensor:
    """Return waves over the positions, float32 ``[rows, columns]``, for ``initial_attention="local"``.

    As in Vaswani et al. 2017, section 3.5, a shift by one position is the same rotation everywhere, so what
    attention learns about a neighbour at one position is true at all others. The wavelengths are between 2 pi
    and 2 pi `rows`. The word vectors begin smaller than these waves and grow to about their size.
    """
    positions = torch.arange(rows, dtype=torch.float32)[:, None]
    pairs = torch.arange(0, columns, 2, dtype=torch.float32)
    angles = positions * rows ** (-pairs / columns)  # [rows, ceil(columns / 2)]
    return AMPLITUDE * torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :columns].contiguous()


def make_linear(ops: Ops, inputs: int, outputs: int, std: float | None = None) -> Linear:
    """Return a linear layer with bias 0 and truncated-normal weights, Glorot-uniform if `std` is None."""
    linear = Linear(inputs, outputs, ops)
    if std is None:
        nn.init.xavier_uniform_(linear.weight)
    else:
        _truncated_normal(linear.weight, std)
    nn.init.zeros_(linear.bias)
    return linear


class SharedEmbedding(nn.Module):
    """``dropout(LayerNorm(word[id] + position[position id] + type[type_id]))``, one for both towers.

    The word table has three uses: the lookup of each tower and the generator's softmax. Each use passes the
    table on to the next, as `words`. In the backward pass the gradient returns on the same way and is added
    to at each use, which saves two gradients of the table's size and their additions.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.dropout = config.dropout
        self.initializer = config.initializer
        E, std = config.embedding, config.initializer
        self.words = _table(config.vocab_size, E, std)
        self.positions = _table(config.max_positions, E, std)
        if config.initial_attention == "local":
            self.positions = nn.Parameter(sinusoids(config.max_positions, E))
        self.types = _table(config.type_vocab, E, std)
        self.norm = nn.LayerNorm(E, eps=config.eps)

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables of words ``[V, E]``, positions ``[max_positions, E]`` and types."""
        return self.words, self.positions, self.types

    def token_rows(self) -> list[TokenRows]:
        """Return the parameters with one row per token, for `resize`."""
        return [TokenRows(self.words, lambda new: _truncated_normal(new, self.initializer))]

    def forward(
        self,
        ids: Tensor,  # [B, L] or [T]
        type_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
        words: Tensor | None = None,  # the word table as its last use returned it
        return_words: bool = False,
    ) -> Tensor | Embedded:  # [.., E]; with `return_words` also the table, for its next use
        dropout, rng = dropout_now(self, ids, rng)
        own, positions, types = self.tables()
        return self.ops.embed(
            ids,
            type_ids,
            None,  # position ids: 0, 1, … in each sequence
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
    """The discriminator's embedding in gradient-disentangled sharing: stop_gradient(shared) + difference.

    The tables are those of the generator plus a difference. It starts at 0 and is trained by the
    discriminator's loss, which does not change the generator's tables (GDES: He, Gao & Chen 2021, DeBERTaV3,
    section 3.3). The LayerNorm is a separate one. Each call adds two word tables, which moves three times
    their size.
    """

    NAMES = ("words", "positions", "types")

    def __init__(self, shared: SharedEmbedding, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config, ops)
        own = {name: torch.zeros_like(self._parameters.pop(name)) for name in self.NAMES}
        self.difference = nn.ParameterDict(own)
        self._shared = (shared,)  # in a tuple, so that its parameters are the generator's only

    @property
    def shared(self) -> SharedEmbedding:
        return self._shared[0]

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        shared = zip(self.NAMES, self.shared.tables(), strict=True)
        return tuple(table.detach() + self.difference[name] for name, table in shared)

    def token_rows(self) -> list[TokenRows]:
        return [TokenRows(self.difference["words"], Tensor.zero_)]


class AddNorm(nn.LayerNorm):
    """``LayerNorm(residual + dropout(x))``; it uses one stream."""

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
        dropout, rng = dropout_now(self, x, rng)
        return self.ops.add_norm(
            x, residual, self.weight, self.bias, eps=self.eps, dropout=dropout, rng=rng, stream=stream
        )


class SelfAttention(nn.Module):
    """``LayerNorm(x + dropout(attention(x) W + b))``; streams: attention probabilities, output.

    With `causal`, a token sees no later token of its sequence. With ``initial_attention="local"`` the weights
    of keys initially equal those of queries, so ``q_i . k_j`` is largest for similar tokens and positions.
    The standard deviation is then 0.5 / sqrt(W), which is about the paper's 0.02 at the width of base.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED, causal: bool = False):
        super().__init__()
        self.ops = ops
        self.causal = causal
        self.heads = config.heads
        self.dropout = config.dropout
        local = config.initial_attention == "local"
        W = config.hidden
        std = 0.5 * W**-0.5 if local else config.initializer
        self.qkv = make_linear(ops, W, 3 * W, std)  # rows: query, key, value
        if local:
            self.qkv.weight.data[W : 2 * W] = self.qkv.weight.data[:W]
        self.out = make_linear(ops, W, W, std)
        self.norm = AddNorm(config, ops)

    def forward(
        self,
        x: Tensor,  # [B, L, W] or [T, W]
        layout: Layout = UNPADDED,
        *,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
        rows: Tensor | None = None,  # [S], see `Encoder`
    ) -> Tensor:
        check_layout(self, layout)
        dropout, rng = dropout_now(self, x, rng)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [.., 3, H, D]
        options = {"causal": self.causal, "dropout": dropout, "rng": rng, "stream": stream}
        context = self.ops.attention_qkv(qkv, **layout._asdict(), **options).flatten(-2)  # [.., W]
        if rows is not None:
            context, x = (y.flatten(0, -2).index_select(0, rows) for y in (context, x))
        return self.norm(self.out(context), x, rng, stream + 1)


class FeedForward(nn.Module):
    """``LayerNorm(x + dropout(gelu(x W_in + b_in) W_out + b_out))``; it uses one stream."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.dense_in = make_linear(ops, config.hidden, config.ffn, config.initializer)
        self.dense_out = make_linear(ops, config.ffn, config.hidden, config.initializer)
        self.norm = AddNorm(config, ops)

    def forward(self, x: Tensor, rng: Tensor | None = None, stream: int = FIRST_STREAM) -> Tensor:
        h = self.ops.bias_gelu(self.dense_in(x, with_bias=False), self.dense_in.bias)  # [.., F]
        return self.norm(self.dense_out(h), x, rng, stream)


class EncoderLayer(nn.Module):
    """One post-LayerNorm transformer layer: self-attention, then feed-forward; it uses three streams.

    In eval mode, without gradients and on a CPU, it is one operator with packed weights, unless it is causal.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED, causal: bool = False):
        super().__init__()
        self.dropout = config.dropout
        self.attention = SelfAttention(config, ops, causal)
        self.feed_forward = FeedForward(config, ops)

    def forward(
        self,
        x: Tensor,  # [B, L, W] or [T, W]
        layout: Layout = UNPADDED,
        *,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
        int8: bool = False,  # see `Encoder`
        rows: Tensor | None = None,  # [S], see `Encoder`
    ) -> Tensor:
        why = inference.why_not(self, x) or self._parts().why_not(Linear, AddNorm)
        why = why or ("its attention is causal" if self.attention.causal else None)
        # For a few rows, two products of the operator would be wasted; in int8 it is faster nevertheless.
        if not why and self.attention.ops == FUSED and (rows is None or int8):
            x = self._infer(x, layout, int8)
            return x if rows is None else x.flatten(0, -2).index_select(0, rows)
        inference.check_int8(self, int8, why or "its ops are not FUSED")
        _, rng = dropout_now(self, x, rng)
        x = self.attention(x, layout, rng=rng, stream=stream, rows=rows)
        return self.feed_forward(x, rng, stream + 2)

    def _parts(self) -> inference.Parts:
        attention, feed_forward = self.attention, self.feed_forward
        linears = (attention.qkv, attention.out, feed_forward.dense_in, feed_forward.dense_out)
        norms = (attention.norm, feed_forward.norm)
        return inference.Parts((attention, feed_forward), tuple((linear,) for linear in linears), norms)

    def _infer(self, x: Tensor, layout: Layout, int8: bool) -> Tensor:
        check_layout(self, layout)
        max_seqlen = check_options("attention_qkv", x, 1, *layout, None, 0.0, None, 0)
        key_mask, cu_seqlens = check.contiguous(*layout[:2])
        heads = self.attention.heads
        scale = (x.shape[-1] // heads) ** -0.5
        return inference.run(self, self._parts(), x, key_mask, cu_seqlens, max_seqlen, heads, scale, int8)


class Tower(nn.Module):
    """What each tower begins with: the embedding, and a projection to its width if that differs."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.dropout = config.dropout
        self.embedding = SharedEmbedding(config, ops)
        self.project = None
        if config.embedding != config.hidden:
            self.project = make_linear(ops, config.embedding, config.hidden)

    def embed(
        self, ids: Tensor, layout: Layout, type_ids: Tensor | None = None, **options: Any
    ) -> Embedded:  # [.., W] and the word table
        """Return what the first layer reads; `options` are those of `SharedEmbedding`."""
        x, words = self.embedding(ids, type_ids, cu_seqlens=layout.cu_seqlens, return_words=True, **options)
        return Embedded(x if self.project is None else self.project(x), words)


class Encoder(Tower):
    """A tower whose layers read all tokens of a sequence.

    With ``encoder.int8 = True`` its layers multiply in int8 in inference on a CPU (eval mode, no gradients).
    The parameters stay in float and are used in all other calls.
    """

    int8 = False

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config, ops)
        self.layers = nn.ModuleList(EncoderLayer(config, ops) for _ in range(config.layers))

    def forward(
        self,
        ids: Tensor,  # [B, L] or [T]
        layout: Layout = UNPADDED,
        *,
        type_ids: Tensor | None = None,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
        words: Tensor | None = None,
        return_words: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor | Embedded:  # [.., W]; with `return_words` also the word table
        """Return the output at every token or, with `rows`, int64 ``[S]``, at these offsets only: ``[S, W]``.

        The last layer then computes its output product and its feed-forward network for these tokens only.
        """
        check_layout(self, layout)
        _, rng = dropout_now(self, ids, rng)
        x, words = self.embed(ids, layout, type_ids, rng=rng, stream=stream, words=words)
        for i, layer in enumerate(self.layers):
            only = rows if layer is self.layers[-1] else None
            x = layer(x, layout, rng=rng, stream=stream + 1 + 3 * i, int8=self.int8, rows=only)
        return Embedded(x, words) if return_words else x

    @staticmethod
    def streams(config: ElectraConfig) -> int:
        """Return the number of streams that an encoder of these sizes uses."""
        return 1 + 3 * config.layers


class DiscriminatorHead(nn.Module):
    """``gelu(x W + b) w + c``: one logit per token, positive if it seems replaced."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.dense = make_linear(ops, config.hidden, config.hidden, config.initializer)
        self.score = make_linear(ops, config.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:  # [.., W] -> [..]
        h = self.ops.bias_gelu(self.dense(x, with_bias=False), self.dense.bias)
        return self.score(h).squeeze(-1)
