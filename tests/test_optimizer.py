"""The paper's AdamW, compared with its formulas in float64."""

import pytest
import torch
from torch import nn

from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.train import optimizer


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def gradients(model, steps, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [
        [scale * torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(steps)
    ]


def take_step(model, optim, grads, lr=0.01, clip=1e9):
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    return optimizer.step(optim, lr, clip)


def by_formula(model, steps, lr=0.01, clip=1e9, b1=0.9, b2=0.999, eps=1e-6, decay=0.01):
    found = []
    norms = [torch.stack([g.double().norm() for g in grads]).norm() for grads in steps]
    for i, (name, p) in enumerate(model.named_parameters()):
        w, m, v = p.detach().double(), 0.0, 0.0
        for grads, norm in zip(steps, norms, strict=True):
            g = grads[i].double() * min(1.0, clip / norm)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            # torch decays first and then updates, w (1 - lr decay) - lr m / ..., which is the same
            w = w - lr * (m / (v.sqrt() + eps) + (0.0 if name.endswith("bias") else decay) * w)
        found.append(w)
    return found


@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_it_is_adamw_without_bias_correction(clip):
    net = model()
    steps = gradients(net, 5)
    wanted = by_formula(net, steps, clip=clip)
    optim = optimizer.adamw(net)
    for grads in steps:
        norm, skipped = take_step(net, optim, grads, clip=clip)
        assert skipped == 0 and torch.isclose(norm, torch.cat([g.flatten() for g in grads]).norm())
    for p, w in zip(net.parameters(), wanted, strict=True):
        assert torch.allclose(p.double(), w, rtol=1e-6, atol=1e-7)


def test_with_bias_correction_it_is_torchs_adamw():
    net, twin = model(), model()
    ours = optimizer.adamw(net, bias_correction=True, weight_decay=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, eps=1e-6, weight_decay=0.0, fused=True)
    for grads in gradients(net, 4):
        take_step(net, ours, grads)
        for p, g in zip(twin.parameters(), grads, strict=True):
            p.grad = g.clone()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    net = model()
    optim = optimizer.adamw(net)
    first, second, third = gradients(net, 3)
    take_step(net, optim, first)
    before = [p.detach().clone() for p in net.parameters()]
    state = {name: x.clone() for name, x in optimizer.state(net, optim).items()}
    second[2][0] = bad
    _, skipped = take_step(net, optim, second)
    assert skipped == 1
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(x, state[name]) for name, x in optimizer.state(net, optim).items())
    take_step(net, optim, third)
    wanted = by_formula(model(), [first, third])
    assert all(
        torch.allclose(p.double(), w, rtol=1e-6, atol=1e-7)
        for p, w in zip(net.parameters(), wanted, strict=True)
    )


def test_skipped_steps_and_their_longest_run_are_counted():
    skipped = optimizer.Skipped(5)
    for step, bad in enumerate([0, 1, 0, 1, 1, 1, 0, 1, 1]):
        skipped.add(step, bool(bad))
    assert (skipped.steps, skipped.longest_run, skipped.first) == (5 + 6, 3, 3)


def test_it_decays_only_matrices_and_embeddings():
    net = Electra(ElectraConfig.tiny())
    decayed, plain = optimizer.adamw(net).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    names = {p: name for name, p in net.named_parameters()}
    assert {names[p] for p in plain["params"]} == {n for p, n in names.items() if p.ndim == 1}
    assert {p.ndim for p in decayed["params"]} == {2}
    assert any(n.endswith("embedding.words") for n in map(names.get, decayed["params"]))


def test_the_schedule_is_the_papers():
    rate = [optimizer.learning_rate(t, peak=2.0, warmup=4, total=10) for t in range(10)]
    wanted = [2.0 * (1 - t / 10) * min(1, t / 4) for t in range(10)]
    assert rate == wanted and rate[0] == 0
    assert optimizer.learning_rate(0, peak=1.0, warmup=0, total=1) == 0


def test_a_negative_second_moment_is_refused():
    model = nn.Linear(3, 2)
    state = optimizer.state(model, optimizer.adamw(model))
    optimizer.check(state)
    state["exp_avg"] = -torch.ones(2)
    optimizer.check(state)
    state["exp_avg_sq.bias"] = torch.tensor([1.0, -0.5])
    with pytest.raises(ValueError, match=r"exp_avg_sq.bias must not be negative, got -0.5"):
        optimizer.check(state)
