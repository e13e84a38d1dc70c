"""The self-check: an exported model gives the logits of this package's model, up to rounding.

The reference is this package's model in float64, on packed batches without padding. The error of the exported
model may be a multiple of the error that the same model of this package has in float32:

    max |exported - float64|  <=  FACTOR (max |float32 - float64| + eps max |float64|)

This is the first line of the error budget of the tests of kernels, `electra_fast/testing/budget.py`. Its
factor there is 2, but here both errors are those of whole models that add in different orders. Models of
presets tiny, small and base had quotients of 0.4 to 1.5 in ONNX Runtime, OpenVINO and PyTorch.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from electra_fast.errors import must
from electra_fast.tasks.examples import Examples
from electra_fast.tasks.task import EVALUATION_TOKENS, predict

FACTOR = 4
EPS = float(np.finfo(np.float32).eps)


class Difference(NamedTuple):
    """How far an exported model is from this package's model."""

    error: float  # the largest one
    allowed: float
    largest: float  # the largest absolute logit

    def __str__(self) -> str:
        return f"largest error {self.error:.1e}, allowed {self.allowed:.1e}, largest logit {self.largest:.2f}"


class Expected(NamedTuple):
    """The results of this package's model."""

    exact: list[np.ndarray]  # computed in float64
    plain: list[np.ndarray]  # computed in float32


def expected(model: nn.Module, examples: Examples) -> Expected:
    """Compute the results of this package's model; the arrays are those of `predict`."""
    tokens = EVALUATION_TOKENS["cpu"]
    exact = predict(copy.deepcopy(model).double(), examples, tokens)
    return Expected(arrays(exact), arrays(predict(model, examples, tokens)))


def arrays(logits: Any) -> list[np.ndarray]:
    """Return logits, an array or a tuple of arrays, as a list."""
    return list(logits) if isinstance(logits, tuple) else [logits]


def check(found: Sequence[np.ndarray], wanted: Expected) -> Difference:
    """Compare the results of an exported model with those of this package.

    Raises:
        ValueError: an error is larger than allowed, or a result is NaN or has another shape.
    """
    worst = Difference(0.0, 0.0, 0.0)
    for got, exact, plain in zip(found, wanted.exact, wanted.plain, strict=True):
        if got.shape != exact.shape:
            raise ValueError(must("export: the exported model", f"have the shape {exact.shape}", got.shape))
        largest = float(np.abs(exact).max())
        allowed = FACTOR * (float(np.abs(plain - exact).max()) + EPS * largest)
        difference = Difference(float(np.abs(got - exact).max()), allowed, largest)
        if not difference.error <= allowed:
            rule = f"have the logits of this package's model up to an error of {allowed:.1e}"
            remedy = "nothing was written; it was converted wrongly, please report this"
            raise ValueError(must("export: the exported model", rule, f"{difference.error:.1e}", remedy))
        worst = max(worst, difference)
    return worst
