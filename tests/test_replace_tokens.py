import pytest
import torch

from electra_fast import ops, testing

OP = "replace_tokens"
IDS = torch.tensor([[10, 11, 12], [13, 14, 15]])


def replaced(function=ops.replace_tokens, device="cpu", **change):
    args = {"ids": IDS, "positions": torch.tensor([1, 4, 0]), "samples": torch.tensor([11, 99, 77])}
    args |= {"weights": torch.tensor([1.0, 1.0, 0.0])} | change
    return function(**{name: x.to(device) for name, x in args.items()})


def test_a_sample_that_equals_the_original_is_not_a_replacement(implementation, device):
    out = replaced(testing.implementations(OP)[implementation[1]], device)
    assert out.ids.tolist() == [[10, 11, 12], [13, 99, 15]]
    assert out.replaced.tolist() == [[False, False, False], [False, True, False]]


def test_the_original_ids_do_not_change(kernel, device):
    replaced(kernel, device)
    assert IDS.tolist() == [[10, 11, 12], [13, 14, 15]]


@pytest.mark.parametrize("position", [-1, 6, 2**31 + 1])
def test_a_bad_position_raises_on_the_cpu_and_is_not_written_by_a_kernel(position):
    bad = torch.tensor([1, position, 0])
    with pytest.raises(IndexError, match=r"replace_tokens: positions must be in \[0, 6\), got"):
        replaced(testing.implementations(OP)["reference"], positions=bad)
    if testing.interpreted():
        with testing.guarded_memory():
            out = replaced(testing.implementations(OP)["triton"], positions=bad)
        assert out.ids.tolist() == IDS.tolist()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": IDS.bool()}, TypeError, "replace_tokens: ids must be int64 or int32, got bool"),
        (
            {"samples": torch.tensor([1, 2])},
            ValueError,
            "replace_tokens: samples must have shape [3], got [2]",
        ),
        (
            {"positions": torch.tensor([1, 4, 0]).int()},
            TypeError,
            "replace_tokens: positions must be int64, got int32",
        ),
        (
            {"weights": torch.ones(3, dtype=torch.bool)},
            TypeError,
            "replace_tokens: weights must be float32, got bool",
        ),
        (
            {"positions": torch.zeros(3, 1, dtype=torch.long)},
            ValueError,
            "positions must have shape [*], got [3, 1]",
        ),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error) as caught:
        replaced(**change)
    assert message in str(caught.value)
