"""Break the source of a kernel on purpose: `check_op` must refuse it."""

import importlib.util
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from electra_fast import ops, testing
from electra_fast.ops._public import Kernels

ROOT = Path(__file__).parents[1]
FAULTS = [
    ("_binary_cross_entropy", "loss = tl.maximum(z, 0.0) + log1p", "loss = tl.maximum(z, 0.0)"),
    ("_binary_cross_entropy", "z = tl.where(y, -x, x)", "z = x"),
    ("_binary_cross_entropy", "acc += tl.load(partial_ptr", "acc = 1.01 * tl.load(partial_ptr"),
    ("_binary_cross_entropy", "guess & y, w", "guess, w"),
    ("_binary_cross_entropy", "tl.where(w == 0, 0.0, x)", "x + 0.0"),
    ("_binary_cross_entropy", "blocks = cdiv(T, BLOCK_T)", "blocks = max(T // BLOCK_T, 1)"),
    ("_binary_cross_entropy", "share = w / tl", "share = 1 / tl"),
    ("_binary_cross_entropy", "s * x > 0, 1.0, e", "x > 0, 1.0, e"),
    ("_binary_cross_entropy", "share = w / tl", "share = 1.01 * w / tl"),
    (
        "_binary_cross_entropy",
        "w / tl.where(total == 0, 1.0, total)",
        "w * (1 / tl.where(total == 0, 1.0, total))",
    ),
    ("rtd_loss", "counted(x, w), y", "counted(-x, w), y"),
    ("rtd_loss", "grid = y.view(torch.uint8), (cdiv(T, BLOCK_T),)", "grid = y.view(torch.uint8), (1,)"),
    ("nce_loss", "counted(x + q + log_odds, w)", "x + q + log_odds"),
    ("nce_loss", "counted(x + q + log_odds, w)", "counted(x + q, w)"),
    ("nce_loss", "counted(x + q + log_odds, w)", "counted(x - q + log_odds, w)"),
    ("nce_loss", "(cdiv(T, BLOCK_T),)", "(max(T // BLOCK_T, 1),)"),
    ("nce_loss", "w_ptr, log_odds, T, BLOCK_T)\n    dx =", "w_ptr, 0.0, T, BLOCK_T)\n    dx ="),
    ("nce_loss", "dx.to(dx", "-dx.to(dx"),
    ("mask_tokens", "tl.where(below < k, kth | bit, kth)", "tl.where(below < k - 1, kth | bit, kth)"),
    ("mask_tokens", "candidate = candidate & real", "candidate = candidate"),
    ("mask_tokens", "+ half) >> 32", ") >> 32"),
    ("mask_tokens", "tl.load(rng_ptr), 0, offs_t, step, 0)", "tl.load(rng_ptr), 0, offs_t, step, 1)"),
    ("mask_tokens", "n = seq_len", "n = seq_len - 1"),
    ("mask_tokens", "slot = ((P * start) >> 32) + b", "slot = ((P * start) >> 32)"),
    ("mask_tokens", "range(k, slots, BLOCK)", "range(k, slots - 1, BLOCK)"),
    ("mask_tokens", "w1.to(tl.int64) >= keep_rate", "w0.to(tl.int64) >= keep_rate"),
    ("replace_tokens", "sample != original", "sample == original"),
    ("replace_tokens", "used = in_m & (tl", "used = in_m | (tl"),
    ("replace_tokens", "grid = (cdiv(M, BLOCK),)", "grid = (max(M // BLOCK, 1),)"),
    ("replace_tokens", "in_t = offs_t < T\n    tl.store(out", "in_t = offs_t < T - 1\n    tl.store(out"),
    ("embed", "position_ids_ptr, offs_t % L", "position_ids_ptr, offs_t"),
    ("embed", "tl.sum(d * d, axis=1) / E", "tl.sum(d * d, axis=1) / (E - 1)"),
    ("embed", "tl.where(in_e, x - mean, 0.0)", "x - mean"),
    (
        "embed",
        "dy = tl.where(keep(rng_ptr, dropout_stream,",
        "dy = tl.where(keep(rng_ptr, dropout_stream + 1,",
    ),
    ("embed", "g - avg_g - h * avg_gh", "g - avg_g"),
    ("embed", "dw += h * dy", "dw += h * g"),
    ("embed", "keys_ptr + 2 * T + offs_t", "keys_ptr + T + offs_t"),
    ("embed", "partial[:, :, 0].sum(0)", "partial[0, :, 0]"),
    ("_embed_sums", "k < head_end, k, k + (tail_start - head_end)", "k < head_end, k, k"),
    ("_embed_sums", "tail_start // PIECE\n", "tail_start // PIECE - 1\n"),
    ("_embed_sums", "tl.sum(x, axis=0), mask=in_e", "tl.max(x, axis=0), mask=in_e"),
    ("_embed_sums", "out += tl.load(base_ptr", "out = tl.load(base_ptr"),
    ("add_norm", "z_i = tl.where(kept_i, z_i * keep_scale, 0.0)", "z_i = tl.where(kept_i, z_i, 0.0)"),
    ("add_norm", "offs_t, i * BLOCK_W, threshold", "offs_t, 0, threshold"),
    ("add_norm", "z_i += residual[i]", "z_i -= residual[i]"),
    ("add_norm", "tl.where(mask[i], z[i] - mean, 0.0)", "z[i] - mean"),
    ("add_norm", "row_sums(dd) / W + eps", "row_sums(dd) / (W - 1) + eps"),
    ("add_norm", "row_sums(dd) / W + eps", "row_sums(dd) / W + 0.01"),
    ("add_norm", "* weight[i] + bias[i]", "* weight[i] - bias[i]"),
    ("add_norm", "g[i] - avg_g - h[i] * avg_gh", "g[i] - avg_g"),
    ("add_norm", "g[i] - avg_g - h[i] * avg_gh", "g[i] - h[i] * avg_gh"),
    ("add_norm", "fold(h_i * dy[i], SIDE)", "fold(h_i * g_i, SIDE)"),
    ("add_norm", "dw, db = next_dw, next_db", "dw = next_dw"),
    ("add_norm", "dx = tl.where(kept[i], dz * keep_scale, 0.0)", "dx = dz"),
    ("add_norm", "T, programs * BLOCK_T", "T, (programs + 1) * BLOCK_T"),
    ("bias_gelu", "-1.151106941e00", "-1.161106941e00"),
    ("bias_gelu", "a = tl.abs(z)", "a = z"),
    ("bias_gelu", "tl.where(z < 0, below, 1.0 - below)", "tl.where(z > 0, below, 1.0 - below)"),
    ("bias_gelu", "+ z * density", "- z * density"),
    ("bias_gelu", "- LOG2_ROOT_2PI)", "- 1.3)"),
    ("bias_gelu", "sums += fold(dx, SIDE)", "sums = fold(dx, SIDE)"),
    ("_rows", "(offs_t < T)[:, None]", "(offs_t < T - 1)[:, None]"),
    ("_rows", "w0 + tl.arange(0, BLOCK_W)\n        offs", "tl.arange(0, BLOCK_W)\n        offs"),
    ("_rows", "range(1, len(x))", "range(2, len(x))"),
    ("_rows", "tl.where(mask[i], (x[i] - m) * SHARE, 0.0)", "(x[i] - m) * SHARE"),
    ("_rows", "mask=(offs_p < P)[:, None]", "mask=(offs_p < P - 1)[:, None]"),
    ("_rows", "tl.program_id(1) * P + offs_p", "offs_p"),
    ("_common", "1 / (1 - p)", "1.0"),
    ("attention", "H, scale, *drop)", "H, 1.01 * scale, *drop)"),
    ("attention", "H, scale, *drop)", "H, scale, drop[0], 1.0, drop[2])"),
    ("attention_qkv", "return dqkv", "return dqkv.flip(-3)"),
    ("attention", "strides(k) if own", "strides(q) if own"),
    ("_attention_tile", "visible = offs_n < k_len", "visible = offs_n <= k_len"),
    ("_attention_tile", "b.to(tl.int64) * k_len", "b.to(tl.int64) * 9"),
    ("_attention_tile", "b.to(tl.int64) * K, K", "b.to(tl.int64) * L, K"),
    ("_attention_tile", "bounds(cu_seqlens_k_ptr, b, last, K, S)", "bounds(cu_seqlens_ptr, b, last, L, T)"),
    ("_attention_tile", "legal & (q_len <= k_len)", "legal & (q_len < k_len)"),
    ("_attention_tile", "other=0) != 0", "other=0) == 0"),
    ("_attention_tile", "offs_n[None, :] <= offs_m[:, None]", "offs_n[None, :] < offs_m[:, None]"),
    ("_attention_fwd", "keep_scale / divisor", "1.0 / divisor"),
    ("_attention_fwd", "row + offs_r * H, 0, threshold", "row + offs_r, 0, threshold"),
    ("_attention_fwd", "row + offs_r * H, start_n, threshold", "row + offs_r * H, 0, threshold"),
    ("_attention_fwd", "acc * alpha[:, None]", "acc"),
    ("_attention_fwd", "l_i = l_i * alpha", "l_i = l_i"),
    ("_attention_fwd", "tl.minimum(k_len, position + BLOCK_M)", "tl.minimum(k_len, position)"),
    ("_attention_fwd", "start_m + k_len - q_len", "start_m"),
    ("_attention_fwd", "start_m + k_len - q_len", "start_m + k_len - q_len + 1"),
    ("_attention_fwd", "dropout_stream, row + offs_r", "dropout_stream, row + k_start - q_start + offs_r"),
    ("_attention_bwd", "p * (dp - delta[:, None])", "p * dp"),
    ("_attention_bwd", "z = tl.where(kept, p, 0.0)", "z = p"),
    ("_attention_bwd", "tl.where(kept, dp * keep_scale, 0.0)", "dp * keep_scale"),
    ("_attention_bwd", "dq * scale, D, BLOCK_D)\n    d_offset", "dq, D, BLOCK_D)\n    d_offset"),
    ("_attention_bwd", "dq * scale, D, BLOCK_D)\n\n\n", "dq, D, BLOCK_D)\n\n\n"),
    ("_attention_bwd", "tl.where(visible[:, None], dv * keep_scale, 0.0)", "dv * keep_scale"),
    ("_attention_bwd", "tl.minimum(k_len, position + BLOCK_M)", "tl.minimum(k_len, position)"),
    ("_attention_bwd", "// BLOCK_M * BLOCK_M", "// BLOCK_M * BLOCK_M + BLOCK_M"),
    ("_attention_bwd", "tl.maximum(start_n - ahead, 0)", "start_n"),
    ("_attention_bwd", "start_m + ahead", "start_m"),
    ("_attention_bwd", "position = k_len - q_len", "position = k_len - q_len - 1"),
    ("_attention_bwd", "tl.maximum(q_len, k_len) == 0", "q_len == 0"),
    (
        "_attention_bwd",
        "in_n = start_n + tl.arange(0, BLOCK_N) < k_len",
        "in_n = start_n + tl.arange(0, BLOCK_N) < q_len",
    ),
    ("mlm_head", "dbias *= slots.scale", "dbias *= 1.01 * slots.scale"),
    ("_mlm_sweep", "used = w != 0", "used = offs_m < M"),
    ("_mlm_sweep", "tl.minimum(largest, 1.0)", "1.0"),
    ("_mlm_sweep", 'mask=offs_v < V, other=float("-inf")', "mask=offs_v < V, other=0.0"),
    (
        "_mlm_sweep",
        "total += tl.sum(w.to(tl.float64), axis=0)",
        "total += tl.sum(used.to(tl.float64), axis=0)",
    ),
    ("_mlm_draw", "= _uniform(rng_ptr, slot)", "= _uniform(rng_ptr, r)"),
    ("_mlm_draw", "up_to - z, 0.0", "up_to, 0.0"),
    ("_mlm_draw", "override = (block_y,", "override = (-1,"),
    ("_mlm_draw", "loss += tl.sum(w * ", "loss += tl.sum("),
    ("_mlm_draw", "goal = (threshold - before)", "goal = threshold"),
    ("_mlm_gradient", "acc = dot(d.to(x.dtype), tokens, acc)", "acc = dot(p.to(x.dtype), tokens, acc)"),
    ("_mlm_gradient", "dbias += tl.sum(d, axis=1)", "dbias += tl.sum(p, axis=1)"),
    ("_mlm_gradient", "mask=used & (offs_e < E), other=0.0", "mask=offs_e < E, other=0.0"),
    (
        "_mlm_gradient",
        "dbias = tl.load(dbias_ptr + offs_v, mask=offs_v < V, other=0.0)",
        "dbias = tl.zeros((BLOCK_V,), tl.float32) + 1e-3",
    ),
]

# The dtype that finds a fault which bfloat16 does not show.
FIRST = {("_mlm_draw", "override = (-1,"): torch.float16, ("_mlm_sweep", "1.0"): torch.float32}


def load(path, name):
    """Load a kernel file as a new module called `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launchers(path, monkeypatch):
    """Return (op, launchers) pairs of the kernel file at `path`, or of those that import it."""
    op = path.stem
    module = load(path, f"broken_{op}")
    if op.startswith("_"):
        monkeypatch.setitem(sys.modules, f"electra_fast.kernels.{op}", module)
        users = [f for f in (ROOT / "kernels").glob("*.py") if f"kernels.{op} import" in f.read_text()]
        parts = sorted(user for user in users if user.stem.startswith("_"))
        for part in parts:  # before an op, which imports them again
            launchers(part, monkeypatch)
        return [pair for user in sorted({*users} - {*parts}) for pair in launchers(user, monkeypatch)]
    names = (op, None) if hasattr(module, op) else (f"{op}_fwd", f"{op}_bwd")
    return [(op, Kernels(*(getattr(module, name) if name else None for name in names)))]


@pytest.mark.skipif(not testing.interpreted(), reason="on a GPU a broken kernel may destroy the context")
@pytest.mark.parametrize(
    ("kernel", "right", "wrong"), FAULTS, ids=[f"{op}: {wrong}" for op, _, wrong in FAULTS]
)
def test_the_check_sees(kernel, right, wrong, tmp_path, monkeypatch):
    source = (ROOT / "kernels" / f"{kernel}.py").read_text()
    assert right in source, "the fault no longer fits the kernel"
    broken = tmp_path / f"{kernel}.py"
    broken.write_text(source.replace(right, wrong))
    pairs = launchers(broken, monkeypatch)
    first = FIRST.get((kernel, wrong), torch.bfloat16)  # finds most faults
    dtypes = sorted((torch.bfloat16, torch.float32, torch.float16), key=lambda dtype: dtype != first)
    with pytest.raises(AssertionError), testing.guarded_memory():
        for dtype, (op, kernels) in product(dtypes, pairs):
            testing.check_op(op, getattr(ops, op).over(kernels), seed=0, dtypes=[dtype])
