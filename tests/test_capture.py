"""A capture that fails leaves torch in a state in which the next one works."""

import contextlib
import multiprocessing
import types

import pytest
import torch

from electra_fast import capture


class FakeTorch:
    """A stand-in for the state of torch that a capture changes: the allocator's recordings and the generator.

    In torch 2.11 a failed capture ends neither; later versions first end the recording.
    """

    def __init__(self, monkeypatch, ends: bool):
        self.ends, self.recording, self.waiting, self.pools = ends, [], False, 0
        graph = types.SimpleNamespace(replay=lambda: "replayed")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self.new_pool)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "side")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(*shape))
        monkeypatch.setattr(capture, "_failed", [])

    def new_pool(self):
        self.pools += 1
        return (0, self.pools)

    def end(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        if self.recording:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.recording.append(pool)
        self.waiting = True
        try:
            yield
        except RuntimeError:
            if self.ends:
                self.end(0, pool)
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            ) from None
        except Exception:
            self.end(0, pool)  # not an error of CUDA: the capture is complete
            self.waiting = False
            raise
        self.end(0, pool)
        self.waiting = False


@pytest.mark.parametrize("ends", [False, True], ids=["torch 2.11", "torch 2.12"])
def test_after_a_failed_capture_the_next_one_and_the_generator_work(monkeypatch, ends):
    torch_ = FakeTorch(monkeypatch, ends)

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might")

    for _ in range(2):
        with pytest.raises(RuntimeError) as failed:
            capture.cuda_graph(waits)
        assert capture.cause(failed.value) == "operation not permitted when stream is capturing"
        assert torch_.recording == [] and not torch_.waiting
        assert capture.cuda_graph(lambda: None)() == "replayed"
    assert torch_.pools == 6, "each capture has its own pool"
    assert len(capture._failed) == (0 if ends else 2)


def test_an_error_that_is_not_cudas_is_its_own_cause(monkeypatch):
    FakeTorch(monkeypatch, ends=True)

    def wrong():
        raise KeyError("ids")

    with pytest.raises(KeyError) as failed:
        capture.cuda_graph(wrong)
    assert capture.cause(failed.value) == "'ids'" and capture._failed == []


def fail_a_capture():
    """On a GPU: fail to capture a wait for the host, then capture, replay and draw random numbers."""
    x = torch.zeros(3, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            with pytest.raises(RuntimeError) as failed:
                capture.cuda_graph(lambda: (x.add_(1), x.sum().item()))
            assert "captur" in capture.cause(failed.value)
            replay = capture.cuda_graph(lambda: x.add_(1))
        replay()
        torch.cuda.current_stream().synchronize()
        assert x.tolist() == [1, 1, 1]
        torch.cuda.empty_cache()
        assert torch.rand(1000, device="cuda").std() > 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_after_a_failed_capture_a_gpu_works():
    """In a separate process, so that no later test fails if torch does not recover."""
    context = multiprocessing.get_context("spawn")  # CUDA does not work after a fork
    process = context.Process(target=fail_a_capture)
    process.start()
    process.join(120)
    assert process.exitcode == 0
