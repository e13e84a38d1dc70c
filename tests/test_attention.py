import pytest
import torch
import torch.nn.functional as F

from electra_fast import ops, testing
from electra_fast.philox import keep_mask

OP = "attention"
RNG = torch.tensor([1, 0])


def heads(*shape, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device).requires_grad_() for _ in range(3)]


def test_is_torchs_attention(implementation, device):
    q, k, v = heads(2, 19, 3, 32, device=device)
    o = testing.implementations(OP)[implementation[1]](q, k, v)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.allclose(o, wanted, atol=1e-5)


def test_a_query_that_sees_no_key_gives_zero_and_zero_gradient(implementation, device):
    q, k, v = heads(2, 5, 1, 16, device=device)
    key_mask = torch.tensor([[True] * 5, [False] * 5], device=device)
    o = testing.implementations(OP)[implementation[1]](q, k, v, key_mask=key_mask)
    o.sum().backward()
    assert (o[1] == 0).all() and (o[0] != 0).all()
    for x in (q, k, v):
        assert (x.grad[1] == 0).all() and x.grad.isfinite().all()


def test_packed_is_padded_without_the_padding(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = (x.detach() for x in heads(3, 8, 2, 16, device=device))
    lengths = torch.tensor([8, 3, 5], device=device)
    real = torch.arange(8, device=device) < lengths[:, None]
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    packed = function(q[real], k[real], v[real], cu_seqlens=cu, max_seqlen=8)
    assert torch.allclose(packed, function(q, k, v, key_mask=real)[real], atol=1e-6)


def test_dropout_is_that_of_the_contract(implementation, device):
    """With v the identity the output is the dropped probabilities themselves."""
    L, p = 32, 0.25
    q, k, _ = (x.detach() for x in heads(4, L, 2, L, device=device))
    v = torch.eye(L, device=device)[None, :, None].expand(4, L, 2, L)
    function, rng = testing.implementations(OP)[implementation[1]], RNG.to(device)
    dropped = function(q, k, v, dropout=p, rng=rng, stream=3)
    whole = function(q, k, v)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], whole[kept] / (1 - p), rtol=1e-5)
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    rows = torch.arange(4 * L * 2).view(4, L, 2)  # t * H + h
    assert torch.equal(kept.cpu(), keep_mask(RNG, 3, rows, L, p))


def test_slices_of_one_tensor_and_transposed_heads_are_taken_by_their_strides(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    qkv = torch.randn(2, 7, 3, 2, 16, device=device)
    sliced = function(*qkv.unbind(2))
    assert torch.allclose(sliced, function(*(x.contiguous() for x in qkv.unbind(2))), atol=1e-5)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.unbind(2)]
    assert torch.allclose(sliced, function(*turned), atol=1e-5)


def test_nothing_in_nothing_out(device):
    q, k, v = heads(0, 5, 2, 16, device=device)
    assert ops.attention(q, k, v).shape == (0, 5, 2, 16)
    q, k, v = heads(0, 2, 16, device=device)
    o = ops.attention(q, k, v, cu_seqlens=torch.zeros(1, dtype=torch.int32, device=device), max_seqlen=4)
    o.sum().backward()
    assert o.shape == q.grad.shape == (0, 2, 16)


def test_casts_to_the_autocast_dtype(device):
    q, k, v = heads(1, 4, 2, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        o = ops.attention(q, k, v)
    o.float().sum().backward()
    assert o.dtype == torch.bfloat16 and q.grad.dtype == torch.float32


Q = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, "attention: q must be float32, float16, bfloat16 or float64, got int32"),
        ({"k": Q[:1]}, ValueError, "attention: k must have shape [2, 3, 4, 8], got [1, 3, 4, 8]"),
        ({"v": Q.half()}, TypeError, "attention: v must be float32, got float16"),
        ({"key_mask": torch.ones(2, 3)}, TypeError, "attention: key_mask must be bool, got float32"),
        (
            {"key_mask": torch.ones(3, 2, dtype=torch.bool)},
            ValueError,
            "key_mask must have shape [2, 3], got [3, 2]",
        ),
        ({"dropout": 0.5}, ValueError, "attention: rng must be given where numbers are drawn, got None"),
        (
            {"cu_seqlens": torch.tensor([0, 6]), "max_seqlen": 6},
            ValueError,
            "must have one token axis, got shape [2, 3, 4, 8]",
        ),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error) as caught:
        ops.attention(**{"q": Q, "k": Q, "v": Q, **change})
    assert message in str(caught.value)


def test_refuses_a_max_seqlen_below_the_longest_on_the_cpu():
    with pytest.raises(ValueError, match="attention: max_seqlen must be at least 3, got 2"):
        ops.attention(*[torch.zeros(3, 4, 8)] * 3, cu_seqlens=torch.tensor([0, 3]), max_seqlen=2)
