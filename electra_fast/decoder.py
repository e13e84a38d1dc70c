"""A decoder, and the model of an encoder and a decoder that reads one text and writes another.

The layers are BERT's with cross-attention, as transformers' ElectraLayer with ``add_cross_attention``. Both
towers have the sizes of one `ElectraConfig`, so they can start from one discriminator (Rothe, Narayan and
Severyn 2020, "Leveraging Pre-trained Checkpoints for Sequence Generation Tasks", there BERT2BERT).

Source and target are batches of their own, each padded or both packed, with a `Layout` each.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.generators import Generator, GeneratorHead
from electra_fast.modules import (
    FIRST_STREAM,
    UNPADDED,
    AddNorm,
    Encoder,
    FeedForward,
    Layout,
    SelfAttention,
    Tower,
    check_layout,
    dropout_now,
    make_linear,
)
from electra_fast.ops import FUSED, Ops
from electra_fast.pretrained import (
    DECODER_FIXED,
    ENCODER_DECODER,
    TIED_TABLE,
    WORD_TABLE,
    PretrainedHalf,
    config_to_hugging_face,
    read_folder,
)
from electra_fast.reference import Embedded, MLMHead

IGNORE = -100  # the label of a token without a loss
ELECTRA = "electra."  # begins the names of a tower's tensors in a file of transformers


class CrossAttention(nn.Module):
    """``LayerNorm(x + dropout(attention(x, states) W + b))``; streams: attention probabilities, output.

    The tokens of a target attend to the encoder's states of their source.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.ops = ops
        self.heads = config.heads
        self.dropout = config.dropout
        W, std = config.hidden, config.initializer
        self.query = make_linear(ops, W, W, std)
        self.key_value = make_linear(ops, W, 2 * W, std)  # rows: key, value
        self.out = make_linear(ops, W, W, std)
        self.norm = AddNorm(config, ops)

    def forward(
        self,
        x: Tensor,  # [B, L, W] or [T, W]
        states: Tensor,  # [B, S, W] or [S, W]
        layout: Layout = UNPADDED,  # of x; its key_mask is not read
        source: Layout = UNPADDED,  # of the states
        *,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
    ) -> Tensor:
        check_layout(self, layout)
        check_layout(self, source)
        dropout, rng = dropout_now(self, x, rng)
        q = self.query(x).unflatten(-1, (self.heads, -1))  # [.., H, D]
        k, v = self.key_value(states).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        context = self.ops.attention(
            q,
            k,
            v,
            key_mask=source.key_mask,
            cu_seqlens=layout.cu_seqlens,
            max_seqlen=layout.max_seqlen,
            dropout=dropout,
            rng=rng,
            stream=stream,
            cu_seqlens_k=source.cu_seqlens,
            max_seqlen_k=source.max_seqlen,
        )
        return self.norm(self.out(context.flatten(-2)), x, rng, stream + 1)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention, feed-forward, each with its LayerNorm; it uses five streams."""

    STREAMS: ClassVar[int] = 5

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.dropout = config.dropout
        self.attention = SelfAttention(config, ops, causal=True)
        self.cross_attention = CrossAttention(config, ops)
        self.feed_forward = FeedForward(config, ops)

    def forward(
        self,
        x: Tensor,  # [B, L, W] or [T, W]
        states: Tensor,  # [B, S, W] or [S, W]
        layout: Layout = UNPADDED,
        source: Layout = UNPADDED,
        *,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
    ) -> Tensor:
        _, rng = dropout_now(self, x, rng)
        x = self.attention(x, layout, rng=rng, stream=stream)
        x = self.cross_attention(x, states, layout, source, rng=rng, stream=stream + 2)
        return self.feed_forward(x, rng, stream + 4)


class Decoder(Tower):
    """A tower whose layers read a source too, with the head of a language model.

    A token sees the tokens before it and the whole source. The softmax has the word table of the embedding.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__(config, ops)
        self.layers = nn.ModuleList(DecoderLayer(config, ops) for _ in range(config.layers))
        self.head = GeneratorHead(config, ops)

    def forward(
        self,
        ids: Tensor,  # [B, L] or [T]
        states: Tensor,  # [B, S, W] or [S, W]
        layout: Layout = UNPADDED,
        source: Layout = UNPADDED,
        *,
        rng: Tensor | None = None,
        stream: int = FIRST_STREAM,
    ) -> Embedded:
        """Return what the head reads at every token, ``[.., E]``, and the word table for the softmax."""
        check_layout(self, layout)
        _, rng = dropout_now(self, ids, rng)
        x, words = self.embed(ids, layout, rng=rng, stream=stream)
        for i, layer in enumerate(self.layers):
            x = layer(x, states, layout, source, rng=rng, stream=stream + 1 + DecoderLayer.STREAMS * i)
        return Embedded(self.head.transform(x), words)


class Sequences(NamedTuple):
    """A batch of sources or of targets."""

    ids: Tensor  # [B, L] or [T]
    layout: Layout = UNPADDED


class EncoderDecoder(PretrainedHalf):
    """An encoder that reads a source, and a decoder that writes a target.

    Its state dict, logits and folders are those of transformers' ``EncoderDecoderModel`` with an
    ``ElectraModel`` and an ``ElectraForCausalLM``. A target begins with [CLS] and ends with [SEP]. Each half
    has its own embedding, as in transformers 5, which cannot tie them.
    """

    hugging_face_class: ClassVar[str] = "EncoderDecoderModel"
    model_type: ClassVar[str] = ENCODER_DECODER
    head_names: ClassVar[dict[str, str]] = {
        ".cross_attention.query.": ".crossattention.self.query.",
        ".cross_attention.key_value.": ".crossattention.self.{key,value}.",
        ".cross_attention.out.": ".crossattention.output.dense.",
        ".cross_attention.norm.": ".crossattention.output.LayerNorm.",
    } | Generator.head_names
    tied: ClassVar[dict[str, str]] = {f"decoder.{TIED_TABLE}": f"decoder.{WORD_TABLE}"}

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.stream = FIRST_STREAM + Encoder.streams(config)  # of the decoder's dropout
        self.encoder = Encoder(config, ops)
        self.decoder = Decoder(config, ops)

    def forward(
        self, source: Sequences, target: Sequences, labels: Tensor, *, rng: Tensor | None = None
    ) -> Tensor:
        """Return the mean of -log p(label) over the labels, float32 ``[]``. No logits are stored.

        Args:
            source: the texts to read, with [CLS] and [SEP].
            target: the tokens that the decoder reads: [CLS] and the text.
            labels: int64, shape of the target's ids, the token after each: the text and [SEP]. `IGNORE`: no
                loss. The result is 0 if all are ignored.
            rng: int64 ``[2]`` = (seed, step), for dropout; None: drawn from PyTorch's default generator.
        """
        _, rng = dropout_now(self, labels, rng)
        x, table = self._states(source, target, rng)
        return self._predict(x, table, labels).loss

    def log_probs(self, source: Sequences, target: Sequences, labels: Tensor) -> Tensor:
        """Return log p(label), float32, shape of labels; 0 where there is no label, without a gradient."""
        with torch.no_grad():
            x, table = self._states(source, target, None)
            lse = self._predict(x, table, labels).lse
            found = self.decoder.head.log_q(x.flatten(0, -2), table, labels.flatten().clamp(min=0), lse)
            return found.masked_fill(labels.flatten() == IGNORE, 0).view_as(labels)

    def logits(self, source: Sequences, target: Sequences) -> Tensor:
        """Return the logits of every token at every position, ``[.., V]``, for inspection."""
        x, table = self._states(source, target, None)
        return F.linear(x, table, self.decoder.head.bias)

    def _states(self, source: Sequences, target: Sequences, rng: Tensor | None) -> Embedded:
        states = self.encoder(*source, rng=rng)
        return self.decoder(target.ids, states, target.layout, source.layout, rng=rng, stream=self.stream)

    def _predict(self, x: Tensor, table: Tensor, labels: Tensor) -> MLMHead:
        flat, weights = labels.flatten(), (labels != IGNORE).flatten().float()
        unused = torch.zeros(2, dtype=torch.long, device=labels.device)  # the seed of a sample
        return self.decoder.head.predict(x.flatten(0, -2), table, flat, weights, unused)

    def hugging_face_names(self, name: str) -> list[str]:
        half, _, rest = name.partition(".")
        if half == "encoder":
            return [f"encoder.{found.removeprefix(ELECTRA)}" for found in super().hugging_face_names(name)]
        # In transformers the decoder's tower has the names of an encoder.
        rest = rest if rest.startswith("head.") else f"encoder.{rest}"
        return [f"decoder.{found}" for found in super().hugging_face_names(rest)]

    def described(self) -> dict[str, Any]:
        tower = config_to_hugging_face(self.config)
        halves = {
            "encoder": {"architectures": ["ElectraModel"]} | tower,
            "decoder": {"architectures": ["ElectraForCausalLM"]} | tower | DECODER_FIXED,
        }
        about = {"architectures": [self.hugging_face_class], "model_type": self.model_type}
        fixed = {"is_encoder_decoder": True, "tie_word_embeddings": False}
        return about | halves | fixed | {"vocab_size": self.config.vocab_size} | self._special_ids()

    def configs(self) -> dict[str, dict[str, Any]]:
        return super().configs() | {"generation_config.json": self._special_ids()}

    def _special_ids(self) -> dict[str, int]:
        """Return the entries that generation reads: where a target begins and ends."""
        config = self.config
        ends = {"decoder_start_token_id": config.cls_id, "eos_token_id": config.sep_id}
        return ends | {"bos_token_id": config.cls_id, "pad_token_id": config.pad_id}

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.state_dict().items() if name not in self.tied}

    @classmethod
    def on_discriminator(cls, folder: str | Path, **changes: Any) -> Self:
        """Return a model whose halves start from the discriminator in a Hugging Face folder.

        Both towers are its encoder. Cross-attention and the decoder's head are new, from PyTorch's default
        generator, as in the paper. Cross-attention with the weights of self-attention learned as fast.

        Args:
            folder: an ELECTRA with any head.
            changes: fields of the config: ``dropout=0.0``.

        Raises:
            FileNotFoundError, ValueError: the folder cannot be read, or is not an ELECTRA with all weights.
        """
        _, config, tensors = read_folder(folder)
        model = cls(dataclasses.replace(config, **changes))
        state = model.state_dict()
        for name in state:
            started = _name_in_discriminator(name)
            if started is None:
                continue
            if started not in tensors or tensors[started].shape != state[name].shape:
                rule, got = "have the encoder of an ELECTRA", f"{folder} without a fitting {started}"
                raise ValueError(must("finetune: --model", rule, got))
            state[name] = tensors[started]
        model.load_state_dict(state)
        return model


def _name_in_discriminator(name: str) -> str | None:
    """Return the tensor of a discriminator from which a tensor of an `EncoderDecoder` starts, None: new."""
    half, _, rest = name.partition(".")
    if half == "encoder":
        return ELECTRA + rest
    if rest == TIED_TABLE:
        return WORD_TABLE
    return rest if rest.startswith(ELECTRA) and ".crossattention." not in rest else None
