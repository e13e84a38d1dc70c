"""What a step of pre-training is at least: FLOPs and bytes, counted by hand, a component at a time.

Products count 2 FLOPs a multiplication; backward is twice forward. `model_flops` is what model FLOPs
utilisation divides by: products that the mathematics asks for, none that a kernel makes again. Bytes are
those of fused kernels on 16-bit activations, which read their inputs and write their results once.

    python -m benchmarks.roofline   # the fewest ms of each timed step, on each GPU of machine.REACHED
"""

from typing import NamedTuple

import torch

from benchmarks.machine import REACHED, bound
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra

A = 2  # bytes of an activation, and of a weight that is computed with
MASTER = 4  # of a weight, its gradient and either average
# The steps that are timed on a GPU, as in inputs.STEPS: config, B, L, micro-batches.
STEPS = {
    "small 128x128": (ElectraConfig.small(), 128, 128, 1),
    "base 8 of 32x512": (ElectraConfig.base(), 32, 512, 8),
    "large 4 of 16x512": (ElectraConfig.large(), 16, 512, 4),
}


class Work(NamedTuple):
    flops: float = 0
    moved: float = 0  # bytes

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved + other.moved)


def product(rows: int, inputs: int, outputs: int) -> Work:
    """x W^T and both its gradients."""
    moved = rows * (inputs + outputs) + inputs * outputs
    return Work(6 * rows * inputs * outputs, 3 * A * moved)


def tower(config: ElectraConfig, T: int, L: int) -> dict[str, Work]:
    """The layers of one tower over T tokens in sequences of L."""
    W, F, row, wide = config.hidden, config.ffn, A * T * config.hidden, A * T * config.ffn
    products = product(T, W, 3 * W) + product(T, W, W) + product(T, W, F) + product(T, F, W)
    work = {
        "linear": products,
        "attention": Work(3 * 4 * T * L * W, (4 + 8) * row),  # q, k, v, o; these and the gradients of all
        "add_norm": Work(0, 2 * (3 + 5) * row),  # x, residual, y; these, and two gradients
        "bias_gelu": Work(0, (2 + 3) * wide),
    }
    return {name: Work(config.layers * w.flops, config.layers * w.moved) for name, w in work.items()}


def step(config: ElectraConfig, B: int, L: int, parameters: int) -> dict[str, Work]:
    """Return the work of a micro-batch by component, and that of the optimizer."""
    T, E, V = B * L, config.embedding, config.vocab_size
    M = B * max(1, round(L * config.mask_prob))
    found: dict[str, Work] = {}
    for size in (config.for_generator(), config):
        for name, work in tower(size, T, L).items():
            found[name] = found.get(name, Work()) + work
        if size.hidden != E:
            found["linear"] += product(T, E, size.hidden)
    heads = product(M, config.generator_hidden, E) + product(T, config.hidden, config.hidden)
    found["linear"] += heads + product(T, config.hidden, 1)
    found["mlm_head"] = Work(6 * M * E * V, 3 * (A + MASTER) * V * E)
    found["embed"] = Work(0, 2 * (A * T * E * 4 + 2 * MASTER * V * E))
    found["masking, loss"] = Work(0, 60 * T)
    # The norm reads gradients; AdamW reads four and writes three; the copies are written.
    found["optimizer"] = Work(0, (8 * MASTER + A) * parameters)
    return found


def model_flops(config: ElectraConfig, B: int, L: int) -> float:
    return sum(work.flops for work in step(config, B, L, 0).values())


def least(config: ElectraConfig, B: int, L: int, accumulate: int, gpu: str) -> dict[str, float]:
    """Return the fewest seconds of a step of `accumulate` micro-batches on `gpu`, by component."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Electra(config).parameters())
    works = step(config, B, L, parameters).items()
    return {name: bound(*work, gpu) * (1 if name == "optimizer" else accumulate) for name, work in works}


def table() -> str:
    """Return `least` of each GPU and each of STEPS as text, in ms."""
    lines = []
    for gpu, (product, copy) in REACHED.items():
        lines.append(f"{gpu}, {product / 1e12:.0f} TFLOP/s, {copy / 1e12:.1f} TB/s; ms per step, at least")
        columns = [least(*of, gpu) for of in STEPS.values()]
        lines.append(f"  {'':14}" + "".join(f"{name:>20}" for name in STEPS))
        rows = {name: [column[name] for column in columns] for name in columns[0]}
        rows["in all"] = [sum(column.values()) for column in columns]
        lines += [f"  {name:14}" + "".join(f"{1e3 * s:20.2f}" for s in row) for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
