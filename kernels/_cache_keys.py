"""Cache keys of kernels that do not depend on the order in which kernels are used.

Triton hashes a kernel's constants together with those of the functions that it calls, but only if these have
been hashed before (Triton 3.6 to 3.8, `DependenciesFinder._update_hash`). So the keys would depend on which
kernel a process uses first, and the process would miss a cache that another one filled.
"""

import functools
import importlib

from triton.runtime.jit import JITFunction


@functools.cache
def fix_cache_keys(module: str) -> None:
    """Hash the kernels of a module of `electra_fast.kernels` in a fixed order, its imports first."""
    members = vars(importlib.import_module(module)).values()
    modules = {getattr(member, "__module__", None) or "" for member in members}  # launchers have one too
    package = module.rpartition(".")[0]
    for name in sorted(name for name in modules - {module} if name.startswith(f"{package}.")):
        fix_cache_keys(name)
    for kernel in members:  # in file order, where a function comes before its callers
        if isinstance(kernel, JITFunction):
            kernel.cache_key  # noqa: B018  the first read computes it
