"""Triton's interpreter in two thirds of its time, with the same results.

While a kernel is interpreted, functions of `triton.language` are replaced by ones that use NumPy. Triton
looks for them among all names of the language whenever one jitted function calls another. Here it looks once.
It also builds a table of the dtypes for each use of one, which is built once per dtype here.
"""

import functools
import inspect


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache  # the first call for a part comes before its functions are replaced
    def builtins(part) -> list[tuple]:
        return [pair for pair in inspect.getmembers(part) if tl.core.is_builtin(pair[1])]

    def patch_builtin(part, builder, scope) -> None:
        for name, original in builtins(part):
            if getattr(part, name) is original:  # it is not replaced yet
                interpreter._patch_attr(part, name, original, builder, scope)

    if hasattr(interpreter, "_patch_builtin"):
        interpreter._patch_builtin = patch_builtin

    original = interpreter._get_np_dtype
    of_scalar = functools.cache(original)

    def np_dtype(dtype):
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return original(scalar) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    interpreter._get_np_dtype = np_dtype
