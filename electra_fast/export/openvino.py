"""OpenVINO, read from the ONNX graph.

`openvino.convert_model` on the model of PyTorch takes 5.0 instead of 0.7 + 1.3 seconds (preset small), leaves
the outputs without names, and its result is equally fast (205 ms per 32 x 32 tokens). Weights stay float32.

There is no int8 here. OpenVINO reads the quantised graph of ONNX Runtime, but stores most of its weights in
float (42 of 54 MB) and needs 283 instead of 205 ms. NNCF's `quantize` gives 67 ms (ONNX Runtime's int8: 95),
but needs texts for calibration and 17 seconds per model, so the losses of all units would need eight minutes.
"""

from pathlib import Path

import numpy as np
import torch

from electra_fast.errors import must
from electra_fast.export import onnx
from electra_fast.export.engine import Engine
from electra_fast.export.model import Source, package

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}  # without it, it may compute in bfloat16


def write(source: Source, file: Path) -> Engine:
    """Write `file`, an .xml, and a .bin next to it; rt_info has `Source.metadata` under ``electra_fast``."""
    openvino = package("openvino")
    # `convert_model` would send data about its use to the makers of OpenVINO, from a process that it forks.
    model = openvino.Core().read_model(onnx.convert(source).SerializeToString())
    for name, value in source.metadata().items():
        model.set_rt_info(value, ["electra_fast", name])
    try:
        openvino.save_model(model, file, compress_to_fp16=False)
    except RuntimeError as error:  # for example on a full disk
        raise OSError(must("export: --out", "be a file that OpenVINO can write", error)) from None
    return engine(file)


def engine(file: Path) -> Engine:
    """Return a function that runs an .xml with the .bin next to it, on as many threads as torch has."""
    settings = SETTINGS | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = package("openvino").compile_model(file, "CPU", settings)

    def run(ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> list[np.ndarray]:
        results = compiled((ids, mask, types))
        return [results[output].copy() for output in compiled.outputs]

    return run
