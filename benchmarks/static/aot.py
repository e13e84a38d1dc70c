"""Compile Triton kernels for one architecture without a GPU, called by their own launchers.

    TRITON_INTERPRET=0 python -m benchmarks.static.aot 90 ops,attention 1.0

A stand-in driver reports the architecture, and each launch stops after compilation, so argument types,
alignment and launch shapes are the real ones. Prints one JSON object per compiled kernel. Runs in its own
process, because Triton decides at import whether kernels are interpreted.

The same compiler makes the same code from the same source. So a kernel whose source, constants and compiler
equal those of a committed row is not compiled again: its figures are copied from that row. The last argument
is the fraction of such kernels that is compiled nevertheless, chosen at random.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.harness.machine import ROOT
from benchmarks.static import figures, gpus, sass

PARTS = ("ops", "attention")  # of launches.py; `packed` compiles no other kernels
COUNTING = [Path(module.__file__).read_bytes() for module in (gpus, sass)]


def compiled(arch: int, *parts: str, share: float = 1.0) -> list[dict]:
    """Return one row per kernel that parts of launches.py compile for sm_<arch>, all in one process.

    Args:
        arch: 90 for sm_90.
        parts: keys of `launches.LAUNCHES`.
        share: the fraction compiled of those kernels that figures.json has from the same source and compiler.
    """
    # Triton's settings would change the figures.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k == "TRITON_CACHE_DIR"}
    command = [sys.executable, "-m", "benchmarks.static.aot", str(arch), ",".join(parts), str(share)]
    # Line numbers would make the machine code depend on comments and on the path of the sources.
    environment = {**kept, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"static: {parts} do not compile for sm_{arch}\n{done.stderr[-3000:]}")
    return named_apart([json.loads(line) for line in done.stdout.splitlines()])


def named_apart(rows: list[dict]) -> list[dict]:
    """Number the rows whose variants have the same text, because they differ in lengths or alignment only."""
    seen: dict[tuple, int] = {}
    for row in rows:
        key = (row["part"], row["kernel"], row["variant"])
        seen[key] = seen.get(key, 0) + 1
        row["variant"] += f" ({seen[key]})" if seen[key] > 1 else ""
    return rows


class Known(Exception):
    """Raised with the hash of a kernel that is not compiled."""


def kernels_of(arch: int, run, known=lambda hash: False) -> list:
    """Return each kernel that `run()` launches for sm_<arch>, in launch order.

    A kernel for whose hash `known` returns True is not compiled, and only has `hash` and `src`.
    """
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = staticmethod(lambda: arch)  # Triton caches compiled kernels by device
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    found: dict[str, object] = {}
    launch, compile, folder = JITFunction.run, triton.compiler.compile, compiler.get_cache_manager

    def cache_folder(hash):  # the compiler's first use of the hash
        if known(hash):
            raise Known(hash)
        return folder(hash)

    def compile_unknown(src, **options):
        try:
            return compile(src, **options)
        except Known as kernel:
            return SimpleNamespace(hash=kernel.args[0], src=src)

    def compile_only(self, *args, **kwargs):
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        found.setdefault(kernel.hash, kernel)

    driver.set_active(Driver())
    JITFunction.run, triton.compiler.compile = compile_only, compile_unknown
    compiler.get_cache_manager = cache_folder
    try:
        run()
    finally:
        JITFunction.run, triton.compiler.compile = launch, compile
        compiler.get_cache_manager = folder
    return list(found.values())


def row_of(arch: int, part: str, kernel, committed: dict[str, dict]) -> dict:
    """Return a kernel's row; if it was not compiled, its figures are those of `committed`, by source."""
    made_from = source(kernel.hash)
    return {
        **(read(arch, kernel) if hasattr(kernel, "asm") else committed[made_from]),
        "part": part,
        "arch": arch,
        "kernel": kernel.src.fn.__name__.removeprefix("_"),
        "variant": variant(kernel),
        "shape": shape(kernel),
        "source": made_from,
        "constants": constants(kernel),
    }


def source(hash: str) -> str:
    """Return a hash of everything that decides a kernel's figures.

    It combines Triton's hash (of source, constants, options and compiler) with the code that counts
    instructions.
    """
    return hashlib.sha256(b"".join([hash.encode(), *COUNTING])).hexdigest()[:16]


def read(arch: int, kernel) -> dict:
    """Return the figures of a compiled kernel, from its instructions."""
    ((use, code),) = sass.functions(kernel.asm["cubin"]).values()
    use["shared_bytes"] = kernel.metadata.shared  # requested at launch, so it is not in the cubin
    found = gpus.row(arch, kernel.metadata.num_warps, use, code, sass.tcgen05_flops(kernel.asm["ptx"]))
    return found | {"products": kernel.asm["ttir"].count("tt.dot")}


def constants(kernel) -> dict:
    """Return by name the arguments that were constants of the compilation: None or a constexpr."""
    names = kernel.src.fn.arg_names
    return {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}


def variant(kernel) -> str:
    """Describe what a kernel was compiled for: its pointers' types, absent arguments, ELECTRA's sizes."""
    types = dict.fromkeys(t[1:] for t in kernel.src.signature.values() if str(t).startswith("*"))
    known = constants(kernel)
    without = [f"no {name.removesuffix('_ptr')}" for name, value in known.items() if value is None]
    given = [f"{k}={v}" for k, v in known.items() if v is not None and not is_shape(k)]
    return " ".join([",".join(types), *without, *given])


def shape(kernel) -> str:
    """Return the constants that the launcher chooses; they are not part of the kernel's identity."""
    return " ".join(f"{name}={value}" for name, value in constants(kernel).items() if is_shape(name))


def is_shape(name: str) -> bool:
    return name.startswith("BLOCK") or name in ("SIDE", "SUB", "PIECE", "LEVELS")


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "0", "an interpreted kernel is not compiled"
    from benchmarks.static.launches import LAUNCHES

    arch, parts, share = int(sys.argv[1]), sys.argv[2].split(","), float(sys.argv[3])
    rows = figures.load()["rows"] if share < 1 else []
    committed = {row["source"]: row for row in rows if row["arch"] == arch}

    def known(hash: str) -> bool:
        return source(hash) in committed and random.random() >= share

    for part in parts:
        for kernel in kernels_of(arch, LAUNCHES[part], known):
            print(json.dumps(row_of(arch, part, kernel, committed)))
