"""Launch Triton's kernels without a GPU: Triton's real launch path for sm_90 with a driver that runs nothing.

`install()` builds `stub_libcuda.c` and makes it Triton's driver. A launch then binds and specialises its
arguments, compiles with ptxas, loads the binary and checks the launch configuration, as on an H100. Tensors
are on the CPU and are not changed. Triton decides at import whether kernels are interpreted, so the process
must have TRITON_INTERPRET=0.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.machine import ROOT

SOURCE = Path(__file__).with_name("stub_libcuda.c")
ARCH, PROCESSORS = 90, 132


def build() -> Path:
    """Return the folder of the stub's libcuda.so.1; build it if the source has changed."""
    folder = ROOT / "build" / f"stub-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    with open(folder / "lock", "w") as lock:  # several processes may build at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "libcuda.so").exists():
            include = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"
            command = ["cc", "-shared", "-fPIC", "-O1", f"-I{include}", f"-Wl,-soname,{library.name}", SOURCE]
            subprocess.run([*command, "-o", library], check=True)
            (folder / "libcuda.so").symlink_to(library.name)
    return folder


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build() / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


def install() -> Callable[[], int]:
    """Make the stub Triton's driver in this process; return a function that counts launches."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(build())
    library().stub_launches.restype = ctypes.c_ulonglong

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    from electra_fast.kernels import _rows

    assert not triton.knobs.runtime.interpret, (
        "TRITON_INTERPRET must be 0: interpreted kernels are not launched"
    )

    class Stub(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: divmod(ARCH, 10)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self):
            return GPUTarget("cuda", ARCH, 32)

    triton.runtime.driver.set_active(Stub())
    _rows.multiprocessors = lambda device: PROCESSORS  # a CPU tensor's device has none
    return library().stub_launches
