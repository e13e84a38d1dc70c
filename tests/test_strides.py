"""Every tensor argument and upstream gradient of every op may have any strides, in every implementation."""

import pytest
import torch
from torch import Tensor

from electra_fast import testing

RISING = ("cu_seqlens", "cu_seqlens_k", "positions")  # their values rise, so they cannot be expanded


def interleaved(x):
    """Return x as every second element of memory that contains each element twice."""
    return torch.stack([x, x], -1)[..., 0]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(x):
    return x[-1:].expand_as(x)


def offset(x):
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)


LAYOUTS = (interleaved, transposed, expanded, offset)


def tensors(example):
    """Return the tensors that a call of the example reads, by name."""
    found = {name: x for name, x in example.args.items() if isinstance(x, Tensor)}
    if example.args.get("dropout") == 0:
        found.pop("rng")
    return found


def cases(op):
    """Yield small examples of an op that together have all of its tensor arguments."""
    seen = set()
    for example in sorted(testing.examples(op), key=lambda e: sum(x.numel() for x in tensors(e).values())):
        found = tensors(example)
        if min(x.numel() for x in found.values()) > 1 and found.keys() - seen:
            seen |= found.keys()
            yield example


def outcome(function, args, gradients, layout):
    """Return the results and the gradients; `layout` sets the strides of the upstream gradients."""
    leaves = {name: args[name].detach().requires_grad_() for name in gradients}
    result = function(**args | leaves)
    results = [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None]
    wanted = [y for y in results if y.requires_grad]
    if not wanted:
        return results
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in wanted]
    upstream = [layout(g) if g.dim() > 0 else g for g in upstream]
    return [*results, *torch.autograd.grad(wanted, leaves.values(), upstream)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_strides_give_the_same(layout, implementation, device):
    """Wrong strides change the whole result; in PyTorch's products, strides may change the last digits."""
    op, name = implementation
    function = testing.implementations(op)[name]
    for example in cases(op):
        example = example.to(device=device)
        strided = {
            argument: x if layout is expanded and argument in RISING else layout(x)
            for argument, x in tensors(example).items()
        }
        whole = {argument: x.contiguous().clone() for argument, x in strided.items()}
        got = outcome(function, example.args | strided, example.gradients, layout)
        wanted = outcome(
            function, example.args | whole, example.gradients, lambda g: layout(g).contiguous().clone()
        )
        for a, b in zip(got, wanted, strict=True):
            rounding = 1 / 64 if a.is_floating_point() else 0
            a, b = a.double().nan_to_num(), b.double().nan_to_num()
            assert (a - b).abs().max() <= rounding * b.abs().max(), example.name
