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
    """Hash the kernels of a module of `electra_fast.kernels`: what they import first, in a fixed order."""
    members = vars(importlib.import_module(module)).values()
    kernels = [member for member in members if isinstance(member, JITFunction)]
    for name in sorted({kernel.__module__ for kernel in kernels} - {module}):
        fix_cache_keys(name)
    for kernel in kernels:  # in the order of the file: a function stands above those that call it
        kernel.cache_key  # noqa: B018  computed once, when it is first read
