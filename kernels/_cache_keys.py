"""Cache keys of kernels that do not depend on the order in which kernels are used.

Triton hashes a kernel's constants together with those of the functions that it calls, but only of those that
were hashed before (Triton 3.6 to 3.8, `DependenciesFinder._update_hash`). Which kernel a process uses first
would so change the keys of others, and a cache that another process filled would be missed.
"""

import functools
import importlib

from triton.runtime.jit import JITFunction


@functools.cache
def fix_cache_keys(module: str) -> None:
    """Hash the kernels of a module of `electra_fast.kernels`: what it imports first, in a fixed order."""
    members = vars(importlib.import_module(module)).values()
    modules = {getattr(member, "__module__", None) or "" for member in members}  # of launchers too
    package = module.rpartition(".")[0]
    for name in sorted(name for name in modules - {module} if name.startswith(f"{package}.")):
        fix_cache_keys(name)
    for kernel in members:  # in the order of the file: a function stands above those that call it
        if isinstance(kernel, JITFunction):
            kernel.cache_key  # noqa: B018  computed once, when it is first read
