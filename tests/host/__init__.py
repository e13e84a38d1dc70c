"""Run csrc/cuda on a machine without a GPU: the same sources, compiled with g++ for tensors of the CPU.

This folder holds what stands in for CUDA's headers and for PyTorch's of c10/cuda; `fibres.h` says how a grid
runs. `install()` builds the extension `_C_host` once and registers each op that it implements as the overload
`<op>.host`, which `electra_fast.testing.implementations` then has as `cuda`.
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths
from torch.utils.flop_counter import flop_registry

from electra_fast import testing
from electra_fast.ops._register import OPERATORS

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = [CSRC / "module.cpp", *sorted(CSRC.glob("*_cuda.cpp")), *sorted(CSRC.glob("cuda/*.cu"))]
HEADERS = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *Path(__file__).parent.rglob("*.h")]

COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# Several builds live in one process, and a unique symbol would be that of the first.
FLAGS += ["-fno-gnu-unique"]
FLAGS += ["-DTORCH_EXTENSION_NAME=_C_host", "-DELECTRA_FAST_CUDA=1"]
# This folder first, so that its headers are found and not a toolkit's.
FLAGS += [f"-I{folder}" for folder in (Path(__file__).parent, CSRC, CSRC / "cuda")]
SYSTEM = [*include_paths(), sysconfig.get_paths()["include"]]
FLAGS += [word for folder in SYSTEM for word in ("-isystem", folder)]
# A GPU refuses an access that is not aligned, where this CPU does not: fibres.h raises.
KERNEL_FLAGS = ["-fsanitize=alignment"]
LINK = ["-shared", *(f"-L{folder}" for folder in library_paths()), "-lc10", "-ltorch_cpu"]


def compiled(source: Path, to: Path, *more: str) -> Path:
    made = to / f"{source.name}.o"
    flags = [*FLAGS, *(KERNEL_FLAGS if source.suffix == ".cu" else ()), *more]
    subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", made], check=True)
    return made


def link(objects: list[Path], to: Path) -> Path:
    library = to / "_C_host.so"
    subprocess.run([COMPILER, *objects, *LINK, "-o", library], check=True)
    return library


def build() -> Path:
    """Return the folder of the objects and the library, which are built where the sources have changed."""
    state = hashlib.sha256(repr((FLAGS, KERNEL_FLAGS, torch.__version__, sys.version)).encode())
    for path in sorted([*SOURCES, *HEADERS]):
        state.update(path.read_bytes())
    folder = ROOT / "build" / f"host-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # the workers of pytest-xdist come here all at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                link(list(pool.map(lambda source: compiled(source, folder), SOURCES)), folder)
            (folder / "ready").touch()
    return folder


def rebuilt(source: Path, to: Path) -> Path:
    """Return a library in which `source` takes the place of the file of the same name in csrc/."""
    ready = build()
    objects = [ready / f"{path.name}.o" for path in SOURCES if path.name != source.name]
    assert len(objects) == len(SOURCES) - 1, f"no source in csrc/ is called {source.name}"
    return link([*objects, compiled(source, to, "-Og")], to)  # it runs once: the compiler takes longer


def load(library: Path, overload: str) -> dict[str, torch._ops.OpOverload]:
    """Register what a library implements as `electra_fast::<op>.<overload>` and return it by operator."""
    name = f"{overload}._C_host"  # pybind11 gives the first module of a name to whoever asks for another
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    found = {}
    for operator, device in module.implemented():
        packet = getattr(torch.ops.electra_fast, operator)
        _, _, schema = str(packet.default._schema).partition("(")
        formula = flop_registry.pop(packet, None)  # a new overload changes the packet's hash
        torch.library.define(f"electra_fast::{operator}.{overload}", f"({schema}")
        if formula:
            flop_registry[packet] = formula
        module.serve(operator, device, f"{operator}.{overload}", "CPU")
        found[operator] = getattr(packet, overload)
    return found


def mm_with_dtype(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return a.to(dtype) @ b.to(dtype)


def install() -> None:
    """Make every op of csrc/cuda that can be built here the implementation `cuda`."""
    if COMPILER is None:
        return
    # PyTorch has the product of halves with a float32 result on a GPU alone.
    torch.library.impl("aten::mm.dtype", "CPU", mm_with_dtype)
    for operator, function in load(build() / "_C_host.so", "host").items():
        OPERATORS[operator] = OPERATORS[operator]._replace(cuda=function)
        testing.HOST_RUN.add(operator.removesuffix("_fwd").removesuffix("_bwd"))
