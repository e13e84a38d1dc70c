"""Build ``electra_fast._C`` from ``csrc/``, with its CUDA kernels if there are a CUDA torch and nvcc.

A part that cannot be built is left out, and `python -m electra_fast info` says why. With
ELECTRA_FAST_BUILD=strict that is an error. ELECTRA_FAST_BUILD=none compiles nothing, and
ELECTRA_FAST_NO_CUDA=1 leaves out the kernels of csrc/cuda.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent

# The instruction set of each CPU capability of torch. A build uses the capability of this machine;
# ATEN_CPU_CAPABILITY=avx2 builds a wheel for older ones.
INSTRUCTIONS = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}

# GPUs with tensor cores and bfloat16. TORCH_CUDA_ARCH_LIST overrides them.
ARCHITECTURES = "8.0 8.6 9.0 10.0 12.0+PTX"

CUDA_MAJOR = torch.version.cuda and torch.version.cuda.split(".")[0]

CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
# Without this flag at::parallel_for is serial, without a warning. At run time torch's libgomp is used.
CXX_FLAGS += ["-fopenmp"]

MODE = os.environ.get("ELECTRA_FAST_BUILD", "")
if MODE not in ("", "strict", "none"):
    sys.exit(f"electra_fast: ELECTRA_FAST_BUILD must be strict or none, got {MODE!r}")

PARTS = {
    "CUDA": "the kernels of csrc/cuda",
    "all": "electra_fast._C, the reference and Triton serve every op",
}
LEFT_OUT: dict[str, str] = {}  # by part, why it is left out


def leave_out(part: str, why: str, wanted: bool = False) -> None:
    """Continue without a part. With ELECTRA_FAST_BUILD=strict, exit unless the user wants it left out."""
    if MODE == "strict" and not wanted:
        sys.exit(f"electra_fast: ELECTRA_FAST_BUILD=strict forbids a build without {PARTS[part]}: {why}")
    LEFT_OUT[part] = why
    report(f"built without {PARTS[part]}: {why}")


def save_left_out(command: build_py | BuildExtension) -> None:
    """Write LEFT_OUT into the package, where `info` reads it."""
    file = Path(ROOT if command.editable_mode else command.build_lib, "electra_fast/_left_out.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(LEFT_OUT))
    if "all" in LEFT_OUT:  # do not load an extension of older sources
        file.with_name(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        save_left_out(self)


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable build passes a new folder each time, in which ninja would compile every file again.
        version = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / version)

    def build_extensions(self) -> None:
        """Build everything. If that fails, build without csrc/cuda, and if that fails, without csrc."""
        while self.extensions:
            (extension,) = self.extensions
            with tempfile.TemporaryFile("w+", errors="replace") as log:
                try:
                    with captured_output(log):
                        super().build_extensions()
                    break
                except Exception as error:  # torch, setuptools and ninja raise different types
                    log.seek(0)
                    errors = (line.strip()[:200] for line in log if re.search(r"\berror\b", line, re.I))
                    why = next(errors, str(error))
            if any(source.endswith(".cu") for source in extension.sources):
                remedy = (
                    f"CUDA_HOME must be a whole CUDA {torch.version.cuda} toolkit, and CXX a compiler for it"
                )
                leave_out("CUDA", f"{why}; {remedy}")
                vars(extension).update(vars(extension_of([])))
            else:
                leave_out("all", f"{why}; CXX must be a compiler with C++20 and OpenMP")
                self.extensions = []
        save_left_out(self)


@contextlib.contextmanager
def captured_output(log) -> Iterator[None]:
    """Redirect the output of this process and its children to `log`, and copy it to stderr at the end."""
    sys.stdout.flush(), sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        for descriptor in saved:
            os.close(descriptor)
        log.seek(0)
        shutil.copyfileobj(log, sys.stderr)


def report(line: str) -> None:
    print(f"electra_fast: {line}", file=sys.stderr)


def sources(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/*{suffix}"))


def find_toolkit() -> str | None:
    """Return the folder of a CUDA toolkit that has both a compiler and headers.

    Torch uses CUDA_HOME or the folder above the nvcc on PATH. That nvcc may be a script which calls the real
    one, so this asks it for its folder.
    """
    candidates = [cpp_extension.CUDA_HOME]
    if nvcc := shutil.which("nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        candidates += re.findall(r"^#\$ TOP=(.*)", dryrun.stderr, re.M)
    # The wheels of CUDA are installed next to torch.
    candidates.append(f"{Path(torch.__file__).parents[1]}/nvidia/cu{CUDA_MAJOR}")
    for folder in (Path(candidate).resolve() for candidate in candidates if candidate):
        if all((folder / file).exists() for file in ("bin/nvcc", "include/cuda_runtime.h")):
            return str(folder)
    return None


def cuda_sources() -> list[str]:
    """Return the CUDA files, or an empty list if they cannot be built. Building needs no GPU."""
    if os.environ.get("ELECTRA_FAST_NO_CUDA") == "1":
        leave_out("CUDA", "ELECTRA_FAST_NO_CUDA=1", wanted=True)
    elif CUDA_MAJOR is None:
        leave_out("CUDA", "this torch is built without CUDA", wanted=True)
    elif (toolkit := find_toolkit()) is None:
        leave_out(
            "CUDA", "no folder has bin/nvcc and include/cuda_runtime.h; set CUDA_HOME to a CUDA toolkit"
        )
    else:
        report(f"csrc/cuda is compiled by {toolkit}/bin/nvcc")
        cpp_extension.CUDA_HOME = toolkit
        if not torch.cuda.is_available():  # torch would ask the GPUs, and fail without one
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        return sources(".cu")
    return []


def cpu_flags() -> tuple[list[str], list[str]]:
    """Return the flags of the compiler and of the linker that at::vec needs."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        return ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"], []
    level = INSTRUCTIONS[capability]
    define = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    # The loader then refuses the library with a message on a CPU without these instructions.
    return [f"-march={level}", *define], [f"-Wl,-z,{level}"]


def extension_of(cuda: list[str]) -> Extension:
    compile_flags, link_flags = cpu_flags()
    extension = (CUDAExtension if cuda else CppExtension)(
        "electra_fast._C",
        sources(".cpp") + cuda,
        # This puts them into the source distribution, even if they cannot be compiled here.
        depends=sources(".h") + sources(".cuh") + sources(".cu"),
        define_macros=[("ELECTRA_FAST_CUDA", "1")] if cuda else [],
        extra_compile_args={"cxx": CXX_FLAGS + compile_flags, "nvcc": ["-O3", "-std=c++20"]},
        extra_link_args=link_flags,
    )
    # Torch links with libcudart.so, but the wheels of CUDA have only this name.
    runtime = f":libcudart.so.{CUDA_MAJOR}"
    extension.libraries = [runtime if name == "cudart" else name for name in extension.libraries]
    return extension


def extensions() -> list[Extension]:
    compiler = os.environ.get("CXX", "c++")
    if MODE == "none":
        leave_out("all", "ELECTRA_FAST_BUILD=none", wanted=True)
    elif sys.platform != "linux":
        leave_out("all", "not on Linux", wanted=True)
    elif shutil.which(compiler.split()[0]) is None:
        leave_out("all", f"no C++ compiler ({compiler}); install one, or set CXX")
    else:
        return [extension_of(cuda_sources())]
    return []


setup(
    packages=[
        "electra_fast",
        "electra_fast.data",
        "electra_fast.export",
        "electra_fast.hf",
        "electra_fast.ops",
        "electra_fast.tasks",
        "electra_fast.testing",
        "electra_fast.testing.checks",
        "electra_fast.testing.distributions",
        "electra_fast.train",
        "electra_fast.use",
        "electra_fast.kernels",
    ],
    # Not a top-level `kernels`: pip would overwrite Hugging Face's package of that name.
    package_dir={"electra_fast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": Build, "build_py": BuildPython},
)
