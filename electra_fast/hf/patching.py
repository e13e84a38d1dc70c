"""`patch`: fused forward passes in an existing model of transformers, and the way back."""

import collections
from types import ModuleType
from typing import NamedTuple

import transformers
from torch import nn
from transformers.models.bert import modeling_bert as bert
from transformers.models.electra import modeling_electra as electra
from transformers.models.encoder_decoder import modeling_encoder_decoder as encoder_decoder

from electra_fast.errors import must
from electra_fast.hf import attention_blocks, blocks, decoders, heads
from electra_fast.hf.fused import Fused, fuse, unfuse
from electra_fast.hf.graphs import GraphedEncoder
from electra_fast.ops import _operators
from electra_fast.tables import text_table

# By name, because a version of transformers may lack some of these classes.
CLASSES: dict[ModuleType, dict[str, type[Fused]]] = {
    electra: {
        "ElectraEmbeddings": blocks.Embeddings,
        "ElectraModel": attention_blocks.Model,
        "ElectraEncoder": GraphedEncoder,
        "ElectraLayer": blocks.Layer,
        "ElectraSelfAttention": attention_blocks.SelfAttention,
        "ElectraCrossAttention": attention_blocks.CrossAttention,
        "ElectraSelfOutput": blocks.AddNorm,
        "ElectraOutput": blocks.AddNorm,
        "ElectraIntermediate": blocks.BiasGELU,
        "ElectraGeneratorPredictions": heads.ElectraTransform,
        "ElectraForMaskedLM": heads.ElectraMaskedLM,
        "ElectraForCausalLM": decoders.ElectraCausalLM,
        "ElectraDiscriminatorPredictions": heads.Scores,
        "ElectraForPreTraining": heads.RTDLoss,
    },
    bert: {
        "BertEmbeddings": blocks.Embeddings,
        "BertModel": attention_blocks.Model,
        "BertEncoder": GraphedEncoder,
        "BertLayer": blocks.Layer,
        "BertSelfAttention": attention_blocks.SelfAttention,
        "BertCrossAttention": attention_blocks.CrossAttention,
        "BertSelfOutput": blocks.AddNorm,
        "BertOutput": blocks.AddNorm,
        "BertIntermediate": blocks.BiasGELU,
        "BertPredictionHeadTransform": heads.BertTransform,
        "BertForMaskedLM": heads.BertMaskedLM,
        "BertLMHeadModel": decoders.BertCausalLM,
    },
    encoder_decoder: {"EncoderDecoderModel": decoders.EncoderDecoder},
}
BLOCKS: dict[type[nn.Module], type[Fused]] = {
    getattr(module, name): mixin
    for module, classes in CLASSES.items()
    for name, mixin in classes.items()
    if hasattr(module, name)
}

OPTIONS = ("attention", "norm", "feed_forward", "layer", "embeddings", "mlm_head", "rtd_loss", "graphs")
REQUESTED = ("graphs",)  # options that are off by default; the table has only those that were requested


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    norm: bool = True,
    feed_forward: bool = True,
    layer: bool = True,
    int8: bool = False,
    embeddings: bool = True,
    mlm_head: bool = True,
    rtd_loss: bool = True,
    graphs: bool = False,
) -> "Patched":
    """Make the blocks of ELECTRA and BERT in `model` run fused; other models do not change.

    Parameters, submodules, `state_dict` and hooks do not change. Results are the same up to rounding, with
    these exceptions: dropout draws other masks; logits are None if a language model (masked, causal, or an
    `EncoderDecoderModel`) is trained with labels (``model(..., output_logits=True)`` returns them); a loss
    without any token is 0 instead of NaN. A second call changes nothing.

    transformers' own forward pass runs if a kernel does not fit, and the printed table gives the reason: a
    class of the installed transformers is not one that this was written for; a submodule has an adapter, a
    hook or quantised weights; a call has `output_attentions`, or a mask that is not ``[B, L]`` or bool
    ``[B, 1, 1, L]``.

    Args:
        model: any model of transformers 5 that contains ELECTRA's or BERT's encoder or decoder, or a module
            that contains such models. Patch before torch.compile, and before accelerate prepares it; before
            or after DDP and FSDP2.
        attention: scores, softmax, dropout and product, of an encoder, of a decoder with or without a cache,
            and from a decoder to an encoder; the mask is not expanded to ``[B, 1, L, L]``.
        norm: dropout, residual and LayerNorm at the end of each half layer.
        feed_forward: bias and GELU.
        layer: a whole layer as one operator in inference on a CPU (eval mode, no gradients), if the three
            options above are on. Its weights are stored a second time, packed.
        int8: in these calls, multiply in int8. Weights have one scale per column, activations are quantised
            per token. All other calls use the float weights, and warn if the model is in eval mode.
        embeddings: the three tables, LayerNorm and dropout.
        mlm_head: the loss of a masked or causal language model and of an `EncoderDecoderModel`, computed from
            labelled positions only.
        rtd_loss: the loss of `ElectraForPreTraining`, without selecting tokens by a mask.
        graphs: on a GPU, the layers are captured as CUDA graphs, one for each of up to 8 shapes, forward and
            backward. Fewer launches make small batches faster; each graph keeps its activations in memory.
            Lengths are padded to a multiple of 32. A call runs without a graph if an earlier call of its
            shape still waits for its backward pass. Training with gradient checkpointing raises ValueError.

    Returns:
        Patched: printed, it shows what runs fused; `undo()` reverts the patch. It is a context manager.

    Raises:
        TypeError: `model` has no known block. ValueError: it is compiled, or is patched with other options.
            After an error nothing has changed.
    """
    given = (attention, norm, feed_forward, layer, embeddings, mlm_head, rtd_loss, graphs)
    wanted = {option for option, value in zip(OPTIONS, given, strict=True) if value}
    if int8 and not wanted.issuperset(("attention", "norm", "feed_forward", "layer")):
        rule = "be False without the options attention, norm, feed_forward and layer"
        raise ValueError(must("electra_fast.hf.patch: int8", rule, True))
    found = _found(model)
    for name, module in model.named_modules():
        _check(name or type(module).__name__, module, wanted, int8)
    for module, mixin in found:
        if mixin.option in wanted and not isinstance(module, Fused) and not mixin.mismatch(module):
            fuse(module, mixin)
            if int8 and mixin is blocks.Layer:
                module.int8 = True
    return Patched(model)


def _found(model: nn.Module) -> list[tuple[nn.Module, type[Fused]]]:
    """Return the modules of `model` that can be fused or are fused."""
    subject, got = "electra_fast.hf.patch: model", type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(must(subject, "be a torch.nn.Module", got))
    found = [(module, mixin) for module in model.modules() if (mixin := mixin_of(module))]
    if not found:
        remedy = 'use model.set_attn_implementation("electra_fast") for other encoders'
        raise TypeError(must(subject, "have ELECTRA's or BERT's encoder of transformers", got, remedy))
    return found


def mixin_of(module: nn.Module) -> type[Fused] | None:
    """Return the mixin that fuses a module, None if its forward pass is not one of the known classes."""
    if isinstance(module, Fused):
        return module.mixin
    known = (mixin for cls, mixin in BLOCKS.items() if type(module).forward is cls.forward)
    return next(known, None)


def _check(name: str, module: nn.Module, wanted: set[str], int8: bool) -> None:
    """Raise an error for a module with which the patch would be wrong or without effect."""
    subject = f"electra_fast.hf.patch: {name}"
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        remedy = "patch first, then compile"
        raise ValueError(must(subject, "not be compiled yet", "a compiled module", remedy))
    mixin = mixin_of(module)
    if mixin and "forward" in module.__dict__:
        got, remedy = "another, set on the module (as by accelerate)", "patch before that"
        raise ValueError(must(subject, "run its class's forward pass", got, remedy))
    other = isinstance(module, Fused) and mixin.option not in wanted
    if other or (isinstance(module, blocks.Layer) and module.int8 != int8):
        got = f"{mixin.option} already fused" if other else f"int8={module.int8}"
        remedy = "undo() that first"
        raise ValueError(must(subject, "not be patched with other options", got, remedy))


class PatchedBlock(NamedTuple):
    """One class of blocks in a model, a line of the printed table."""

    option: str
    block: str  # name of the class, empty if the model has no such block
    fused: int  # number of blocks of this class that run fused
    of: int  # number of blocks of this class
    by: str  # the ops that they call
    why_not: str

    def cells(self) -> tuple[str, ...]:
        count = f"{self.fused} of {self.of}" if self.of else ""
        return self.option, self.block, count, self.by, self.why_not


class Patched:
    """A patched model: it prints which blocks run fused now, and can revert the patch.

        patched = patch(model)
        print(patched)
        patched.undo()

    ``with patch(model): …`` reverts it at the end.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def undo(self) -> None:
        """Restore the forward pass of every module; results are then bit for bit those of the original model.

        Raises:
            ValueError: a fused module got another class or forward pass after the patch.
        """
        fused = [(name, m) for name, m in self.model.named_modules() if isinstance(m, Fused)]
        for name, module in fused:
            if "unfused" not in vars(type(module)) or "forward" in module.__dict__:
                subject = f"electra_fast.hf.undo: {name or type(module).__name__}"
                got, remedy = "another class or forward pass (fully_shard, accelerate)", "remove that first"
                raise ValueError(must(subject, "be in the state after patch", got, remedy))
        for _, module in fused:
            unfuse(module)

    def rows(self) -> list[PatchedBlock]:
        """Return the blocks by option and class, with the number of those that run fused now."""
        classes = collections.defaultdict(list)
        for module, mixin in _found(self.model):
            if mixin.option in REQUESTED and not isinstance(module, Fused):
                continue
            classes[mixin.option, type(module).__name__, mixin.uses].append(module)
        rows = [_row(*key, modules) for key, modules in classes.items()]
        missing = set(OPTIONS) - set(REQUESTED) - {row.option for row in rows}
        rows += [PatchedBlock(option, "", 0, 0, "", _why_none(option)) for option in missing]
        return sorted(rows, key=lambda row: (row.of == 0, OPTIONS.index(row.option)))

    def __str__(self) -> str:
        device = next(self.model.parameters()).device.type.upper()
        rows = self.rows()
        table = text_table([("option", "class", "fused", "by", "why not"), *(row.cells() for row in rows)])
        ops = dict.fromkeys(op for row in rows if row.fused and row.by for op in row.by.split(", "))
        lines = [f"{op} on {device}: {_operators.served_by(op, device)}" for op in ops]
        return "\n".join([table, "", *lines, f"unchanged: {', '.join(self.others()) or 'nothing'}"])

    def others(self) -> list[str]:
        """Return the names of the layers with parameters that belong to no known block."""
        found = _found(self.model)
        known = {id(part) for m, mixin in found if mixin not in WHOLE for part in m.modules()}
        known |= {id(m.get_submodule(name)) for m, mixin in found for name, _ in mixin.parts}
        return [
            name
            for name, module in self.model.named_modules()
            if id(module) not in known and any(True for _ in module.parameters(recurse=False))
        ]


# Blocks that contain other blocks.
WHOLE = (
    attention_blocks.Model,
    blocks.Layer,
    GraphedEncoder,
    decoders.ElectraCausalLM,
    decoders.BertCausalLM,
    decoders.EncoderDecoder,
    heads.ElectraMaskedLM,
    heads.BertMaskedLM,
    heads.RTDLoss,
)


def _row(option: str, block: str, uses: str, modules: list[nn.Module]) -> PatchedBlock:
    why = [_why_not(module) for module in modules]
    last = {module.last_unsupported for module in modules if isinstance(module, Fused)} - {None}
    reasons = [*sorted({*why} - {None}), *sorted(f"the last call ran unfused: {reason}" for reason in last)]
    return PatchedBlock(option, block, why.count(None), len(why), uses, "; ".join(reasons))


def _why_not(module: nn.Module) -> str | None:
    if isinstance(module, Fused):
        return module.obstacle()
    mismatch = mixin_of(module).mismatch(module)
    return f"transformers {transformers.__version__}: {mismatch}" if mismatch else "not requested"


def _why_none(option: str) -> str:
    missing = [
        name
        for module, classes in CLASSES.items()
        for name, mixin in classes.items()
        if mixin.option == option and not hasattr(module, name)
    ]
    if not missing:
        return "the model has none"
    return f"transformers {transformers.__version__} has no {', '.join(missing)}"
