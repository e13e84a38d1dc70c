"""Statistical checks of the random ops: of a masker, a sampler or dropout.

The seeds are fixed, so each check always gives the same answer. A function that draws its own random numbers
cannot be compared element by element; `PROPERTIES` are what is judged instead.
"""

import math
from collections.abc import Callable, Iterator

import torch

from electra_fast.testing.budget import Judgement
from electra_fast.testing.distributions.dropouts import (
    accuracy,
    dropout_properties,
    of_add_norm,
    of_attention,
    of_attention_qkv,
    of_embed,
)
from electra_fast.testing.distributions.gradients import gradient_properties
from electra_fast.testing.distributions.maskers import masker_properties
from electra_fast.testing.distributions.samplers import sampler_properties
from electra_fast.testing.distributions.statistics import NotJudged, failure
from electra_fast.testing.example import DTYPES, Example
from electra_fast.testing.report import RAISED, RIGHT, UNSUPPORTED, WRONG, Row
from electra_fast.testing.supports import Supports, parameters, unsupported

PAIRS = {"sequences": 8, "queries": 64, "heads": 4, "keys": 64}
TOKENS = {"sequences": 32, "tokens": 64, "columns": 128}


def _dropout(op: str, read: Callable, shape: dict[str, int]) -> Callable[..., Iterator[Judgement]]:
    def properties(function, device="cpu", dtype=torch.float32):
        dropout, error = read(function, dtype), accuracy(dtype)
        yield from dropout_properties(dropout, device=device, shape=shape, accuracy=error)
        yield from gradient_properties(op, function, device)

    return properties


# `PROPERTIES[op](function, device)`; the function is called with the op's arguments by name.
PROPERTIES: dict[str, Callable[..., Iterator[Judgement]]] = {
    "mask_tokens": lambda function, device="cpu", dtype=None: masker_properties(function, device=device),
    "mlm_head": lambda function, device="cpu", dtype=torch.float32: sampler_properties(
        function, device=device, dtype=dtype
    ),
    "attention": _dropout("attention", of_attention, PAIRS),
    "attention_qkv": _dropout("attention_qkv", of_attention_qkv, PAIRS),
    "add_norm": _dropout("add_norm", of_add_norm, TOKENS),
    "embed": _dropout("embed", of_embed, TOKENS),
}


def _first_wrong(judgements: Iterator[Judgement]) -> None:
    for judgement in judgements:
        judgement.assert_right()


def _by_position(function: Callable, *names: str) -> Callable:
    """Return a function that is called by name and passes these arguments by position."""
    return lambda **args: function(*[args.pop(name) for name in names], **args)


def check_masker(
    mask_tokens: Callable, *, device: str = "cpu", B: int = 64, L: int = 64, steps: int = 40
) -> None:
    """Check a masker with the signature of `ops.mask_tokens`.

    Counts must be exact, positions uniform over the candidates and independent of neighbours and of the
    previous step, the share that keeps its id must be `keep_prob`, and only candidates may change. Padding
    must stay unchanged, if the masker accepts `key_mask`.

    Raises:
        AssertionError: a property is wrong; the message names the first one.
    """
    function, names = _by_position(mask_tokens, "ids", "candidates", "rng"), parameters(mask_tokens)
    padding = names is None or "key_mask" in names
    _first_wrong(masker_properties(function, device=device, B=B, L=L, steps=steps, padding=padding))


def check_sampler(
    mlm_head: Callable, *, device: str = "cpu", M: int = 4096, steps: int = 8, V: int = 257
) -> None:
    """Compare the samples of a head with the signature of `ops.mlm_head` with the softmax of its logits.

    Flat and peaked rows are tested by chi-square, the tail behind one token at logit gaps 8 and 12 by z. A
    token of probability 0 must not occur. As the uniforms are specified, every sample must be inside the
    float64 bracket of its uniform.

    Raises:
        AssertionError: a property is wrong; the message names the first one.
    """
    function = _by_position(mlm_head, "x", "table", "bias", "targets", "weights", "rng")
    _first_wrong(sampler_properties(function, device=device, M=M, steps=steps, V=V, specified=True))


def check_dropout(
    dropout: Callable, p: float = 0.1, *, device: str = "cpu", rows: int = 512, columns: int = 96
) -> None:
    """Check `dropout(x, p, rng, stream) -> like x` for x = ones ``[rows, columns]``.

    Kept elements must be scaled by 1/(1-p); the counts in total, per column and per row must be binomial;
    neighbours, steps and streams must be independent.

    Raises:
        AssertionError: a property is wrong; the message names the first one.
    """
    _first_wrong(dropout_properties(dropout, p, device=device, shape={"rows": rows, "columns": columns}))


def distribution_rows(function: Callable, op: str, supports: Supports, device: str) -> list[Row]:
    """Return a row per property of a function that draws its own random numbers. No error gets out.

    The function is called with the op's arguments by name, as `supports.fit` returns it.
    """
    results, dtypes = supports.get("results"), supports.get("dtypes", True)
    gradients = supports.get("gradients", True)

    def declared(**args):
        floats = {n: x for n, x in args.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
        reason = unsupported(Example(op, "", args, tuple(floats)), supports)
        leaves = {name for name, x in floats.items() if x.requires_grad}
        if gradients is not True and not leaves <= set(gradients or ()):
            reason = reason or "gradients"
        if op == "mlm_head" and results is not None and "samples" not in results:
            reason = "results"
        if reason:
            raise NotJudged(reason)
        return function(**args)

    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    legal = [dtype for name, dtype in names.items() if dtypes is True or name in (dtypes or ())]
    rows = []
    try:
        for found in PROPERTIES[op](declared, device, *legal[:1]):
            rows.append(_row(found))
    except Exception as error:  # of any type: it is a finding about the function
        rows.append(_row(failure(op, error)))
    return rows


def _row(found: Judgement) -> Row:
    numbers = () if math.isnan(found.error) else (found.error, found.budget, found.ratio)
    if math.isnan(found.ratio):
        verdict = UNSUPPORTED
    elif found.why.startswith(f"{found.name}: raised "):
        verdict = RAISED
    else:
        verdict = WRONG if found.why else RIGHT
    return Row("distribution", "", found.quantity, verdict, found.why, *numbers)
