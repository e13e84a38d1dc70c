"""The encoder with BERT's names, for servers that know BERT and not ELECTRA.

If the embeddings are as wide as the layers, as in base and large, the encoder of ELECTRA is that of BERT. In
tiny and small they are normalised and then projected, for which BERT has no parameters.
"""

import json
from pathlib import Path

from electra_fast import data
from electra_fast.errors import must
from electra_fast.export.engine import Engine, of_module
from electra_fast.export.model import MODEL, EncoderOnly, Exported, Source, load
from electra_fast.heads import ENCODER
from electra_fast.pretrained import config_to_hugging_face


def require(source: Source) -> None:
    """Raise ValueError if BERT has no parameters for the encoder."""
    config = source.head.config
    if config.embedding != config.hidden:
        rule = f"have an embedding_size equal to its hidden_size ({config.hidden}) for --as-bert"
        remedy = "BERT has no projection of the embeddings; export to onnx instead"
        raise ValueError(must(f"{MODEL} {source.folder}", rule, config.embedding, remedy))


def write(source: Source, folder: Path) -> Engine:
    """Write the folder of a BertModel without a pooler: config.json, model.safetensors, the tokenizer."""
    from safetensors.torch import save_file

    described = config_to_hugging_face(source.head.config)
    del described["embedding_size"]
    described |= {"architectures": ["BertModel"], "model_type": "bert"}
    named = source.head.state_dict().items()
    tensors = {name.removeprefix(ENCODER): x for name, x in named if name.startswith(ENCODER)}
    data.save_tokenizer(source.tokenizer, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    return of_module(Exported(load("BertModel", folder, add_pooling_layer=False)).eval())


def encoder_of(source: Source) -> Source:
    """Return the source without its head, whose output is that of the BertModel."""
    return source._replace(head=EncoderOnly(source.head))
