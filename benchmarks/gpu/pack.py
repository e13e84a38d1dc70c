"""What can be made for a GPU machine without one: the compiled extension, and a cache of Triton's kernels.

`make gpu-pack` runs this with the Python and torch of the GPU machine. The folder holds the extension for
sm_90, `triton.tar.xz`, and `manifest.json`, which says what they were made for; `use()` installs what fits.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from benchmarks.machine import ROOT, source_hash

FOLDER = ROOT / "build" / "gpu-pack"
CACHE = ROOT / "build" / "gpu-cache"
MOST = 16 << 20  # bytes of the folder
KEPT = (".cubin", ".json", ".so")  # of Triton's cache; the rest are the compiler's intermediate forms
HERE = "@cache@"  # Triton's index files hold absolute paths: this stands for the cache's own


def versions() -> dict[str, str]:
    """Return what a compiled extension depends on."""
    import torch

    facts = {"torch": torch.__version__, "python": sys.implementation.cache_tag}
    return facts | {"csrc": source_hash(ROOT, ("csrc/**/*", "setup.py"))}


def extension_name() -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(folder: Path, arch: str, **environment: str) -> Path:
    """Compile csrc/ for one architecture into a folder; return the extension."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder]
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": arch} | environment
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return folder / "electra_fast" / extension_name()


def fill_cache(cache: Path) -> int:
    """Compile all kernels that `make gpu` launches before its test suite; return how many there are."""
    from concurrent.futures import ThreadPoolExecutor

    from electra_fast import testing

    jobs = [("shapes", "attention"), ("shapes", "ops"), ("steps", "small"), ("steps", "base")]
    jobs += [("examples", op) for op in testing.OPS if "triton" in testing.implementations(op, "cuda")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}

    def run(job: tuple[str, ...]) -> None:
        print(f"compiling for sm_90: {' '.join(job)}", flush=True)
        command = [sys.executable, "-m", "benchmarks.static.on_stub", *job]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, jobs))
    return sum(1 for _ in cache.rglob("*.cubin"))


def save_cache(cache: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:xz") as tar:
        for file in sorted(cache.rglob("*")):
            if not file.is_file() or file.suffix not in KEPT:
                continue
            if file.name.startswith("__grp__"):
                file.write_text(file.read_text().replace(str(cache), HERE))
            tar.add(file, file.relative_to(cache))


def load_cache(archive: Path, cache: Path) -> int:
    """Unpack a cache into a folder; return the number of kernels."""
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    for index in cache.rglob("__grp__*.json"):
        index.write_text(index.read_text().replace(HERE, str(cache)))
    return sum(1 for _ in cache.rglob("*.cubin"))


def make(folder: Path, arch: str = "9.0") -> int:
    """Fill the folder anew; return an exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        # AVX2 loads on every machine that has a GPU of this kind; the CPU's kernels are not timed there.
        made = build(Path(scratch, "lib"), arch, ATEN_CPU_CAPABILITY="avx2")
        shutil.copy(made, folder)
        kernels = fill_cache(Path(scratch, "triton"))
        save_cache(Path(scratch, "triton"), folder / "triton.tar.xz")
    facts = versions() | {"arch": arch, "kernels": kernels}
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {kernels} kernels and the extension, {size / 2**20:.1f} MB, for torch {facts['torch']}")
    if size > MOST:
        print(
            f"gpu-pack: the folder must have at most {MOST >> 20} MB, got {size / 2**20:.1f}", file=sys.stderr
        )
    return int(size > MOST)


def use(folder: Path = FOLDER, cache: Path = CACHE) -> list[str]:
    """Put what fits of the pack where it is looked for; return what was done and what did not fit."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return ["no pack: Triton compiles each kernel when it is first used"]
    said, facts = [], json.loads(manifest.read_text())
    here = versions()
    differences = [f"{k} {facts.get(k)}, here {here[k]}" for k in here if facts.get(k) != here[k]]
    if differences:
        said.append(f"the pack's extension was made for {'; '.join(differences)}: not used")
    else:
        shutil.copy(folder / extension_name(), ROOT / "electra_fast" / extension_name())
        said.append("the extension is the pack's")
    return [*said, f"{load_cache(folder / 'triton.tar.xz', cache)} kernels of the pack in Triton's cache"]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Make the folder that `make gpu` takes to a GPU machine.")
    p.add_argument("--out", type=Path, default=FOLDER)
    sys.exit(make(p.parse_args().out.resolve()))
