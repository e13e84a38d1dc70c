"""`patch`: fused forward passes in a model that somebody else has built, and back."""

import collections
from types import ModuleType
from typing import NamedTuple

import transformers
from torch import nn
from transformers.models.bert import modeling_bert as bert
from transformers.models.electra import modeling_electra as electra

from electra_fast.hf import blocks, heads
from electra_fast.hf.fused import Fused, fuse, unfuse
from electra_fast.ops import _register

# By name: a version of transformers that lacks one of these classes has the others.
CLASSES: dict[ModuleType, dict[str, type[Fused]]] = {
    electra: {
        "ElectraEmbeddings": blocks.Embeddings,
        "ElectraModel": blocks.Encoder,
        "ElectraSelfAttention": blocks.SelfAttention,
        "ElectraSelfOutput": blocks.AddNorm,
        "ElectraOutput": blocks.AddNorm,
        "ElectraIntermediate": blocks.BiasGELU,
        "ElectraGeneratorPredictions": heads.ElectraTransform,
        "ElectraForMaskedLM": heads.ElectraMaskedLM,
        "ElectraDiscriminatorPredictions": heads.Scores,
        "ElectraForPreTraining": heads.RTDLoss,
    },
    bert: {
        "BertEmbeddings": blocks.Embeddings,
        "BertModel": blocks.Encoder,
        "BertSelfAttention": blocks.SelfAttention,
        "BertSelfOutput": blocks.AddNorm,
        "BertOutput": blocks.AddNorm,
        "BertIntermediate": blocks.BiasGELU,
        "BertPredictionHeadTransform": heads.BertTransform,
        "BertForMaskedLM": heads.BertMaskedLM,
    },
}
BLOCKS: dict[type[nn.Module], type[Fused]] = {
    getattr(module, name): mixin
    for module, classes in CLASSES.items()
    for name, mixin in classes.items()
    if hasattr(module, name)
}

OPTIONS = ("attention", "norm", "feed_forward", "embeddings", "mlm_head", "rtd_loss")


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    norm: bool = True,
    feed_forward: bool = True,
    embeddings: bool = True,
    mlm_head: bool = True,
    rtd_loss: bool = True,
) -> "Patched":
    """Have the blocks of ELECTRA and BERT in `model`, and in no other model, run fused.

    Parameters, submodules, `state_dict` and hooks stay as they are, and so do results up to rounding, with
    these exceptions: dropout draws other masks, logits are None where `ElectraForMaskedLM` or
    `BertForMaskedLM` is trained with labels (``model(..., output_logits=True)`` has them), and a loss over
    nothing is 0 instead of NaN. A second call changes nothing.

    Where a kernel does not fit, transformers' own forward pass runs, and the table names the reason: the
    installed transformers has another class than this was written for; a submodule has an adapter, a hook or
    quantised weights; a call has a cache, `output_attentions`, or a mask that is not ``[B, L]`` or bool
    ``[B, 1, 1, L]``.

    Args:
        model: any model of transformers 5 with ELECTRA's or BERT's encoder in it, or a module that holds such
            models. Patch before torch.compile, and before accelerate prepares it.
        attention: scores, softmax, dropout and product, and the mask as it is instead of ``[B, 1, L, L]``.
        norm: dropout, residual and LayerNorm at the end of each half layer.
        feed_forward: bias and GELU.
        embeddings: the three tables, LayerNorm and dropout.
        mlm_head: the loss of a masked language model, from labelled positions alone.
        rtd_loss: the loss of `ElectraForPreTraining`, without picking tokens by a mask.

    Returns:
        Patched: its `print` says what runs fused, its `undo()` takes all back; a context manager.

    Raises:
        TypeError: nothing in `model` is known here. ValueError: it is compiled, is a decoder, or is patched
            with other options; nothing has been changed.
    """
    given = (attention, norm, feed_forward, embeddings, mlm_head, rtd_loss)
    wanted = {option for option, value in zip(OPTIONS, given, strict=True) if value}
    found = _found(model)
    for name, module in model.named_modules():
        _check(name or type(module).__name__, module, wanted)
    for module, mixin in found:
        if mixin.option in wanted and not isinstance(module, Fused) and not mixin.unknown(module):
            fuse(module, mixin)
    return Patched(model)


def _found(model: nn.Module) -> list[tuple[nn.Module, type[Fused]]]:
    """Return the modules of `model` that can be fused, or are."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"electra_fast.hf.patch: model must be a torch.nn.Module, got {type(model).__name__}")
    found = [(module, mixin) for module in model.modules() if (mixin := mixin_of(module))]
    if not found:
        raise TypeError(
            "electra_fast.hf.patch: model must have ELECTRA's or BERT's encoder of transformers, got "
            f'{type(model).__name__}; model.set_attn_implementation("electra_fast") serves other encoders'
        )
    return found


def mixin_of(module: nn.Module) -> type[Fused] | None:
    """Return what fuses a module, if its forward pass is the one that is known here."""
    if isinstance(module, Fused):
        return module.mixin
    known = (mixin for cls, mixin in BLOCKS.items() if type(module).forward is cls.forward)
    return next(known, None)


def _check(name: str, module: nn.Module, wanted: set[str]) -> None:
    """Refuse a module that makes a patch wrong or of no effect."""
    refuse = f"electra_fast.hf.patch: {name} must"
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        raise ValueError(f"{refuse} not be compiled yet, got a compiled module; patch first, then compile")
    if getattr(module, "is_decoder", False) or getattr(getattr(module, "config", None), "is_decoder", False):
        raise ValueError(
            f"{refuse} be an encoder, got is_decoder=True, which needs a cache and a causal mask"
        )
    mixin = mixin_of(module)
    if mixin and "forward" in module.__dict__:
        raise ValueError(
            f"{refuse} run its class's forward pass, got another, set on the module (as accelerate does); "
            "patch before that"
        )
    if isinstance(module, Fused) and mixin.option not in wanted:
        raise ValueError(
            f"{refuse} not be patched with other options, got {mixin.option} fused already; undo() that first"
        )


class Row(NamedTuple):
    option: str
    block: str  # the class's name, none where the model has no such block
    fused: int  # of the blocks of this class
    of: int
    by: str  # the ops that they call
    why_not: str

    def cells(self) -> tuple[str, ...]:
        count = f"{self.fused} of {self.of}" if self.of else ""
        return self.option, self.block, count, self.by, self.why_not


class Patched:
    """A patched model: what of it runs fused at this moment, and the way back.

        patched = patch(model)
        print(patched)
        patched.undo()

    or ``with patch(model): …``, which undoes it at the end.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def undo(self) -> None:
        """Give every module its own forward pass again; the model then computes what it did, to the bit.

        Raises:
            ValueError: something was put in front of a fused module since, which must go first.
        """
        fused = [(name, m) for name, m in self.model.named_modules() if isinstance(m, Fused)]
        for name, module in fused:
            if "unfused" not in vars(type(module)) or "forward" in module.__dict__:
                raise ValueError(
                    f"electra_fast.hf: undo must find {name or type(module).__name__} as patch left it, got "
                    "another forward pass or class in front (fully_shard, accelerate); take that away first"
                )
        for _, module in fused:
            unfuse(module)

    def rows(self) -> list[Row]:
        """Return the blocks by option and class, and how many of them run fused at this moment."""
        classes = collections.defaultdict(list)
        for module, mixin in _found(self.model):
            classes[mixin.option, type(module).__name__, mixin.runs].append(module)
        rows = [_row(*key, modules) for key, modules in classes.items()]
        missing = set(OPTIONS) - {row.option for row in rows}
        rows += [Row(option, "", 0, 0, "", _why_none(option)) for option in missing]
        return sorted(rows, key=lambda row: (row.of == 0, OPTIONS.index(row.option)))

    def __str__(self) -> str:
        device = next(self.model.parameters()).device.type.upper()
        cells = [("option", "class", "fused", "by", "why not"), *(row.cells() for row in self.rows())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        ops = dict.fromkeys(op for row in self.rows() if row.fused for op in row.by.split(", "))
        lines += ["", *(f"{op} on {device}: {_register.served_by(op, device)}" for op in ops)]
        return "\n".join([*lines, f"as before: {', '.join(self.others()) or 'nothing'}"])

    def others(self) -> list[str]:
        """Return the layers with parameters that belong to no known block, by name."""
        found = _found(self.model)
        known = {id(part) for m, mixin in found if mixin not in WHOLE for part in m.modules()}
        known |= {id(m.get_submodule(name)) for m, mixin in found for name, _ in mixin.parts}
        return [
            name
            for name, module in self.model.named_modules()
            if id(module) not in known and any(True for _ in module.parameters(recurse=False))
        ]


# Blocks that hold the others.
WHOLE = (blocks.Encoder, heads.ElectraMaskedLM, heads.BertMaskedLM, heads.RTDLoss)


def _row(option: str, block: str, runs: str, modules: list[nn.Module]) -> Row:
    why = [_why_not(module) for module in modules]
    declined = {f"the last call ran unfused: {m.declined}" for m in modules if getattr(m, "declined", None)}
    reasons = [*sorted({*why} - {None}), *sorted(declined)]
    return Row(option, block, why.count(None), len(why), runs, "; ".join(reasons))


def _why_not(module: nn.Module) -> str | None:
    if isinstance(module, Fused):
        return module.hindrance()
    unknown = mixin_of(module).unknown(module)
    return f"transformers {transformers.__version__}: {unknown}" if unknown else "not asked for"


def _why_none(option: str) -> str:
    gone = [
        name
        for module, classes in CLASSES.items()
        for name, mixin in classes.items()
        if mixin.option == option and not hasattr(module, name)
    ]
    return (
        f"transformers {transformers.__version__} has no {', '.join(gone)}" if gone else "the model has none"
    )
