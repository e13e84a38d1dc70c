import pytest
import torch
import torch.nn.functional as F
from conftest import both_paths

from electra_fast import ops, testing
from electra_fast.ops._operators import OPERATORS
from electra_fast.philox import keep_mask

OP = "attention"
RNG = torch.tensor([1, 0])
TRITON = pytest.mark.skipif("triton" not in testing.implementations(OP), reason="Triton cannot run here")


def heads(*shape, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device).requires_grad_() for _ in range(3)]


def test_is_torchs_attention(implementation, device):
    q, k, v = heads(2, 19, 3, 32, device=device)
    o = testing.implementations(OP)[implementation[1]](q, k, v)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.allclose(o, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_the_operator_returns_the_log_sum_exp_of_the_scores(name, device):
    if not (forward := getattr(OPERATORS["attention_fwd"], name)):
        pytest.skip(f"{name} is not available here")
    q, k, v = (x.detach() for x in heads(2, 19, 3, 32, device=device))
    _, lse = forward(q, k, v, None, None, 19, False, 0.3, 0.0, None, 0, None, 19)
    wanted = 0.3 * torch.einsum("blhd,bmhd->blhm", q, k)
    assert torch.allclose(lse, wanted.logsumexp(-1), atol=1e-5)


def test_a_query_that_sees_no_key_gives_zero_and_zero_gradient(implementation, device):
    q, k, v = heads(2, 5, 1, 16, device=device)
    key_mask = torch.tensor([[True] * 5, [False] * 5], device=device)
    o = testing.implementations(OP)[implementation[1]](q, k, v, key_mask=key_mask)
    o.sum().backward()
    assert (o[1] == 0).all() and (o[0] != 0).all()
    for x in (q, k, v):
        assert (x.grad[1] == 0).all() and x.grad.isfinite().all()


def test_packed_sequences_give_what_padded_ones_give(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = (x.detach() for x in heads(3, 8, 2, 16, device=device))
    lengths = torch.tensor([8, 3, 5], device=device)
    real = torch.arange(8, device=device) < lengths[:, None]
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    packed = function(q[real], k[real], v[real], cu_seqlens=cu, max_seqlen=8)
    assert torch.allclose(packed, function(q, k, v, key_mask=real)[real], atol=1e-6)


@pytest.mark.parametrize("L", [24, 150])
def test_float32_gradients_cancel_to_the_last_digit(L, implementation, device):
    """If all values are equal, the output does not depend on the scores, and their gradient is 0.

    dO is nearly orthogonal to the value. The sum of dO O has the rounding error of its large terms, but the
    sum of P dP is as accurate as dP itself.
    """
    D = 64
    q, k, v = heads(1, L, 2, D, device=device, seed=3)
    do = torch.randn(1, L, 2, D, generator=torch.Generator().manual_seed(4)).to(device)
    with torch.no_grad():
        v.copy_(v[:, :1].clone())
        do -= (do * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True) * v
    if implementation[1] == "reference":
        pytest.skip("the reference sums dO O")
    if implementation[1] == "triton" and testing.interpreted():
        product = do[0, :, 0].numpy() @ v.detach()[0, :, 0].numpy().T
        if (product != product[:, :1]).any():  # so do some versions of OpenBLAS for AVX2
            pytest.skip("NumPy rounds equal columns of a product differently, so dP is not the same in a row")
    function = testing.implementations(OP)[implementation[1]]
    dq, dk, _ = torch.autograd.grad(function(q, k, v), (q, k, v), do)
    dp = (do.double() * v.double()).sum(-1).abs().max() + 4 * torch.finfo(v.dtype).eps * D**0.5
    bound = 4 * torch.finfo(v.dtype).eps * dp * L * max(q.abs().max(), k.abs().max())
    assert max(dq.abs().max(), dk.abs().max()) < bound


@pytest.mark.parametrize(
    ("B", "L", "dtype"),
    [
        (2, 32, torch.float32),
        (1, 96, torch.float32),
        (2, 32, torch.bfloat16),
        (1, 96, torch.bfloat16),
        (1, 160, torch.bfloat16),
    ],
)
def test_dropout_drops_what_keep_mask_says_forward_and_backward(B, L, dtype, implementation, device):
    """If v and dO are columns of the identity, o and dv contain the probabilities after dropout."""
    H, D, p = 2, 32, 0.25
    function, rng = testing.implementations(OP)[implementation[1]], RNG.to(device)
    q, k, _ = (x.detach().to(dtype) for x in heads(B, L, H, D, device=device))
    columns = torch.eye(L, device=device, dtype=dtype)[None, :, None].expand(B, L, H, L).split(D, -1)
    forward, backward, whole = [], [], []
    for part in columns:
        v = part.clone().requires_grad_()
        o = function(q, k, v, dropout=p, rng=rng, stream=3)
        (dv,) = torch.autograd.grad(o, v, part)
        forward.append(o.detach()), backward.append(dv), whole.append(function(q, k, part))
    dropped, replayed, whole = (torch.cat(x, -1) for x in (forward, backward, whole))
    kept = dropped != 0
    rtol = 4 * torch.finfo(dtype).eps
    assert torch.allclose(dropped[kept], whole[kept] / (1 - p), rtol=max(rtol, 1e-5))
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    rows = torch.arange(B * L * H).view(B, L, H)  # t * H + h
    assert torch.equal(kept.cpu(), keep_mask(RNG, 3, rows, L, p))
    assert torch.equal(replayed.transpose(1, 3) != 0, kept)  # dv has one row per key and one column per query


# One token, and the edges of every block. The longest sequence of a batch selects the kernel.
@pytest.mark.parametrize(
    "lengths", [(1, 2, 5, 0, 17, 31, 32, 33, 63, 64), (65, 127, 128), (129, 200, 0, 257)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_around_the_edges_of_blocks(lengths, dtype, implementation, device, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), 1, 32, generator=generator).to(dtype) for _ in range(3))
    bounds = torch.tensor((0, *lengths)).cumsum(0).int()
    args = {"q": q, "k": k, "v": v, "cu_seqlens": bounds, "max_seqlen": max(lengths)}
    example = testing.Example(OP, f"{lengths} {dtype}", args, ("q", "k", "v"))
    testing.check_example(testing.implementations(OP)[implementation[1]], example.to(device=device))


@TRITON
@pytest.mark.parametrize("L", [40, 140])
@pytest.mark.parametrize(
    ("bounds", "bad"),
    [
        ([0, 9, 20], slice(0, 0)),
        ([0, 9, 300], slice(9, None)),
        ([0, 9, 5, 40], slice(None)),
        ([0, 40, 9, 40], slice(None)),
        ([-9, 9, 20], slice(0, 9)),
        ([2, 9, 20], slice(0, 9)),
    ],
    ids=["fewer than the tokens", "above", "falling", "falling far", "below", "not from 0"],
)
def test_wrong_bounds_give_nan_on_a_gpu_and_rows_of_no_sequence_are_zero(bounds, bad, L, device):
    """On a GPU the kernels are the first to read the bounds."""
    function = testing.implementations(OP)["triton"]
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in heads(L, 2, 16, device=device))
    cu = torch.tensor(bounds, device=device, dtype=torch.int32)
    with testing.guarded_memory():
        o = function(q, k, v, cu_seqlens=cu, max_seqlen=L)
        gradients = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    is_bad = torch.zeros(L, dtype=torch.bool)
    is_bad[bad] = True
    for x in (o, *gradients):
        x = x.detach().cpu()
        assert x[is_bad].isnan().all() and x[~is_bad].isfinite().all()
        assert x[20:][~is_bad[20:]].eq(0).all()


@TRITON
def test_strides_may_need_more_than_32_bits(device):
    function = testing.implementations(OP)["triton"]
    memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)  # only a few pages are used
    far = [memory[i * 1024 :].as_strided((2, 8, 2, 16), (2**31, 32, 16, 1)) for i in range(3)]
    near = [torch.randn(2, 8, 2, 16, device=device, dtype=torch.bfloat16) for _ in far]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    assert torch.equal(function(*far), function(*near))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an interpreted kernel always has the same order")
@pytest.mark.parametrize("L", [128, 512])
def test_200_runs_give_the_same_bits(L, device):
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in heads(16, L, 4, 64, device=device))
    results = []
    for _ in range(200):
        o = ops.attention(q, k, v, dropout=0.1, rng=RNG.to(device))
        results.append([o.detach(), *torch.autograd.grad(o, (q, k, v), torch.ones_like(o))])
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


def test_a_second_backward_pass_accumulates_nothing(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = heads(2, 9, 2, 16, device=device)
    o = function(q, k, v, dropout=0.3, rng=RNG.to(device))
    first, second = (
        torch.autograd.grad(o, (q, k, v), torch.full_like(o, g), retain_graph=True) for g in (1, 4)
    )
    assert all(torch.allclose(4 * a, b, rtol=1e-6) for a, b in zip(first, second, strict=True))


def test_slices_and_transposed_heads_are_read_by_their_strides(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    qkv = torch.randn(2, 7, 3, 2, 16, device=device)
    sliced = function(*qkv.unbind(2))
    assert torch.allclose(sliced, function(*(x.contiguous() for x in qkv.unbind(2))), atol=1e-5)
    for a, b in ((1, 2), (2, 3)):
        turned = [x.transpose(a, b).contiguous().transpose(a, b) for x in qkv.unbind(2)]
        assert torch.allclose(sliced, function(*turned), atol=1e-5)


def test_casts_to_the_autocast_dtype(device):
    q, k, v = heads(1, 4, 2, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        o = ops.attention(q, k, v)
    o.float().sum().backward()
    assert o.dtype == torch.bfloat16 and q.grad.dtype == torch.float32


@pytest.mark.parametrize("D", [5, 64])
def test_masked_keys_may_be_nan_and_threads_change_no_bit(D, implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = heads(3, 70, 2, D, device=device)
    real = torch.rand(3, 70, generator=torch.Generator().manual_seed(1)).to(device) < 0.7
    options = {"key_mask": real, "dropout": 0.2, "rng": RNG.to(device)}

    def results():
        o = function(q, k, v, **options)
        return o.detach(), *torch.autograd.grad(o, (q, k, v), real[..., None, None].to(o).expand_as(o))

    wanted = results()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    again = results()
    torch.set_num_threads(threads)
    assert all(map(torch.equal, wanted, again))
    if implementation[1] != "reference":  # its einsum multiplies masked values by 0
        with torch.no_grad():
            k[~real], v[~real] = torch.nan, torch.inf
        for x, y in zip(results(), wanted, strict=True):
            assert torch.equal(x[real], y[real])


Q = torch.zeros(2, 3, 4, 8)


@both_paths(OP)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, "attention: q must be float32, float16, bfloat16 or float64, got int32"),
        ({"k": Q[:1]}, ValueError, "attention: k must have shape [2, *, 4, 8], got [1, 3, 4, 8]"),
        ({"v": Q.half()}, TypeError, "attention: v must be float32, got float16"),
        ({"key_mask": torch.ones(2, 3)}, TypeError, "attention: key_mask must be bool, got float32"),
        (
            {"key_mask": torch.ones(3, 2, dtype=torch.bool)},
            ValueError,
            "key_mask must have shape [2, 3], got [3, 2]",
        ),
        ({"dropout": 0.5}, ValueError, "attention: rng must be given if random numbers are drawn, got None"),
        (
            {"cu_seqlens": torch.tensor([0, 6]), "max_seqlen": 6},
            ValueError,
            "must have one token axis, got shape [2, 3, 4, 8]",
        ),
    ],
)
def test_refuses(change, error, message, path):
    with pytest.raises(error) as caught:
        path(**{"q": Q, "k": Q, "v": Q, **change})
    assert message in str(caught.value)


def test_refuses_bounds_that_do_not_fit_the_tokens_on_the_cpu():
    for bounds in ([0, 2], [1, 3], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="attention: cu_seqlens must rise from 0 to the 3 tokens, got"):
            ops.attention(*[torch.zeros(3, 4, 8)] * 3, cu_seqlens=torch.tensor(bounds), max_seqlen=3)


def test_refuses_a_max_seqlen_below_the_longest_on_the_cpu():
    with pytest.raises(ValueError, match="attention: max_seqlen must be at least 3, got 2"):
        ops.attention(*[torch.zeros(3, 4, 8)] * 3, cu_seqlens=torch.tensor([0, 3]), max_seqlen=2)


@pytest.mark.parametrize(
    ("tokens", "bounds"),
    [
        ((2, 0), None),
        ((0, 5), None),
        ((0,), [0]),
        ((0,), [0, 0]),
        ((0,), [0, 0, 0, 0]),
        ((2, 3), None),
        ((3,), [0, 0, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("rest", [(2, 16), (0, 16), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_axis_may_be_empty(tokens, bounds, rest, dtype, implementation, device):
    if bounds is None:
        layout = {"key_mask": torch.ones(tokens, dtype=torch.bool, device=device)}
    else:
        layout = {"cu_seqlens": torch.tensor(bounds, device=device, dtype=torch.int32), "max_seqlen": 4}
    q, k, v = heads(*tokens, *rest, device=device)
    with testing.guarded_memory():
        o = testing.implementations(OP)[implementation[1]](*(x.to(dtype) for x in (q, k, v)), **layout)
        o.sum().backward()
    assert o.shape == q.shape and o.dtype == dtype and o.isfinite().all()
    assert all(x.grad.shape == q.shape and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("bound", [9, 40, 2**40])
def test_max_seqlen_may_be_any_upper_bound(bound, implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = (x.detach() for x in heads(12, 2, 16, device=device))
    cu = torch.tensor([0, 9, 12], device=device, dtype=torch.int32)
    o = function(q, k, v, cu_seqlens=cu, max_seqlen=bound)
    assert torch.allclose(o[:9], function(q[None, :9], k[None, :9], v[None, :9])[0], atol=1e-6)


@pytest.mark.parametrize("bound", [True, 3.0, None])
def test_refuses_a_max_seqlen_that_is_not_an_int(bound):
    with pytest.raises(TypeError, match="attention: max_seqlen must be an int in a packed batch, got "):
        ops.attention(*[torch.zeros(3, 4, 8)] * 3, cu_seqlens=torch.tensor([0, 3]), max_seqlen=bound)
