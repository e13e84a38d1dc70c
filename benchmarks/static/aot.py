"""Compile Triton kernels for one architecture, as their own launchers call them, without a GPU.

    TRITON_INTERPRET=0 python -m benchmarks.static.aot 90 ops 1.0

A stand-in driver names the architecture, and a launch stops after the compiler: argument types, alignment and
launch shapes are the real ones. Prints one JSON object per compiled kernel. Runs in a process of its own,
because Triton decides at import whether kernels are interpreted.

The same compiler makes the same code of the same source. So a kernel whose source, constants and compiler
are those of a committed row need not be compiled again, and takes its figures from there. The last argument
is the share of such kernels that is compiled all the same, chosen at random.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.machine import ROOT
from benchmarks.static import figures, gpus, sass

PARTS = ("ops", "attention")  # of launches.py; `packed` compiles nothing that these do not
COUNTING = [Path(module.__file__).read_bytes() for module in (gpus, sass)]


def compiled(arch: int, part: str, share: float = 1.0) -> list[dict]:
    """Return a row for each kernel that a part of launches.py compiles for sm_<arch>.

    Of the kernels that figures.json has from the same source and compiler only `share` is compiled.
    """
    # Another compiler, or one that is told otherwise, has other figures.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k == "TRITON_CACHE_DIR"}
    command = [sys.executable, "-m", "benchmarks.static.aot", str(arch), part, str(share)]
    # Line numbers would make the machine code depend on comments and on the folder of the sources.
    environment = {**kept, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"static: {part} does not compile for sm_{arch}\n{done.stderr[-3000:]}")
    return named_apart([json.loads(line) for line in done.stdout.splitlines()])


def named_apart(rows: list[dict]) -> list[dict]:
    """Number those whose variants read alike: for other lengths, or multiples of other powers of two."""
    seen: dict[tuple, int] = {}
    for row in rows:
        key = (row["kernel"], row["variant"])
        seen[key] = seen.get(key, 0) + 1
        row["variant"] += f" ({seen[key]})" if seen[key] > 1 else ""
    return rows


class Known(Exception):
    """Raised with the hash of a kernel that is not compiled."""


def kernels_of(arch: int, run, known=lambda hash: False) -> list:
    """Return each kernel that `run()` launches for sm_<arch>, in the order of their launches.

    Those of whose hash `known` is true are not compiled and have nothing but `hash` and `src`.
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

    def cache_folder(hash):  # the first thing that is done with the hash
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
    """Return a kernel's row; one that was not compiled has its figures from `committed`, by source."""
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
    """Return a hash of all that decides the figures of a kernel: Triton's own, and how code is counted.

    Triton's is of the source, the constants, the options and the compiler.
    """
    return hashlib.sha256(b"".join([hash.encode(), *COUNTING])).hexdigest()[:16]


def read(arch: int, kernel) -> dict:
    """Return the figures of a compiled kernel, from its instructions."""
    ((use, code),) = sass.functions(kernel.asm["cubin"]).values()
    use["shared_bytes"] = kernel.metadata.shared  # asked for at launch, which the cubin does not know
    found = gpus.row(arch, kernel.metadata.num_warps, use, code, sass.tcgen05_flops(kernel.asm["ptx"]))
    return found | {"products": kernel.asm["ttir"].count("tt.dot")}


def constants(kernel) -> dict:
    """Return the arguments that a kernel was compiled for, those that are None or a constexpr, by name."""
    names = kernel.src.fn.arg_names
    return {names[place[0]]: value for place, value in kernel.src.constants.items() if len(place) == 1}


def variant(kernel) -> str:
    """Say what a kernel was compiled for: the types behind its pointers, what is absent, ELECTRA's sizes."""
    types = dict.fromkeys(t[1:] for t in kernel.src.signature.values() if str(t).startswith("*"))
    known = constants(kernel)
    without = [f"no {name.removesuffix('_ptr')}" for name, value in known.items() if value is None]
    given = [f"{k}={v}" for k, v in known.items() if v is not None and not is_shape(k)]
    return " ".join([",".join(types), *without, *given])


def shape(kernel) -> str:
    """Return the constants that its launcher chooses; with others it is still the same kernel."""
    return " ".join(f"{name}={value}" for name, value in constants(kernel).items() if is_shape(name))


def is_shape(name: str) -> bool:
    return name.startswith("BLOCK") or name in ("SIDE", "SUB", "PIECE", "LEVELS")


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "0", "an interpreted kernel is not compiled"
    from benchmarks.static.launches import LAUNCHES

    arch, part, share = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    rows = figures.load()["rows"] if share < 1 else []
    committed = {row["source"]: row for row in rows if row["arch"] == arch}

    def known(hash: str) -> bool:
        return source(hash) in committed and random.random() >= share

    for kernel in kernels_of(arch, LAUNCHES[part], known):
        print(json.dumps(row_of(arch, part, kernel, committed)))
