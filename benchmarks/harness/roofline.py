"""The least work of a pre-training step: FLOPs and bytes per component, counted by hand.

A product counts 2 FLOPs per multiplication, and backward is twice forward. `model_flops` is the numerator of
model FLOPs utilisation: the products of the mathematics, without those that a kernel computes again. Bytes
are those of fused kernels on 16-bit activations, which read their inputs and write their results once.

`python -m benchmarks roofline` prints the fewest ms of each timed step on each GPU of machine.REACHED.
"""

import argparse
from typing import NamedTuple

import torch

from benchmarks.harness.machine import REACHED, bound
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.tables import text_table

A = 2  # bytes of an activation and of a 16-bit copy of a weight
MASTER = 4  # bytes of a weight, of its gradient and of each of AdamW's two averages
# The steps timed on a GPU, as in inputs.STEPS: config, B, L, micro-batches.
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
    """x W^T and its two gradients."""
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
    two_tower = config.generator_kind == "two_tower"
    M = T if two_tower else B * max(1, round(L * config.mask_prob))
    found: dict[str, Work] = {}
    for size in (*[config.for_generator()] * (2 if two_tower else 1), config):
        for name, work in tower(size, T, L).items():
            found[name] = found.get(name, Work()) + work
        if size.hidden != E:
            found["linear"] += product(T, E, size.hidden)
    width = config.generator_hidden * (2 if two_tower else 1)
    heads = product(M, width, E) + product(T, config.hidden, config.hidden)
    found["linear"] += heads + product(T, config.hidden, 1)
    found["mlm_head"] = Work(6 * M * E * V, 3 * (A + MASTER) * V * E)
    found["embed"] = Work(0, 2 * (A * T * E * 4 + 2 * MASTER * V * E))
    found["masking, loss"] = Work(0, 60 * T)
    # Clipping reads the gradients, AdamW reads four tensors and writes three, and the copies are written.
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
    """Return a table of `least` for each GPU and each of STEPS, in ms."""
    parts = []
    for gpu, (product, copy) in REACHED.items():
        columns = [least(*of, gpu) for of in STEPS.values()]
        rows = {name: [column[name] for column in columns] for name in columns[0]}
        rows["total"] = [sum(column.values()) for column in columns]
        cells = [[name, *(f"{1e3 * s:.2f}" for s in row)] for name, row in rows.items()]
        parts.append(f"{gpu}, {product / 1e12:.0f} TFLOP/s, {copy / 1e12:.1f} TB/s: fewest ms per step")
        parts.append(text_table([["", *STEPS], *cells], right=range(1, 1 + len(STEPS))))
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    description = "Print the fewest ms of each timed training step on each GPU with known bounds."
    p = argparse.ArgumentParser(prog="python -m benchmarks roofline", description=description)
    p.parse_args(arguments)
    print(table())
    return 0
