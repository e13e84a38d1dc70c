"""Time one call: CPU time on the CPU, events around graph replays with a cold L2 on CUDA."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.profiler import profile  # torch.profiler's loads the compiler, 4 s

from electra_fast.capture import cause, cuda_graph

SHORTEST = 2e-3  # seconds; a round on the CPU repeats a call until it lasts this long


class Clock:
    """pytest-benchmark's timer. It advances only when a round adds the time that it measured."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def add(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Timed:
    """One provider of a group, and the times of its rounds."""

    function: Callable  # one call
    how: str  # how the times are measured
    run: Callable  # the same work; on CUDA the replay of a graph, if it could be captured
    seconds: float = 0.0  # duration of one call, used for planning
    times: list[float] = field(default_factory=list)  # seconds per call, one entry per round
    host: list[float] = field(default_factory=list)  # seconds until the call returned to the host


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile of the values, with linear interpolation."""
    ranked = sorted(values)
    rank = q * (len(ranked) - 1)
    below = int(rank)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (rank - below) * (ranked[above] - ranked[below])


def ratio_percentiles(times: list[float], others: list[float]) -> tuple[float, float]:
    """Return the 20th and 80th percentile of times / others, round by round."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    return quantile(ratios, 0.2), quantile(ratios, 0.8)


def once(function: Callable, args: dict[str, Any], gradients: tuple[str, ...] = ()) -> Callable[[], Any]:
    """Return a function without arguments that calls `function`, with its backward pass to `gradients`."""
    if not gradients:

        def forward():
            with torch.no_grad():
                return function(**args)

        return forward

    leaves = {name: args[name].detach().clone().requires_grad_() for name in gradients}
    args, wanted = args | leaves, tuple(leaves.values())

    def result():
        y = function(**args)
        return y if isinstance(y, torch.Tensor) else y.loss

    upstream = None

    def both():
        nonlocal upstream
        y = result()
        upstream = torch.full_like(y, 0.5) if upstream is None else upstream
        return torch.autograd.grad(y, wanted, upstream)

    return both


def on_a_stream(function: Callable[[], None]) -> Callable[[], None]:
    """Return the function on a CUDA stream of its own: the default one cannot be captured."""
    if not torch.cuda.is_available():
        return function
    side = torch.cuda.Stream()

    def run() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)

    return run


def interleave(
    timed: list[Timed],
    rounds: int,
    sample: Callable[[Timed], None],
    enough: Callable[[int], bool] = lambda done: False,
) -> None:
    """Sample the providers in turn, `rounds` times or until `enough(rounds done)`: drift affects all equally.

    Each round starts with the next provider.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            if enough(r):
                break
            first = r % len(timed)
            for one in timed[first:] + timed[:first]:
                sample(one)
    finally:
        if collecting:
            gc.enable()


class CPU:
    """Measures CPU time, which does not include the work of other processes on shared cores.

    A function with the attribute `elsewhere` makes another process work, and returns its CPU time in seconds.
    """

    def prepare(self, function: Callable) -> Timed:
        return Timed(function, getattr(function, "elsewhere", "CPU time of all threads"), function)

    def sample(self, timed: Timed) -> None:
        if hasattr(timed.function, "elsewhere"):
            timed.times.append(timed.run())
            timed.host.append(timed.times[-1])
            return
        calls = max(1, round(SHORTEST / max(timed.seconds, 1e-7)))
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            timed.run()
        timed.times.append((time.process_time() - cpu) / calls)
        timed.host.append((time.perf_counter() - wall) / calls)

    def synchronize(self) -> None:
        pass

    def peak_bytes(self, function: Callable) -> int:
        """Return the most bytes that PyTorch's allocator held for one call, from the profiler's events."""
        with profile(profile_memory=True) as p:
            function()
        events = [e for e in p.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most


class CUDA:
    """Measures with events around graph replays. Before each replay it fills a buffer that is larger than L2.

    The fill evicts L2, and lasts longer than the host needs to enqueue the replay and the events, so the
    device does not wait for the host between the events.
    """

    def __init__(self):
        properties = torch.cuda.get_device_properties(0)
        self.buffer = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    def prepare(self, function: Callable) -> Timed:
        timed = Timed(function, "graph replay, cold L2", function)
        for _ in range(5):
            self.synchronize()
            start = time.perf_counter()
            function()
            timed.host.append(time.perf_counter() - start)
        if eager := getattr(function, "eager", None):  # why it must not be captured
            timed.how = eager
            return timed
        try:
            timed.run = self._capture(function)
        except RuntimeError as error:
            self.synchronize()
            timed.how = f"eager calls, cold L2; capture failed: {cause(error)}"
        return timed

    def _capture(self, function: Callable) -> Callable:
        side = torch.cuda.Stream()  # the default stream cannot be captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
            replay = cuda_graph(function)
        torch.cuda.current_stream().wait_stream(side)
        return replay

    def sample(self, timed: Timed) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        start.record()
        timed.run()
        end.record()
        end.synchronize()
        timed.times.append(start.elapsed_time(end) / 1e3)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_bytes(self, function: Callable) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


def prepared(clock: CPU | CUDA, function: Callable) -> Timed:
    """Return a function that was called before, ready to be sampled, with an estimate of its time."""
    timed = clock.prepare(function)
    clock.synchronize()
    start = time.perf_counter()
    timed.run()
    clock.synchronize()
    timed.seconds = time.perf_counter() - start
    return timed
