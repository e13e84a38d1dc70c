"""The machine that measures, the bounds of its speed, and a hash of the sources that are measured."""

import hashlib
import importlib.metadata
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
# The speeds that a GPU reached in bfloat16 products, FLOP/s, and in copies, B/s. They bound a kernel's speed.
# H100: measured with torch, a product of 8192^3 and a copy on the device. H200: from the first estimates,
# whose sizes were not recorded.
REACHED = {"h100-80gb-hbm3": (798e12, 3.0e12), "h200": (790e12, 4.3e12)}
DATASHEET = {"h100-80gb-hbm3": 989e12, "h200": 989e12}  # dense bfloat16 FLOP/s, the usual base of MFU
SOURCES = ("kernels/*.py", "csrc/**/*", "electra_fast/ops/*.py")


def source_hash(root: Path = ROOT, patterns: tuple[str, ...] = SOURCES) -> str:
    """Return the SHA-256 of the paths and contents of all kernel sources."""
    digest = hashlib.sha256()
    for file in sorted({f for pattern in patterns for f in root.glob(pattern) if f.is_file()}):
        for part in (file.relative_to(root).as_posix().encode(), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def budget(given: float | None) -> float:
    """Return the seconds that a run may take; a GPU's run compiles more."""
    default = 480.0 if device() == "cuda" else 240.0
    return default if given is None else given


def slug(name: str) -> str:
    """Return the name of a device's results file: rtx-4090 for "NVIDIA GeForce RTX 4090"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(w for w in words if w not in ("nvidia", "geforce", "tesla")) or "device"


def device_slug() -> str:
    return slug(torch.cuda.get_device_name()) if device() == "cuda" else "cpu"


def bound(flops: float, moved: float, gpu: str | None = None) -> float | None:
    """Return the fewest seconds that this work needs, or None if REACHED does not contain the GPU.

    Args:
        flops: FLOPs of bfloat16 products.
        moved: bytes read and written.
        gpu: a key of REACHED; defaults to the device of this process.
    """
    reached = REACHED.get(device_slug() if gpu is None else gpu)
    return None if reached is None else max(flops / reached[0], moved / reached[1])


def cpu_model() -> str:
    """Return the CPU's name from Linux's /proc/cpuinfo, or "unknown"."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else "unknown"


def clocks() -> str | None:
    """Return the GPU's current and maximum clocks, or None if nvidia-smi does not answer."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{query}: {answer.stdout.strip()}" if answer.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def info() -> dict:
    """Return the facts that the results contain in addition to pytest-benchmark's machine info."""
    facts = {
        "device": device_slug(),
        "device_name": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "sources": source_hash(),
    }
    if device() == "cuda":
        facts |= {
            "device_name": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "clocks": clocks(),
        }
    return facts
