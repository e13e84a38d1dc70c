"""The discriminator with a head for a task, with the state dicts of transformers.

Each class has the state dict of the class of transformers that it names, so folders can be exchanged. The
heads are those of transformers. The published code of the paper has no dense layer between [CLS] and the
scores of a class, and a larger head for answers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.linear import Linear
from electra_fast.modules import FIRST_STREAM, Encoder, Layout, draw_rng, make_linear
from electra_fast.ops import FUSED, Ops
from electra_fast.philox import drop
from electra_fast.pretrained import PretrainedHalf, read_folder

NO_LABELS = ("LABEL_0", "LABEL_1")  # transformers' default, for heads without classes
ENCODER = "electra."  # begins the names of the encoder's tensors


class Dropout(nn.Module):
    """Dropout as a function of (seed, step); it uses one stream."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, rng: Tensor | None, stream: int) -> Tensor:
        return drop(x, self.p, rng, stream).to(x.dtype) if self.training else x


class ClassifierHead(nn.Module):
    """``dropout(gelu(dropout(x) W + b)) V + c``, the head of a whole sequence; it uses two streams."""

    def __init__(self, config: ElectraConfig, outputs: int, ops: Ops):
        super().__init__()
        self.ops = ops
        self.dropout = Dropout(config.dropout)
        self.dense = make_linear(ops, config.hidden, config.hidden)
        self.out = make_linear(ops, config.hidden, outputs)

    def forward(self, x: Tensor, rng: Tensor | None, stream: int) -> Tensor:  # [S, W] -> [S, C]
        h = self.dense(self.dropout(x, rng, stream), with_bias=False)
        h = self.ops.bias_gelu(h, self.dense.bias)
        return scores(self.out, self.dropout(h, rng, stream + 1))


def scores(layer: Linear, x: Tensor) -> Tensor:
    """Return the layer's output, computed in the dtype of its weights under autocast too.

    In bfloat16 many scores are equal to others, and metrics of ranking and correlation depend on their order.
    """
    if x.is_meta:  # "meta" has no autocast state
        return layer(x)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))


class TaskHead(PretrainedHalf):
    """An encoder with a head.

    Args:
        config: the sizes.
        labels: the names of the outputs, for config.json.
        problem: transformers' ``problem_type``: ``single_label_classification``,
            ``multi_label_classification`` or ``regression``; None for other tasks.
        ops: the implementation.
    """

    only_first: ClassVar[bool] = False  # whether the head reads the first token of each sequence only, [CLS]
    # For each layer with one row per label, by transformers' name: the attribute with the labels.
    outputs: ClassVar[dict[str, str]]

    def __init__(
        self, config: ElectraConfig, labels: Sequence[str], problem: str | None = None, ops: Ops = FUSED
    ):
        super().__init__()
        self.config, self.labels, self.problem = config, tuple(labels), problem
        self.stream = FIRST_STREAM + Encoder.streams(config)  # of the head's dropout
        self.encoder = Encoder(config, ops)
        self.make_head(config, ops)

    def make_head(self, config: ElectraConfig, ops: Ops) -> None:
        """Create the modules of the head."""
        raise NotImplementedError

    def head(self, x: Tensor, layout: Layout, rng: Tensor | None) -> Any:
        """Return the logits for the encoder's output x: ``[S, W]`` with `only_first`, else of all tokens."""
        raise NotImplementedError

    def forward(
        self,
        ids: Tensor,
        *,
        type_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
    ) -> Any:
        """Return the logits: one row per sequence, ``[S, C]``, or per token, ``[T, C]`` or ``[B, L, C]``.

        Arguments as in `Electra`. A packed batch may end with empty sequences, whose rows are arbitrary.
        """
        if self.training and rng is None:
            rng = draw_rng(ids)
        layout = Layout(key_mask, cu_seqlens, max_seqlen)
        rows = first_tokens(ids, layout) if self.only_first else None
        x = self.encoder(ids, layout, type_ids=type_ids, rng=rng, rows=rows)
        return self.head(x, layout, rng)

    def described(self) -> dict[str, Any]:
        names = {
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }
        return super().described() | names | ({"problem_type": self.problem} if self.problem else {})

    @classmethod
    def build(cls, described: dict[str, Any], config: ElectraConfig, ops: Ops) -> Self:
        return cls(config, labels_of(described), described.get("problem_type"), ops)

    def copy_head(self, folder: str | Path) -> int:
        """Copy the head of a fine-tuned folder: its inner layer, and the rows of the labels that both have.

        Returns the number of these labels.

        Raises:
            FileNotFoundError, ValueError: the folder cannot be read, or its head is of another class or size.
        """
        rule = f"have the head of {type(self).__name__} for hidden_size {self.config.hidden}"
        try:
            other = type(self).from_pretrained(folder)
        except RuntimeError:
            got = f"{folder}, whose weights do not fit"
            raise ValueError(must("finetune: --init-head", rule, got)) from None
        if other.config.hidden != self.config.hidden:
            got = f"{folder} with {other.config.hidden}"
            raise ValueError(must("finetune: --init-head", rule, got))
        theirs = other.state_dict()
        for name, new in self.state_dict().items():  # these tensors share the memory of the parameters
            labels = self.outputs.get(name.rpartition(".")[0])
            if labels is not None:
                copy_rows(new, theirs[name], getattr(self, labels), getattr(other, labels))
            elif not name.startswith(ENCODER):
                new.copy_(theirs[name])
        return len(set(self.labels) & set(other.labels))


def copy_rows(new: Tensor, old: Tensor, new_labels: Sequence[str], old_labels: Sequence[str]) -> None:
    """Copy the rows of the labels that both have."""
    row = {label: i for i, label in enumerate(old_labels)}
    for i, label in enumerate(new_labels):
        if label in row:
            new[i] = old[row[label]]


def on_encoder(folder: str | Path, make: Callable[[ElectraConfig], TaskHead], **changes: Any) -> TaskHead:
    """Return the model of `make` with the encoder of a Hugging Face folder.

    Its head is that of the folder if it has one for the same labels, otherwise a new one with Glorot-uniform
    weights from PyTorch's default generator.

    Args:
        folder: an ELECTRA with any head.
        make: returns a new model for the sizes of the folder.
        changes: fields of the config: ``dropout=0.0``.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be read, or is not an ELECTRA with all weights.
    """
    described, config, tensors = read_folder(folder)
    model = make(dataclasses.replace(config, **changes))
    state = model.state_dict()
    found = {n: t for n, t in tensors.items() if n in state and t.shape == state[n].shape}
    encoder = {name for name in state if name.startswith(ENCODER)}
    if missing := sorted(encoder - found.keys()):
        rule, got = "have the encoder of an ELECTRA", f"{folder} without a fitting {missing[0]}"
        raise ValueError(must("finetune: --model", rule, got))
    same_slots = described.get("slot_labels") == model.described().get("slot_labels")
    same_labels = labels_of(described) == model.labels and same_slots
    if not (same_labels and found.keys() == state.keys()):
        found = {name: found[name] for name in encoder}
    model.load_state_dict(state | found)
    return model


def labels_of(described: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the outputs in a config.json; transformers leaves out its default, two labels.

    Raises:
        ValueError: id2label does not number its labels from 0 on.
    """
    labels = described.get("id2label") or dict(zip("01", NO_LABELS, strict=True))
    if not isinstance(labels, dict) or labels.keys() != {str(i) for i in range(len(labels))}:
        rule = 'be an object with the keys "0", "1" and so on'
        raise ValueError(must("from_pretrained: id2label in config.json", rule, labels))
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


def first_tokens(ids: Tensor, layout: Layout) -> Tensor:
    """Return the offset of the first token of each sequence, [CLS], in the flattened ids: int64 ``[S]``."""
    if layout.cu_seqlens is None:
        return torch.arange(0, ids.numel(), ids.shape[-1], device=ids.device)
    # An empty sequence at the end of a batch begins after the last token.
    return layout.cu_seqlens[:-1].long().clamp(max=len(ids) - 1)


class SequenceClassifier(TaskHead):
    """One row of scores per text, as ``ElectraForSequenceClassification``."""

    hugging_face_class: ClassVar[str] = "ElectraForSequenceClassification"
    head_names: ClassVar[dict[str, str]] = {"classifier.out.": "classifier.out_proj."}
    outputs: ClassVar[dict[str, str]] = {"classifier.out_proj": "labels"}
    only_first = True

    def make_head(self, config: ElectraConfig, ops: Ops) -> None:
        self.classifier = ClassifierHead(config, len(self.labels), ops)

    def head(self, x: Tensor, layout: Layout, rng: Tensor | None) -> Any:
        return self.classifier(x, rng, self.stream)


class TokenClassifier(TaskHead):
    """One row of scores per token, as ``ElectraForTokenClassification``."""

    hugging_face_class: ClassVar[str] = "ElectraForTokenClassification"
    head_names: ClassVar[dict[str, str]] = {}
    outputs: ClassVar[dict[str, str]] = {"classifier": "labels"}

    def make_head(self, config: ElectraConfig, ops: Ops) -> None:
        self.dropout = Dropout(config.dropout)
        self.classifier = make_linear(ops, config.hidden, len(self.labels))

    def head(self, x: Tensor, layout: Layout, rng: Tensor | None) -> Tensor:
        return scores(self.classifier, self.dropout(x, rng, self.stream))


class QuestionAnswerer(TaskHead):
    """The scores of each token as start and as end of an answer, as ``ElectraForQuestionAnswering``."""

    hugging_face_class: ClassVar[str] = "ElectraForQuestionAnswering"
    head_names: ClassVar[dict[str, str]] = {"spans.": "qa_outputs."}
    outputs: ClassVar[dict[str, str]] = {}
    some_unanswered = False  # whether it has learned to leave questions without an answer, as in SQuAD 2.0

    def make_head(self, config: ElectraConfig, ops: Ops) -> None:
        self.spans = make_linear(ops, config.hidden, 2)

    def head(self, x: Tensor, layout: Layout, rng: Tensor | None) -> Tensor:
        return scores(self.spans, x)

    def described(self) -> dict[str, Any]:
        return super().described() | {"some_unanswered": self.some_unanswered}

    @classmethod
    def build(cls, described: dict[str, Any], config: ElectraConfig, ops: Ops) -> Self:
        head = super().build(described, config, ops)
        head.some_unanswered = described.get("some_unanswered", False)
        return head


class MultipleChoice(TaskHead):
    """One score per option, as ``ElectraForMultipleChoice``: ``dropout(gelu(x W + b)) v + c``."""

    hugging_face_class: ClassVar[str] = "ElectraForMultipleChoice"
    head_names: ClassVar[dict[str, str]] = {"summary.": "sequence_summary.summary.", "score.": "classifier."}
    outputs: ClassVar[dict[str, str]] = {}
    only_first = True

    def make_head(self, config: ElectraConfig, ops: Ops) -> None:
        self.ops = ops
        self.dropout = Dropout(config.dropout)
        self.summary = make_linear(ops, config.hidden, config.hidden)
        self.score = make_linear(ops, config.hidden, 1)

    def head(self, x: Tensor, layout: Layout, rng: Tensor | None) -> Tensor:  # [S]
        h = self.ops.bias_gelu(self.summary(x, with_bias=False), self.summary.bias)
        return scores(self.score, self.dropout(h, rng, self.stream)).squeeze(-1)

    def described(self) -> dict[str, Any]:
        return super().described() | {"summary_last_dropout": self.config.dropout}


class IntentLogits(NamedTuple):
    intents: Tensor  # [S, C]
    slots: Tensor  # [T, K] or [B, L, K]


class IntentClassifier(TaskHead):
    """One intent per utterance and one slot tag per token.

    transformers loads it as ElectraForSequenceClassification, without the scores of the slots. The folder
    slots/ in its folder is an ElectraForTokenClassification.
    """

    hugging_face_class: ClassVar[str] = "ElectraForSequenceClassification"
    head_names: ClassVar[dict[str, str]] = SequenceClassifier.head_names
    outputs: ClassVar[dict[str, str]] = {"classifier.out_proj": "labels", "slot_classifier": "slot_labels"}

    def __init__(
        self, config: ElectraConfig, labels: Sequence[str], slot_labels: Sequence[str], ops: Ops = FUSED
    ):
        self.slot_labels = tuple(slot_labels)
        super().__init__(config, labels, "single_label_classification", ops)

    def make_head(self, config: ElectraConfig, ops: Ops) -> None:
        self.classifier = ClassifierHead(config, len(self.labels), ops)
        self.slot_dropout = Dropout(config.dropout)
        self.slot_classifier = make_linear(ops, config.hidden, len(self.slot_labels))

    def head(self, x: Tensor, layout: Layout, rng: Tensor | None) -> IntentLogits:
        first = x.flatten(0, -2).index_select(0, first_tokens(x[..., 0], layout))
        intents = self.classifier(first, rng, self.stream)
        return IntentLogits(intents, scores(self.slot_classifier, self.slot_dropout(x, rng, self.stream + 2)))

    def described(self) -> dict[str, Any]:
        return super().described() | {"slot_labels": list(self.slot_labels)}

    @classmethod
    def build(cls, described: dict[str, Any], config: ElectraConfig, ops: Ops) -> Self:
        if "slot_labels" not in described:
            rule, got = "have slot_labels", "a config.json without them"
            raise ValueError(must("from_pretrained: an IntentClassifier", rule, got))
        return cls(config, labels_of(described), described["slot_labels"], ops)

    def save_pretrained(self, folder: str | Path) -> None:
        super().save_pretrained(folder)
        self.slot_tagger().save_pretrained(Path(folder) / "slots")

    def slot_tagger(self) -> TokenClassifier:
        """Return a TokenClassifier with the encoder and the slots of this model, for transformers."""
        with torch.device("meta"):  # without random weights, because all of them are those of this model
            tagger = TokenClassifier(self.config, self.slot_labels)
        tagger.encoder, tagger.classifier = self.encoder, self.slot_classifier
        return tagger.train(self.training)
