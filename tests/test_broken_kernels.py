"""Break a kernel's source on purpose: the check must see it."""

import importlib.util
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from electra_fast import ops, testing
from electra_fast.ops._register import Kernels

ROOT = Path(__file__).parents[1]
FAULTS = [
    ("rtd_loss", "loss = tl.maximum(z, 0.0) + log1p", "loss = tl.maximum(z, 0.0)"),
    ("rtd_loss", "z = tl.where(y, -x, x)", "z = x"),
    ("rtd_loss", "acc += tl.load(partial_ptr", "acc = 1.01 * tl.load(partial_ptr"),
    ("rtd_loss", "guess & y, w", "guess, w"),
    ("rtd_loss", "x = tl.where(w == 0, 0.0, x)", "x = x + 0.0"),
    ("rtd_loss", "blocks = triton.cdiv(T, BLOCK_T)", "blocks = max(T // BLOCK_T, 1)"),
    ("rtd_loss", "share = w / tl", "share = 1 / tl"),
    ("rtd_loss", "s * x > 0, 1.0, e", "x > 0, 1.0, e"),
    ("rtd_loss", "share = w / tl", "share = 1.01 * w / tl"),
    ("rtd_loss", "w / tl.where(total == 0, 1.0, total)", "w * (1 / tl.where(total == 0, 1.0, total))"),
    ("mask_tokens", "tl.where(below < k, kth | bit, kth)", "tl.where(below < k - 1, kth | bit, kth)"),
    ("mask_tokens", "candidate = candidate & real", "candidate = candidate"),
    ("mask_tokens", "+ half) >> 32", ") >> 32"),
    ("mask_tokens", "tl.load(rng_ptr), 0, t, step, 0)", "tl.load(rng_ptr), 0, t, step, 1)"),
    ("mask_tokens", "n = length", "n = length - 1"),
    ("mask_tokens", "slot = ((P * start) >> 32) + b", "slot = ((P * start) >> 32)"),
    ("mask_tokens", "range(k, slots, BLOCK)", "range(k, slots - 1, BLOCK)"),
    ("mask_tokens", "w1.to(tl.int64) >= keep_rate", "w0.to(tl.int64) >= keep_rate"),
    ("replace_tokens", "sample != original", "sample == original"),
    ("replace_tokens", "used = in_m & (tl", "used = in_m | (tl"),
    ("replace_tokens", "grid = (triton.cdiv(M, BLOCK),)", "grid = (max(M // BLOCK, 1),)"),
    ("replace_tokens", "in_t = offs_t < T\n    tl.store(out", "in_t = offs_t < T - 1\n    tl.store(out"),
    ("embed", "places_ptr, t % L", "places_ptr, t"),
    ("embed", "tl.sum(d * d, axis=1) / E", "tl.sum(d * d, axis=1) / (E - 1)"),
    ("embed", "tl.where(in_e, x - mean, 0.0)", "x - mean"),
    ("embed", "dy = tl.where(keep(rng_ptr, site, t", "dy = tl.where(keep(rng_ptr, site + 1, t"),
    ("embed", "g - avg_g - h * avg_gh", "g - avg_g"),
    ("embed", "sum_dw += h * dy", "sum_dw += h * g"),
    ("embed", "keys_ptr + 2 * T + t", "keys_ptr + T + t"),
    ("embed", "partial[:, :, 0].sum(0)", "partial[0, :, 0]"),
    ("_embed_sums", "k < up, k, k + (down - up)", "k < up, k, k"),
    ("_embed_sums", "start, end = up // PIECE, down // PIECE", "start, end = up // PIECE, down // PIECE - 1"),
    ("_embed_sums", "tl.sum(x, axis=0), mask=e < E", "tl.max(x, axis=0), mask=e < E"),
    ("_embed_sums", "total += tl.load(base_ptr", "total = tl.load(base_ptr"),
    ("add_norm", "z_i = tl.where(kept_i, z_i * scale, 0.0)", "z_i = tl.where(kept_i, z_i, 0.0)"),
    ("add_norm", "t, i * BLOCK_W, threshold", "t, 0, threshold"),
    ("add_norm", "z_i += residual[i]", "z_i -= residual[i]"),
    ("add_norm", "tl.where(inside[i], z[i] - mean, 0.0)", "z[i] - mean"),
    ("add_norm", "total(dd) / W + eps", "total(dd) / (W - 1) + eps"),
    ("add_norm", "total(dd) / W + eps", "total(dd) / W + 0.01"),
    ("add_norm", "* weight[i] + bias[i]", "* weight[i] - bias[i]"),
    ("add_norm", "g[i] - avg_g - h[i] * avg_gh", "g[i] - avg_g"),
    ("add_norm", "g[i] - avg_g - h[i] * avg_gh", "g[i] - h[i] * avg_gh"),
    ("add_norm", "fold(h_i * dy[i], SIDE)", "fold(h_i * g_i, SIDE)"),
    ("add_norm", "sum_dw, sum_db = more_dw, more_db", "sum_dw = more_dw"),
    ("add_norm", "dx = tl.where(kept[i], dz * scale, 0.0)", "dx = dz"),
    ("add_norm", "T, programs * BLOCK_T", "T, (programs + 1) * BLOCK_T"),
    ("bias_gelu", "-1.151106941e00", "-1.161106941e00"),
    ("bias_gelu", "a = tl.abs(z)", "a = z"),
    ("bias_gelu", "tl.where(z < 0, below, 1.0 - below)", "tl.where(z > 0, below, 1.0 - below)"),
    ("bias_gelu", "+ z * density", "- z * density"),
    ("bias_gelu", "- LOG2_ROOT_2PI)", "- 1.3)"),
    ("bias_gelu", "sums += fold(dx, SIDE)", "sums = fold(dx, SIDE)"),
    ("_rows", "(t < T)[:, None] & (w < W)[None, :]", "(t < T - 1)[:, None] & (w < W)[None, :]"),
    ("_rows", "w = first + tl.arange(0, BLOCK_W)\n        at", "w = tl.arange(0, BLOCK_W)\n        at"),
    ("_rows", "range(1, len(x))", "range(2, len(x))"),
    ("_rows", "tl.where(inside[i], (x[i] - m) * SHARE, 0.0)", "(x[i] - m) * SHARE"),
    ("_rows", "mask=(p < P)[:, None]", "mask=(p < P - 1)[:, None]"),
    ("_rows", "tl.program_id(1) * P + p", "p"),
    ("attention", '"scale": scale', '"scale": 1.01 * scale'),
    ("attention", "1 / (1 - dropout)", "1.0"),
    ("attention_qkv", "return dqkv", "return dqkv.flip(-3)"),
    ("_attention_tile", "seen = m < n", "seen = m < L"),
    ("_attention_tile", "other=0) != 0", "other=0) == 0"),
    ("_attention_tile", "m[None, :] <= l[:, None]", "m[None, :] < l[:, None]"),
    ("_attention_fwd", "kept_scale / some", "1.0 / some"),
    ("_attention_fwd", "row + i * H, 0, threshold", "row + i, 0, threshold"),
    ("_attention_fwd", "row + i * H, first, threshold", "row + i * H, 0, threshold"),
    ("_attention_fwd", "acc * shrink[:, None]", "acc"),
    ("_attention_fwd", "total = total * shrink", "total = total"),
    ("_attention_fwd", "tl.minimum(n, first_l + BLOCK_M)", "tl.minimum(n, first_l)"),
    ("_attention_bwd", "p * (dp - delta[:, None])", "p * dp"),
    ("_attention_bwd", "z = tl.where(kept, p, 0.0)", "z = p"),
    ("_attention_bwd", "tl.where(kept, dp * kept_scale, 0.0)", "dp * kept_scale"),
    ("_attention_bwd", "at, d_strides[1], inside, dq * scale", "at, d_strides[1], inside, dq"),
    (
        "_attention_bwd",
        "first_l, h), d_strides[1], inside, dq * scale",
        "first_l, h), d_strides[1], inside, dq",
    ),
    ("_attention_bwd", "tl.where(seen[:, None], dv * kept_scale, 0.0)", "dv * kept_scale"),
    ("_attention_bwd", "tl.minimum(n, first_l + BLOCK_M)", "tl.minimum(n, first_l)"),
    ("_attention_bwd", "first_m // BLOCK_M * BLOCK_M", "(first_m // BLOCK_M + 1) * BLOCK_M"),
    ("mlm_head", "dbias *= self.scale", "dbias *= 1.01 * self.scale"),
    ("_mlm_sweep", "used = w != 0", "used = m < M"),
    ("_mlm_sweep", "tl.minimum(most, 1.0)", "1.0"),
    ("_mlm_sweep", 'mask=v < V, other=float("-inf")', "mask=v < V, other=0.0"),
    (
        "_mlm_sweep",
        "total += tl.sum(w.to(tl.float64), axis=0)",
        "total += tl.sum(used.to(tl.float64), axis=0)",
    ),
    ("_mlm_draw", "= _uniform(rng_ptr, slot)", "= _uniform(rng_ptr, r)"),
    ("_mlm_draw", "up_to - z, 0.0", "up_to, 0.0"),
    ("_mlm_draw", "barred = block_y\n", "barred = -1\n"),
    ("_mlm_draw", "loss += tl.sum(w * ", "loss += tl.sum("),
    ("_mlm_draw", "goal = (threshold - before)", "goal = threshold"),
    ("_mlm_gradient", "acc = dot(d.to(x.dtype), tokens, acc)", "acc = dot(p.to(x.dtype), tokens, acc)"),
    ("_mlm_gradient", "total += tl.sum(d, axis=1)", "total += tl.sum(p, axis=1)"),
    ("_mlm_gradient", "mask=used & (e < E), other=0.0", "mask=e < E, other=0.0"),
    (
        "_mlm_gradient",
        "total = tl.load(dbias_ptr + v, mask=v < V, other=0.0)",
        "total = tl.zeros((BLOCK_V,), tl.float32) + 1e-3",
    ),
]


def load(path, name):
    """Load a kernel file as the module `name`, whatever else has that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launchers(path, monkeypatch):
    """Return ops and their launchers: the kernel file at `path`, or those that import it."""
    op = path.stem
    module = load(path, f"broken_{op}")
    if op.startswith("_"):
        monkeypatch.setitem(sys.modules, f"electra_fast.kernels.{op}", module)
        users = [f for f in (ROOT / "kernels").glob("*.py") if f"kernels.{op} import" in f.read_text()]
        parts = sorted(user for user in users if user.stem.startswith("_"))
        for part in parts:  # they come before an op, which imports them anew
            launchers(part, monkeypatch)
        return [pair for user in sorted({*users} - {*parts}) for pair in launchers(user, monkeypatch)]
    names = (op, None) if hasattr(module, op) else (f"{op}_fwd", f"{op}_bwd")
    return [(op, Kernels(*(getattr(module, name) if name else None for name in names)))]


@pytest.mark.skipif(not testing.interpreted(), reason="on a GPU a broken kernel may take the context with it")
@pytest.mark.parametrize(
    ("kernel", "right", "wrong"), FAULTS, ids=[f"{op}: {wrong}" for op, _, wrong in FAULTS]
)
def test_the_check_sees(kernel, right, wrong, tmp_path, monkeypatch):
    source = (ROOT / "kernels" / f"{kernel}.py").read_text()
    assert right in source, "the fault no longer fits the kernel"
    broken = tmp_path / f"{kernel}.py"
    broken.write_text(source.replace(right, wrong))
    pairs = launchers(broken, monkeypatch)
    dtypes = (torch.bfloat16, torch.float32, torch.float16)  # the first finds most, and soonest
    with pytest.raises(AssertionError), testing.guarded_memory():
        for dtype, (op, kernels) in product(dtypes, pairs):
            testing.check_op(op, getattr(ops, op).over(kernels), seed=0, dtypes=[dtype])
