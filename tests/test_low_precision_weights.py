import copy

import torch
from torch import nn

from electra_fast.linear import Linear, LowPrecisionWeights


def layers():
    torch.manual_seed(0)
    return nn.Sequential(Linear(24, 40), nn.GELU(), Linear(40, 8)), torch.randn(3, 7, 24)


def result(model, x):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    return y, torch.autograd.grad(y.float().square().sum(), (x, *model.parameters()))


def test_copies_give_the_results_of_autocast_and_unrounded_gradients():
    model, x = layers()
    wanted, gradients = result(model, x)
    copies = LowPrecisionWeights(model, torch.bfloat16)
    y, found = result(model, x)
    assert torch.equal(y, wanted) and y.dtype == torch.bfloat16
    for g, w in zip(found, gradients, strict=True):
        assert g.dtype == torch.float32 and (g - w).norm() < 0.01 * w.norm()
    copies.drop()
    assert torch.equal(result(model, x)[1][1], gradients[1])


def test_copies_have_the_values_of_the_last_refresh():
    model, x = layers()
    copies = LowPrecisionWeights(model, torch.bfloat16)
    stale, _ = result(model, x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(result(model, x)[0], stale)
    copies.refresh()
    fresh, _ = result(model, x)
    assert not torch.equal(fresh, stale)
    copies.drop()
    assert torch.equal(result(model, x)[0], fresh)


def test_copies_are_not_used_without_autocast_or_in_a_copied_model():
    model, x = layers()
    wanted = model(x)
    LowPrecisionWeights(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), wanted) and twin[0].low is None and model[0].low is not None
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_without_its_bias_a_layer_returns_the_product():
    model, x = layers()
    assert torch.allclose(model[0](x, with_bias=False) + model[0].bias, model[0](x))
    LowPrecisionWeights(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x, with_bias=False)
        y.sum().backward()
        assert torch.equal(y, torch.nn.functional.linear(x, model[0].weight))
    assert model[0].bias.grad is None and model[0].weight.grad.dtype == torch.float32
