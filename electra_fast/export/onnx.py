"""ONNX, and ONNX Runtime that runs it.

The exporter is the one of torch.onnx that traces (`dynamo=False`). For preset small with 77 labels, on one
core:

    exporter                                seconds  MB    ms per 32 x 32 tokens  writes
    torch.onnx, tracing                         0.7  54.4  211                    one file
    torch.onnx, torch.export                   10.1  55.7  241                    one file; needs onnxscript
    transformers.exporters (experimental)      15.8  55.6  as above               two files; unnamed axes

Batch and length are dynamic in all three. Its nodes have the names of the modules, of which `int8` makes
units. A trace follows one path through the Python code, so the self-check runs other shapes than the trace.
torch calls it the legacy exporter. `dynamo=True` is the other one; there the names of the modules are in the
metadata of the nodes.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from electra_fast.export.engine import Engine
from electra_fast.export.model import INPUTS, Source, package, to_export


def write(source: Source, file: Path) -> Engine:
    """Write an ONNX file whose axes ``batch`` and ``length`` are dynamic."""
    file.write_bytes(convert(source).SerializeToString())
    return engine(file)


def convert(source: Source) -> Any:
    """Return a model as an ``onnx.ModelProto`` whose metadata_props are `Source.metadata`."""
    onnx, file, outputs = package("onnx"), io.BytesIO(), source.outputs
    axes = {name: {0: "batch", 1: "length"} for name in INPUTS}
    axes |= {output.name: {0: "batch"} | ({1: "length"} if output.per_token else {}) for output in outputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tracing, see above
        torch.onnx.export(
            to_export(source),
            example(),
            file,
            input_names=list(INPUTS),
            output_names=[output.name for output in outputs],
            dynamic_axes=axes,
            dynamo=False,
        )
    proto = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(proto, source.metadata())
    return proto


def example() -> tuple[torch.Tensor, ...]:
    """Return inputs for a trace: two texts of which one is padded."""
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    return torch.ones_like(mask), mask, torch.zeros_like(mask)


def engine(model: bytes | Path) -> Engine:
    """Return a function that runs an ONNX file, or its bytes, on as many threads as torch has."""
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    given = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> list[np.ndarray]:
        return session.run(None, dict(zip(INPUTS, (ids, mask, types), strict=True)))

    return run
