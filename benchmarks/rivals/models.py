"""Inference engines that run a model of transformers: ONNX Runtime and OpenVINO, on a CPU.

Each function returns `logits(ids, mask)`, on as many threads as torch has now. ONNX Runtime's threads must
not spin, because the CPU time of all threads is measured.
"""

import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.rivals import cpu, needs, package

Logits = Callable[[Tensor, Tensor], Tensor]
NAMES = ["input_ids", "attention_mask"]


class OnlyLogits(nn.Module):
    """A model with tensors as its arguments and as its result, as exporters need it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits


def example() -> tuple[Tensor, Tensor]:
    return torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)


def onnx_model(model: nn.Module) -> bytes:
    """Return a model as ONNX for any batch size and length.

    Of the two exporters in torch this is the one that needs a tenth of the time; the graphs run equally fast.
    """
    file, axes = io.BytesIO(), {name: {0: "B", 1: "L"} for name in NAMES}
    names = {"input_names": NAMES, "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(OnlyLogits(model), example(), file, **names, dynamo=False)
    return file.getvalue()


def quantized(model: bytes) -> bytes:
    """Return the model with int8 weights, one scale per column; activations are quantized in each call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        settings = {"weight_type": QuantType.QInt8, "per_channel": True}
        quantize_dynamic(onnx.load_from_string(model), file, **settings)
        return file.read_bytes()


@needs(cpu, package("onnxruntime"), package("onnx"))
def onnx_runtime(model: nn.Module, int8: bool = False) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    exported = onnx_model(model)
    exported = quantized(exported) if int8 else exported
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        arguments = zip(NAMES, (ids.numpy(), mask.numpy()), strict=True)
        return torch.from_numpy(session.run(None, dict(arguments))[0])

    return logits


@needs(cpu, package("openvino"))
def openvino(model: nn.Module) -> Logits:
    """OpenVINO in float32; without the hint it may compute in bfloat16."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    converted = ov.convert_model(OnlyLogits(model), example_input=example())
    compiled = ov.compile_model(converted, "CPU", settings)

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(compiled((ids.numpy(), mask.numpy()))[0])

    return logits


ENGINES = {
    "ort": onnx_runtime,
    "ort_int8": needs(*onnx_runtime.needs)(functools.partial(onnx_runtime, int8=True)),
    "openvino": openvino,
}
