"""Random calls of every op, each generated from one integer, its seed.

Sizes are near the edges of blocks, or 0; tensors have any dtype, layout and offset; one case in four has
extreme or infinite values, one in twelve has illegal values. Such cases are judged less strictly: see
`judge_case`.
"""

import math
import random
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.testing.budget import judge
from electra_fast.testing.definition import REPLAYED, check_function
from electra_fast.testing.example import DTYPES, NEVER_EXPANDED, Example
from electra_fast.testing.judge import judge_example, run
from electra_fast.testing.layouts import LAYOUTS

SMALL = (0.0, 1e-40, 65504.0)
EXTREMES = (*SMALL, 1e20, 1e30, 3e38)
# In these arguments at most 1e30 is planted. At 3e38 a sum of products overflows in some orders only, scores
# in units of log 2 overflow earlier, and F.gelu may double its argument.
FACTORS = {"linear": ("x", "weight"), "mlm_head": ("x", "table"), "bias_gelu": ("x", "bias")}
FACTORS |= {"attention": ("q", "k"), "attention_qkv": ("qkv",)}
INFINITE = (torch.inf, torch.nan)
ILLEGAL = (-1, 2**31 - 1, -(2**31), 2**31 + 5, 2**40, -(2**63))
REFUSALS = (ValueError, TypeError, IndexError, NotImplementedError)  # if the message begins with the op
MARGIN = 4  # multiple of the budget: in some of thousands of cases plain PyTorch is exact by chance
LENIENT = 16.0  # multiple of plain PyTorch's error, where extreme values may cancel
CANCELLED = 64  # allowed roundings of the largest input, for a gradient whose terms cancel completely


class Case(NamedTuple):
    example: Example
    kind: str  # ordinary, extreme, infinite or illegal


class Outcome(NamedTuple):
    finding: str = ""  # the error, empty if the case is right
    refused: str = ""  # the message of a documented error


class Draw:
    """The random decisions of one case."""

    def __init__(self, seed: int, small: bool):
        self.random, self.small = random.Random(seed), small
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        self.one_of = lambda *values: self.random.choice(values)
        self.dtype = self.random.choice(DTYPES)

    def size(self, most: int, small: int, least: int = 0) -> int:
        """Return at most `most`, or `small` for a slow implementation; often 2^n or 2^n +- 1."""
        most = small if self.small else most
        edge = 2 ** self.random.randrange(most.bit_length()) + self.one_of(-1, 0, 1)
        size = self.one_of(edge, self.random.randint(least, most))
        return min(max(0 if self.random.random() < 0.05 else size, least), most)

    def floats(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype)

    def ids(self, V: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        ids = torch.randint(max(V, 1), shape, generator=self.generator)
        return ids.to(dtype or self.one_of(torch.int32, torch.int64))

    def bools(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < self.one_of(0, 0.1, 0.5, 0.9, 1)

    def weights(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) * self.bools(*shape)

    def rng(self) -> Tensor:
        seed = self.one_of(0, -1, 2**63 - 1, -(2**63), self.random.randrange(-(2**63), 2**63))
        return torch.tensor([seed, self.one_of(0, 1, 2**32 - 1, self.random.randrange(2**32))])

    def dropout(self) -> dict[str, Any]:
        p = self.one_of(0.0, 0.0, 0.1, 0.5, 0.999)
        return {"dropout": p, "rng": self.rng() if p else None, "stream": self.one_of(0, 2, 2**31 - 1)}

    def tokens(self, most: int, small: int) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the shape of the tokens and the arguments for a padded or packed batch."""
        B, L = self.size(5, 3), self.size(most, small)
        if self.one_of(True, False):
            return (B, L), {"key_mask": self.one_of(None, self.bools(B, L))}
        lengths = torch.randint(L + 1, (B,), generator=self.generator) * self.bools(B)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        longest = int(lengths.max()) if B else 0
        layout = {"cu_seqlens": bounds.to(self.one_of(torch.int32, torch.int64))}
        return (int(bounds[-1]),), layout | {"max_seqlen": longest + self.one_of(0, 1, 100)}


def _mask_tokens(d):
    shape, layout = d.tokens(1100, 130)
    args = {"ids": d.ids(30522, *shape), "candidates": d.bools(*shape), "rng": d.rng(), "mask_id": 103}
    args |= {"mask_prob": d.one_of(0.15, 1.0, 2.0**-32, d.random.uniform(1e-9, 1))}
    return args | {"keep_prob": d.one_of(0.15, 0.0, 1.0)} | layout, ()


def _replace_tokens(d):
    shape, _ = d.tokens(1100, 130)
    ids = d.ids(30522, *shape)
    positions = torch.randperm(ids.numel(), generator=d.generator)[: d.size(300, 70)].to(ids.dtype)
    samples = d.ids(30522, len(positions), dtype=ids.dtype)
    return {"ids": ids, "positions": positions, "samples": samples, "weights": d.weights(len(positions))}, ()


def _embed(d):
    shape, layout = d.tokens(300, 17)
    V, P, types = d.size(30522, 80, 1), d.size(600, 33, 1), d.one_of(1, 2, 3)
    E = d.size(1100 if V < 1000 else 70, 130, 3)  # the gradient of a LayerNorm over two numbers is 0
    ids = d.ids(V, *shape)
    given = None if "key_mask" in layout and shape[1] <= P and d.one_of(True, False) else d.ids(P, *shape)
    args = {"ids": ids, "type_ids": d.one_of(None, d.ids(types, *shape)), "position_ids": given}
    args |= {"word": d.floats(V, E), "position": d.floats(P, E), "type": d.floats(types, E)}
    norm = d.one_of(d.dtype, torch.float32)
    args |= {"norm_weight": d.floats(E, dtype=norm), "norm_bias": d.floats(E, dtype=norm)}
    args |= {"eps": d.one_of(1e-12, 1e-5), "padding_idx": d.one_of(None, 0, V - 1)}
    args |= {"cu_seqlens": layout.get("cu_seqlens"), "return_word": d.one_of(False, True)}
    return args | d.dropout(), ("word", "position", "type", "norm_weight", "norm_bias")


def _linear(d):
    shape, _ = d.tokens(300, 70)
    K, N = d.size(600, 130), d.size(600, 130)
    args = {"x": d.floats(*shape, K), "weight": d.floats(N, K), "bias": d.one_of(None, d.floats(N))}
    if d.one_of(True, False):
        low = {f"low_{name}": args[name] for name in ("weight", "bias") if args[name] is not None}
        args |= low | {name.removeprefix("low_"): x.float() for name, x in low.items()}
    return args, ("x", "weight", "bias")


def _queries(d):
    shape, layout = d.tokens(300, 70)
    heads = (d.size(4, 2, 1), d.one_of(64, d.size(256, 128, 1)))
    args = {"q": d.floats(*shape, *heads)}
    args |= {"causal": d.one_of(False, True), "scale": d.one_of(None, 0.05, 1.0, -0.5, 0.0)}
    return args | layout | d.dropout()


def _other_keys(d, shape, layout, causal):
    """Return the shape of the keys of queries of this shape and layout, and its arguments.

    If they are causal, no sequence has more queries than keys.
    """
    most = d.size(300, 70)
    if "cu_seqlens" not in layout:
        keys = (shape[0], most + causal * shape[1])
        return keys, {"key_mask": d.one_of(None, d.bools(*keys))}
    cu_seqlens = layout["cu_seqlens"]
    lengths = torch.randint(most + 1, (len(cu_seqlens) - 1,), generator=d.generator)
    lengths = lengths * d.bools(len(lengths)) + causal * cu_seqlens.diff()
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    longest = int(lengths.max()) if len(lengths) else 0
    layout = {"cu_seqlens_k": bounds.to(d.one_of(torch.int32, torch.int64))}
    return (int(bounds[-1]),), layout | {"max_seqlen_k": longest + d.one_of(0, 1, 100)}


def _attention(d):
    args = _queries(d)
    keys, layout = args["q"].shape[:-2], {}
    if d.one_of(False, True):
        keys, layout = _other_keys(d, keys, args, args["causal"])
    k, v = (d.floats(*keys, *args["q"].shape[-2:]) for _ in range(2))
    return {"q": args.pop("q"), "k": k, "v": v, **args, **layout}, ("q", "k", "v")


def _attention_qkv(d):
    args = _queries(d)
    q = args.pop("q")
    return {"qkv": d.floats(*q.shape[:-2], 3, *q.shape[-2:]), **args}, ("qkv",)


def _add_norm(d):
    shape, W = d.tokens(70, 20)[0], d.size(1100, 260, 3)
    x, norm = d.floats(*shape, W), d.one_of(d.dtype, torch.float32)
    if d.dtype == torch.float32 and d.one_of(True, False):  # constant rows, whose mean must be exact
        x[..., :] = x[..., :1] * d.one_of(1, 1000)
    args = {"x": x, "residual": d.one_of(None, d.floats(*shape, W))}
    args |= {"weight": d.floats(W, dtype=norm), "bias": d.floats(W, dtype=norm), "eps": d.one_of(1e-12, 1e-5)}
    return args | d.dropout(), ("x", "residual", "weight", "bias")


def _bias_gelu(d):
    shape, F = d.tokens(70, 20)[0], d.size(3100, 260, 1)
    bias = d.floats(F, dtype=d.one_of(d.dtype, torch.float32))
    return {"x": d.floats(*shape, F, scale=d.one_of(1, 4)), "bias": bias}, ("x", "bias")


def _mlm_head(d):
    M, V, E = d.size(300, 33), d.size(30522, 300, 1), d.size(200, 70, 1)
    args = {"x": d.floats(M, E), "table": d.floats(V, E, scale=d.one_of(0.02, 0.3))}
    args["bias"] = d.floats(V, dtype=d.one_of(d.dtype, torch.float32))
    args |= {"targets": d.ids(V, M), "weights": d.weights(M), "rng": d.rng()}
    args |= {
        "temperature": d.one_of(1.0, 0.7, 1e-6, 1e6),
        "disallow_correct": V > 1 and d.one_of(False, True),
    }
    return {**args, "return_table": d.one_of(False, True)}, ("x", "table", "bias")


def _rtd_loss(d):
    shape, _ = d.tokens(1100, 260)
    args = {"logits": d.floats(*shape, scale=d.one_of(1, 30)), "replaced": d.bools(*shape)}
    return {**args, "weights": d.one_of(None, d.weights(*shape))}, ("logits",)


def _nce_loss(d):
    args, _ = _rtd_loss(d)
    x = args.pop("logits")
    log_q = -d.floats(*x.shape, scale=d.one_of(1, 10), dtype=torch.float32).abs()
    args = {"energies": x, "log_q": log_q, "noise": args["replaced"], "weights": args["weights"]}
    return {**args, "log_odds": d.one_of(0.0, -1.7, 3.0)}, ("energies",)


_MAKERS = (
    _mask_tokens, _embed, _linear, _attention, _attention_qkv, _add_norm, _bias_gelu, _mlm_head,
    _replace_tokens, _rtd_loss, _nce_loss,
)  # fmt: skip
MAKERS = {maker.__name__.removeprefix("_"): maker for maker in _MAKERS}


def _plant(d: Draw, args: dict, names: list[str], values: tuple, factors: tuple = ()) -> None:
    """Write some of `values` to a few elements of one or two of the tensors `names`."""
    for name in d.random.sample(names, min(len(names), d.one_of(1, 2))):
        flat = args[name].flatten()
        for i in (d.random.randrange(len(flat)) for _ in range(d.one_of(1, 2, 4) if len(flat) else 0)):
            value = d.random.choice(values)
            if values is EXTREMES:
                largest = 65504.0 if name == "weights" else 1e30 if name in factors else value
                value = min(value, largest)
            if flat.is_floating_point():
                value = value if values is INFINITE else min(value, torch.finfo(flat.dtype).max)
                if d.small and flat.dtype == torch.bfloat16 and value:
                    value = max(value, torch.finfo(flat.dtype).tiny)  # Triton's interpreter reads less as 0
                flat[i] = value if name == "weights" else value * d.one_of(1, -1)  # no weight is negative
            elif abs(value) <= torch.iinfo(flat.dtype).max:
                flat[i] = value
        args[name] = flat.view(args[name].shape)


def case(op: str, seed: int, small: bool = False) -> Case:
    """Return the case of a seed; with `small` its size suits the Triton interpreter."""
    d = Draw(seed, small)
    args, gradients = MAKERS[op](d)
    tensors = [name for name, x in args.items() if isinstance(x, Tensor) and x.dim()]
    floats = [name for name in tensors if args[name].is_floating_point()]
    integers = [name for name in tensors if name != "rng" and args[name].dtype in (torch.int32, torch.int64)]
    kind = d.random.choices(("ordinary", "extreme", "infinite", "illegal"), (8, 2, 1, 1))[0]
    if kind in ("extreme", "infinite") and floats:
        _plant(d, args, floats, EXTREMES if kind == "extreme" else INFINITE, FACTORS.get(op, ()))
    elif kind == "illegal" and integers:
        _plant(d, args, integers, ILLEGAL)
    else:
        kind = "ordinary"
    for name in tensors:
        layout = d.one_of("", "", "", *LAYOUTS)
        if layout and not (layout == "expanded" and name in NEVER_EXPANDED):
            args[name] = LAYOUTS[layout](args[name])
    gradients = tuple(name for name in gradients if args[name] is not None)
    upstream = d.one_of("", *LAYOUTS)
    exact = not gradients
    return Case(Example(op, f"seed {seed}", args, gradients, exact=exact, layout=upstream), kind)


def _judge_roughly(function, example: Example, factor: float, extreme: bool) -> dict[str, str]:
    """Return for each result the error that exceeds roundings, empty if it is right.

    Results for which plain PyTorch has NaN or infinity are omitted; for extreme values all are omitted then.
    A result that is NaN is omitted if the reference in float32 is NaN too: F.layer_norm is at large values,
    where it may be finite in bfloat16.
    """
    got, cpu = run(function, example), example.to(device="cpu")
    low = run(getattr(REPLAYED, example.op), cpu)
    if extreme and not all(x.isfinite().all() for results in low for x in results.values()):
        return {}
    wide = run(getattr(reference, example.op), cpu) if extreme else low
    ref = run(getattr(reference, example.op), cpu.to(torch.float64))
    floats = [x.dtype for x in example.args.values() if isinstance(x, Tensor) and x.is_floating_point()]
    # Allow one rounding of the result, and one of the largest number, which may have cancelled.
    eps = max(torch.finfo(dtype).eps for dtype in floats)
    inputs = (x for x in cpu.args.values() if isinstance(x, Tensor) and x.is_floating_point() and x.numel())
    cancelled = eps if extreme else torch.finfo(torch.float32).eps
    most = cancelled * max((x.abs().nan_to_num(0, 0, 0).max().item() for x in inputs), default=0)
    wholly = max(CANCELLED, eps / cancelled)  # one of the terms may be a rounded result
    found = {}
    for kind, results, wanted, plain, other in zip((".", ": gradient of "), got, ref, low, wide, strict=True):
        for name in (results.keys() & plain.keys()) - {"samples"}:
            both_nan = results[name].isnan().any() and other[name].isnan().any()
            if plain[name].isfinite().all() and not both_nan:
                title = f"{example.op} ({example.name}){kind}{name}"  # the name that judge_example gives
                nothing = not extreme and wanted[name].numel() and wanted[name].abs().max() <= most
                rounded = plain[name].double() + eps * wanted[name] + (wholly if nothing else 1) * most
                judgement = judge(title, results[name], wanted[name], rounded, factor)
                found[title] = judgement.why if judgement.ratio > (1 if nothing else MARGIN) else ""
    return found


def _judge_run(function, example: Example) -> str:
    """Check only that the samples are ids of the vocabulary."""
    samples = run(function, example)[0].get("samples")
    V = len(example.args.get("table", ()))
    legal = not V or ((samples >= 0) & (samples < V)).all()
    return "" if legal else f"a sample outside of the vocabulary: {samples.tolist()}"


def judge_ordinary(function, example: Example) -> str:
    """Return the error of an ordinary case that exceeds `MARGIN` times the budget, or an empty string."""
    wrong = [j for j in judge_example(function, example) if j.why and j.ratio > MARGIN]
    # If terms cancel, plain PyTorch may be exact by chance. A wrong sample or NaN has an infinite ratio.
    if any(math.isfinite(j.ratio) for j in wrong):
        found = _judge_roughly(function, example, factor=3.0, extreme=False)
        wrong = [j for j in wrong if not math.isfinite(j.ratio) or found.get(j.name, j.why)]
    return wrong[0].why if wrong else ""


def judge_case(op: str, function, seed: int, *, small: bool = False, device: str = "cpu") -> Outcome:
    """Run one case and judge it. An ordinary case must be within `MARGIN` times the error budget.

    With extreme values the result must be near that of plain PyTorch, if that is finite. With infinite or
    illegal values any numbers are right, but samples must be legal, and errors must be documented ones.
    """
    example, kind = case(op, seed, small)
    example = example.to(device=device)
    try:
        if kind in ("infinite", "illegal"):
            return Outcome(_judge_run(function, example))
        if kind == "extreme" and not example.exact:
            found = _judge_roughly(function, example, LENIENT, extreme=True)
            return Outcome(next(filter(None, found.values()), ""))
        return Outcome(judge_ordinary(function, example))
    except REFUSALS as error:
        if str(error).startswith(op.removesuffix("_qkv")):  # attention_qkv runs the kernel of attention
            return Outcome(refused=str(error))
        return Outcome(f"{type(error).__name__}: {error}")
    except Exception as error:  # not a documented error
        return Outcome(f"{type(error).__name__}: {error}")


def fuzz_op(op: str, function, *, seconds: float = 60, seed: int | None = None, device: str = "cpu") -> int:
    """Run an implementation of an op on random cases; return the number of cases.

    Args:
        op: a name in `electra_fast.ops.Ops`.
        function: has the signature of that op and is called with keywords.
        seconds: the duration; at least one case is run.
        seed: the seed of the first case, incremented for each case; None draws a new one.
        device: the device of the inputs.

    Raises:
        AssertionError: a case is wrong or raises an error that is not documented; the message has its seed.
    """
    check_function("fuzz_op", op, function)
    seed = torch.seed() % 2**31 if seed is None else seed
    end, cases = time.monotonic() + seconds, 0
    while not cases or time.monotonic() < end:
        finding = judge_case(op, function, seed + cases, device=device).finding
        if finding:
            raise AssertionError(f"{op} [seed {seed + cases}]: {finding}")
        cases += 1
    return cases
