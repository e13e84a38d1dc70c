"""Calls that launch every Triton kernel by its own launcher, in the dtypes, layouts and widths of ELECTRA."""

import torch

from benchmarks.harness import candidates
from electra_fast import testing


def launch_ops() -> None:
    """Call every Triton kernel except attention's, with its backward, on each dtype, layout and long rows."""
    for op in testing.OPS:
        kernels = testing.implementations(op, device="cuda")
        for example in testing.examples(op) if "triton" in kernels and "attention" not in op else ():
            # Other layouts are copied before the launch, or compile to the same code for unaligned pointers.
            if example.name.startswith(("padded", "packed, int64", "a batch")) and not example.layout:
                testing.run(kernels["triton"], example)
    mask_tokens = testing.implementations("mask_tokens", device="cuda")["triton"]
    for L in (128, 512, 2048, 4096):
        ids = torch.zeros(2, L, dtype=torch.long)
        mask_tokens(ids, ids == 0, torch.tensor([1, 2]), mask_id=103)

    mlm_head = testing.implementations("mlm_head", device="cuda")["triton"]
    for E, dtype, options in (
        (128, torch.bfloat16, {}),
        (128, torch.bfloat16, {"temperature": 0.5, "disallow_correct": True}),
        (128, torch.float32, {}),
        (768, torch.bfloat16, {}),
    ):
        launch_mlm_head(mlm_head, 256, E, dtype, **options)

    embed = testing.implementations("embed", device="cuda")["triton"]
    for E in (64, 128, 768, 1024):
        for dtype in (torch.bfloat16, torch.float32):
            ids = torch.zeros(2, 512, dtype=torch.long)
            launch_embed(embed, ids, E, dtype)
            launch_embed(embed, ids, E, dtype, types=ids, positions=ids)

    add_norm = testing.implementations("add_norm", device="cuda")["triton"]
    bias_gelu = testing.implementations("bias_gelu", device="cuda")["triton"]
    for dtype in (torch.bfloat16, torch.float32):
        for W in (64, 256, 768, 1024):
            launch_add_norm(add_norm, 64, W, dtype, dropout=0.0)
            launch_add_norm(add_norm, 64, W, dtype, dropout=0.1)
        for W in (256, 1024, 3072, 4096):
            launch_bias_gelu(bias_gelu, 64, W, dtype)
    launch_linear_gelus()


def launch_linear_gelus() -> None:
    """Call the candidate at the sizes of small, base and large."""
    bf16 = torch.bfloat16
    sizes = ((256, 1024, bf16), (768, 3072, bf16), (1024, 4096, bf16), (256, 1024, torch.float32))
    for K, N, dtype in sizes:
        launch_linear_gelu(256, K, N, dtype).sum().backward()
    with torch.no_grad():  # the product is not stored
        launch_linear_gelu(256, 768, 3072, bf16)


def launch_linear_gelu(T, K, N, dtype) -> torch.Tensor:
    x, weight, bias = (torch.zeros(s, dtype=dtype, requires_grad=True) for s in ((T, K), (N, K), (N,)))
    return candidates.linear_gelu(x, weight, bias)


def launch_attentions() -> None:
    """Call attention at each of its launch shapes with dropout, and at ELECTRA's shapes also without.

    Then as decoders do: to other tokens with dropout, causal with earlier keys, and with one query.
    """
    attention = testing.implementations("attention", device="cuda")["triton"]
    for dtype, D, L in (
        (torch.bfloat16, 64, 64),
        (torch.bfloat16, 64, 128),
        (torch.bfloat16, 64, 512),
        (torch.bfloat16, 128, 512),
        (torch.float32, 64, 512),
        (torch.float32, 128, 512),
    ):
        launch_attention(attention, dtype, D, L, packed=False, dropout=0.1)
        if (dtype, D) == (torch.bfloat16, 64):
            launch_attention(attention, dtype, D, L, packed=True, dropout=0.1)
    for L in (128, 512):
        launch_attention(attention, torch.bfloat16, 64, L, packed=False, mask=False)
    launch_attention(attention, torch.float16, 36, 512, packed=True, causal=True)

    for packed in (False, True):
        for L, K in ((32, 128), (128, 512)):
            launch_attention(attention, torch.bfloat16, 64, L, packed, K=K, dropout=0.1)
        launch_attention(attention, torch.bfloat16, 64, 128, packed, K=512, causal=True)
    for dtype, D in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 128)):
        for K in (64, 128, 512) if (dtype, D) == (torch.bfloat16, 64) else (512,):
            with torch.no_grad():
                launch_attention(attention, dtype, D, 1, packed=False, K=K)


def launch_attention(attention, dtype, D, L, packed, mask=True, K=None, **options) -> None:
    """Call attention, with its backward unless gradients are off; K is the number of keys, None: L."""
    lengths = (L, L if K is None else K)
    shapes = [(2 * n, 2, D) if packed else (2, n, 2, D) for n in lengths]
    q, k, v = (torch.zeros(shapes[i], dtype=dtype, requires_grad=True) for i in (0, 1, 1))
    if packed:
        bounds = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in lengths]
        options |= {"cu_seqlens": bounds[0], "max_seqlen": L}
        options |= {"cu_seqlens_k": bounds[1], "max_seqlen_k": K} if K is not None else {}
    elif mask:
        options["key_mask"] = torch.ones(2, lengths[1], dtype=torch.bool)
    o = attention(q, k, v, rng=torch.tensor([1, 2]), **options)
    if o.requires_grad:
        o.sum().backward()


def launch_embed(embed, ids, E, dtype, types=None, positions=None, **options) -> None:
    tables = [torch.zeros(n, E, dtype=dtype, requires_grad=True) for n in (30522, 512, 2)]
    norm = [torch.zeros(E, requires_grad=True) for _ in range(2)]
    options |= {"eps": 1e-12, "dropout": 0.1, "rng": torch.tensor([1, 2]), "stream": 2}
    embed(ids, types, positions, *tables, *norm, **options).sum().backward()


def launch_add_norm(add_norm, T, W, dtype, dropout) -> None:
    x, residual = (torch.zeros(T, W, dtype=dtype, requires_grad=True) for _ in range(2))
    norm = [torch.zeros(W, requires_grad=True) for _ in range(2)]
    options = {"eps": 1e-12, "dropout": dropout, "rng": torch.tensor([1, 2]), "stream": 2}
    add_norm(x, residual, *norm, **options).sum().backward()


def launch_bias_gelu(bias_gelu, T, W, dtype) -> None:
    x = torch.zeros(T, W, dtype=dtype, requires_grad=True)
    bias_gelu(x, torch.zeros(W, requires_grad=True)).sum().backward()


def launch_mlm_head(mlm_head, M, E, dtype, **options) -> None:
    x, table = (torch.zeros(n, E, dtype=dtype, requires_grad=True) for n in (M, 30522))
    targets, weights, rng = torch.zeros(M, dtype=torch.long), torch.ones(M), torch.tensor([1, 2])
    mlm_head(x, table, torch.zeros(30522), targets, weights, rng, **options).loss.backward()


def launch_packed() -> None:
    """Call the ops on packed batches of many sizes, which must all share one compiled kernel."""
    ops = {op: testing.implementations(op, device="cuda").get("triton") for op in testing.OPS}
    for T in (1, 15, 16, 17, 1024, 4099):
        ids, cu_seqlens = torch.zeros(T, dtype=torch.long), torch.tensor([0, T], dtype=torch.int32)
        packed = {"cu_seqlens": cu_seqlens, "max_seqlen": 128}
        masked = ops["mask_tokens"](ids, ids == 0, torch.tensor([1, 2]), mask_id=103, **packed)
        ops["replace_tokens"](ids, masked.positions, masked.targets, masked.weights)
        logits = torch.zeros(T, requires_grad=True)
        ops["rtd_loss"](logits, ids == 0).loss.backward()
        ops["nce_loss"](logits, torch.zeros(T), ids == 0).loss.backward()
        launch_mlm_head(ops["mlm_head"], len(masked.targets), 128, torch.bfloat16)
        launch_embed(ops["embed"], ids, 128, torch.bfloat16, cu_seqlens=cu_seqlens)
        launch_add_norm(ops["add_norm"], T, 256, torch.bfloat16, dropout=0.1)
        launch_bias_gelu(ops["bias_gelu"], T, 1024, torch.bfloat16)
        qkv = torch.zeros(T, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        for longest in (64, 128, 200, 512):
            packed["max_seqlen"] = longest
            ops["attention_qkv"](qkv, dropout=0.1, rng=torch.tensor([1, 2]), **packed).sum().backward()


LAUNCHES = {
    "ops": launch_ops,
    "attention": launch_attentions,
    "packed": launch_packed,
    "linear_gelu": launch_linear_gelus,
}
