import pytest
import torch
import torch.nn.functional as F

from electra_fast import ops, testing

OP = "mlm_head"


def arguments(device="cpu", M=6, V=31, E=16, **change):
    g = torch.Generator().manual_seed(0)
    args = {"x": torch.randn(M, E, generator=g), "table": torch.randn(V, E, generator=g)}
    args |= {"bias": torch.randn(V, generator=g), "targets": torch.randint(V, (M,), generator=g)}
    args |= {"weights": torch.ones(M), "rng": torch.tensor([1, 0])}
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in {**args, **change}.items()}


def test_loss_is_torchs_cross_entropy(implementation, device):
    args = arguments(device)
    out = testing.implementations(OP)[implementation[1]](**args)
    logits = F.linear(args["x"], args["table"], args["bias"])
    assert torch.allclose(out.loss, F.cross_entropy(logits, args["targets"]))
    assert torch.allclose(out.lse, logits.logsumexp(-1), atol=1e-5)
    assert out.correct == (logits.argmax(-1) == args["targets"]).sum()


def test_draws_from_the_softmax(implementation, device):
    testing.check_sampler(testing.implementations(OP)[implementation[1]], device=device)


@pytest.mark.parametrize(
    "fault",
    [
        lambda s: (s + 1) % 257,
        lambda s: torch.where(torch.rand(s.shape) < 0.01, 7, s),
        lambda s: s // 2 * 2,
    ],
    ids=["shifted", "the token of probability 0", "even ids alone"],
)
def test_the_check_finds_a_broken_sampler(fault):
    def broken(*args, **options):
        out = ops.mlm_head(*args, **options)
        return out._replace(samples=fault(out.samples))

    with pytest.raises(AssertionError):
        testing.check_sampler(broken)


def test_unused_slots_cost_no_gradient_and_may_hold_anything(implementation, device):
    args = arguments(device)
    args["x"][2] = torch.nan
    args["targets"][2] = -100
    args["weights"][2] = 0
    for name in ("x", "table", "bias"):
        args[name].requires_grad_()
    out = testing.implementations(OP)[implementation[1]](**args)
    out.loss.backward()
    assert out.samples[2] == 0 and out.lse[2] == 0 and (args["x"].grad[2] == 0).all()
    assert all(args[name].grad.isfinite().all() for name in ("x", "table", "bias"))


def test_no_slot_and_no_weight_give_zero(implementation, device):
    f = testing.implementations(OP)[implementation[1]]
    for args in (arguments(device, M=0), arguments(device, weights=torch.zeros(6))):
        args["table"].requires_grad_()
        out = f(**args)
        out.loss.backward()
        assert out.loss == 0 and out.correct == 0 and (args["table"].grad == 0).all()


@pytest.mark.parametrize("V", [1, 2, 3, 257, 1000])
def test_vocabularies(implementation, device, V):
    out = testing.implementations(OP)[implementation[1]](**arguments(device, V=V))
    assert out.loss.isfinite() and (out.samples >= 0).all() and (out.samples < V).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures(implementation, device, temperature):
    args = arguments(device, M=200)
    out = testing.implementations(OP)[implementation[1]](**args, temperature=temperature)
    logits = F.linear(args["x"], args["table"], args["bias"])
    if temperature < 1:
        assert torch.equal(out.samples, logits.argmax(-1))
    else:
        assert len(out.samples.unique()) > 20
    assert torch.allclose(out.loss, F.cross_entropy(logits, args["targets"]))  # of the sample only


def test_a_peaked_row_may_still_not_draw_its_target(implementation, device):
    args = arguments(device)
    args["bias"][4] = 1e4
    args["targets"][:] = 4
    f = testing.implementations(OP)[implementation[1]]
    assert (f(**args).samples == 4).all()
    assert (f(**args, disallow_correct=True).samples != 4).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_strange_row_keeps_to_itself_and_draws_a_valid_id(implementation, device, value):
    args = arguments(device)
    args["x"][1] = value
    out = testing.implementations(OP)[implementation[1]](**args)
    assert out.loss.isnan() and 0 <= out.samples[1] < 31
    rest = torch.arange(6, device=device) != 1
    whole = testing.implementations(OP)[implementation[1]](**arguments(device))
    assert torch.equal(out.samples[rest], whole.samples[rest])


def test_large_logits_stay_finite(implementation, device):
    args = arguments(device, x=torch.full((6, 16), 1e3), table=torch.randn(31, 16) * 1e3)
    assert testing.implementations(OP)[implementation[1]](**args).loss.isfinite()


@pytest.mark.parametrize("bad", [31, -1, 2**31 + 5])
def test_a_bad_target_raises_on_the_cpu_and_makes_the_loss_nan_on_a_gpu(device, bad):
    args = arguments(device)
    args["targets"][3] = bad
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"mlm_head: targets must be in \[0, 31\), got {bad} at \[3\]"):
            ops.mlm_head(**args)
    else:
        assert ops.mlm_head(**args).loss.isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "mlm_head: temperature must be positive and finite, got 0"),
        (
            {"temperature": float("nan")},
            ValueError,
            "mlm_head: temperature must be positive and finite, got nan",
        ),
        (
            {"temperature": float("inf")},
            ValueError,
            "mlm_head: temperature must be positive and finite, got inf",
        ),
        (
            {"V": 1, "disallow_correct": True},
            ValueError,
            "mlm_head: disallow_correct must be False where the vocabulary",
        ),
        ({"table": torch.zeros(31, 8)}, ValueError, "mlm_head: table must have shape [*, 16], got [31, 8]"),
        (
            {"table": torch.zeros(31, 16).bfloat16()},
            TypeError,
            "mlm_head: table must be float32, got bfloat16",
        ),
        ({"targets": torch.zeros(6)}, TypeError, "mlm_head: targets must be int64 or int32, got float32"),
        ({"weights": torch.ones(5)}, ValueError, "mlm_head: weights must have shape [6], got [5]"),
        ({"rng": None}, ValueError, "mlm_head: rng must be given"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error) as caught:
        ops.mlm_head(**arguments(**change))
    assert message in str(caught.value)
