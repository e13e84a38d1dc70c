"""Example inputs of every op: the cases that break kernels, at sizes for the Triton interpreter.

Random numbers from a seed, with mean 0 and ELECTRA's scale, and with planted outliers, ties, peaked rows, a
row of padding, NaN in unused slots, and odd sizes. `extremes.py` adds constant rows and extreme values,
`variants` adds empty batches and other memory layouts.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from electra_fast import reference
from electra_fast.testing.example import DTYPES, RNG, Example, variants
from electra_fast.testing.extremes import EXTREMES


def _normal(generator, *shape, scale=1.0, dtype=torch.float32):
    x = torch.randn(shape, generator=generator) * scale
    if x.numel() > 8:
        x.view(-1)[torch.randint(x.numel(), (5,), generator=generator)] *= 6  # outliers
    return x.to(dtype)


def _ids(generator, shape, V, dtype=torch.int64):
    """Return Zipf-like ids, with special ones."""
    return (V * torch.rand(shape, generator=generator) ** 3).long().clamp(max=V - 1).to(dtype)


def _rng(device="cpu"):
    return torch.tensor(RNG, device=device)


def _lengths(B, L):
    """Return the lengths of a full row, a short row, one token, and only padding."""
    return torch.tensor([L, L // 2, 1, 0])[torch.arange(B) % 4]


def _mask_tokens(g):
    for name, B, L, dtype, options in (
        ("padded", 5, 130, torch.int64, {}),
        ("int32, a quarter, no keeping", 4, 64, torch.int32, {"mask_prob": 0.25, "keep_prob": 0.0}),
        ("all candidates, all kept", 3, 33, torch.int64, {"mask_prob": 1.0, "keep_prob": 1.0}),
        ("one in four billion", 2, 40, torch.int64, {"mask_prob": 2.0**-32}),
        ("one position", 3, 1, torch.int64, {}),
        ("long", 1, 1000, torch.int64, {}),
        ("more than a block of slots", 2, 700, torch.int64, {"mask_prob": 1.0}),
        ("no sequence", 0, 16, torch.int64, {}),
        ("no position", 2, 0, torch.int64, {}),
    ):
        ids = _ids(g, (B, L), 90, dtype) + 5
        args = {
            "ids": ids,
            "candidates": torch.rand(B, L, generator=g) > 0.1,
            "rng": _rng(),
            "mask_id": 103,
            **options,
        }
        yield Example("mask_tokens", f"{name}, no padding", args, exact=True)
        key_mask = torch.arange(L) < _lengths(B, L)[:, None]
        yield Example("mask_tokens", name, {**args, "key_mask": key_mask}, exact=True)
    for name, bounds, dtype in (
        ("packed, an empty sequence first, within and last", [0, 0, 100, 100, 101, 260, 260], torch.int32),
        ("packed, int64 bounds", [0, 7, 8, 75], torch.int64),
        ("packed, no token", [0, 0], torch.int32),
    ):
        T, cu = bounds[-1], torch.tensor(bounds, dtype=dtype)
        args = {"ids": _ids(g, (T,), 90) + 5, "candidates": torch.rand(T, generator=g) > 0.1, "rng": _rng()}
        args |= {"mask_id": 103, "cu_seqlens": cu, "max_seqlen": max(int(cu.diff().max()), 1)}
        yield Example("mask_tokens", name, args, exact=True)
        yield Example("mask_tokens", f"{name}, all masked", {**args, "mask_prob": 1.0}, exact=True)


def _replace_tokens(g):
    for example in _mask_tokens(g):
        masked = reference.mask_tokens(**example.args)
        draw = _ids(g, masked.targets.shape, 90, masked.targets.dtype)
        samples = torch.where(torch.rand(draw.shape, generator=g) < 0.5, masked.targets, draw)
        args = {
            "ids": example.args["ids"],
            "samples": samples,
            "positions": masked.positions,
            "weights": masked.weights,
        }
        yield Example("replace_tokens", example.name, args, exact=True)


def _rtd_loss(g):
    for dtype in DTYPES:
        for name, shape in (
            ("a token", (1,)),
            ("a block and one", (1025,)),
            ("a batch", (3, 851)),
            ("none", (0,)),
        ):
            x = _normal(g, *shape, scale=3, dtype=dtype)
            y = torch.rand(shape, generator=g) < 0.15
            w = torch.rand(shape, generator=g) * (torch.rand(shape, generator=g) < 0.8)
            args = {"logits": x, "replaced": y}
            yield Example("rtd_loss", f"{name} {dtype}", args, ("logits",))
            yield Example("rtd_loss", f"{name}, weights {dtype}", {**args, "weights": w}, ("logits",))
    x, y = (
        torch.tensor([[1e4, -1e4, 0.0, -0.0], [9.0, 60.0, -60.0, 1.0]]),
        torch.tensor([[True, False, True, False]] * 2),
    )
    yield Example("rtd_loss", "large logits, ties", {"logits": x, "replaced": y}, ("logits",))
    rest = {"replaced": y.t(), "weights": torch.tensor([[1.0, 0.0, 0.5, 2.0]] * 2).t()}
    garbage = x.index_fill(1, torch.tensor([1]), torch.nan).t()
    yield Example("rtd_loss", "transposed, NaN in the padding", {"logits": garbage, **rest}, ("logits",))
    nothing = {"logits": x, "replaced": y, "weights": torch.zeros(2, 4)}
    yield Example("rtd_loss", "weights all 0", nothing, ("logits",))


def _nce_loss(g):
    for example in _rtd_loss(g):
        x, noise, weights = (example.args.get(name) for name in ("logits", "replaced", "weights"))
        # Energies near -log q, as of a trained model: the sum cancels.
        log_q = -4 - 3 * torch.rand(x.shape, generator=g)
        args = {"energies": (x.float() - log_q).to(x.dtype), "log_q": log_q, "noise": noise}
        args |= {"log_odds": -1.7} if weights is None else {"weights": weights}
        yield Example("nce_loss", example.name, args, ("energies",))
    args = {"energies": _normal(g, 2, 3), "log_q": torch.full((2, 3), -torch.inf)}
    args["noise"] = torch.zeros(2, 3, dtype=torch.bool)
    yield Example("nce_loss", "log_q of -inf in data", args, ("energies",))


def _embed_arguments(g, E, dropout, dtype):
    """Return (tables and options, ids)."""
    tables = [_normal(g, n, E, scale=0.02, dtype=dtype) for n in (40, 16, 2)]
    norm = [1 + _normal(g, E, scale=0.1), _normal(g, E, scale=0.1)]
    args = dict(zip(("word", "position", "type", "norm_weight", "norm_bias"), tables + norm, strict=True))
    return args | {"eps": 1e-12, "dropout": dropout, "rng": _rng(), "stream": 2}, _ids(g, (3, 16), 40)


def _embed(g):
    names = ("word", "position", "type", "norm_weight", "norm_bias")
    none = {"type_ids": None, "position_ids": None}
    cu_seqlens = torch.tensor([0, 0, 16, 17, 33, 48], dtype=torch.int32)
    for dtype in DTYPES:
        for E, dropout in ((24, 0.0), (100, 0.1)):
            args, ids = _embed_arguments(g, E, dropout, dtype)
            yield Example("embed", f"padded E={E} {dtype}", {"ids": ids, **none, **args}, names)
            given = {"ids": ids.int(), "type_ids": ids.int() % 2, "position_ids": ids.flip(1) % 16}
            given["padding_idx"] = 0
            yield Example("embed", f"all ids given E={E} {dtype}", {**given, **args}, names)
            packed = {"ids": ids.flatten(), **none, "cu_seqlens": cu_seqlens}
            yield Example("embed", f"packed E={E} {dtype}", {**packed, **args}, names)
        # As in training: every third token has the same id, and the table has a gradient from its next use.
        args, _ = _embed_arguments(g, 100, 0.1, dtype)
        ids = torch.where(torch.rand(25, 16, generator=g) < 0.3, 3, _ids(g, (25, 16), 40))
        frequent = {"ids": ids, "type_ids": ids.int() % 2, "position_ids": None, "padding_idx": 3}
        args |= {"return_word": True}
        yield Example("embed", f"a frequent id {dtype}", {**frequent, **args}, names)


def _attention_options(g):
    """Yield (name, shape of the tokens, keyword arguments)."""
    holes = torch.rand(4, 21, generator=g) > 0.3
    holes[2] = False  # a query without a visible key
    yield "no mask", (3, 17), {}
    yield "holes and a row of padding", (4, 21), {"key_mask": holes}
    real = torch.arange(33) < torch.tensor([33, 16, 1])[:, None]
    yield "right padding", (3, 33), {"key_mask": real}
    yield "causal, own scale", (2, 9), {"causal": True, "scale": 0.05}
    yield "dropout", (4, 21), {"key_mask": holes, "dropout": 0.1, "rng": _rng(), "stream": 5}
    cu = torch.tensor([0, 0, 17, 18, 18, 40], dtype=torch.int32)
    yield "packed", (40,), {"cu_seqlens": cu, "max_seqlen": 22}
    yield (
        "packed, dropout",
        (40,),
        {"cu_seqlens": cu, "max_seqlen": 32, "dropout": 0.3, "rng": _rng(), "stream": 6},
    )
    # More keys than one tile of a kernel.
    holes = torch.rand(1, 150, generator=g) > 0.3
    yield "long, dropout", (1, 150), {"key_mask": holes, "dropout": 0.1, "rng": _rng(), "stream": 7}
    cu = torch.tensor([0, 3, 143], dtype=torch.int32)
    yield "long, packed, causal", (143,), {"cu_seqlens": cu, "max_seqlen": 140, "causal": True}


def _attention_keys(g):
    """Yield (name, shape of the queries' tokens, that of the keys', keyword arguments)."""
    holes = torch.rand(3, 21, generator=g) > 0.3
    holes[1] = False  # queries without a visible key
    yield "other keys", (3, 9), (3, 21), {"key_mask": holes, "dropout": 0.1, "rng": _rng(), "stream": 5}
    real = torch.arange(33) < torch.tensor([33, 16, 1])[:, None]
    yield "one query", (3, 1), (3, 33), {"key_mask": real}
    yield "causal, earlier keys", (2, 5), (2, 20), {"causal": True}
    yield "no key", (2, 5), (2, 0), {}

    def packed(queries, keys):
        cu, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
        longest = {"max_seqlen": max(queries), "max_seqlen_k": max(keys)}
        return (sum(queries),), (sum(keys),), {"cu_seqlens": cu, "cu_seqlens_k": cu_k, **longest}

    # Sequences without queries, without keys and without both.
    *tokens, bounds = packed((0, 7, 1, 0, 12), (5, 33, 0, 0, 22))
    dropout = {"dropout": 0.3, "rng": _rng(), "stream": 6}
    yield "packed, other keys", *tokens, {**bounds, **dropout}
    *tokens, bounds = packed((3, 0, 5), (3, 17, 21))
    yield "packed, causal, earlier keys", *tokens, {**bounds, "causal": True}
    # More queries, or more keys, than one tile of a kernel.
    holes = torch.rand(1, 140, generator=g) > 0.3
    yield "long, causal, earlier keys", (1, 70), (1, 140), {"key_mask": holes, "causal": True}
    *tokens, bounds = packed((3, 130), (140, 17))
    yield "long, packed, other keys", *tokens, {**bounds, **dropout}


def _attention(g):
    every = list(_attention_options(g))
    for dtype in DTYPES:
        for D, some in ((64, every), (36, every[:-2]), (16, every[:1]), (128, every[-2:])):
            for name, tokens, options in some:
                args = {side: _normal(g, *tokens, 2, D, dtype=dtype) for side in "qkv"}
                yield Example("attention", f"{name} D={D} {dtype}", args | options, ("q", "k", "v"))
    every = list(_attention_keys(g))
    for dtype in DTYPES:
        for D, some in ((64, every), (36, every[:3])):
            for name, tokens, keys, options in some:
                shapes = {"q": tokens, "k": keys, "v": keys}
                args = {side: _normal(g, *shape, 2, D, dtype=dtype) for side, shape in shapes.items()}
                yield Example("attention", f"{name} D={D} {dtype}", args | options, ("q", "k", "v"))


def _attention_qkv(g):
    for dtype in DTYPES:
        for name, tokens, options in _attention_options(g):
            qkv = _normal(g, *tokens, 3, 2, 64, dtype=dtype)
            yield Example("attention_qkv", f"{name} {dtype}", {"qkv": qkv, **options}, ("qkv",))


def _add_norm(g):
    names = ("x", "residual", "weight", "bias")
    for dtype in DTYPES:
        for W, dropout in ((64, 0.0), (100, 0.1), (96, 0.1)):
            tensors = [_normal(g, 3, 11, W, dtype=dtype), _normal(g, 3, 11, W, dtype=dtype)]
            tensors += [1 + _normal(g, W, scale=0.1), _normal(g, W, scale=0.1)]
            args = dict(zip(names, tensors, strict=True))
            args |= {"eps": 1e-12, "dropout": dropout, "rng": _rng(), "stream": 4}
            yield Example("add_norm", f"W={W} {dtype}", args, names)
            alone = ("x", "weight", "bias")
            yield Example("add_norm", f"W={W}, no residual {dtype}", {**args, "residual": None}, alone)


def _linear(g):
    for dtype in DTYPES:
        for name, shape, N, has_bias in (
            ("a batch", (2, 9, 33), 50, True),
            ("no bias", (7, 64), 16, False),
            ("one output", (3, 5, 16), 1, True),
            ("none", (0, 8), 5, True),
        ):
            args = {"x": _normal(g, *shape, dtype=dtype), "weight": _normal(g, N, shape[-1], dtype=dtype)}
            args["bias"] = _normal(g, N, dtype=dtype) if has_bias else None
            wanted = ("x", "weight", "bias") if has_bias else ("x", "weight")
            yield Example("linear", f"{name} {dtype}", args, wanted)
            if dtype != torch.float32:
                low = {f"low_{k}": v for k, v in args.items() if k != "x" and v is not None}
                masters = {k: v.float() for k, v in args.items() if k != "x" and v is not None}
                yield Example("linear", f"{name} {dtype}, copies", args | masters | low, wanted)


def _bias_gelu(g):
    for dtype in DTYPES:
        args = {"x": _normal(g, 5, 7, 300, dtype=dtype), "bias": _normal(g, 300)}
        yield Example("bias_gelu", f"contiguous {dtype}", args, ("x", "bias"))
        args = {"x": _normal(g, 48, 33, dtype=dtype).t(), "bias": _normal(g, 48, dtype=dtype)}
        yield Example("bias_gelu", f"transposed {dtype}", args, ("x", "bias"))
    args = {"x": _normal(g, 3, 1030), "bias": _normal(g, 1030)}
    yield Example("bias_gelu", "wide", args, ("x", "bias"))


def _mlm_head_arguments(g, M, V, E, dtype, bias_dtype=torch.float32):
    table, bias = _normal(g, V, E, scale=0.3, dtype=dtype), _normal(g, V, dtype=bias_dtype)
    x, targets = _normal(g, M, E, dtype=dtype), _ids(g, (M,), V)
    x[2] = 2 * table[targets[2]]  # a peaked row
    weights = torch.ones(M)
    weights[1] = 0.5
    weights[::5] = 0
    x[0], targets[0] = torch.nan, -100  # an unused slot may contain anything
    return {"x": x, "table": table, "bias": bias, "targets": targets, "weights": weights, "rng": _rng()}


def _mlm_head(g):
    names = ("x", "table", "bias")
    for dtype in DTYPES:
        args = _mlm_head_arguments(g, 37, 257, 24, dtype)
        yield Example("mlm_head", f"M=37 V=257 {dtype}", args, names)
        args = _mlm_head_arguments(g, 9, 50, 64, dtype, bias_dtype=dtype)
        options = {"temperature": 0.7, "disallow_correct": True}
        yield Example("mlm_head", f"M=9 V=50 {dtype}", {**args, **options}, names)
        args = _mlm_head_arguments(g, 18, 290, 144, dtype)
        yield Example("mlm_head", f"M=18 V=290 {dtype}", args, names)
        yield Example("mlm_head", f"the table passed on {dtype}", {**args, "return_table": True}, names)
    args = _mlm_head_arguments(g, 4, 290, 144, torch.float16)
    one = args | {"x": args["x"][1:2], "targets": args["targets"][1:2].int()}
    yield Example("mlm_head", "one slot", {**one, "weights": torch.ones(1)}, names)
    yield Example("mlm_head", "no weight", {**one, "weights": torch.zeros(1)}, names)


_MAKERS = (
    _mask_tokens, _embed, _linear, _attention, _attention_qkv, _add_norm, _bias_gelu, _mlm_head,
    _replace_tokens, _rtd_loss, _nce_loss,
)  # fmt: skip


def examples(op: str, seed: int = 0, supported: Callable[[Example], bool] = lambda _: True) -> list[Example]:
    """Return the examples of one op as a list; they depend only on the seed.

    Empty batches and other memory layouts are made of those that `supported` accepts.
    """
    generator = torch.Generator().manual_seed(seed)
    makers = {maker.__name__.removeprefix("_"): maker for maker in _MAKERS}
    found = list(makers[op](generator))
    extremes = (replace(example, special=True) for example in EXTREMES.get(op, lambda _: ())(generator))
    return [*found, *extremes, *variants([example for example in found if supported(example)])]
