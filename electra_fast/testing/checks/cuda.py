"""Checks that need a GPU: CUDA graphs and streams. `checks.py` explains how a check is called."""

import torch

from electra_fast.capture import capturable_stream, cause, cuda_graph
from electra_fast.testing.checks.bits import (
    assert_same,
    device_of,
    run_placed,
    span,
    title,
    with_other_values,
)
from electra_fast.testing.example import Example
from electra_fast.testing.judge import backward, forward, leaves, run, upstream

BUSY = 100  # calls while another stream is busy
WIDTH = 2048  # of the matrices with which it is busy
DELAY = 50_000_000  # clock cycles, about 30 ms: longer than the host needs to launch a call


def _gpu(example: Example) -> torch.device:
    device = device_of(example)
    if device.type != "cuda":
        raise NotImplementedError("needs a GPU")
    return device


def graph(f, example):
    """A CUDA graph of it, forward and backward, gives the bits of a call for any values."""
    device, pair = _gpu(example), (with_other_values(example), example)
    with capturable_stream(device):
        wanted = [run(f, one) for one in pair]
        args = leaves(example.to())
        given = upstream(example, forward(f, example, args))
        found = []

        def body():
            results = forward(f, example, args)
            found[:] = results, backward(example, args, results, given)

        try:
            replay = cuda_graph(body)
        except Exception as error:  # of any type: the call itself has succeeded
            raise AssertionError(f"{title(example)}: not captured: {cause(error)}") from error
        for one, outcome in zip(pair, wanted, strict=True):
            with torch.no_grad():
                for name, x in one.tensors().items():
                    span(args[name]).copy_(span(x))
            replay()
            assert_same(one, "between a call and the replay of a CUDA graph", outcome, found)


def streams(f, example):
    """On another CUDA stream it waits for its inputs and gives the same bits."""
    device, wanted = _gpu(example), run(f, example)

    def late(tensors):
        """Return copies that are 0 until the current stream, but no other, has waited."""
        memory = {name: torch.zeros_like(span(x)) for name, x in tensors.items()}
        torch.cuda.synchronize(device)
        torch.cuda._sleep(DELAY)
        return {n: memory[n].copy_(span(x)).as_strided(x.shape, x.stride()) for n, x in tensors.items()}

    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        assert_same(example, "between two CUDA streams", wanted, run_placed(f, example, late))


def races(f, example):
    """Calls while another CUDA stream is busy give the same bits."""
    device, wanted = _gpu(example), run(f, example)
    load, busy = torch.ones(WIDTH, WIDTH, device=device), torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    for i in range(BUSY):
        with torch.cuda.stream(busy):
            for _ in range(i % 4):
                load @ load
        assert_same(example, "between calls while another stream is busy", wanted, run(f, example))
    torch.cuda.synchronize(device)
