"""Gradients added over the processes of a run, in flat buckets, while the backward pass continues.

Each gradient is a view of a bucket, so a sum over the processes needs no copy. The buckets are in the reverse
order of the parameters, in which the backward pass completes them, and are sent in this order only: all
processes must send the same ones. The sum has no division, because the loss of a micro-batch was divided by
the number of micro-batches of all processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from electra_fast.distributed import World
from electra_fast.errors import must

BUCKET = 25 << 20  # bytes, as in DistributedDataParallel
ALIGNED = 64  # elements; fused AdamW reads aligned gradients faster


class GradientBuckets:
    """The gradients of a model; between `zero` and `wait` they are added up.

    Args:
        model: all its parameters must get a gradient in each micro-batch.
        world: the processes.
        size: bytes of a bucket; a larger parameter has its own.
    """

    def __init__(self, model: nn.Module, world: World, size: int = BUCKET):
        self.world = world
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.groups = _grouped(list(self.names)[::-1], size)
        self.buckets = [_flat(group) for group in self.groups]
        self._bucket_of = {p: number for number, group in enumerate(self.groups) for p in group}
        self._last = False
        for p in self.names:
            p.register_post_accumulate_grad_hook(self._completed)
        self.zero()

    def zero(self) -> None:
        """Set all gradients to 0."""
        for group, bucket in zip(self.groups, self.buckets, strict=True):
            bucket.zero_()
            begin = 0
            for p in group:
                p.grad = bucket[begin : begin + p.numel()].view_as(p)
                begin += _aligned(p.numel())

    def before(self, last: bool) -> None:
        """Prepare for a backward pass; in the `last` one of a step the buckets are sent."""
        self.world.watch()
        self._last = last
        self._missing = [set(group) for group in self.groups]
        self._waits: list[Callable[[], None]] = []

    def wait(self) -> None:
        """Wait until all gradients are the sums over the processes; on a GPU the host does not wait.

        Raises:
            RuntimeError: a parameter had no gradient, and another process may wait for it.
        """
        missing = [self.names[p] for group in self._missing for p in group]
        if missing:
            rule = "have a gradient in each micro-batch"
            raise RuntimeError(must(f"{self.world.command}: parameters", rule, f"none for {missing[0]}"))
        for wait in self._waits:
            wait()

    def _completed(self, p: nn.Parameter) -> None:
        self._missing[self._bucket_of[p]].discard(p)
        while self._last and len(self._waits) < len(self.buckets) and not self._missing[len(self._waits)]:
            self._waits.append(self.world.start_adding(self.buckets[len(self._waits)]))


def _grouped(parameters: list[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Return the parameters in groups of one dtype and at most `size` bytes, or one larger parameter."""
    groups: list[list[nn.Parameter]] = []
    total = 0
    for p in parameters:
        bytes_ = _aligned(p.numel()) * p.element_size()
        if not groups or groups[-1][0].dtype != p.dtype or total + bytes_ > size:
            groups.append([])
            total = 0
        groups[-1].append(p)
        total += bytes_
    return groups


def _flat(group: list[nn.Parameter]) -> Tensor:
    first, elements = group[0], sum(_aligned(p.numel()) for p in group)
    return torch.zeros(elements, dtype=first.dtype, device=first.device)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNED) * ALIGNED
