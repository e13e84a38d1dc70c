"""Capture launches as a CUDA graph, which one call of the host replays."""

import contextlib
from collections.abc import Callable, Iterator

import torch

_failed: list[torch.cuda.CUDAGraph] = []  # kept, as torch 2.11's pinned-memory allocator points to them


def cuda_graph(body: Callable[[], None]) -> Callable[[], None]:
    """Capture the launches of `body` on the current CUDA stream, without running them; return the replay.

    After a failed capture another capture and the default CUDA generator work. torch 2.11 leaves both broken
    (pytorch 180395): the allocator continues recording to the graph's pool, so emptying the cache raises an
    error, and the generator waits for the end of the capture, so every draw raises an error. The recording
    can be ended from Python. The generator is reset by the end of any other capture, so one fill is captured.
    The memory of a failed capture stays reserved until the process ends, in torch 2.13 too: a caller that
    needs this memory must capture in another process.

    Raises:
        Exception: the capture failed; `cause` gives the reason.
    """
    try:
        return _captured(body)
    except Exception:
        _captured(torch.zeros(1, device="cuda").zero_)
        raise


def _captured(body: Callable[[], None]) -> Callable[[], None]:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream = torch.cuda.current_stream()
    try:
        # Thread-local, because the loader's thread pins memory meanwhile, which a global capture forbids.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            body()
    except Exception:
        with contextlib.suppress(RuntimeError):  # the recording has ended already, from torch 2.12 on
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            _failed.append(graph)
        raise
    return graph.replay


@contextlib.contextmanager
def capturable_stream(device: torch.device) -> Iterator[None]:
    """Use a new CUDA stream on a GPU: the default one cannot be captured."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.synchronize(device)


def cause(error: Exception) -> str:
    """Return the first line of the error that made a capture fail.

    The end of a failed capture raises another error, whose context is the error that `body` raised.
    """
    return str(error.__context__ or error).partition("\n")[0]
