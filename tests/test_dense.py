import copy

import torch
from torch import nn

from electra_fast.dense import Copies, Dense


def layers():
    torch.manual_seed(0)
    return nn.Sequential(Dense(24, 40), nn.GELU(), Dense(40, 8)), torch.randn(3, 7, 24)


def result(model, x):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    return y, torch.autograd.grad(y.float().square().sum(), (x, *model.parameters()))


def test_with_copies_it_computes_what_autocast_does_and_rounds_no_gradient():
    model, x = layers()
    wanted, gradients = result(model, x)
    copies = Copies(model, torch.bfloat16)
    y, found = result(model, x)
    assert torch.equal(y, wanted) and y.dtype == torch.bfloat16
    for g, w in zip(found, gradients, strict=True):
        assert g.dtype == torch.float32 and (g - w).norm() < 0.01 * w.norm()
    copies.drop()
    assert torch.equal(result(model, x)[1][1], gradients[1])


def test_copies_are_as_fresh_as_the_last_refresh():
    model, x = layers()
    copies = Copies(model, torch.bfloat16)
    stale, _ = result(model, x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(result(model, x)[0], stale)
    copies.refresh()
    fresh, _ = result(model, x)
    assert not torch.equal(fresh, stale)
    copies.drop()
    assert torch.equal(result(model, x)[0], fresh)


def test_without_autocast_and_in_a_copied_model_they_are_not_used():
    model, x = layers()
    wanted = model(x)
    Copies(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), wanted) and twin[0].low is None and model[0].low is not None
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_without_its_bias_it_is_the_product():
    model, x = layers()
    assert torch.allclose(model[0](x, with_bias=False) + model[0].bias, model[0](x))
    Copies(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x, with_bias=False)
        y.sum().backward()
        assert torch.equal(y, torch.nn.functional.linear(x, model[0].weight))
    assert model[0].bias.grad is None and model[0].weight.grad.dtype == torch.float32
