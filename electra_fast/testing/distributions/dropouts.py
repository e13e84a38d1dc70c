"""The properties of dropout's distribution, and how the mask is read off an op that contains dropout.

A reader turns an op into a function `dropout(x, p, rng, stream) -> like x` for x = ones. So every op is
judged by the same properties.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from electra_fast.testing.budget import Judgement
from electra_fast.testing.distributions.statistics import (
    NotJudged,
    judged,
    plausible,
    seeded,
    tail,
    within,
    z_test,
)

Dropout = Callable[[Tensor, float, Tensor, int], Tensor]
OTHERS = {"steps": (3, 1, 2), "streams": (3, 0, 3), "seeds": (4, 0, 2)}  # (seed, step, stream)
APART = (1, 2, 8, 16, 32)
CHANCE = 1e-6  # of a right mask, that two indices of an axis are found to be alike


def accuracy(dtype: torch.dtype) -> float:
    """Return the relative error of an element that is read off a result with this dtype."""
    return max(1e-5, 8 * torch.finfo(dtype).eps)


def dropout_properties(
    dropout: Dropout, p: float = 0.1, *, device: str = "cpu", shape: dict[str, int], accuracy: float = 1e-5
) -> Iterator[Judgement]:
    """Judge `dropout(x, p, rng, stream) -> like x` for x = ones.

    Args:
        shape: the name and the size of each axis of x.
        accuracy: the relative error that a kept element may have.
    """
    x = torch.ones(*shape.values(), device=device)

    def drop(seed, step, stream):
        rng = torch.tensor([seed, step], device=device)
        with seeded(rng, stream):
            return dropout(x, p, rng, stream).detach().cpu()

    y = drop(3, 0, 2)
    first = y > 0.5
    wanted = 1 - round(p * 65536) / 65536

    def scale():
        off = (y[first] * (1 - p) - 1).abs().max().item() if first.any() else 0.0
        return within(off, accuracy, f"a kept element is {off:.3g} away from 1/(1-p), relatively")

    def dropped():
        others = y[~first].unique()
        return "" if not others.any() else f"they are {others[:4].tolist()}, not 0"

    # Along an axis with one mask, the other properties are about that mask, and about the share that was
    # found. So a fault does not make the properties wrong that it does not concern.
    some = bool(first.any()) and not bool(first.all())
    alike = [some and bool((first == first.narrow(axis, 0, 1)).all()) for axis in range(first.dim())]
    cut = tuple(slice(1) if one else slice(None) for one in alike)
    kept = first[cut].double()
    q = kept.mean().item()
    centred = kept - q  # products of different elements have mean 0 and are uncorrelated

    def share():
        n = kept.numel()
        return z_test(kept.sum().item(), n * wanted, n * wanted * (1 - wanted))

    def together(a: Tensor, b: Tensor, where: str = "") -> Judgement:
        return z_test((a * b).sum().item(), 0.0, (q * (1 - q)) ** 2 * a.numel(), where)

    def counts(axis: int) -> Judgement:
        n = kept.shape[axis]
        if not some or n == 1:
            raise NotJudged("all are kept or dropped" if not some else "there is one mask")
        off = centred.movedim(axis, 0).reshape(n, -1).sum(1)
        return plausible(tail((off**2 / (kept.numel() / n * q * (1 - q))).sum(), n - 1))

    def neighbours(axis: int, name: str) -> Judgement | str:
        if alike[axis]:
            return f"all {name} have the same mask"
        n = kept.shape[axis]
        pairs = [
            together(centred.narrow(axis, d, n - d), centred.narrow(axis, 0, n - d), f", {d} {name} apart")
            for d in APART
            if d < n
        ]
        return max(*pairs, most_alike(axis, name), key=lambda found: found.ratio)

    def most_alike(axis: int, name: str) -> Judgement:
        """Judge the pair of indices that drops most elements together, by Chernoff's bound of a binomial."""
        dropped = 1 - kept.movedim(axis, 0).flatten(1)
        both = (dropped @ dropped.T).fill_diagonal_(0)
        n, most, mean = len(both), both.max().item(), (1 - q) ** 2 * dropped.shape[1]
        first, second = divmod(int(both.argmax()), n)
        surprise = most * math.log(most / mean) - most + mean if most > mean else 0.0
        why = f"{name} {second} and {first} drop {most:.0f} elements together, expected {mean:.3g}"
        return within(surprise, math.log(n * n / CHANCE), why)

    def others(key: tuple[int, int, int], name: str) -> Judgement | str:
        other = drop(*key) > 0.5
        if some and torch.equal(first, other):
            return f"two {name} have the same mask"
        return together(centred, other[cut].double() - q)

    found = {"scale of the kept elements": scale, "dropped elements": dropped, "kept share": share}
    for axis, name in enumerate(shape):
        found[f"kept share of the {name}"] = functools.partial(counts, axis)
        found[f"independence of {name}"] = functools.partial(neighbours, axis, name)
    for name, key in OTHERS.items():
        found[f"independence of {name}"] = functools.partial(others, key, name)
    yield from judged("dropout", found)


def of_attention(function: Callable, dtype: torch.dtype = torch.float32) -> Dropout:
    """Read dropout of ``[sequences, queries, heads, keys]``: scores are equal, v is the identity."""

    def dropout(x, p, rng, stream):
        B, L, H, _ = x.shape
        q = torch.zeros(B, L, H, L, dtype=dtype, device=x.device)
        v = torch.eye(L, dtype=dtype, device=x.device)[:, None].expand(B, L, H, L).contiguous()
        return L * function(q=q, k=q.clone(), v=v, dropout=p, rng=rng, stream=stream).float()

    return dropout


def of_attention_qkv(function: Callable, dtype: torch.dtype = torch.float32) -> Dropout:
    """Read dropout as `of_attention` does."""
    return of_attention(lambda q, k, v, **options: function(qkv=torch.stack([q, k, v], -3), **options), dtype)


def of_add_norm(function: Callable, dtype: torch.dtype = torch.float32) -> Dropout:
    """Read dropout of ``[sequences, tokens, columns]``.

    LayerNorm is invertible up to two numbers per row. Two columns where x is 0 and the residual known give
    them. A second call with two other columns reads those.
    """

    def read(x, p, rng, stream, known):
        x, residual = x.to(dtype, copy=True), torch.zeros_like(x, dtype=dtype)
        x[..., known] = 0
        residual[..., known] = torch.tensor([4.0, -4.0], dtype=dtype, device=x.device)
        one, zero = (torch.full(x.shape[-1:], c, dtype=dtype, device=x.device) for c in (1.0, 0.0))
        y = function(
            x=x, residual=residual, weight=one, bias=zero, eps=1e-5, dropout=p, rng=rng, stream=stream
        )
        high, low = y.double()[..., known].split(1, dim=-1)
        return 8 * (y.double() - low) / (high - low) - 4

    def dropout(x, p, rng, stream):
        z = read(x, p, rng, stream, [0, 1])
        with seeded(rng, stream):
            z[..., :2] = read(x, p, rng, stream, [2, 3])[..., :2]
        return z.masked_fill(z.abs() <= accuracy(dtype), 0).float()

    return dropout


def of_embed(function: Callable, dtype: torch.dtype = torch.float32) -> Dropout:
    """Read dropout of ``[sequences, tokens, columns]``: a LayerNorm with weight 0 and bias 1 gives ones."""

    def dropout(x, p, rng, stream):
        (B, L, E), zeros = x.shape, torch.zeros
        options = {"dtype": dtype, "device": x.device}
        tables = {"word": zeros(8, E, **options), "position": zeros(L, E, **options)}
        tables |= {"type": zeros(2, E, **options), "norm_weight": zeros(E, **options)}
        ids = zeros(B, L, dtype=torch.long, device=x.device)
        return function(
            ids=ids, type_ids=None, position_ids=None, **tables, norm_bias=torch.ones(E, **options),
            eps=1e-5, dropout=p, rng=rng, stream=stream,
        ).float()  # fmt: skip

    return dropout
