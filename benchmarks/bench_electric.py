"""A training step of Electric, with its two-tower generator, and one of ELECTRA with equal sizes.

Electric predicts all tokens and not only the masked ones: its generator has twice the layers, and the product
with the word table has a row per token.
"""

import dataclasses
import functools

from benchmarks.bench_step import StepCase
from benchmarks.harness.cases import Run, parametrize
from benchmarks.harness.inputs import STEPS
from electra_fast.config import ElectraConfig

PROVIDERS = ("fused", "electra", "torch")


class ElectricCase(StepCase):
    providers = headline = PROVIDERS

    def __init__(self, size: str):
        super().__init__(size)
        self.name = f"electric, {size}, step"
        self.electra = StepCase(size)

    @property
    def config(self) -> ElectraConfig:
        return dataclasses.replace(self.size.config, objective="electric")

    def prepare(self, provider: str):
        if provider != "electra":
            return super().prepare(provider)
        step = self.electra.prepare("fused")
        self.errors["electra"] = self.electra.errors["fused"]
        return step

    def info(self, provider):
        if provider == "electra":
            return self.electra.info("fused") | {"op": "electric"}
        return super().info(provider) | {"op": "electric"}


@functools.cache
def case(size: str, passes: str) -> ElectricCase:
    return ElectricCase(size)


size = next(iter(STEPS))
bench_electric = parametrize(case, [Run(size, "step", provider, 5) for provider in PROVIDERS])
