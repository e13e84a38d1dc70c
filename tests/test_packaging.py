"""What a build produces and contains, and that the package imports without its optional parts."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools import Distribution
from torch.utils import cpp_extension

import electra_fast.kernels

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
WHEEL = (*PIP, "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
SDIST = (sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')")

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"
)


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"ELECTRA_FAST_BUILD": ""} | environment  # `make test-torch` sets it to strict
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def build(checkout: Path, *command: str, **environment: str) -> tuple[Path, str]:
    """Return the one file that a build leaves in dist/, and the output of the build."""
    result = run(*command, cwd=checkout, **environment)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    (built,) = (checkout / "dist").iterdir()
    return built, output


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, so that builds leave no files here and can run at the same time."""
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    return shutil.copytree(ROOT, tmp_path / "checkout", ignore=left_out)


def test_wheel_without_a_compiler(checkout):
    wheel, output = build(checkout, *WHEEL, CXX="/nonexistent")
    assert re.search(r"built without electra_fast\._C.*no C\+\+ compiler \(/nonexistent\)", output)
    assert wheel.name.endswith("-py3-none-any.whl")

    archive = zipfile.ZipFile(wheel)
    (top_level,) = (name for name in archive.namelist() if name.endswith("/top_level.txt"))
    assert archive.read(top_level).decode().split() == ["electra_fast"]
    sources = (ROOT / "kernels").glob("*.py")
    assert {f"electra_fast/kernels/{path.name}" for path in sources} <= set(archive.namelist())
    roots = {name.split("/")[0] for name in archive.namelist()}
    assert roots == {"electra_fast", top_level.split("/")[0]}


def failing_compiler(folder: Path, message: str) -> Path:
    """Return a compiler that reports its version but fails to compile, with this message."""
    file = folder / "failing-c++"
    real = shutil.which(os.environ.get("CXX", "c++"))
    script = f'case "$*" in *-dump*|*--version*) exec {real} "$@";; esac\necho "{message}" >&2\nexit 1'
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


MESSAGE = "csrc/a.cpp:1:10: fatal error: omp.h: No such file or directory"


@needs_compiler
def test_if_the_compiler_fails_the_package_is_installed_without_the_extension(checkout, tmp_path):
    wheel, output = build(checkout, *WHEEL, CXX=str(failing_compiler(tmp_path, MESSAGE)))
    line = f"{MESSAGE}; CXX must be a compiler with C++20 and OpenMP"
    assert (
        f"electra_fast: built without electra_fast._C, the reference and Triton serve every op: {line}\n"
        in output
    )
    archive = zipfile.ZipFile(wheel)
    assert "electra_fast/kernels/embed.py" in archive.namelist()
    assert not any("/_C" in name for name in archive.namelist())
    assert json.loads(archive.read("electra_fast/_left_out.json"))["all"] == line, "info prints it"


@needs_compiler
def test_sdist_has_all_files_that_a_build_needs(checkout):
    sdist, _ = build(checkout, *SDIST)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for folder in ("csrc", "kernels") for path in (ROOT / folder).rglob("*")]
    sources = [path for path in sources if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".py")]
    needed = {str(path.relative_to(ROOT)) for path in sources}
    assert needed | {"setup.py", "pyproject.toml", "LICENSE"} <= names


@pytest.mark.slow
@needs_compiler
def test_wheel_with_a_compiler(checkout):
    wheel, output = build(checkout, *WHEEL)
    assert not re.search(r"csrc/\S+: warning:", output)
    assert any(name.startswith("electra_fast/_C.") for name in zipfile.ZipFile(wheel).namelist())


@pytest.fixture
def extension(monkeypatch, tmp_path):
    """Return what setup.py builds with a CUDA torch, with PATH and site-packages in a temporary folder."""
    made = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", made.update)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site-packages/torch/__init__.py"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))  # the folder above the first nvcc on PATH
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv("ELECTRA_FAST_NO_CUDA", raising=False)
    monkeypatch.delenv("ELECTRA_FAST_BUILD", raising=False)

    def build() -> setuptools.Extension:
        made.update(runpy.run_path(str(ROOT / "setup.py")))
        return made["ext_modules"][0]

    build.made = made
    return build


@pytest.fixture
def built(extension, monkeypatch, tmp_path):
    """Return (extensions, left out) of setup.py's build_ext, with `compile(extension)` for torch's build."""

    def build(compile) -> tuple[list, dict]:
        monkeypatch.setattr(
            cpp_extension.BuildExtension, "build_extensions", lambda self: compile(*self.extensions)
        )
        first = extension()
        command = extension.made["Build"](Distribution({"ext_modules": [first]}))
        command.finalize_options()
        command.build_lib, command.extensions = str(tmp_path / "lib"), [first]
        command.build_extensions()
        return command.extensions, json.loads((tmp_path / "lib/electra_fast/_left_out.json").read_text())

    return build


def compiles(suffixes: tuple[str, ...]):
    """Return a compilation that fails like ninja for sources with other suffixes."""

    def compile(extension):
        if any(not source.endswith(suffixes) for source in extension.sources):
            os.write(
                1, b"FAILED: a.o\n/usr/bin/nvcc -c a.cu\nfatal error: cuda_runtime.h: No such file\n1 error\n"
            )
            raise RuntimeError("Error compiling objects for extension")

    return compile


def fake_toolkit(folder: Path, nvcc: str = "", header: bool = True) -> None:
    """Put the script `nvcc` as nvcc, and CUDA's header, into a folder."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
    (folder / "bin/nvcc").chmod(0o755)
    if header:
        (folder / "include").mkdir()
        (folder / "include/cuda_runtime.h").touch()


@needs_compiler
def test_nvcc_on_the_path_may_be_a_script(extension, tmp_path, capsys):
    fake_toolkit(tmp_path, f'exec {tmp_path}/cuda/bin/nvcc "$@"', header=False)
    # nvcc prints the folder among other lines.
    fake_toolkit(tmp_path / "cuda", f"echo '#$ _SPACE_= \n#$ TOP={tmp_path}/cuda/bin/..' >&2")
    built = extension()
    assert f"csrc/cuda is compiled by {tmp_path}/cuda/bin/nvcc" in capsys.readouterr().err
    assert any(source.endswith(".cu") for source in built.sources)
    assert str(tmp_path / "cuda/include") in built.include_dirs


@needs_compiler
def test_nvcc_of_wheels_is_found(extension, tmp_path):
    fake_toolkit(tmp_path, "exit 1", header=False)
    fake_toolkit(tmp_path / "site-packages/nvidia/cu13")
    built = extension()
    assert any(source.endswith(".cu") for source in built.sources)
    assert ":libcudart.so.13" in built.libraries and "cudart" not in built.libraries


@needs_compiler
def test_every_package_is_installed(extension):
    extension()
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "electra_fast").rglob("__init__.py")}
    named = {".".join(folder.parts) for folder in folders}
    assert set(extension.made["packages"]) == named | {"electra_fast.kernels"}


@needs_compiler
def test_nvcc_without_its_headers_builds_for_the_cpu(extension, tmp_path, capsys):
    fake_toolkit(tmp_path, "exit 1", header=False)
    built = extension()
    assert (
        "electra_fast: built without the kernels of csrc/cuda: no folder has bin/nvcc and "
        "include/cuda_runtime.h; set CUDA_HOME to a CUDA toolkit\n"
    ) in capsys.readouterr().err
    assert not any(source.endswith(".cu") for source in built.sources)


@needs_compiler
def test_if_nvcc_fails_only_csrc_cuda_is_left_out(built, tmp_path, capfd):
    fake_toolkit(tmp_path)
    (extension,), left_out = built(compiles((".cpp",)))
    assert extension.sources and all(source.endswith(".cpp") for source in extension.sources)
    assert extension.define_macros == [] and not any("cudart" in name for name in extension.libraries)
    why = "fatal error: cuda_runtime.h: No such file; CUDA_HOME must be a whole CUDA 13.0 toolkit, and CXX"
    assert left_out == {"CUDA": f"{why} a compiler for it"}
    output = capfd.readouterr().err
    assert f"electra_fast: built without the kernels of csrc/cuda: {why}" in output
    assert "/usr/bin/nvcc -c a.cu" in output, "the output of the compilers is not lost"


@needs_compiler
def test_if_a_build_without_cuda_fails_too_csrc_is_left_out(built, tmp_path):
    fake_toolkit(tmp_path)
    assert built(compiles(()))[0] == []


@needs_compiler
def test_a_build_without_faults_leaves_nothing_out(built, tmp_path):
    fake_toolkit(tmp_path)
    (extension,), left_out = built(compiles((".cpp", ".cu")))
    assert left_out == {} and any(source.endswith(".cu") for source in extension.sources)


@needs_compiler
def test_a_strict_build_fails_instead_of_leaving_out_parts(built, extension, tmp_path, monkeypatch):
    monkeypatch.setenv("ELECTRA_FAST_BUILD", "strict")
    fake_toolkit(tmp_path)
    with pytest.raises(
        SystemExit, match=r"strict forbids .* without the kernels of csrc/cuda: .*No such file"
    ):
        built(compiles((".cpp",)))
    (tmp_path / "include/cuda_runtime.h").unlink()
    with pytest.raises(SystemExit, match="no folder has bin/nvcc"):
        extension()
    monkeypatch.setenv("ELECTRA_FAST_NO_CUDA", "1")  # the user leaves it out
    assert not any(source.endswith(".cu") for source in extension().sources)
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler"):
        extension()
    monkeypatch.setenv("ELECTRA_FAST_BUILD", "loose")
    with pytest.raises(SystemExit, match="must be strict or none, got 'loose'"):
        extension()


def test_a_build_can_leave_csrc_out(extension, monkeypatch, capsys):
    monkeypatch.setenv("ELECTRA_FAST_BUILD", "none")
    with pytest.raises(IndexError):
        extension()
    assert "serve every op: ELECTRA_FAST_BUILD=none" in capsys.readouterr().err


def test_editable_install_maps_kernels():
    assert electra_fast.kernels.__name__ == "electra_fast.kernels"
    assert Path(electra_fast.kernels.__file__) == ROOT / "kernels/__init__.py"


def test_top_level_kernels_is_not_hugging_faces_package():
    # How transformers looks for that package, and how users import from it.
    program = "import kernels; assert not hasattr(kernels, '__version__'); kernels.get_kernel"
    for line in (program, "from kernels import get_kernel"):
        result = run(sys.executable, "-c", line, cwd=ROOT)
        assert "ImportError: this folder is the package 'electra_fast.kernels'" in result.stderr


def test_imports_without_extension_triton_and_gpu():
    program = """
import sys
sys.modules["electra_fast._C"] = sys.modules["triton"] = None  # as if neither were installed
import torch
from electra_fast import ops
ids = torch.full((2, 8), 7)
masked = ops.mask_tokens(ids, ids == 7, torch.tensor([1, 2]), mask_id=103)
assert masked.weights.tolist() == [1, 1]
"""
    result = run(sys.executable, "-c", program, cwd=ROOT, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr


def test_an_extension_built_for_another_torch_says_so(tmp_path):
    shutil.copytree(ROOT / "electra_fast", tmp_path / "electra_fast", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "electra_fast" / "_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    errors = run(sys.executable, "-c", "import electra_fast.ops", cwd=tmp_path).stderr
    assert re.search(
        r"ImportError: electra_fast\._C does not load with torch \d.*undefined symbol: _ZN3c10", errors
    )
