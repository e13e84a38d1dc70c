"""Hugging Face's state dicts and folders for one half of an ELECTRA model.

In the module a parameter has a name of this package, ``encoder.layers.0.attention.qkv.weight``. In
``state_dict()`` and in files it has the name and shape of transformers, so files can be exchanged unchanged.
Two hooks translate the names. Query, key and value are one parameter in the module and three in the files.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from electra_fast import local
from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.ops import FUSED, Ops
from electra_fast.resize import resize

WORD_TABLE = "electra.embeddings.word_embeddings.weight"
TABLES = (
    WORD_TABLE,
    "electra.embeddings.position_embeddings.weight",
    "electra.embeddings.token_type_embeddings.weight",
)
DIFFERENCE = (
    "encoder.embedding.difference."  # `DifferenceEmbedding`'s parameters, which Hugging Face does not have
)
TIED_TABLE = "generator_lm_head.weight"  # a second name of the word table, in a language model
OLD_BUFFER = "electra.embeddings.position_ids"  # arange(512), in files of transformers before 4.31
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Replacements in a parameter's name, applied in this order; a parameter that is several ones in transformers
# has all their names in braces.
ENCODER_NAMES = {
    "encoder.embedding.words": TABLES[0],
    "encoder.embedding.positions": TABLES[1],
    "encoder.embedding.types": TABLES[2],
    "encoder.embedding.norm.": "electra.embeddings.LayerNorm.",
    "encoder.project.": "electra.embeddings_project.",
    "encoder.layers.": "electra.encoder.layer.",
    ".attention.qkv.": ".attention.self.{query,key,value}.",
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

TWO_TOWER = "electra_two_tower"  # the model_type of a `TwoTowerGenerator`, which transformers does not have
ENCODER_DECODER = "encoder-decoder"  # that of an `EncoderDecoder`, whose config.json has one of each half
# Entries of config.json for which this package supports one value only.
CONFIG_FIXED = {
    "model_type": "electra",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
DECODER_FIXED = {"is_decoder": True, "add_cross_attention": True}  # the same for a decoder


def config_to_hugging_face(config: ElectraConfig) -> dict[str, Any]:
    """Return the config.json of the tower with the sizes `layers`, `hidden`, `heads`, `ffn` of the config."""
    fixed = {name: CONFIG_FIXED[name] for name in ("model_type", "hidden_act")}
    return fixed | {theirs: getattr(config, ours) for theirs, ours in CONFIG_FIELDS.items()}


def config_from_hugging_face(config: dict[str, Any], model_type: str = "electra") -> ElectraConfig:
    """Return the config of a config.json, which describes one tower; the other tower gets the same sizes.

    Args:
        config: the content of config.json.
        model_type: the one that it must have, or none. If it is `ENCODER_DECODER`, two towers are described,
            which must be equal.

    Raises:
        ValueError: it describes a model that this package does not support.
    """
    if model_type != ENCODER_DECODER:
        return _config_of_tower(config, CONFIG_FIXED | {"model_type": model_type})
    if (found := config.get("model_type")) != model_type:
        rule = f"be {model_type!r}"
        raise ValueError(must("from_pretrained: model_type in config.json", rule, repr(found)))
    encoder, decoder = (config.get(half) for half in ("encoder", "decoder"))
    if not isinstance(encoder, dict) or not isinstance(decoder, dict):
        rule, got = "have an object for each of encoder and decoder", f"{encoder!r} and {decoder!r}"
        raise ValueError(must("from_pretrained: config.json", rule, got))
    found = _config_of_tower(encoder, CONFIG_FIXED)
    if (other := _config_of_tower(decoder, CONFIG_FIXED | DECODER_FIXED)) != found:
        rule, got = "have an encoder and a decoder of the same sizes", f"{found} and {other}"
        raise ValueError(must("from_pretrained: config.json", rule, got))
    return found


def _config_of_tower(config: dict[str, Any], fixed: dict[str, Any]) -> ElectraConfig:
    """Return the config of one tower; `fixed` has the only supported value of some entries."""
    for name, only in fixed.items():
        if (value := config.get(name, only)) != only:
            remedy = "TwoTowerGenerator.from_pretrained loads it" if value == TWO_TOWER else ""
            rule = f"be {only!r}"
            raise ValueError(must(f"from_pretrained: {name} in config.json", rule, repr(value), remedy))
    fields: dict[str, Any] = {}
    for theirs, ours in CONFIG_FIELDS.items():
        value = config.get(theirs)
        if value is not None and fields.setdefault(ours, value) != value:
            rule = f"equal the model's one {ours} ({fields[ours]!r})"
            remedy = "edit config.json if the difference does not matter"
            raise ValueError(must(f"from_pretrained: {theirs} in config.json", rule, repr(value), remedy))
    both = ("layers", "hidden", "heads", "ffn")
    return ElectraConfig(**fields, **{"generator_" + f: fields[f] for f in both if f in fields})


class PretrainedHalf(nn.Module):
    """A tower and its head, with Hugging Face's state dict and folders."""

    hugging_face_class: ClassVar[str]
    model_type: ClassVar[str] = "electra"
    head_names: ClassVar[dict[str, str]]  # like ENCODER_NAMES, for the parameters of the head
    tied: ClassVar[dict[str, str]] = {}  # second names of tensors in a state dict, each with the first one
    config: ElectraConfig  # with the sizes of this half in `layers`, `hidden`, `heads`, `ffn`

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_names_to_hugging_face)
        self.register_load_state_dict_pre_hook(_names_from_hugging_face)

    def hugging_face_names(self, name: str) -> list[str]:
        """Return the name of a parameter in transformers; the three names of a fused QKV."""
        for ours, theirs in (ENCODER_NAMES | self.head_names).items():
            name = name.replace(ours, theirs)
        before, _, rest = name.partition("{")
        parts, _, after = rest.partition("}")
        return [before + part + after for part in parts.split(",")]

    def resize_token_embeddings(
        self, vocab_size: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Resize the vocabulary in place: the word table and the head's bias.

        Existing tokens keep their rows. New rows are initialized as in a new model, with bias 0.

        Args:
            vocab_size: the new number of rows; it must include the special ids.
            optimizer: the optimizer of this model. Its state is resized too, new rows are 0. An optimizer
                that has taken a step and is not passed here raises an error in its next step.

        Raises:
            ValueError: vocab_size is too small, or the optimizer's state has other shapes; nothing has
                changed then.
        """
        config = dataclasses.replace(self.config, vocab_size=vocab_size)
        resize(self, vocab_size, optimizer)
        self.config = config

    def described(self) -> dict[str, Any]:
        """Return the config.json of this model."""
        return {"architectures": [self.hugging_face_class]} | config_to_hugging_face(self.config)

    def configs(self) -> dict[str, dict[str, Any]]:
        """Return the content of each JSON file of the folder."""
        return {"config.json": self.described()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the content of model.safetensors. Loading gives tied tensors their second name again."""
        # The file has the sums that a `DifferenceEmbedding` looks up, not its differences.
        own = {
            name: x
            for name, x in self.state_dict().items()
            if name not in self.tied and not name.startswith(DIFFERENCE)
        }
        tables = (table.detach() for table in self.encoder.embedding.tables())
        return own | dict(zip(TABLES, tables, strict=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers and this class can read.

        Raises:
            OSError: the files cannot be written; existing files are unchanged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        configs, tensors = self.configs(), self.tensors()
        # The files are renamed when complete, so a full disk or a kill leaves the old ones unchanged.
        unfinished = {name: folder / f"{name}.part" for name in (*configs, "model.safetensors")}
        try:
            for name, config in configs.items():
                unfinished[name].write_text(json.dumps(config, indent=2) + "\n")
            save_file(tensors, unfinished["model.safetensors"], metadata={"format": "pt"})
            for name, file in unfinished.items():
                file.replace(folder / name)
        except BaseException as error:
            for file in unfinished.values():
                with contextlib.suppress(OSError):
                    file.unlink()
            if isinstance(error, OSError | SafetensorError):
                raise OSError(must(f"save_pretrained: {folder}", "be writable", error)) from error
            raise

    @classmethod
    def from_pretrained(cls, folder: str | Path, ops: Ops = FUSED) -> Self:
        """Load a Hugging Face folder and return the model in eval mode.

        Its dtype is that of the file; several dtypes are promoted to one by PyTorch's rules.

        Raises:
            FileNotFoundError: the folder, config.json or model.safetensors does not exist.
            ValueError: config.json describes a model that this package does not support or that has another
                number of layers than the file, or the file is damaged or contains NaN, infinity or integers.
            RuntimeError: tensors are missing, unknown or of another shape; the message lists them.
        """
        folder, (described, config, tensors) = Path(folder), read_folder(folder, cls.model_type)
        try:
            with torch.device("meta"):  # without random weights, because all of them come from the file
                model = cls.build(described, config, ops)
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            file = folder / "model.safetensors"
            raise RuntimeError(must(f"from_pretrained: {file}", "fit config.json", error)) from None
        return model.eval()

    @classmethod
    def build(cls, described: dict[str, Any], config: ElectraConfig, ops: Ops) -> Self:
        """Return a new model; `described` is the config.json of the folder that will be loaded."""
        return cls(config, ops)


class Folder(NamedTuple):
    """The contents of a Hugging Face folder with one model."""

    described: dict[str, Any]  # config.json
    config: ElectraConfig
    tensors: dict[str, Tensor]  # by transformers' names


def read_folder(folder: str | Path, model_type: str = "electra") -> Folder:
    """Read a Hugging Face folder; errors as in `PretrainedHalf.from_pretrained`."""
    folder = local.existing("from_pretrained: folder", folder)
    file, config_file = folder / "model.safetensors", folder / "config.json"
    if not file.is_file():
        remedy = "save an older checkpoint again with transformers, or "
        remedy += "load_state_dict(torch.load(file, weights_only=True))"
        raise FileNotFoundError(
            must(f"from_pretrained: {folder}", "contain model.safetensors", "a folder without it", remedy)
        )
    described = local.json_object("from_pretrained", config_file)
    try:
        config = config_from_hugging_face(described, model_type)
    except ValueError as error:
        raise ValueError(f"{error}; in {config_file}") from None
    tensors = _read(file)
    # Checked first, because building millions of layers for a wrong number would take hours.
    if (layers := _layers(tensors, model_type)) != config.layers:
        subject = f"from_pretrained: num_hidden_layers in {config_file}"
        raise ValueError(must(subject, f"be {layers}, the layers in {file.name}", config.layers))
    return Folder(described, config, tensors)


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
        raise ValueError(must(f"from_pretrained: {file}", "be a whole safetensors file", error)) from None
    tensors.pop(OLD_BUFFER, None)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            got = f"{name} of {tensor.dtype}"
            raise ValueError(must(f"from_pretrained: {file}", f"have tensors of {DTYPES}", got))
        if not tensor.isfinite().all():
            raise ValueError(must(f"from_pretrained: {file}", "have finite weights", f"NaN or inf in {name}"))
    dtypes = {tensor.dtype for tensor in tensors.values()} or {torch.float32}
    dtype = functools.reduce(torch.promote_types, dtypes)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _layers(names: Iterable[str], model_type: str) -> int:
    encoder_decoder = model_type == ENCODER_DECODER
    prefix = "encoder.encoder.layer." if encoder_decoder else ENCODER_NAMES["encoder.layers."]
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def _names_to_hugging_face(
    half: PretrainedHalf, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict
) -> None:
    for name, _ in half.named_parameters(remove_duplicate=False):
        tensor = state_dict.pop(prefix + name)
        names = half.hugging_face_names(name)
        parts = (tensor,) if len(names) == 1 else tensor.chunk(len(names))
        state_dict.update({prefix + n: part for n, part in zip(names, parts, strict=True)})
    state_dict.update({prefix + second: state_dict[prefix + first] for second, first in half.tied.items()})


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
    """Rename and join the tensors in place. Errors are reported under the names in the file.

    A parameter that cannot be loaded gets its current value: PyTorch would otherwise report it again, under a
    name that the file does not have.
    """
    state_dict.pop(prefix + OLD_BUFFER, None)
    for second, first in half.tied.items():
        word = state_dict.get(prefix + first)
        tied = state_dict.pop(prefix + second, word)
        if tied is not word and not (word is not None and torch.equal(tied, word)):
            error_msgs.append(f"{prefix + second} must equal {prefix + first}, which is tied")

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
