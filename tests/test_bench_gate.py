"""The gate before a provider is timed: what it accepts and refuses, and the rivals that it checks."""

import pytest
import torch
import torch.nn.functional as F
from fake_runs import GELU, SIZE

from benchmarks.harness import gate
from benchmarks.harness.cases import BOTH, OpCase
from benchmarks.harness.inputs import SIZES
from benchmarks.rivals import mlm_head as rivals
from benchmarks.rivals import require
from electra_fast import reference
from electra_fast.ops import FUSED, TORCH

MASK = {
    "ids": torch.arange(200, 456).view(4, 64),
    "candidates": torch.ones(4, 64, dtype=torch.bool),
    "key_mask": torch.arange(64) < torch.tensor([[64], [40], [7], [1]]),
    "rng": torch.tensor([0, 1]),
    "mask_id": 103,
}


def test_the_gate_lets_the_baselines_pass():
    gate.Gate("bias_gelu", GELU, ("x", "bias")).check(TORCH.bias_gelu)
    gate.Gate("mask_tokens", MASK, ()).check(TORCH.mask_tokens)


def test_the_gate_checks_a_kernel_without_floats():
    gate.check_kernel("mask_tokens", FUSED.mask_tokens, MASK)
    with pytest.raises(AssertionError):
        gate.check_kernel(
            "mask_tokens", lambda **args: FUSED.mask_tokens(**args)._replace(ids=args["ids"]), MASK
        )


def test_the_gate_tells_errors_beside_what_is_allowed():
    found = gate.Gate("bias_gelu", GELU, ("x", "bias")).check(
        lambda x, bias: F.gelu(x + bias) * (1 + 2.0**-20)
    )
    assert set(found) == {"result", "gradient of x", "gradient of bias"}
    error, allowed = found["result"]
    assert error < allowed < 2.0**-16
    assert error == pytest.approx(2.0**-20 * F.gelu(GELU["x"] + GELU["bias"]).abs().max().item(), rel=0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        lambda x, bias: F.gelu(x + bias.detach()) + 0 * bias.sum(),
        lambda x, bias: F.gelu(x + bias).bfloat16().float(),
        lambda x, bias: F.gelu(x + bias) * torch.nan,
    ],
)
def test_the_gate_refuses_other_work(wrong):
    with pytest.raises(AssertionError):
        gate.Gate("bias_gelu", GELU, ("x", "bias")).check(wrong)


@pytest.mark.parametrize("change", [{"mask_prob": 0.3}, {"key_mask": torch.ones(4, 64, dtype=torch.bool)}])
def test_the_gate_refuses_other_masks(change):
    with pytest.raises(AssertionError):
        gate.Gate("mask_tokens", MASK, ()).check(lambda **args: reference.mask_tokens(**args | change))


HEAD = ("x", "table", "bias")


@pytest.fixture
def head():
    """Return arguments of `mlm_head`: a quarter of the slots is unused, and the gate makes two pieces."""
    g, slots = torch.Generator().manual_seed(0), gate.SLOTS + 100
    shapes = {"x": (slots, 16), "table": (300, 16), "bias": (300,)}
    args = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    args["targets"] = torch.randint(300, (slots,), generator=g)
    args["weights"] = (torch.arange(slots) % 4 != 1).float()
    return args | {"rng": torch.tensor([0, 1])}


def test_the_definition_in_pieces_is_the_definition(head):
    example = gate.Gate("mlm_head", head, HEAD).example.to(torch.float64)
    (got, got_gradients), (ref, ref_gradients) = gate.pieces(example), gate.whole(example)
    for name in ("loss", "lse", "correct"):
        torch.testing.assert_close(got[name], ref[name], check_dtype=False)
    assert set(got_gradients) == set(ref_gradients) == set(HEAD)
    for name in HEAD:
        torch.testing.assert_close(got_gradients[name], ref_gradients[name])


@pytest.mark.parametrize("name", ["attention", "attention_qkv"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_attention_by_sequences_is_the_definition(name, packed, monkeypatch):
    g, B, L, H, D = torch.Generator().manual_seed(0), 7, 12, 2, 8
    bounds = torch.tensor([0, 12, 12, 15, 27, 28, 35, 46], dtype=torch.int32)
    key_mask = torch.rand(B, L, generator=g) > 0.3
    layout = {"cu_seqlens": bounds, "max_seqlen": L} if packed else {"key_mask": key_mask}
    names, heads = (("qkv",), (3, H, D)) if name == "attention_qkv" else (("q", "k", "v"), (H, D))
    shape = (46, *heads) if packed else (B, L, *heads)
    args = {x: torch.randn(shape, generator=g) for x in names} | layout
    example = gate.Gate(name, args, names).example.to(torch.float64)
    ref, ref_gradients = gate.whole(example)

    monkeypatch.setattr(gate, "SCORES", 3 * H * L * L)  # of three sequences
    calls, define = [], getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda **args: calls.append(1) or define(**args))
    got, got_gradients = gate.sequences(example)
    assert len(calls) == 2 * 3, "three pieces, each computed again for its gradient"
    torch.testing.assert_close(got, ref)
    torch.testing.assert_close(got_gradients, ref_gradients)
    assert set(got_gradients) == set(names)


@pytest.mark.parametrize("rival", ["linear_ce", "linear_ce_chunked", "linear_ce_one"])
def test_the_gate_lets_a_rival_leave_out_what_it_has_not(rival, head, monkeypatch):
    monkeypatch.setattr(rivals, "LOGITS", 300 * 500)  # three chunks
    try:
        require(rivals.RIVALS[rival])
    except ImportError as missing:
        pytest.skip(str(missing))
    gate.Gate("mlm_head", head, HEAD).check(rivals.RIVALS[rival])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda head: head._replace(loss=head.loss * 1.01),
        lambda head: head._replace(loss=head.loss.detach()),
        lambda head: head._replace(samples=None),
        lambda head: head._replace(samples=head.samples + 300),
        lambda head: head._replace(samples=head.samples[1:]),
        lambda head: head._replace(lse=head.lse + 1),
    ],
)
def test_the_gate_refuses_a_rival_s_other_work(wrong, head):
    check = gate.Gate("mlm_head", head, HEAD).check
    check(lambda **args: TORCH.mlm_head(**args)._replace(correct=None, lse=None))
    with pytest.raises(AssertionError):
        check(lambda **args: wrong(TORCH.mlm_head(**args)))


def test_a_rival_draws_from_the_softmax():
    torch.manual_seed(0)
    x, table, bias = torch.ones(20_000, 1), torch.zeros(4, 1), torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    share = torch.bincount(rivals.draw(x, table, bias), minlength=4) / len(x)
    assert (share - bias.exp()).abs().max() < 0.015  # four standard deviations


def test_the_sizes_that_one_op_has_do_without_the_reference():
    sizes = SIZES[SIZE], SIZES[SIZE]._replace(name="larger")
    common, own = (OpCase("mlm_head", None, size, BOTH, rivals.RIVALS) for size in sizes)
    assert own.name == "mlm_head, larger, forward+backward"
    assert own.providers == ("fused", "torch", *rivals.RIVALS, "compile", "compile_max")
    assert set(common.providers) == {*own.providers, "reference"}
