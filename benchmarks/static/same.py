"""Compare over the stub driver the two ways to launch a kernel: by Triton, and by `kernels/_launch.py`.

Each launch that the extension finds in its table is also done by Triton. Both must pass the same to the
driver: the function of the compiled kernel, grid, block, shared memory, stream and every parameter.
"""

import ctypes
import itertools
import random
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from benchmarks.static import stub
from electra_fast import testing
from electra_fast.kernels import _launch
from electra_fast.ops import _operators

OBSERVER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_uint)] * 2, ctypes.c_uint, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
WIDTHS = {"u64": 8, "u32": 4, "u8": 1, "f32": 4}  # bytes of a parameter, by its type in PTX


class Compared:
    """electra_fast._C, whose `launch` is compared with Triton's."""

    def __init__(self, extension):
        self.extension, self.different = extension, []
        self.calls = self.direct = 0
        self.has_driver, self.remember = extension.has_driver, extension.remember

    def launch(self, context, grid, stream, arguments, constants) -> bool:
        kernel = context[0]
        types = _launch._ptx_types(kernel[grid](*arguments, **constants))
        theirs, _ = passed(types, lambda: kernel[grid](*arguments, **constants))
        ours, done = passed(types, lambda: self.extension.launch(context, grid, stream, arguments, constants))
        self.calls, self.direct = self.calls + 1, self.direct + done
        if done and ours != theirs:
            self.different.append(f"{kernel.__name__}: {ours} instead of {theirs}")
        return done


def passed(types: list[str], launch: Callable) -> tuple[list, object]:
    """Return what a call passes to the driver, for a kernel with parameters of `types`, and its result."""
    seen = []

    @OBSERVER
    def observe(function, grid, block, shared, stream, arguments):
        values = [ctypes.string_at(arguments[i], WIDTHS[type]) for i, type in enumerate(types)]
        seen.append((function, grid[:3], block[:3], shared, stream, values))

    library = stub.library()
    library.stub_observe(observe)
    try:
        return seen, launch()
    finally:
        library.stub_observe(ctypes.cast(None, OBSERVER))


def examples(launches: Callable[[], int], *ops: str) -> Iterator[dict]:
    """Call Triton's implementations twice on every example; yield the launches that were compared."""
    _operators._C = compared = Compared(_operators._C)
    for op in ops:
        function = testing.implementations(op, device="cuda")["triton"]
        for example in testing.examples(op, 0):
            testing.run(function, example)
            calls, direct = compared.calls, compared.direct
            testing.run(function, example)
            counts = {"calls": compared.calls - calls, "direct": compared.direct - direct}
            yield {"op": op, "example": example.name, **counts, "different": compared.different}


@triton.jit(do_not_specialize=["free"], do_not_specialize_on_alignment=["loose_ptr"])
def every_type(x_ptr, y_ptr, loose_ptr, n, free, pair, scale, flag, C: tl.constexpr, D: tl.constexpr):
    i = tl.arange(0, 16)
    value = tl.load(x_ptr + i * pair[0]).to(tl.float32) * scale + n + free + flag + C
    if y_ptr is not None:
        value += tl.load(y_ptr + i * pair[1])
    if D is not None:
        value += D
    tl.store(loose_ptr + i, value.to(loose_ptr.dtype.element_ty))


INTEGERS = [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1]
INTEGERS += [2**32, 2**63 - 1, 2**63, 2**64 - 16]
VIEWS = [
    torch.zeros(64, dtype=dtype)[offset:]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)
    for offset in (0, 1, 16)
]


def arguments(launches: Callable[[], int], seed: str) -> Iterator[dict]:
    """Launch a kernel on many arguments, in random order and twice; yield what is launched differently."""
    _launch.enable(compared := Compared(_operators._C))
    draw = random.Random(int(seed))
    plain = {
        "x": VIEWS[0], "y": VIEWS[0], "loose": VIEWS[0], "n": 3, "free": 3, "pair": (3, 3), "scale": 0.3,
        "flag": 3, "C": 3, "D": None, "num_warps": 4,
    }  # fmt: skip
    values = {
        "x": VIEWS, "y": [*VIEWS, None], "loose": VIEWS, "n": INTEGERS, "free": INTEGERS,
        "pair": list(itertools.product((1, 3, 16, 2**31), repeat=2)), "scale": [0.0, 1.0, -0.1, 3e38, 1, 16],
        "flag": [True, False, 1, 0], "C": [0, 1, 2, True, -5, 2**40], "D": [None, 0, 1, False],
        "num_warps": [1, 2, 4],
    }  # fmt: skip
    cases = [plain | {name: value} for name, some in values.items() for value in some]
    cases += [{name: draw.choice(some) for name, some in values.items()} for _ in range(40)]
    draw.shuffle(cases)
    for case in cases * 2:
        *given, C, D, num_warps = case.values()
        before = compared.direct
        grid = draw.choice([(1,), (7, 3), (2, 3, 4)])
        _launch.launch(every_type, grid, *given, C=C, D=D, num_warps=num_warps)
        shown = {k: str(v.dtype) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        numbers = [case["n"], case["free"], *case["pair"]]
        unknown = isinstance(case["flag"], bool) or max(numbers) >= 2**63  # these stay Triton's
        yield {"case": shown, "unknown": unknown, "direct": compared.direct - before}
    yield {"different": compared.different}
