"""Launch a kernel: the first time by Triton, then by the extension, without Triton's binder.

Triton binds and specialises the arguments of every launch in Python, which takes ten times as long as the
rest of the launch. Here Triton's compiled kernel is entered into a table of the extension
(`csrc/launch.cpp`). The key of a call has everything on which Triton's choice of a compiled kernel depends:
the kernel, the driver and the device, dtype and alignment of each tensor, whether an integer is 1, is
divisible by 16 and fits in 32 bits, each constant, and the two settings that Triton reads at a launch.
Environment variables matter only when a kernel is first compiled, as in Triton. Only one check is dropped:
Triton refuses to launch a kernel if a global constant in its source was changed.

Triton launches everything if `enable` gives a reason. It launches one call if there are hooks, for example of
a profiler, if torch.compile traces it, or if an argument has a type that the table does not know.
"""

import re
import warnings

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

VERSIONS = ("3.6", "3.7", "3.8")  # of Triton, whose sources were read
LETTERS = {"i32": "i", "i64": "l", "fp32": "f", "constexpr": "c"}  # of `remember`; pointers have p
PTX = {"p": "u64", "l": "u64", "i": "u32", "f": "f32"}  # the types of a kernel's parameters
SCRATCH = ["u64", "u64"]  # Triton appends two pointers, which are null for a kernel without scratch memory
SETTINGS = ("debug", "launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook")

_extension = None  # launches compiled kernels; None: Triton does


def enable(extension) -> str:
    """Launch through `extension`, electra_fast._C or None, if possible; return why it is not, or ""."""
    global _extension
    why = _why_not(extension)
    _extension = None if why else extension
    return why


def _why_not(extension) -> str:
    if triton.knobs.runtime.interpret:
        return "kernels are interpreted"
    if extension is None:
        return "the extension is not built"
    if not triton.__version__.startswith(VERSIONS):
        return f"Triton {triton.__version__} is not one of {', '.join(VERSIONS)}"
    missing = [name for name in SETTINGS if not hasattr(triton.knobs.runtime, name)]
    missing += [name for name in ("instrumentation_mode",) if not hasattr(triton.knobs.compilation, name)]
    if missing:
        return f"Triton {triton.__version__} has no {', '.join(missing)}"
    return "" if extension.has_driver() else "there is no libcuda.so.1"


def launch(kernel: JITFunction, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Run `kernel[grid]`.

    Args:
        kernel: has its constexprs after its other parameters.
        grid: one to three numbers of programs.
        arguments: a value for each parameter that is not a constexpr.
        constants: the constexprs, and the options num_warps, num_stages and maxnreg.
    """
    if _extension is None or torch.compiler.is_compiling() or _has_hooks(kernel):
        kernel[grid](*arguments, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    debug, mode = triton.knobs.runtime.debug, triton.knobs.compilation.instrumentation_mode
    context = (kernel, active, device, debug, mode)
    if not _extension.launch(context, grid, active.get_current_stream(device), arguments, constants):
        compiled = kernel[grid](*arguments, **constants)
        if isinstance(compiled, triton.compiler.CompiledKernel):  # not if another tool replaced the launch
            _remember(compiled, context, arguments, constants)


def _has_hooks(kernel: JITFunction) -> bool:
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # a HookChain, a function or None
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.add_stages_inspection_hook
        or kernel.pre_run_hooks
    )


def _remember(compiled, context: tuple, arguments: tuple, constants: dict) -> None:
    """Enter a compiled kernel into the table, unless its launch needs more than its arguments."""
    parameters = compiled.src.fn.params
    assert [p.is_constexpr for p in parameters] == [i >= len(arguments) for i in range(len(parameters))]
    facts = compiled.metadata
    scratch = facts.global_scratch_size or facts.profile_scratch_size
    if scratch or facts.num_ctas != 1 or facts.launch_pdl or facts.launch_cooperative_grid:
        return
    types = _types(list(compiled.src.signature.values())[: len(arguments)])
    if _ptx_types(compiled) != [PTX.get(letter) for letter in types if letter != "c"] + SCRATCH:
        unknown = f"Triton {triton.__version__} passes the arguments of {compiled.name} in an unknown way"
        warnings.warn(f"electra_fast: {unknown}, so it launches this kernel itself", stacklevel=3)
        return
    _extension.remember(
        context, arguments, constants, compiled.function, 32 * facts.num_warps, facts.shared, types, compiled
    )


def _types(signature: list) -> str:
    """Return a letter for each argument of a signature, tuples flattened, and ? for an unknown type."""
    letters = ""
    for type in signature:
        if isinstance(type, tuple):
            letters += _types(list(type))
        else:
            letters += "p" if type[0] == "*" else LETTERS.get(type, "?")
    return letters


def _ptx_types(compiled) -> list[str]:
    """Return the types of the parameters that the kernel's PTX declares."""
    _, _, entry = compiled.asm["ptx"].partition(".entry")
    return re.findall(r"\.param \.(\w+)", entry.partition("{")[0])
