import pytest
import torch

from electra_fast import ops, reference

RNG = torch.tensor([1, 0])


def arguments(device="cpu", dtype=torch.float32, **change):
    generator = torch.Generator().manual_seed(0)
    word, position, type = (torch.randn(n, 8, generator=generator).to(dtype) for n in (20, 6, 2))
    args = {"ids": torch.tensor([[3, 4, 5], [6, 0, 0]]), "type_ids": None, "position_ids": None}
    args |= {"word": word, "position": position, "type": type}
    args |= {"norm_weight": torch.ones(8), "norm_bias": torch.zeros(8), "eps": 1e-12}
    args = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    return args | {
        n: x.to(device) if device != "cpu" and isinstance(x, torch.Tensor) else x for n, x in change.items()
    }


def test_types_and_positions_default_to_zero_and_the_place(device):
    ids = torch.tensor([[3, 4, 5], [6, 0, 0]])
    given = {"type_ids": torch.zeros_like(ids), "position_ids": torch.arange(3).expand(2, 3)}
    assert torch.equal(ops.embed(**arguments(device)), ops.embed(**arguments(device, **given)))


def test_a_packed_batch_starts_each_sequence_at_place_zero(device):
    packed = {"ids": torch.tensor([3, 4, 5, 6]), "cu_seqlens": torch.tensor([0, 3, 3, 4], dtype=torch.int32)}
    y = ops.embed(**arguments(device, **packed))
    padded = ops.embed(**arguments(device))
    assert torch.equal(y, torch.cat([padded[0], padded[1, :1]]))


def test_the_result_has_the_autocast_dtype_and_the_gradients_the_tables(device):
    args = arguments(device)
    args["word"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.embed(**args)
        assert y.dtype == reference.embed(**args).dtype == torch.bfloat16
    y.sum().backward()
    assert args["word"].grad.dtype == torch.float32
    assert ops.embed(**arguments(device, dtype=torch.float16)).dtype == torch.float16


def test_a_frozen_table_gets_no_gradient_and_an_unused_row_zero(device):
    args = arguments(device)
    args["word"].requires_grad_()
    ops.embed(**args).square().sum().backward()
    assert args["position"].grad is None and (args["word"].grad[10:] == 0).all()


@pytest.mark.parametrize("name", ["ids", "type_ids", "position_ids"])
@pytest.mark.parametrize("bad", [-1, 2**31 + 5, 20])
def test_a_bad_id_raises_on_the_cpu_and_makes_its_row_nan_on_a_gpu(device, name, bad):
    ids = torch.tensor([[0, 1, 1], [1, bad, 0]])
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"embed: {name} must be in \[0, \d+\), got {bad} at \[1, 1\]"):
            ops.embed(**arguments(**{name: ids}))
    else:
        y = ops.embed(**arguments(device, **{name: ids}))
        assert y[1, 1].isnan().all() and y[0].isfinite().all()


TABLE = torch.zeros(20, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(2, 3)}, TypeError, "embed: ids must be int64 or int32, got float32"),
        (
            {"ids": torch.zeros(2, 3, dtype=torch.uint8)},
            TypeError,
            "embed: ids must be int64 or int32, got uint8",
        ),
        (
            {"type_ids": torch.zeros(3, 2, dtype=torch.long)},
            ValueError,
            "embed: type_ids must have shape [2, 3], got [3, 2]",
        ),
        ({"position": TABLE[:, :4]}, ValueError, "embed: position must have shape [*, 8], got [20, 4]"),
        ({"type": TABLE.double()}, TypeError, "embed: type must be float32, got float64"),
        ({"norm_bias": torch.zeros(3)}, ValueError, "embed: norm_bias must have shape [8], got [3]"),
        ({"dropout": 0.1}, ValueError, "embed: rng must be given where numbers are drawn, got None"),
        ({"dropout": 1.0, "rng": RNG}, ValueError, "embed: dropout must be in [0, 1), got 1.0"),
        ({"word": TABLE.to("meta")}, ValueError, "embed: word must be on cpu as the others are, got meta"),
        (
            {"ids": torch.zeros(1, 7, dtype=torch.long)},
            ValueError,
            "ids must have at most 6 positions a sequence, got 7",
        ),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error) as caught:
        ops.embed(**arguments(**change))
    assert message in str(caught.value)


@pytest.mark.parametrize("bounds", [[1, 3], [0, 2], [0, 3, 2, 3]])
def test_refuses_wrong_bounds_on_the_cpu(bounds):
    with pytest.raises(ValueError, match="embed: cu_seqlens must rise from 0 to the 3 tokens"):
        ops.embed(**arguments(ids=torch.tensor([1, 2, 3]), cu_seqlens=torch.tensor(bounds)))
