import math

import pytest
import torch

from electra_fast import ops, testing

OP = "nce_loss"
LOG_ODDS = math.log(0.15 / 0.85)


def function_of(implementation):
    return testing.implementations(OP)[implementation[1]]


def batch(T, device, dtype=torch.float32):
    """Return (energies, log_q, noise, weights) of T tokens."""
    noise, weights = torch.rand(T, device=device) < 0.15, torch.rand(T, device=device)
    return torch.randn(T, device=device).mul_(3).to(dtype), -5 * weights.flip(0), noise, weights


def test_it_is_the_loss_of_the_paper(implementation, device):
    """Clark et al. 2020b: -E log[(n - k) p / ((n - k) p + k q)] over data, - E log[k q / (…)] over noise."""
    energies, log_q, noise, _ = batch(100, device)
    k, n = 15, 100
    data, other = (n - k) * energies.double().neg().exp(), k * log_q.double().exp()
    wanted = -(torch.where(noise, other, data) / (data + other)).log().mean()
    loss = function_of(implementation)(energies, log_q, noise, log_odds=math.log(k / (n - k))).loss
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bits_are_those_of_rtd_loss_of_the_logits(implementation, device, dtype, weighted):
    energies, log_q, noise, weights = batch(2500, device, dtype)
    weights = weights if weighted else None
    x = energies.clone().requires_grad_()
    logits = (energies.float() + log_q + LOG_ODDS).requires_grad_()
    got = function_of(implementation)(x, log_q, noise, weights, log_odds=LOG_ODDS)
    wanted = testing.implementations("rtd_loss")[implementation[1]](logits, noise, weights)
    assert torch.equal(got.loss, wanted.loss) and torch.equal(got.counts, wanted.counts)
    (dx,), (dlogits,) = torch.autograd.grad(got.loss, x), torch.autograd.grad(wanted.loss, logits)
    if dtype != torch.bfloat16 or implementation[1] != "triton":  # the interpreter truncates to bfloat16
        assert torch.equal(dx, dlogits.to(dtype))


@pytest.mark.parametrize("table", [ops.REFERENCE, ops.TORCH, ops.FUSED], ids=["reference", "torch", "fused"])
def test_only_the_energies_get_a_gradient(table, device):
    energies, log_q, noise, _ = batch(9, device)
    for x in (energies, log_q):
        x.requires_grad_()
    table.nce_loss(energies, log_q, noise).loss.backward()
    assert energies.grad is not None and log_q.grad is None


def test_a_token_that_the_noise_never_draws(implementation, device):
    never = torch.tensor([-torch.inf, 0.0], device=device)
    x = torch.zeros(2, device=device, requires_grad=True)
    noise = torch.zeros(2, dtype=torch.bool, device=device)
    loss, counts = function_of(implementation)(x, never, noise)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) / 2) and counts.tolist() == [0, 0, 0, 2]
    assert x.grad.tolist() == [0, 0.25]
    assert function_of(implementation)(x, never, ~noise).loss == torch.inf


@pytest.mark.parametrize("name", ["energies", "log_q"])
def test_tokens_of_weight_zero_may_have_any_energy_and_log_q(implementation, device, name):
    x = torch.zeros(4, device=device, requires_grad=True)
    anything = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0], device=device)
    args = {"energies": x, "log_q": torch.zeros(4, device=device)}
    args[name] = args[name].detach() + anything
    args["energies"].requires_grad_()
    noise, w = torch.tensor([True, False, True, False], device=device), torch.tensor([0.0, 0.0, 0.0, 3.0])
    loss, counts = function_of(implementation)(**args, noise=noise, weights=w.to(device))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and counts.tolist() == [0, 0, 0, 3]
    assert args["energies"].grad.tolist() == [0, 0, 0, 0.5]


@pytest.mark.parametrize("name", ["energies", "log_q", "weights"])
def test_nan_is_not_lost(implementation, device, name):
    energies, log_q, noise, weights = batch(3, device)
    args = {"energies": energies, "log_q": log_q, "noise": noise, "weights": weights + 1}
    args[name][1] = torch.nan
    assert function_of(implementation)(**args).loss.isnan()


@pytest.mark.parametrize("T", [0, 4])
def test_no_tokens_and_zero_weights_give_zero(implementation, device, T):
    energies, log_q, noise, _ = batch(T, device)
    energies.requires_grad_()
    loss, counts = function_of(implementation)(energies, log_q, noise, torch.zeros(T, device=device))
    loss.backward()
    assert loss == 0 and (energies.grad == 0).all() and counts.tolist() == [0, 0, 0, 0]


def test_triton_refuses_float64_and_names_the_reference(implementation, device):
    energies, log_q, noise, _ = batch(3, device, torch.float64)
    if implementation[1] == "triton":
        with pytest.raises(TypeError, match=r"got float64; use electra_fast.reference.nce_loss"):
            function_of(implementation)(energies, log_q, noise)
    else:
        assert function_of(implementation)(energies, log_q, noise).loss.dtype == torch.float64


X, Y = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X.int(), X, Y), {}, TypeError, "energies must be float32, float16, bfloat16 or float64, got int32"),
        ((X, X[0], Y), {}, ValueError, "log_q must have shape [2, 3], got [3]"),
        ((X, X.half(), Y), {}, TypeError, "log_q must be float32, got float16"),
        ((X, X.to("meta"), Y), {}, ValueError, "log_q must be on cpu as the others are, got meta"),
        ((X, X, X), {}, TypeError, "noise must be bool, got float32"),
        ((X, X, Y, Y), {}, TypeError, "weights must be float32, got bool"),
        ((X, X, Y), {"log_odds": math.inf}, ValueError, "log_odds must be finite, got inf"),
        ((X, X, Y), {"log_odds": math.nan}, ValueError, "log_odds must be finite, got nan"),
    ],
)
def test_refuses(args, options, error, message):
    with pytest.raises(error) as caught:
        ops.nce_loss(*args, **options)
    assert f"nce_loss: {message}" in str(caught.value)
