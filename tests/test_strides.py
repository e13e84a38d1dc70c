"""Every tensor argument and upstream gradient of every op may have any strides, in every implementation."""

import torch
from torch import Tensor

from electra_fast import testing

RISING = ("cu_seqlens", "positions")  # which an expanded tensor is not


def interleaved(x):
    """x as every second element of memory that holds other values in between"""
    return torch.stack([x, x.flatten().roll(1).view_as(x)], -1)[..., 0]


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
    """Return the results and gradients, for upstream gradients that lie in memory as `layout` has them."""
    leaves = {name: args[name].detach().requires_grad_() for name in gradients}
    result = function(**args | leaves)
    results = [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None]
    wanted = [y for y in results if y.requires_grad]
    if not wanted:
        return results
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in wanted]
    upstream = [g if g.dim() == 0 else layout(g) for g in upstream]
    return [*results, *torch.autograd.grad(wanted, leaves.values(), upstream)]


def assert_same(first, second, what):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), what


def test_any_strides_give_the_same_bits(implementation, device):
    op, name = implementation
    function = testing.implementations(op)[name]
    for example in cases(op):
        example = example.to(device=device)
        args, found = example.args, tensors(example)
        for layout in LAYOUTS:
            for argument, x in found.items():
                if layout is expanded and argument in RISING:
                    continue
                other = layout(x)
                both = [
                    outcome(function, args | {argument: y}, example.gradients, torch.clone)
                    for y in (other, other.contiguous().clone())
                ]
                assert_same(*both, f"{example.name}: {argument} {layout.__name__}")
            if example.gradients:
                both = [
                    outcome(function, args, example.gradients, upstream)
                    for upstream in (layout, lambda g, layout=layout: layout(g).contiguous().clone())
                ]
                assert_same(*both, f"{example.name}: upstream gradient {layout.__name__}")
