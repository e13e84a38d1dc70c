"""Hugging Face's names and folders for one half of an ELECTRA model.

Inside, a parameter is named after what it is, ``encoder.layers.0.attention.qkv.weight``. Outside,
in ``state_dict()`` and in files, it has the name and shape that transformers gives it, so that
checkpoints go back and forth unchanged. Two hooks translate; query, key and value are one parameter
inside and three outside.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from electra_fast import local
from electra_fast.config import ElectraConfig
from electra_fast.ops import FUSED, Ops
from electra_fast.vocabulary import resize

WORD_TABLE = "electra.embeddings.word_embeddings.weight"
TABLES = (
    WORD_TABLE,
    "electra.embeddings.position_embeddings.weight",
    "electra.embeddings.token_type_embeddings.weight",
)
DIFFERENCE = "encoder.embedding.difference."  # to another embedding's tables: no name of Hugging Face's
TIED_TABLE = "generator_lm_head.weight"  # the same table, listed again by the generator
OLD_BUFFER = "electra.embeddings.position_ids"  # in files of transformers before 4.31: arange(512)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Replaced one after the other in the name of a parameter; {} becomes query, key and value.
ENCODER_NAMES = {
    "encoder.embedding.words": TABLES[0],
    "encoder.embedding.positions": TABLES[1],
    "encoder.embedding.types": TABLES[2],
    "encoder.embedding.norm.": "electra.embeddings.LayerNorm.",
    "encoder.project.": "electra.embeddings_project.",
    "encoder.layers.": "electra.encoder.layer.",
    ".attention.qkv.": ".attention.self.{}.",
    ".attention.out.": ".attention.output.dense.",
    ".attention.norm.": ".attention.output.LayerNorm.",
    ".feed_forward.dense_in.": ".intermediate.dense.",
    ".feed_forward.dense_out.": ".output.dense.",
    ".feed_forward.norm.": ".output.LayerNorm.",
}

CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "embedding_size": "embedding",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "dropout",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab",
    "initializer_range": "initializer",
    "layer_norm_eps": "eps",
    "pad_token_id": "pad_id",
    "cls_token_id": "cls_id",
    "sep_token_id": "sep_id",
    "mask_token_id": "mask_id",
}

# What a config.json may say in only one way, because this package has no other.
CONFIG_FIXED = {
    "model_type": "electra",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def config_to_hugging_face(config: ElectraConfig) -> dict[str, Any]:
    """Return the config.json of the tower whose sizes are in `layers`, `hidden`, `heads`, `ffn`."""
    fixed = {name: CONFIG_FIXED[name] for name in ("model_type", "hidden_act")}
    return fixed | {theirs: getattr(config, ours) for theirs, ours in CONFIG_FIELDS.items()}


def config_from_hugging_face(config: dict[str, Any]) -> ElectraConfig:
    """Read the config.json of one tower; the other one, not described there, gets the same sizes.

    Raises:
        ValueError: it describes a model that this package does not have.
    """
    for name, only in CONFIG_FIXED.items():
        if (value := config.get(name, only)) != only:
            rule = f"{name} in config.json must be {only!r}"
            raise ValueError(f"from_pretrained: {rule}, got {value!r}")
    fields: dict[str, Any] = {}
    for theirs, ours in CONFIG_FIELDS.items():
        value = config.get(theirs)
        if value is not None and fields.setdefault(ours, value) != value:
            raise ValueError(
                f"from_pretrained: {theirs} in config.json must equal the model's one {ours} "
                f"({fields[ours]!r}), got {value!r}; edit config.json if it does not matter to you"
            )
    both = ("layers", "hidden", "heads", "ffn")
    return ElectraConfig(**fields, **{"generator_" + f: fields[f] for f in both if f in fields})


class PretrainedHalf(nn.Module):
    """A tower and its head, with Hugging Face's state dict and folders."""

    hugging_face_class: ClassVar[str]
    head_names: ClassVar[dict[str, str]]  # as ENCODER_NAMES, for the parameters of the head
    tower: ElectraConfig  # this half's sizes in `layers`, `hidden`, `heads`, `ffn`

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_names_to_hugging_face)
        self.register_load_state_dict_pre_hook(_names_from_hugging_face)

    def hugging_face_names(self, name: str) -> list[str]:
        """Return the one name, or the three of a fused QKV, that a parameter has outside."""
        for ours, theirs in (ENCODER_NAMES | self.head_names).items():
            name = name.replace(ours, theirs)
        return [name.format(part) for part in ("query", "key", "value")] if "{}" in name else [name]

    def resize_token_embeddings(
        self, vocab_size: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Grow or shrink the vocabulary: the word table and the head's bias, in place.

        Old tokens keep their rows; a new one's are initialised as at first, its bias 0.

        Args:
            vocab_size: rows from now on; it must hold the special ids.
            optimizer: the one that trains this model: its averages get the same rows, new ones 0. One that
                has taken a step and is not given here refuses its next, naming the sizes.

        Raises:
            ValueError: vocab_size is too small, or the optimizer keeps what has no such rows; nothing has
                been changed then.
        """
        tower = dataclasses.replace(self.tower, vocab_size=vocab_size)
        resize(self, vocab_size, optimizer)
        self.tower = tower

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; transformers reads them, as this class does.

        Raises:
            OSError: the files cannot be written; those that were there before are unchanged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architectures": [self.hugging_face_class]} | config_to_hugging_face(self.tower)
        tensors = self.state_dict()
        tensors.pop(TIED_TABLE, None)  # as transformers does: loading ties it again
        # What an embedding looks up is in its tables; a difference to somebody else's is not theirs to know.
        tensors = {n: t for n, t in tensors.items() if not n.startswith(DIFFERENCE)}
        tables = (table.detach() for table in self.encoder.embedding.tables())
        tensors |= zip(TABLES, tables, strict=True)
        # Under another name first: a full disk or a kill leaves the old checkpoint as it was.
        unfinished = {name: folder / f"{name}.part" for name in ("config.json", "model.safetensors")}
        try:
            unfinished["config.json"].write_text(json.dumps(config, indent=2) + "\n")
            save_file(tensors, unfinished["model.safetensors"], metadata={"format": "pt"})
            for name, file in unfinished.items():
                file.replace(folder / name)
        except BaseException as error:
            for file in unfinished.values():
                with contextlib.suppress(OSError):
                    file.unlink()
            if isinstance(error, OSError | SafetensorError):
                raise OSError(f"save_pretrained: {folder} must be written whole, got: {error}") from error
            raise

    @classmethod
    def from_pretrained(cls, folder: str | Path, ops: Ops = FUSED) -> Self:
        """Read a Hugging Face folder; the model comes in eval mode.

        Its dtype is that of the file; if the file has several, the one to which PyTorch promotes them.

        Raises:
            FileNotFoundError: there is no such folder, or it has no config.json or no model.safetensors.
            ValueError: config.json describes a model that this package does not have, or that has another
                number of layers than the file; or the file is damaged or holds NaN, infinity or integers.
            RuntimeError: a tensor is missing, unknown or of another shape; all are listed.
        """
        folder = local.existing("from_pretrained: folder", folder)
        file, config_file = folder / "model.safetensors", folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"from_pretrained: {folder} must hold model.safetensors; save an older checkpoint "
                "again with transformers, or load_state_dict(torch.load(file, weights_only=True))"
            )
        described = local.json_object("from_pretrained", config_file)
        try:
            config = config_from_hugging_face(described)
        except ValueError as error:
            raise ValueError(f"{error}; in {config_file}") from None
        tensors = _read(file)
        # A model is built layer by layer: without this check a wrong number in a small file costs hours.
        if (layers := _layers(tensors)) != config.layers:
            rule = f"num_hidden_layers in {config_file} must be {layers}, the layers in {file.name}"
            raise ValueError(f"from_pretrained: {rule}, got {config.layers}")
        try:
            with torch.device("meta"):  # without random weights: each of them must come from the file
                model = cls(config, ops)
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise RuntimeError(f"from_pretrained: {file} must fit {config_file.name}, got: {error}") from None
        return model.eval()


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in one floating-point dtype.

    Raises:
        ValueError: the file is damaged, or a tensor in it is not finite or not of a floating-point dtype.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, LookupError) as error:  # LookupError: a dtype that PyTorch does not have
        raise ValueError(f"from_pretrained: {file} must be a whole safetensors file, got: {error}") from None
    tensors.pop(OLD_BUFFER, None)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"from_pretrained: {file} must hold {DTYPES}, got {name} of {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"from_pretrained: {file} must hold finite weights, got NaN or inf in {name}")
    dtypes = {tensor.dtype for tensor in tensors.values()} or {torch.float32}
    dtype = functools.reduce(torch.promote_types, dtypes)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _layers(names: Iterable[str]) -> int:
    prefix = ENCODER_NAMES["encoder.layers."]
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def _names_to_hugging_face(
    half: PretrainedHalf, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict
) -> None:
    for name, _ in half.named_parameters(remove_duplicate=False):
        tensor = state_dict.pop(prefix + name)
        names = half.hugging_face_names(name)
        parts = (tensor,) if len(names) == 1 else tensor.chunk(len(names))
        state_dict.update({prefix + n: part for n, part in zip(names, parts, strict=True)})
    if half.hugging_face_class == "ElectraForMaskedLM":
        state_dict[prefix + TIED_TABLE] = state_dict[prefix + WORD_TABLE]


def _names_from_hugging_face(
    half: PretrainedHalf,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Rename and join in place. What is amiss is reported under the names in the checkpoint.

    A parameter that cannot be loaded is given its own value, or PyTorch would report it once more,
    under a name that the checkpoint does not have.
    """
    state_dict.pop(prefix + OLD_BUFFER, None)
    word = state_dict.get(prefix + WORD_TABLE)
    tied = state_dict.pop(prefix + TIED_TABLE, word)
    if tied is not word and not (word is not None and torch.equal(tied, word)):
        error_msgs.append(f"{prefix + TIED_TABLE} must equal {prefix + WORD_TABLE}, which is tied")

    for name, parameter in half.named_parameters(remove_duplicate=False):
        names = [prefix + n for n in half.hugging_face_names(name)]
        shape = (parameter.shape[0] // len(names), *parameter.shape[1:])
        parts = [state_dict.pop(n, None) for n in names]
        state_dict[prefix + name] = parameter.detach()
        if wrong := [n for n, part in zip(names, parts, strict=True) if part is None]:
            missing_keys.extend(wrong)
        elif wrong := [n for n, part in zip(names, parts, strict=True) if part.shape != shape]:
            error_msgs.extend(f"size mismatch for {n}: the model's shape is {shape}" for n in wrong)
        else:
            state_dict[prefix + name] = parts[0] if len(parts) == 1 else torch.cat(parts)
