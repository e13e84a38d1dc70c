"""`attention` to keys of other tokens than the queries: cross-attention, earlier keys, one query."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import both_paths

from electra_fast import ops, reference, testing
from electra_fast.philox import keep_mask

OP = "attention"
RNG = torch.tensor([1, 0])
TRITON = pytest.mark.skipif("triton" not in testing.implementations(OP), reason="Triton cannot run here")
EDGES = [n + i for n in (16, 32, 64, 128) for i in (-1, 0, 1)]


def heads(*lengths, B=2, H=2, D=16, device="cpu", dtype=torch.float32, seed=0):
    """Return a tensor ``[B, n, H, D]`` for each length n, or ``[n, H, D]`` with B = None."""
    generator = torch.Generator().manual_seed(seed)
    batch = () if B is None else (B,)
    return [torch.randn(*batch, n, H, D, generator=generator).to(device, dtype) for n in lengths]


def bounds(*lengths, device="cpu"):
    return torch.tensor((0, *lengths)).cumsum(0).int().to(device)


def packed(queries, keys, dtype=torch.float32, D=32, causal=False):
    """Return an example of packed sequences with these numbers of queries and keys."""
    q, k, v = heads(sum(queries), sum(keys), sum(keys), B=None, H=1, D=D, dtype=dtype)
    args = {"q": q, "k": k, "v": v, "causal": causal, "dropout": 0.1, "rng": RNG}
    args |= {"cu_seqlens": bounds(*queries), "max_seqlen": max(queries)}
    args |= {"cu_seqlens_k": bounds(*keys), "max_seqlen_k": max(keys)}
    return testing.Example(OP, f"{queries} {keys} {causal} {dtype}", args, ("q", "k", "v"))


def test_is_torchs_attention(implementation, device):
    q, k, v = heads(5, 19, 19, device=device)
    o = testing.implementations(OP)[implementation[1]](q, k, v)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.allclose(o, wanted, atol=1e-5)


# The longest sequence of a batch selects the kernel. Of a causal one, keys are added to the queries.
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((0, 1, 5, 0, 16, 17, 33, 64, 2), (5, 0, 1, 0, 31, 32, 16, 63, 64)),
        ((1, 33, 64, 65), (127, 128, 65, 1)),
        ((3, 16), (129, 65)),
        ((129, 1, 0), (17, 200, 130)),
    ],
    ids=str,
)
def test_lengths_around_the_edges_of_blocks(queries, keys, dtype, causal, implementation, device):
    keys = tuple(map(sum, zip(queries, keys, strict=True))) if causal else keys
    example = packed(queries, keys, dtype, causal=causal)
    testing.check_example(testing.implementations(OP)[implementation[1]], example.to(device=device))


@pytest.mark.skipif("cpu" not in testing.implementations(OP), reason="the extension is not built")
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_every_pair_of_lengths_around_the_edges_on_the_cpu(causal):
    pairs = [(L, K) for L, K in itertools.product([0, 1, *EDGES], repeat=2) if L <= K or not causal]
    example = packed(*map(tuple, zip(*pairs, strict=True)), D=5, causal=causal)
    testing.check_example(testing.implementations(OP)["cpu"], example)


def test_padded_batches_have_a_mask_of_the_keys(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = heads(7, 40, 40, B=3, device=device)
    real = torch.arange(40, device=device) < torch.tensor([40, 9, 0], device=device)[:, None]
    o = function(q, k, v, key_mask=real)
    assert torch.allclose(o[1], function(q[1:2], k[1:2, :9], v[1:2, :9])[0], atol=1e-6)
    assert (o[2] == 0).all() and (o[:2] != 0).all()


def test_packed_sequences_give_what_padded_ones_give(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = heads(6, 9, 9, B=2, device=device)
    layout = {"cu_seqlens": bounds(6, 6, device=device), "max_seqlen": 6}
    layout |= {"cu_seqlens_k": bounds(9, 9, device=device), "max_seqlen_k": 9}
    o = function(*(x.flatten(0, 1) for x in (q, k, v)), causal=True, **layout)
    assert torch.equal(o.view_as(q), function(q, k, v, causal=True))


@pytest.mark.parametrize("L", [1, 5])
def test_queries_with_a_cache_are_the_last_rows_of_causal_attention(L, implementation, device):
    """The cache has more room than keys, and its heads before its tokens, as in transformers."""
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = heads(21, 21, 21, device=device)
    cache = [F.pad(x.transpose(1, 2), (0, 0, 0, 11)).transpose(1, 2) for x in (k, v)]
    keys, values = (x[:, :21] for x in cache)
    o = function(q[:, -L:], keys, values, causal=True)
    assert torch.allclose(o, function(q, k, v, causal=True)[:, -L:], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bounds_of_the_queries_given_for_the_keys_change_no_bit(dtype, implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    tensors = [x.requires_grad_() for x in heads(40, 40, 40, B=None, device=device, dtype=dtype)]
    cu = bounds(0, 17, 1, 22, device=device)
    options = {"cu_seqlens": cu, "max_seqlen": 22, "dropout": 0.2, "rng": RNG.to(device)}
    results = []
    for keys in ({}, {"cu_seqlens_k": cu.clone(), "max_seqlen_k": 22}):
        o = function(*tensors, **options, **keys)
        results.append([o, *torch.autograd.grad(o, tensors, torch.ones_like(o))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("L", "K"), [(3, 40), (34, 130)])
def test_dropout_has_a_row_per_query_and_a_column_per_key(L, K, implementation, device):
    """If v has columns of the identity, the output contains the probabilities after dropout."""
    H, p, function = 2, 0.25, testing.implementations(OP)[implementation[1]]
    q, k = heads(L, K, B=1, H=H, device=device)
    parts = torch.eye(K, device=device)[None, :, None].expand(1, K, H, K).split(16, -1)
    pad = [F.pad(part, (0, 16 - part.shape[-1])) for part in parts]
    options = {"dropout": p, "rng": RNG.to(device), "stream": 3}
    kept = torch.cat([function(q, k, v, **options) for v in pad], -1)[..., :K] != 0
    rows = torch.arange(L * H).view(1, L, H)
    assert torch.equal(kept.cpu(), keep_mask(RNG, 3, rows, K, p))


@pytest.mark.parametrize("layout", ["slices of one tensor", "a cache", "heads first", "q alone differs"])
def test_any_strides_are_read(layout, implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = heads(5, 9, 9, device=device)
    if layout == "slices of one tensor":
        k, v = torch.stack((k, v), 2).unbind(2)
    elif layout == "a cache":
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 7))[:, :9] for x in (k, v))
    elif layout == "heads first":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = function(*(x.contiguous() for x in (q, k, v)))
    assert torch.allclose(function(q, k, v), wanted, atol=1e-6)


@TRITON
def test_a_cache_is_not_copied_and_far_keys_are(device, monkeypatch):
    from electra_fast.kernels import attention as kernels

    q, *cache = heads(1, 32, 32, device=device)
    seen = []
    monkeypatch.setattr(
        kernels, "launch", lambda kernel, grid, *arguments, **constants: seen.append(arguments)
    )
    rest = (None, None, 1, False, 0.25, 0.0, None, 0, None, 9)
    k, v = (x[:, :9] for x in cache)
    kernels.attention_fwd(q, k, v, *rest)
    assert [x.data_ptr() for x in seen[0][:3]] == [x.data_ptr() for x in (q, k, v)]
    memory = torch.empty(2**25 + 4096, dtype=torch.bfloat16, device=device)  # only a few pages are used
    far = memory.as_strided((1, 2, 1, 16), (0, 2**25, 0, 1))
    kernels.attention_fwd(q[:1, :, :1].bfloat16(), far, far, *rest[:-1], 2)
    assert seen[1][1].is_contiguous()


@pytest.mark.parametrize("wanted", [s for n in (1, 2) for s in itertools.combinations("qkv", n)], ids="".join)
def test_any_of_the_tensors_may_need_a_gradient(wanted, implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    args = dict(zip("qkv", heads(4, 9, 9, device=device), strict=True))
    every = {name: x.clone().requires_grad_() for name, x in args.items()}
    function(**every).square().sum().backward()
    some = {name: x.clone().requires_grad_(name in wanted) for name, x in args.items()}
    function(**some).square().sum().backward()
    for name, x in some.items():
        assert torch.equal(x.grad, every[name].grad) if name in wanted else x.grad is None


@TRITON
@pytest.mark.parametrize("far", [0, 150], ids=["one tile", "blocks"])
@pytest.mark.parametrize(
    ("queries", "keys", "causal", "bad"),
    [
        ([0, 4, 9], [0, 6, 99999], False, [1]),
        ([0, 4, 9], [0, 99999, 20], False, [0, 1]),
        ([0, 4, 9], [0, 6, 5], False, [0, 1]),
        ([0, 4, 9], [2, 6, 20], False, [0]),
        ([0, 4, 99999], [0, 6, 20], False, [1]),
        ([0, 4, 9], [0, 3, 20], True, [0]),
        ([0, 4, 9], [0, 4, 20], True, []),
    ],
)
def test_a_bad_sequence_gives_nan_and_the_others_are_right(queries, keys, causal, bad, far, device):
    """On a GPU the kernels are the first to read the bounds. The last key belongs to no sequence."""
    T, S, function = 9, 20 + far, testing.implementations(OP)["triton"]
    q, k, v = (x.bfloat16().requires_grad_() for x in heads(T, S + 1, S + 1, B=None, device=device))
    keys = [n + far * (i == 2 and n == 20) for i, n in enumerate(keys)]
    cu, cu_k = (torch.tensor(b, device=device, dtype=torch.int32) for b in (queries, keys))
    layout = {"cu_seqlens": cu, "max_seqlen": T, "cu_seqlens_k": cu_k, "max_seqlen_k": S}
    with testing.guarded_memory():
        o = function(q, k, v, causal=causal, **layout)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    for i, (rows, columns) in enumerate([(slice(0, 4), slice(2, 3)), (slice(4, 9), slice(7, 20 + far))]):
        for x, which in ((o, rows), (dq, rows), (dk, columns), (dv, columns)):
            assert x[which].isnan().all() if i in bad else x[which].isfinite().all(), (i, x[which])
    if 1 not in bad:
        assert (dk[-1] == 0).all() and (dv[-1] == 0).all()


def test_sequences_without_queries_or_keys_have_zero_gradients(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = (x.requires_grad_() for x in heads(7, 12, 12, B=None, device=device))
    layout = {"cu_seqlens": bounds(0, 3, 4, device=device), "max_seqlen": 4}
    layout |= {"cu_seqlens_k": bounds(5, 0, 7, device=device), "max_seqlen_k": 7}
    with testing.guarded_memory():
        o = function(q, k, v, **layout)
        o.sum().backward()
    assert (o[:3] == 0).all() and (q.grad[:3] == 0).all() and (o[3:] != 0).all()
    assert (k.grad[:5] == 0).all() and (v.grad[:5] == 0).all() and (v.grad[5:] != 0).all()


@pytest.mark.parametrize(("L", "K"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_there_may_be_no_queries_or_no_keys(L, K, is_packed, implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    q, k, v = heads(L, K, K, B=None if is_packed else 2, device=device)
    layout = {}
    if is_packed:
        layout = {"cu_seqlens": bounds(0, L, device=device), "max_seqlen": L}
        layout |= {"cu_seqlens_k": bounds(0, K, device=device), "max_seqlen_k": K}
    tensors = [x.requires_grad_() for x in (q, k, v)]
    with testing.guarded_memory():
        o = function(*tensors, **layout)
        o.sum().backward()
    assert o.shape == q.shape and all((x == 0).all() for x in (o, *(t.grad for t in tensors)))


def test_casts_to_the_autocast_dtype(device):
    q, k, v = (x.requires_grad_() for x in heads(1, 4, 4, device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        o = ops.attention(q, k, v)
    o.float().sum().backward()
    assert o.dtype == torch.bfloat16 and k.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_is_compiled_twice_for_many_numbers_of_keys(is_packed, device):
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    for i, K in enumerate((20, 21, 33, 47)):
        q, k, v = heads(6, K, K, B=None if is_packed else 3, device=device)
        k.requires_grad_()
        layout = {"causal": True}
        if is_packed:
            layout |= {"cu_seqlens": bounds(2, 4, device=device), "max_seqlen": 4}
            layout |= {"cu_seqlens_k": bounds(7, K - 7, device=device), "max_seqlen_k": K}
        with torch.compiler.set_stance("fail_on_recompile" if i >= 2 else "default"):
            o = compiled(q, k, v, **layout)
        (got,) = torch.autograd.grad(o.sum(), k)
        (wanted,) = torch.autograd.grad(ops.attention(q, k, v, **layout).sum(), k)
        assert torch.equal(got, wanted)


def test_the_operators_obey_pytorchs_rules(device):
    example = packed((4, 0, 3), (2, 3, 9)).to(device=device)
    q, k, v = (example.args[name] for name in "qkv")
    cu, cu_k, rng = (example.args[name] for name in ("cu_seqlens", "cu_seqlens_k", "rng"))
    options = (None, cu, 4, False, 0.2, 0.1, rng, 0, cu_k, 9)
    operators = torch.ops.electra_fast
    torch.library.opcheck(operators.attention_fwd, (q, k, v, *options))
    o, lse = operators.attention_fwd(q, k, v, *options)
    torch.library.opcheck(operators.attention_bwd, (torch.ones_like(o), q, k, v, o, lse, *options))


Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 4, 8)
CU = torch.tensor([0, 3])
PACKED = {"q": Q[0], "k": K[0], "v": K[0], "cu_seqlens": CU, "max_seqlen": 3}


@both_paths(OP)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": K[:, :, :3]}, ValueError, "attention: k must have shape [2, *, 4, 8], got [2, 5, 3, 8]"),
        ({"k": K[0]}, ValueError, "attention: k must have shape [2, *, 4, 8], got [5, 4, 8]"),
        (
            {"q": K[0, 0]},
            ValueError,
            "attention: q must have axes [B, L, H, D] or [T, H, D], got shape [4, 8]",
        ),
        ({"v": Q}, ValueError, "attention: v must have shape [2, 5, 4, 8], got [2, 3, 4, 8]"),
        (
            {"key_mask": torch.ones(2, 3, dtype=torch.bool)},
            ValueError,
            "attention: key_mask must have shape [2, 5], got [2, 3]",
        ),
        (
            {"k": Q[:, :2], "v": Q[:, :2], "causal": True},
            ValueError,
            "attention: causal must be False with more queries than keys, 3 and 2, got True",
        ),
        (
            {"cu_seqlens_k": CU, "max_seqlen_k": 5},
            ValueError,
            "attention: cu_seqlens must be given with cu_seqlens_k, got None; one query per sequence",
        ),
        (PACKED, ValueError, "attention: k must have the 3 tokens of q, got 5; pass cu_seqlens_k"),
        (
            {**PACKED, "cu_seqlens_k": torch.tensor([0, 2, 5]), "max_seqlen_k": 5},
            ValueError,
            "attention: cu_seqlens_k must have shape [2], got [3]",
        ),
        (
            {**PACKED, "cu_seqlens_k": torch.tensor([0.0, 5.0]), "max_seqlen_k": 5},
            TypeError,
            "attention: cu_seqlens_k must be int64 or int32, got float32",
        ),
        (
            {**PACKED, "cu_seqlens_k": torch.tensor([0, 5])},
            TypeError,
            "attention: max_seqlen_k must be an int in a packed batch, got NoneType",
        ),
    ],
)
def test_refuses(change, error, message, path):
    with pytest.raises(error) as caught:
        path(**{"q": Q, "k": K, "v": K, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("cu_seqlens_k", "options", "message"),
    [
        ([0, 4], {}, r"cu_seqlens_k must rise from 0 to the 5 tokens, got "),
        ([1, 5], {}, r"cu_seqlens_k must rise from 0 to the 5 tokens, got "),
        ([0, 5], {"max_seqlen_k": 4}, "max_seqlen_k must be at least 5, got 4"),
    ],
)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_refuses_bad_bounds_of_the_keys_on_the_cpu(name, cu_seqlens_k, options, message):
    function = testing.implementations(OP).get(name) or pytest.skip(f"{name} is not available here")
    layout = {"cu_seqlens_k": torch.tensor(cu_seqlens_k), "max_seqlen_k": 5, **options}
    with pytest.raises(ValueError, match=f"attention: {message}"):
        function(**PACKED, **layout)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_refuses_causal_sequences_with_more_queries_than_keys_on_the_cpu(name):
    function = testing.implementations(OP).get(name) or pytest.skip(f"{name} is not available here")
    layout = {"cu_seqlens": torch.tensor([0, 1, 3]), "cu_seqlens_k": torch.tensor([0, 4, 5])}
    with pytest.raises(ValueError, match="attention: causal must be False if a sequence has more queries"):
        function(**{**PACKED, **layout}, max_seqlen_k=5, causal=True)


def test_the_flops_are_those_of_the_pairs():
    from torch.utils.flop_counter import FlopCounterMode

    args = packed((2, 3), (7, 0)).args
    with FlopCounterMode(display=False) as counter:
        ops.attention(**args)
        ops.attention(Q, K, K)
    pairs = [2 * 7 * math.prod(args["q"].shape[-2:]), 2 * 3 * 5 * 4 * 8]
    assert counter.get_total_flops() == sum(2 * 2 * n for n in pairs)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("L", [1, 9])
@pytest.mark.parametrize("name", testing.implementations("attention"))
def test_a_hidden_key_stays_hidden_with_any_scale(name, L, scale):
    """-inf times a scale of 0 or below is not -inf."""
    q, k, v = (torch.randn(2, n, 2, 16, requires_grad=True) for n in (L, 21, 21))
    results = []
    for f in (testing.implementations("attention")[name], reference.attention):
        o = f(q, k, v, causal=True, scale=scale)
        results.append((o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
