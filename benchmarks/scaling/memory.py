"""The memory of one GPU in training, with the state of the optimizer on each GPU or divided among all.

Dividing it is ZeRO's first stage (Rajbhandari et al. 2020): each GPU updates a part of the weights and sends
it to the others. Only Adam's averages become smaller.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.harness.roofline import MASTER, A
from benchmarks.scaling.prediction import Model, Network, Step
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra

CPU = torch.device("cpu")
CAPACITY = {"h100-80gb-hbm3": 80e9, "h200": 141e9}  # bytes, NVIDIA's datasheets


class Memory(NamedTuple):
    """Bytes of one GPU; temporary tensors and the fragments of the allocator are not counted."""

    weights: float
    copies: float  # of the weights, in 16 bits
    gradients: float
    averages: float  # AdamW's two
    activations: float  # of one micro-batch, kept for the backward pass

    @property
    def total(self) -> float:
        return sum(self)


def memory(of: Model, sequences: int, shards: int = 1) -> Memory:
    """Return the memory of a GPU with micro-batches of `sequences`, and averages divided into `shards`."""
    n = of.parameters
    averages = 2 * MASTER * n / shards
    return Memory(MASTER * n, A * n, MASTER * n, averages, sequences * activations(of.config, of.length))


def largest(capacity: float, shards: int = 1) -> float:
    """Return the parameters whose state fills `capacity`, without any activation."""
    return capacity / (MASTER + A + MASTER + 2 * MASTER / shards)


@functools.cache
def activations(config: ElectraConfig, length: int) -> int:
    """Return the bytes per sequence that autograd keeps from a forward pass under bfloat16 autocast.

    They are counted from tensors without data. Tensors that do not depend on the batch cancel out.
    """
    return _saved(config, 2, length) - _saved(config, 1, length)


def _saved(config: ElectraConfig, B: int, L: int) -> int:
    storages: dict[int, torch.UntypedStorage] = {}

    def seen(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage._cdata] = storage
        return x

    mode = FakeTensorMode()
    with torch.device("meta"):
        model, ids = Electra(config), torch.empty(B, L, dtype=torch.long)
        inputs = (ids, torch.empty(B, L, dtype=torch.bool), torch.empty(2, dtype=torch.long))
    _replace_tensors(model, mode)
    ids, key_mask, rng = (FakeTensor(mode, x, CPU) for x in inputs)
    hooks = torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x)
    with mode, hooks, torch.autocast("cpu", torch.bfloat16):
        model(ids, key_mask=key_mask, rng=rng)
    return sum(storage.nbytes() for storage in storages.values())


def _replace_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the tensors of a model on the device meta, on which autocast does not work."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = fakes.setdefault(p, nn.Parameter(FakeTensor(mode, p.data, CPU)))
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = FakeTensor(mode, x, CPU)


def sharded(of: Model, step: Step, gpus: int, network: Network) -> float:
    """Return the seconds of a step with the state of the optimizer divided among all GPUs.

    A sum whose parts stay on different GPUs costs half of the all-reduce. Gathering the 16-bit copies of the
    new weights, half as many bytes as the gradients, costs half of the other half, and nothing hides it.
    """
    scattered = max(network.all_reduce(of.table, gpus) / 2, step.reduction / 2 - step.backward)
    gathered = A / MASTER * step.reduction / 2
    return step.compute + step.optimizer / gpus + scattered + gathered
