"""Run csrc/cuda on a machine without a GPU: the same sources, compiled with g++ for CPU tensors.

This folder replaces the headers of CUDA and of PyTorch's c10/cuda; `fibres.h` explains how a grid runs.
`install()` builds the extension `_C_host` once and registers each of its ops as the overload `<op>.host`.
`electra_fast.testing.implementations` then returns this overload as `cuda`.
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
from electra_fast.ops._operators import OPERATORS

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = [*sorted(CSRC.glob("*.cpp")), *sorted(CSRC.glob("cuda/*.cpp")), *sorted(CSRC.glob("cuda/*.cu"))]
HEADERS = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *Path(__file__).parent.rglob("*.h")]

COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# One process loads several builds. A unique symbol of theirs would be resolved to the first build.
FLAGS += ["-fno-gnu-unique"]
FLAGS += ["-DTORCH_EXTENSION_NAME=_C_host", "-DELECTRA_FAST_CUDA=1"]
# This folder comes first, so that its headers are found instead of a toolkit's.
FLAGS += [f"-I{folder}" for folder in (Path(__file__).parent, CSRC, CSRC / "cuda")]
SYSTEM = [*include_paths(), sysconfig.get_paths()["include"]]
FLAGS += [word for folder in SYSTEM for word in ("-isystem", folder)]
# A GPU refuses an access that is not aligned, but this CPU does not. With this flag fibres.h raises.
KERNEL_FLAGS = ["-fsanitize=alignment"]
LINK = ["-shared", *(f"-L{folder}" for folder in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch_python"]


def compiled(source: Path, to: Path, *more: str) -> Path:
    target = to / f"{source.name}.o"
    flags = [*FLAGS, *(KERNEL_FLAGS if source.suffix == ".cu" else ()), *more]
    subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
    return target


def link(objects: list[Path], to: Path) -> Path:
    library = to / "_C_host.so"
    subprocess.run([COMPILER, *objects, *LINK, "-o", library], check=True)
    return library


def build() -> Path:
    """Return the folder of the objects and the library, and build them if the sources have changed."""
    state = hashlib.sha256(repr((FLAGS, KERNEL_FLAGS, torch.__version__, sys.version)).encode())
    for path in sorted([*SOURCES, *HEADERS]):
        state.update(path.read_bytes())
    folder = ROOT / "build" / f"host-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # the workers of pytest-xdist call this at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                link(list(pool.map(lambda source: compiled(source, folder), SOURCES)), folder)
            (folder / "ready").touch()
    return folder


def rebuilt(changed: Path, to: Path) -> Path:
    """Return a library in which `changed` replaces the file of the same name in csrc/cuda."""
    ready = build()
    sources = [changed]
    if changed.suffix != ".cu":  # a header: compile copies of the files that include it, next to it
        users = [path for path in SOURCES if f'#include "{changed.name}"' in path.read_text()]
        sources = [Path(shutil.copy(path, to)) for path in users]
    names = {source.name for source in sources}
    objects = [ready / f"{path.name}.o" for path in SOURCES if path.name not in names]
    assert sources and len(objects) + len(sources) == len(SOURCES), f"csrc/cuda does not use {changed.name}"
    # With -Og the compiler is faster, and the library runs only once.
    return link([*objects, *(compiled(source, to, "-Og") for source in sources)], to)


def load(library: Path, overload: str) -> dict[str, torch._ops.OpOverload]:
    """Register the kernels of a library as `electra_fast::<op>.<overload>`; return them by operator."""
    name = f"{overload}._C_host"  # pybind11 would return the first module of the same name again
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
    """Make the kernels of csrc/cuda the implementation `cuda` of their ops, if they can be built here."""
    if COMPILER is None:
        return
    # PyTorch has the product of half tensors with a float32 result only on a GPU.
    torch.library.impl("aten::mm.dtype", "CPU", mm_with_dtype)
    for operator, function in load(build() / "_C_host.so", "host").items():
        OPERATORS[operator] = OPERATORS[operator]._replace(cuda=function)
        testing.HOST_RUN.add(operator.removesuffix("_fwd").removesuffix("_bwd"))
