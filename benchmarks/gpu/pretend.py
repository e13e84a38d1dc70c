"""Run a module with a pretended GPU: `python -m benchmarks.gpu.pretend benchmarks.gpu.capture …`.

This executes the code that otherwise only runs on a GPU: streams, events, captures, memory counters, bfloat16
and rivals. Tensors are on the CPU, and a graph is a stand-in that runs the captured function at each replay.
The times mean nothing.
"""

import runpy
import sys
import time
import types
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode

PROPERTIES = types.SimpleNamespace(name="pretended", L2_cache_size=1 << 16, multi_processor_count=132)


def on_the_cpu(x):
    """Return the CPU for a CUDA device or its name, and any other object unchanged."""
    named = isinstance(x, str | torch.device) and str(x).split(":")[0] == "cuda"
    return torch.device("cpu") if named else x


class OnTheCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: on_the_cpu(x) for name, x in (kwargs or {}).items()}
        return function(*map(on_the_cpu, args), **kwargs)


class Event:
    def __init__(self, **_):
        self.seconds = 0.0

    def record(self, stream=None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.seconds - self.seconds)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Stream:
    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def is_capturing(self) -> bool:
        return False


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def install() -> None:
    """Replace the parts of `torch.cuda` that the harness and the step use."""
    from benchmarks.harness import clock
    from electra_fast import capture

    def stand_in(body):
        return body

    capture.cuda_graph = clock.cuda_graph = stand_in
    torch.Generator = Generator
    profile = torch.profiler.profile
    torch.profiler.profile = lambda **_: profile(activities=[torch.profiler.ProfilerActivity.CPU])
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.accelerator.current_stream = lambda *_: Stream()
    torch.accelerator.current_device_index = lambda: 0
    for name, value in {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda *_, **__: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda *_: "NVIDIA pretended",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: PROPERTIES,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: Stream(),
        "stream": lambda *_: nullcontext(),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 20,
        "reset_peak_memory_stats": lambda *_: None,
        "Event": Event,
        "Stream": Stream,
    }.items():
        setattr(torch.cuda, name, value)


if __name__ == "__main__":
    from electra_fast import testing

    testing.interpret()  # before a GPU is pretended
    install()
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    with OnTheCPU():
        runpy.run_module(module, run_name="__main__", alter_sys=True)
