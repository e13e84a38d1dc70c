"""Build, without a GPU, what a GPU machine needs: the compiled extension and a cache of Triton's kernels.

`make gpu-pack` runs this with the Python and torch of the GPU machine. The folder contains the extension for
sm_90, `triton.tar.xz`, and `manifest.json` with the versions that they were built for. `use()` installs the
parts that fit.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from benchmarks.harness.machine import ROOT, source_hash
from electra_fast.errors import must

FOLDER = ROOT / "build" / "gpu-pack"
CACHE = ROOT / "build" / "gpu-cache"
MOST = 16 << 20  # maximum bytes of the folder
ARCHIVE = "triton.tar.xz"
KEPT = (".cubin", ".json", ".so")  # files of Triton's cache; the others are intermediate forms
HERE = "@cache@"  # stands for the path of the cache, because Triton's index files contain absolute paths


def versions() -> dict[str, str]:
    """Return the versions that a compiled extension depends on."""
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
    """Compile all kernels that `make gpu` launches before its test suite; return their number."""
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


def checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make(folder: Path, commit: dict, arch: str = "9.0") -> int:
    """Make the folder; return an exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        # AVX2 runs on every machine with such a GPU, and the CPU kernels are not timed there.
        made = build(Path(scratch, "lib"), arch, ATEN_CPU_CAPABILITY="avx2")
        shutil.copy(made, folder)
        kernels = fill_cache(Path(scratch, "triton"))
        save_cache(Path(scratch, "triton"), folder / ARCHIVE)
    sums = {name: checksum(folder / name) for name in (extension_name(), ARCHIVE)}
    facts = versions() | {"arch": arch, "kernels": kernels, "commit": commit, "sha256": sums}
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {kernels} kernels and the extension, {size / 2**20:.1f} MB, for torch {facts['torch']}")
    if size > MOST:
        rule = f"have at most {MOST >> 20} MB"
        print(must("gpu-pack: the folder", rule, f"{size / 2**20:.1f}"), file=sys.stderr)
    return int(size > MOST)


def manifest(folder: Path = FOLDER) -> dict:
    """Return the manifest of a pack, empty if it cannot be read."""
    try:
        found = json.loads((folder / "manifest.json").read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def use(folder: Path = FOLDER, cache: Path = CACHE) -> list[str]:
    """Install the parts of the pack that fit; return what was done, and what was not, with the reason."""
    facts, said = manifest(folder), []
    if not facts:
        return ["no pack: Triton compiles each kernel at its first use"]
    sums = facts.get("sha256", {})

    def torn(name: str) -> bool:
        return not (folder / name).is_file() or checksum(folder / name) != sums.get(name)

    here = versions()
    differences = [f"{k} {facts.get(k)}, here {here[k]}" for k in here if facts.get(k) != here[k]]
    if differences:
        said.append(f"the pack's extension was built for {'; '.join(differences)}: not used")
    elif torn(extension_name()):
        said.append("the pack's extension differs from the file in its manifest: not used")
    else:
        target = ROOT / "electra_fast" / extension_name()
        part = target.with_suffix(".part")
        shutil.copy(folder / extension_name(), part)
        part.replace(target)
        for stamp in ROOT.glob("build/ready-*"):  # so that `make test` builds its own extension again
            stamp.unlink()
        said.append("the extension of the pack is installed")
    if torn(ARCHIVE):
        return [*said, "the pack's Triton cache differs from the file in its manifest: not used"]
    return [*said, f"{load_cache(folder / ARCHIVE, cache)} kernels of the pack in Triton's cache"]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Build the folder that `make gpu` uses on a GPU machine.")
    p.add_argument("--out", type=Path, default=FOLDER)
    p.add_argument("--commit", default="", help="the commit that the results name")
    p.add_argument("--dirty", action="store_true", help="there are uncommitted changes")
    options = p.parse_args()
    sys.exit(make(options.out.resolve(), {"id": options.commit, "dirty": options.dirty}))
