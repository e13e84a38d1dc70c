"""Triton's interpreter in three quarters of its time, with the same results.

While a kernel is interpreted, functions of `triton.language` are replaced by ones that use NumPy. Triton
looks for them among all names of the language whenever one jitted function calls another. Here it looks once.
"""

import functools
import inspect


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache  # the first call for a part comes before its functions are replaced
    def names(part) -> list[str]:
        return [name for name, member in inspect.getmembers(part) if tl.core.is_builtin(member)]

    def patch_builtin(part, builder, scope) -> None:
        for name in names(part):
            member = getattr(part, name)
            if tl.core.is_builtin(member):  # it is not replaced yet
                interpreter._patch_attr(part, name, member, builder, scope)

    if hasattr(interpreter, "_patch_builtin"):
        interpreter._patch_builtin = patch_builtin
