"""Compile every Triton kernel for one architecture, as its own launcher calls it, and report its resources.

    TRITON_INTERPRET=0 python tests/aot.py 90 [--attention or --packed]

A stand-in driver names the architecture, and a launch stops after the compiler: argument types, alignment and
launch shapes are the real ones. Prints one JSON object a compiled kernel. Runs in a process of its own,
because Triton decides at import whether kernels are interpreted.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may ask for


def resources(kernel) -> dict:
    """Return registers, stack, shared memory and tensor-core instructions of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run(
            [tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, _, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout).groups()
    )
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "shared_bytes": kernel.metadata.shared,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|QGMMA)\b", sass)),
        "wgmma": sass.count("HGMMA"),
        "mufu": len(re.findall(r"\bMUFU\b", sass)),  # exponentials, most of them
        "integer": len(
            re.findall(r"\b(?:IMAD|IADD3?|LOP3|SHF|PRMT|ISETP|LEA)\b", sass)
        ),  # Philox, and addresses
        "products": kernel.asm["ttir"].count("tt.dot"),
    }


def compiled_for(arch: int, run) -> dict[str, dict]:
    """Return the resources of each kernel variant that `run()` launches, compiled for sm_<arch>."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = staticmethod(lambda: arch)  # Triton caches compiled kernels by device
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    found: dict[str, object] = {}
    launch = JITFunction.run

    def compile_only(self, *args, **kwargs):
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        found[f"{self.__name__} #{kernel.hash[:8]}"] = kernel

    driver.set_active(Driver())
    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = launch
    return {
        name: {"arch": arch, "warps": k.metadata.num_warps, "constants": constants(k), **resources(k)}
        for name, k in found.items()
    }


def constants(kernel) -> dict:
    """Return the arguments that a kernel was compiled for, those that are None or a constexpr, by name."""
    names = kernel.src.fn.arg_names
    return {names[place[0]]: value for place, value in kernel.src.constants.items() if len(place) == 1}


def launch_ops() -> None:
    """Call every Triton kernel but attention's, with its backward, on each dtype and layout and long rows."""
    import torch

    from electra_fast import testing

    for op in testing.OPS:
        kernels = testing.implementations(op, device="cuda")
        for example in testing.examples(op) if "triton" in kernels and "attention" not in op else ():
            if example.name.startswith(("padded", "packed, int64", "a batch")):
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
            launch_embed(embed, ids, E, dtype, types=ids, places=ids)

    add_norm = testing.implementations("add_norm", device="cuda")["triton"]
    bias_gelu = testing.implementations("bias_gelu", device="cuda")["triton"]
    for dtype in (torch.bfloat16, torch.float32):
        for W in (64, 256, 768, 1024):
            launch_add_norm(add_norm, 64, W, dtype, dropout=0.0)
            launch_add_norm(add_norm, 64, W, dtype, dropout=0.1)
        for W in (256, 1024, 3072, 4096):
            launch_bias_gelu(bias_gelu, 64, W, dtype)


def launch_attentions() -> None:
    """Call attention at each of its launch shapes, with dropout; at the shapes of ELECTRA also without."""
    import torch

    from electra_fast import testing

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


def launch_attention(attention, dtype, D, L, packed, mask=True, **options) -> None:
    import torch

    shape = (2 * L, 2, D) if packed else (2, L, 2, D)
    q, k, v = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    if packed:
        options |= {"cu_seqlens": torch.tensor([0, L, 2 * L], dtype=torch.int32), "max_seqlen": L}
    elif mask:
        options["key_mask"] = torch.ones(2, L, dtype=torch.bool)
    attention(q, k, v, rng=torch.tensor([1, 2]), **options).sum().backward()


def launch_embed(embed, ids, E, dtype, types=None, places=None, **options) -> None:
    import torch

    tables = [torch.zeros(n, E, dtype=dtype, requires_grad=True) for n in (30522, 512, 2)]
    norm = [torch.zeros(E, requires_grad=True) for _ in range(2)]
    options |= {"eps": 1e-12, "dropout": 0.1, "rng": torch.tensor([1, 2]), "stream": 2}
    embed(ids, types, places, *tables, *norm, **options).sum().backward()


def launch_add_norm(add_norm, T, W, dtype, dropout) -> None:
    import torch

    x, residual = (torch.zeros(T, W, dtype=dtype, requires_grad=True) for _ in range(2))
    norm = [torch.zeros(W, requires_grad=True) for _ in range(2)]
    options = {"eps": 1e-12, "dropout": dropout, "rng": torch.tensor([1, 2]), "stream": 2}
    add_norm(x, residual, *norm, **options).sum().backward()


def launch_bias_gelu(bias_gelu, T, W, dtype) -> None:
    import torch

    x = torch.zeros(T, W, dtype=dtype, requires_grad=True)
    bias_gelu(x, torch.zeros(W, requires_grad=True)).sum().backward()


def launch_mlm_head(mlm_head, M, E, dtype, **options) -> None:
    import torch

    x, table = (torch.zeros(n, E, dtype=dtype, requires_grad=True) for n in (M, 30522))
    targets, weights, rng = torch.zeros(M, dtype=torch.long), torch.ones(M), torch.tensor([1, 2])
    mlm_head(x, table, torch.zeros(30522), targets, weights, rng, **options).loss.backward()


def launch_packed() -> None:
    """Call the ops on packed batches of many sizes, which must not compile a kernel for each."""
    import torch

    from electra_fast import testing

    ops = {op: testing.implementations(op, device="cuda").get("triton") for op in testing.OPS}
    for T in (1, 15, 16, 17, 1024, 4099):
        ids, cu_seqlens = torch.zeros(T, dtype=torch.long), torch.tensor([0, T], dtype=torch.int32)
        packed = {"cu_seqlens": cu_seqlens, "max_seqlen": 128}
        masked = ops["mask_tokens"](ids, ids == 0, torch.tensor([1, 2]), mask_id=103, **packed)
        ops["replace_tokens"](ids, masked.positions, masked.targets, masked.weights)
        logits = torch.zeros(T, requires_grad=True)
        ops["rtd_loss"](logits, ids == 0).loss.backward()
        launch_mlm_head(ops["mlm_head"], len(masked.targets), 128, torch.bfloat16)
        launch_embed(ops["embed"], ids, 128, torch.bfloat16, cu_seqlens=cu_seqlens)
        launch_add_norm(ops["add_norm"], T, 256, torch.bfloat16, dropout=0.1)
        launch_bias_gelu(ops["bias_gelu"], T, 1024, torch.bfloat16)
        qkv = torch.zeros(T, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        for longest in (64, 128, 200, 512):
            packed["max_seqlen"] = longest
            ops["attention_qkv"](qkv, dropout=0.1, rng=torch.tensor([1, 2]), **packed).sum().backward()


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "0", "an interpreted kernel is not compiled"
    launches = {"--attention": launch_attentions, "--packed": launch_packed}
    (launch,) = [launches[word] for word in sys.argv[1:] if word in launches] or [launch_ops]
    for arch in map(int, [word for word in sys.argv[1:] if word not in launches]):
        for name, row in compiled_for(arch, launch).items():
            print(json.dumps({"kernel": name, **row}), flush=True)
