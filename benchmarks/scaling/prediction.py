"""The predicted time of a step on many GPUs, at the paper's global batch. No number here is a measurement.

The time of one GPU is that of benchmarks/results if it was measured there, else a prediction. Its share of
the bound in `harness/roofline.py` is assumed for any number of sequences per GPU. Small products reach less,
so the efficiency of many GPUs is an upper limit.
"""

import functools
import math
from typing import NamedTuple

import torch

from benchmarks.gpu.predictions import PREDICTED
from benchmarks.harness import roofline
from benchmarks.harness.machine import ROOT, bound
from benchmarks.report import runs
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.train import gradients
from electra_fast.train.recipe import PAPER

PRESETS = {
    "small": "small 128x128",
    "base": "base 8 of 32x512",
    "large": "large 4 of 16x512",
}  # roofline.STEPS
GPUS = (1, 8, 16, 64, 256, 1024)
PER_NODE = 8
PREDICTED_FOR = "h200"  # the GPU of PREDICTED
LAUNCHES = 800  # kernels of a micro-batch of 12 layers (docs/predictions.md)
LAUNCH = 1e-6  # seconds per launch in a CUDA graph (docs/predictions.md)


class Network(NamedTuple):
    """Bytes per second that each GPU sends, and seconds of one message.

    nvlink: the line rate of an H100 is 450 GB/s, and NCCL reaches 370 GB/s of it in a ring
        (https://github.com/NVIDIA/nccl-tests/issues/212). The switches' own sums (NVLS) are faster.
    network: one adapter of 400 Gb/s per GPU, as in NVIDIA's DGX H100, less the same fifth for protocols.
    latency: assumed.
    """

    nvlink: float = 370e9
    network: float = 40e9
    latency: float = 10e-6

    def all_reduce(self, size: float, gpus: int) -> float:
        """Return the seconds in which `gpus` add up `size` bytes, sent in buckets.

        Two levels: each node scatters the sum among its GPUs, GPUs with the same part add it up over the
        nodes, and each node gathers the parts. Both levels are rings, and a message passes log2 of the GPUs.
        """
        local = min(gpus, PER_NODE)
        buckets = math.ceil(size / gradients.BUCKET)
        sent = ring(size, local) / self.nvlink + ring(size / local, gpus // local) / self.network
        return sent + buckets * math.log2(gpus) * self.latency


def ring(size: float, n: int) -> float:
    """Return the bytes that each of n sends to add up `size` bytes over a ring (Patarasuk and Yuan 2009)."""
    return 2 * (n - 1) / n * size


class Model(NamedTuple):
    """A preset of the paper."""

    name: str
    config: ElectraConfig
    sequences: int  # of a step of the paper
    length: int
    steps: int
    micro: int  # sequences of the largest micro-batch

    @property
    def parameters(self) -> int:
        return parameters(self.config)

    @property
    def gradients(self) -> int:
        """Bytes in float32."""
        return self.parameters * roofline.MASTER

    @property
    def table(self) -> int:
        """Bytes of the gradient of the word table, which is complete only at the end of the backward pass."""
        return self.config.vocab_size * self.config.embedding * roofline.MASTER


@functools.cache
def parameters(config: ElectraConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Electra(config).parameters())


def model(preset: str) -> Model:
    config, micro, length, _ = roofline.STEPS[PRESETS[preset]]
    paper = PAPER[preset]
    return Model(preset, config, paper["batch_tokens"] // length, length, paper["steps"], micro)


class Step(NamedTuple):
    """The seconds of one step of all GPUs."""

    sequences: int  # per GPU
    compute: float  # forward and backward of all micro-batches of a GPU
    backward: float  # the last backward pass, during which gradients are sent
    optimizer: float
    reduction: float  # the all-reduce of the gradients
    exposed: float  # the part of it that the backward pass does not hide

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.exposed


def step(of: Model, gpus: int, gpu: str, network: Network) -> Step | None:
    """Return the step of the paper's batch, None if it has less than one sequence per GPU."""
    sequences = of.sequences // gpus
    if sequences == 0:
        return None
    accumulate = math.ceil(sequences / of.micro)
    forward_and_backward, optimizer = micro_batch(of, sequences // accumulate, gpu)
    backward = 2 / 3 * forward_and_backward
    reduction = network.all_reduce(of.gradients, gpus)
    exposed = max(network.all_reduce(of.table, gpus), reduction - backward)
    return Step(sequences, accumulate * forward_and_backward, backward, optimizer, reduction, exposed)


def micro_batch(of: Model, sequences: int, gpu: str) -> tuple[float, float]:
    """Return the seconds of a micro-batch, forward and backward, and of the optimizer."""
    works = roofline.step(of.config, sequences, of.length, of.parameters)
    least = {name: bound(*work, gpu) for name, work in works.items()}
    optimizer = least.pop("optimizer")
    reached, _ = share(of.name, gpu)
    return sum(least.values()) / reached + launches(of), optimizer / reached


def launches(of: Model) -> float:
    """Return the seconds of the launches of a micro-batch."""
    return LAUNCHES * LAUNCH * of.config.layers / 12


def share(preset: str, gpu: str) -> tuple[float, str]:
    """Return the share of the bound that one GPU reaches in the timed step, and where its time is from."""
    measured = measured_step(preset, gpu)
    if measured is not None:
        return _share(preset, gpu, measured), f"the measured step of one {gpu}"
    timed = preset if ("step", PRESETS[preset]) in PREDICTED else "base"
    seconds = PREDICTED["step", PRESETS[timed]] / 1e6
    return _share(timed, PREDICTED_FOR, seconds), f"the predicted step of {timed} on one {PREDICTED_FOR}"


def _share(preset: str, gpu: str, seconds: float) -> float:
    config, B, L, accumulate = roofline.STEPS[PRESETS[preset]]
    least = sum(roofline.least(config, B, L, accumulate, gpu).values())
    return least / (seconds - accumulate * launches(model(preset)))


def measured_step(preset: str, gpu: str) -> float | None:
    """Return the seconds of the fused step in the committed results of a GPU, None without any."""
    file = ROOT / "benchmarks" / "results" / f"{gpu}.json"
    if not file.exists():
        return None
    found = runs.groups(runs.read(file)).get(f"step, {PRESETS[preset]}, step", {}).get("fused")
    return found["stats"]["median"] if isinstance(found, dict) else None
