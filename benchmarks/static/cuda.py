"""Compile csrc/cuda for one architecture with nvcc, without a GPU and without a CUDA build of torch."""

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.harness.machine import ROOT
from benchmarks.static import gpus, sass

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
INCLUDED = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")])
RESERVED = 1024  # bytes of shared memory per block that nvcc reserves for the driver, from sm_90 on
TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "short": "i16", "int": "i32"}


def find_nvcc() -> str | None:
    """Return the nvcc of requirements.txt, whose version is pinned, or else the one on PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return next((str(file.locate()) for file in files if file.name == "nvcc"), shutil.which("nvcc"))


NVCC = find_nvcc()


def version() -> str | None:
    """Return nvcc's version, or None without nvcc."""
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout if NVCC else ""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    return found and found[1]


def source_hash(source: Path) -> str:
    """Return a hash of everything that decides the figures of a file's kernels."""
    files = [source, *INCLUDED, *(Path(module.__file__) for module in (gpus, sass))]
    state = hashlib.sha256(str(version()).encode())
    for file in files:
        state.update(file.read_bytes())
    return state.hexdigest()[:16]


def compiled(arch: int, source: Path) -> list[dict]:
    """Return one row per kernel that a source file instantiates; a compiler warning is an error."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [NVCC, "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", "-Werror", "all-warnings"]
        done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"static: {source.name} does not compile for sm_{arch}\n{done.stderr}")
        found, warps = sass.functions(cubin.read_bytes()), most_warps(sass.tool("cuobjdump", "-elf", cubin))
    rows = []
    for name, (use, code) in found.items():
        use["shared_bytes"] = max(use["shared_bytes"] - RESERVED * (arch >= 90), 0)
        kernel, variant = readable(name)
        row = {"part": source.name, "arch": arch, "kernel": kernel, "variant": variant, "shape": ""}
        row |= {"source": source_hash(source), "products": 0}  # cuBLAS computes the products
        rows.append(row | gpus.row(arch, warps[name], use, code))
    return sorted(rows, key=lambda row: (row["kernel"], row["variant"]))


def most_warps(elf: str) -> dict[str, int]:
    """Return by mangled name the most warps per block of each kernel, from its launch bounds."""
    pattern = r"^\.nv\.info\.(\S+)$(?:(?!^\.nv\.).)*?EIATTR_MAX_THREADS.*?Value:\s*0x(\w+) "
    return {name: int(threads, 16) // gpus.WARP for name, threads in re.findall(pattern, elf, re.M | re.S)}


def readable(mangled: str) -> tuple[str, str]:
    """Return a kernel's name without namespaces, and its template arguments."""
    said = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name, arguments = re.search(r"(\w+)_kernel(?:<(.*?)>)?\(", said).groups()
    words = [TYPES.get(word, word) for word in (arguments or "").split(", ")]
    return name, " ".join(words)
