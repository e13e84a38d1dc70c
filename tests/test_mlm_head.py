import pytest
import torch
import torch.nn.functional as F

from electra_fast import ops, testing
from electra_fast.ops._operators import OPERATORS
from electra_fast.testing import Example
from electra_fast.testing.distributions.statistics import chi_square, plausible
from electra_fast.testing.judge import assert_samples

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


@pytest.fixture
def fast(implementation, device):
    """Skip implementations that run one program or block at a time, in Python or in fibres."""
    if device == "cpu" and implementation[1] in ("triton", "cuda"):
        pytest.skip("slow without a GPU; test_implementations_draw_the_same compares its draws")


def test_draws_from_the_softmax(implementation, device, fast):
    testing.check_sampler(testing.implementations(OP)[implementation[1]], device=device)


@pytest.mark.parametrize("scale", [0.02, 1.0], ids=["flat", "peaked"])
def test_two_million_draws(scale, device):
    g = torch.Generator().manual_seed(2)
    x, table = scale * torch.randn(1, 16, generator=g), torch.randn(257, 16, generator=g)
    counts = torch.zeros(257)
    for step in range(2):
        change = {"targets": torch.zeros(2**20, dtype=torch.long), "weights": torch.ones(2**20)}
        change |= {"x": x.repeat(2**20, 1), "table": table, "bias": torch.zeros(257)}
        samples = ops.mlm_head(**arguments(device, **change, rng=torch.tensor([3, step]))).samples
        counts += samples.bincount(minlength=257).cpu()
    p = (x @ table.T).double().softmax(-1)[0]
    judgement = plausible(chi_square(counts, p * 2**21))
    assert not judgement.why, judgement.why


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "disallow_correct": True}], ids=["defaults", "options"]
)
def test_implementations_draw_the_same(device, options):
    """A draw may differ if u is within rounding of a boundary: at most one row in a hundred."""
    args = arguments(device, M=200, V=300, E=24)
    draws = {n: f(**args, **options).samples for n, f in testing.implementations(OP).items()}
    for name, samples in draws.items():
        assert_samples(Example(OP, name, args | options), samples)
        assert (samples != draws["reference"]).sum() <= 2, name


@pytest.mark.parametrize(
    "fault",
    [
        lambda s: (s + 1) % 257,
        lambda s: torch.where(torch.rand(s.shape) < 0.01, 7, s),
        lambda s: s // 2 * 2,
    ],
    ids=["shifted", "the token of probability 0", "only even ids"],
)
def test_the_check_finds_a_broken_sampler(fault):
    def broken(*args, **options):
        out = ops.mlm_head(*args, **options)
        return out._replace(samples=fault(out.samples))

    with pytest.raises(AssertionError):
        testing.check_sampler(broken)


def test_the_check_finds_an_lse_in_an_unused_slot():
    def broken(x, table, bias, targets, weights, rng, **options):
        out = ops.mlm_head(x, table, bias, targets, weights, rng, **options)
        return out._replace(lse=out.lse + (weights == 0))

    with pytest.raises(AssertionError, match="lse"):
        testing.check_op(OP, broken, seed=0)


def test_unused_slots_get_no_gradient_and_may_have_any_value(implementation, device):
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


def test_no_slots_and_zero_weights_give_zero(implementation, device):
    f = testing.implementations(OP)[implementation[1]]
    for args in (arguments(device, M=0), arguments(device, weights=torch.zeros(6))):
        args["table"].requires_grad_()
        out = f(**args)
        out.loss.backward()
        assert out.loss == 0 and out.correct == 0 and (args["table"].grad == 0).all()


@pytest.mark.parametrize("V", [1, 2, 3, 257, 1000])
def test_vocabulary_sizes(implementation, device, V):
    out = testing.implementations(OP)[implementation[1]](**arguments(device, V=V))
    assert out.loss.isfinite() and (out.samples >= 0).all() and (out.samples < V).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures(implementation, device, temperature):
    args = arguments(device, M=100)
    out = testing.implementations(OP)[implementation[1]](**args, temperature=temperature)
    logits = F.linear(args["x"], args["table"], args["bias"])
    if temperature < 1:
        assert torch.equal(out.samples, logits.argmax(-1))
    else:
        assert len(out.samples.unique()) > 20
    # The temperature changes only the samples.
    assert torch.allclose(out.loss, F.cross_entropy(logits, args["targets"]))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # of NumPy
@pytest.mark.parametrize("temperature", [1e-300, 1e50, 1e300])
def test_a_temperature_outside_the_range_of_float32(implementation, device, temperature):
    args = arguments(device, M=30)
    samples = testing.implementations(OP)[implementation[1]](**args, temperature=temperature).samples
    if temperature < 1:
        logits = F.linear(args["x"], args["table"], args["bias"])
        assert torch.equal(samples, logits.argmax(-1))
    else:
        assert len(samples.unique()) > 10


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # of NumPy
@pytest.mark.parametrize("largest", [1e4, 1e30, 3e38])
@pytest.mark.parametrize(("target", "dtype"), [(4, torch.float32), (5, torch.float32), (4, torch.bfloat16)])
def test_the_largest_logits_and_their_negatives(largest, target, dtype, implementation, device):
    """Sixteen logits tie for the largest: such a target has the loss log 16, any other that of PyTorch."""
    args = arguments(device, M=16)
    args["bias"] = torch.where(torch.arange(31) % 2 == 0, largest, -largest).to(device)
    args["targets"][:] = target
    args["x"] = args["x"] * 1e-6  # ties up to rounding
    if largest == 1e4:
        args["x"] *= 0
    args |= {name: args[name].to(dtype) for name in ("x", "table")}
    leaves = {name: args[name].requires_grad_() for name in ("x", "table", "bias")}
    out = testing.implementations(OP)[implementation[1]](**args)
    gradients = torch.autograd.grad(out.loss, leaves.values())

    logits = F.linear(args["x"].float(), args["table"].float(), args["bias"])
    wanted = F.cross_entropy(logits, args["targets"])
    assert torch.allclose(out.loss, wanted)
    assert torch.allclose(out.lse, logits.logsumexp(-1))
    for got, right in zip(gradients, torch.autograd.grad(wanted, leaves.values()), strict=True):
        assert torch.allclose(got, right, rtol=2e-2, atol=1e-5)
    assert (out.samples % 2 == 0).all() and len(out.samples.unique()) > 3
    wrong = testing.implementations(OP)[implementation[1]](**args, disallow_correct=True, temperature=0.5)
    assert (wrong.samples % 2 == 0).all() and (wrong.samples != target).all()


def test_without_columns_the_logits_are_the_bias(implementation, device):
    args = arguments(device, M=20, E=0)
    for name in ("x", "table", "bias"):
        args[name].requires_grad_()
    out = testing.implementations(OP)[implementation[1]](**args)
    out.loss.backward()
    logits = args["bias"].detach().expand(20, 31)
    assert torch.allclose(out.loss, F.cross_entropy(logits, args["targets"]))
    assert args["x"].grad.shape == (20, 0) and args["table"].grad.shape == (31, 0)
    share = args["targets"].bincount(minlength=31) / 20
    assert torch.allclose(args["bias"].grad, logits[0].softmax(0) - share, atol=1e-6)


def test_disallow_correct_holds_for_a_peaked_row(implementation, device):
    args = arguments(device)
    args["bias"][4] = 1e4
    args["targets"][:] = 4
    f = testing.implementations(OP)[implementation[1]]
    assert (f(**args).samples == 4).all()
    assert (f(**args, disallow_correct=True).samples != 4).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_draws_a_valid_id_and_changes_no_other_row(implementation, device, value):
    args = arguments(device)
    args["x"][1] = value
    out = testing.implementations(OP)[implementation[1]](**args)
    assert out.loss.isnan() and 0 <= out.samples[1] < 31
    rest = torch.arange(6, device=device) != 1
    whole = testing.implementations(OP)[implementation[1]](**arguments(device))
    assert torch.equal(out.samples[rest], whole.samples[rest])


def test_any_number_of_threads_gives_the_same_bits(check_thread_counts):
    example = next(e for e in testing.examples(OP) if e.name.startswith("M=37"))
    args = {"table": torch.randn(5000, 24), "bias": torch.randn(5000), "x": torch.randn(300, 24)}
    args |= {"targets": torch.randint(5000, (300,)), "weights": torch.ones(300)}
    example.args.update(args)
    check_thread_counts(ops.mlm_head, example)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_vocabulary(device, dtype):
    """Many tiles of ids, sizes that are not multiples of a tile, and more slots than one chunk."""
    g = torch.Generator().manual_seed(4)
    args = {"x": torch.randn(300, 72, generator=g).to(dtype), "table": torch.randn(30522, 72, generator=g)}
    args |= {"bias": torch.randn(30522, generator=g), "weights": (torch.rand(300, generator=g) > 0.5).float()}
    args["table"] = (0.2 * args["table"]).to(dtype)
    args = arguments(device, **args, targets=torch.randint(30522, (300,), generator=g))
    testing.check_example(ops.mlm_head, Example(OP, "a whole vocabulary", args, ("x", "table", "bias")))


def test_the_arg_max_of_a_tie_is_the_lowest_id(implementation, device):
    args = arguments(device, V=400)
    args["table"][:] = 0
    args["bias"][:] = 0
    args["bias"][[70, 75, 300]] = 2.0
    args["targets"][:] = torch.tensor([70, 75, 300, 0, 70, 75], device=device)
    assert testing.implementations(OP)[implementation[1]](**args).correct == 2


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)])
def test_only_the_wanted_gradients_are_computed(implementation, device, wanted):
    operator = getattr(OPERATORS["mlm_head_bwd"], implementation[1])
    *_, dx, dtable, dbias = operator(*arguments(device).values(), 1.0, False, *wanted)
    assert (dx.numel() > 0, dtable.numel() > 0) == wanted and dbias.shape == (31,)


def test_a_frozen_table_does_not_change_the_gradient_of_x(implementation, device):
    args = arguments(device)
    args["x"].requires_grad_()
    out = testing.implementations(OP)[implementation[1]](**args)
    (dx,) = torch.autograd.grad(out.loss, args["x"])
    args["table"].requires_grad_()
    wanted = torch.autograd.grad(ops.REFERENCE.mlm_head(**args).loss, args["x"])[0]
    assert torch.allclose(dx, wanted, atol=1e-6)


def test_backward_runs_twice(implementation, device):
    args = arguments(device)
    args["table"].requires_grad_()
    loss = testing.implementations(OP)[implementation[1]](**args).loss
    first, second = (torch.autograd.grad(g * loss, args["table"], retain_graph=True)[0] for g in (1, 3))
    assert torch.allclose(3 * first, second)


def test_a_gradient_too_small_for_float16_survives_until_it_is_scaled(implementation, device):
    """With 1e5 slots a gradient is 1e-5 P; it must not become 0 before the loss scale multiplies it."""
    half = {name: arguments()[name].half() for name in ("x", "table")}
    args = arguments(device, **half, weights=torch.tensor([1e-4] * 5 + [1e4]))
    args["x"].requires_grad_()
    loss = testing.implementations(OP)[implementation[1]](**args).loss
    (dx,) = torch.autograd.grad(loss * 2.0**26, args["x"])
    assert (dx[:5] != 0).any(1).all()


def test_tensors_need_not_be_aligned(implementation, device):
    args = arguments(device)
    for name in ("x", "table", "bias", "targets", "weights"):
        x = args[name]
        args[name] = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    f = testing.implementations(OP)[implementation[1]]
    assert torch.equal(f(**args).samples, f(**arguments(device)).samples)


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


@pytest.mark.skipif("triton" not in testing.implementations(OP), reason="Triton is not installed")
def test_programs_of_many_tiles_and_slots_of_many_chunks(device, monkeypatch):
    """As for real sizes, a program has several tiles, and the stored exponentials need several chunks.

    The slots and the blocks of tokens are counted, summed and searched in several steps.
    """
    from electra_fast.kernels import mlm_head

    monkeypatch.setattr(mlm_head, "BLOCK", 4)
    monkeypatch.setattr(mlm_head, "PROGRAMS", 2)
    monkeypatch.setattr(mlm_head, "CHUNK_BYTES", 1)
    g = torch.Generator().manual_seed(6)
    for dtype in (torch.float32, torch.bfloat16):
        args = arguments(device, M=150, V=300, E=24)
        args |= {name: args[name].to(dtype) for name in ("x", "table")}
        args["weights"] = (torch.rand(150, generator=g) > 0.2).float().to(device)
        example = Example(OP, f"many {dtype}", args, ("x", "table", "bias"))
        testing.check_example(testing.implementations(OP)["triton"], example)


@pytest.mark.parametrize("bad", [31, -1, 2**31 + 5])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_bad_target_makes_only_its_own_row_nan(device, name, bad):
    args = arguments(device)
    args["targets"][3] = bad
    args["x"].requires_grad_()
    if name not in testing.implementations(OP):
        pytest.skip(f"{name} is not available here")
    with testing.guarded_memory():
        out = testing.implementations(OP)[name](**args)
        out.loss.backward()
    assert out.loss.isnan() and (out.samples >= 0).all() and (out.samples < 31).all()
    assert args["x"].grad[3].isnan().all() and args["x"].grad[[0, 1, 2, 4, 5]].isfinite().all()


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
            "mlm_head: disallow_correct must be False if the vocabulary",
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
        (
            {"table": torch.zeros(0, 16), "bias": torch.zeros(0)},
            ValueError,
            "mlm_head: table must have at least one row, got shape [0, 16]",
        ),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error) as caught:
        ops.mlm_head(**arguments(**change))
    assert message in str(caught.value)


def test_the_gradient_of_a_confident_row_is_more_accurate_than_a_float32_lse(implementation, device):
    """p - 1 of the target is about 1e-6 here, as large as the rounding error of lse in float32."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 64, generator=generator)
    targets = torch.arange(8)
    confident = table[targets] * (torch.linspace(27, 29, 8) / table[targets].square().sum(1))[:, None]
    args = {"x": confident, "table": table, "bias": torch.zeros(50), "targets": targets}
    args |= {"weights": torch.ones(8), "rng": torch.tensor([1, 0])}
    example = testing.Example(OP, "confident", args, ("x", "table", "bias"))
    testing.check_example(testing.implementations(OP)[implementation[1]], example.to(device=device))
