"""`python -m benchmarks host`: the host's work for Triton's kernels, over the stub driver.

    TRITON_INTERPRET=0 python -m benchmarks.static.on_stub host        calls of every op
    TRITON_INTERPRET=0 python -m benchmarks.static.on_stub host_step   a step of transformers' models
    TRITON_INTERPRET=0 python -m benchmarks.static.on_stub host_layer  our encoder and decoder layers

Each row has counts, which `tests/test_launches.py` compares with committed ones, and CPU time. The binder is
Triton's own way to launch; after the first call of a specialisation it must not be entered.

The step is forward and backward of transformers' two pre-training models, patched and unpatched, with the
layers of ELECTRA-small but so few columns and tokens that PyTorch's arithmetic on the CPU takes little time.
What remains is the host's work, which a GPU needs as well. Neither side includes the time of CUDA's driver,
which the side with more launches would pay more often. There is no dropout, because PyTorch dispatches three
operators for it on a CPU and one on a GPU.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.harness.dispatched import Dispatched
from benchmarks.static import on_stub
from electra_fast.tables import text_table

ROUNDS = 15
CALLS = 20  # of an op in each round
B, L = 2, 8
SIZES = {
    "num_hidden_layers": 12, "hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4,
    "intermediate_size": 64, "vocab_size": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
HEADS = ("ElectraForMaskedLM", "ElectraForPreTraining")


def host(launches: Callable[[], int]) -> Iterator[dict]:
    """Yield a row for each op and pass, and for the launch of an empty kernel by Triton."""
    import triton

    from electra_fast import testing

    @triton.jit
    def nothing(x_ptr):
        pass

    x = torch.zeros(1)
    calls = {("empty kernel", "launch by Triton"): lambda: nothing[(1,)](x)}
    for op in testing.OPS:
        function = testing.implementations(op, device="cuda").get("triton")
        if function is not None:
            example = next(e for e in testing.examples(op, 0) if "none" not in e.name)
            calls |= {(op, passes): call for passes, call in passes_of(function, example).items()}
    for (op, passes), row in measured(launches, calls, CALLS).items():
        yield {"op": op, "passes": passes, **row}


def host_step(launches: Callable[[], int]) -> Iterator[dict]:
    """Yield a row for the patched and the unpatched step."""
    with steps() as both:
        for name, row in measured(launches, both, 1).items():
            yield {"step": name, **row}


def host_layer(launches: Callable[[], int]) -> Iterator[dict]:
    """Yield a row for forward and backward of an encoder's and of a decoder's layer."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    library = serve_cpu()
    for name, row in measured(launches, layers(), 1).items():
        yield {"layer": name, **row}
    del library


def host_serve(launches: Callable[[], int]) -> Iterator[dict]:
    """Take a step for each line of stdin, "patched" or "unpatched"; yield its CPU time."""
    with steps() as both:
        for line in sys.stdin:
            start = time.process_time()
            both[line.strip()]()
            yield {"seconds": time.process_time() - start}


@contextlib.contextmanager
def steps() -> Iterator[dict[str, Callable[[], None]]]:
    """Yield the two steps, whose kernels Triton's launchers serve."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory that no kernel has written may contain denormal numbers
    library = serve_cpu()
    yield {"patched": step(True), "unpatched": step(False)}
    del library


def measured(launches: Callable[[], int], calls: dict, repeat: int) -> dict[object, dict]:
    """Count what each call does, and time the calls in turn."""
    from triton.runtime.jit import JITFunction

    bound, run = 0, JITFunction.run

    def counted(*args, **kwargs):
        nonlocal bound
        bound += 1
        return run(*args, **kwargs)

    rows: dict[object, dict] = {}
    for name, call in calls.items():
        for _ in range(3):  # another tensor may be aligned differently
            call()
        JITFunction.run, before = counted, (bound, launches())
        with Dispatched() as mode:
            call()
        JITFunction.run = run
        counts = {"launches": launches() - before[1], "binder": bound - before[0]}
        rows[name] = {"operators": mode.by_name.total(), **counts}
    seconds: dict[object, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeat):
                call()
            seconds[name].append((time.process_time() - start) / repeat)
    return {
        name: row | {"us": round(1e6 * statistics.median(seconds[name]), 1)} for name, row in rows.items()
    }


def passes_of(function: Callable, example) -> dict[str, Callable]:
    """Return a forward call of an example and, if the op has gradients, a forward and backward call."""

    def forward():
        with torch.no_grad():
            return function(**example.args)

    if not example.gradients:
        return {"forward": forward}
    leaves = {n: example.args[n].clone().requires_grad_() for n in example.gradients}

    def both():
        y = function(**example.args | leaves)
        y = y if isinstance(y, torch.Tensor) else y.loss
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), allow_unused=True)

    return {"forward": forward, "forward+backward": both}


def serve_cpu() -> torch.library.Library:
    """Make Triton's launchers serve tensors on the CPU, as they serve CUDA, while the result is alive."""
    from electra_fast.ops._operators import OPERATORS

    library = torch.library.Library("electra_fast", "IMPL")
    for op, kernels in OPERATORS.items():
        if kernels.triton:
            library.impl(op, kernels.triton, "CPU", allow_override=True)
    return library


def step(patched: bool) -> Callable[[], None]:
    """Return forward and backward of both models."""
    import transformers

    from electra_fast import hf

    config = transformers.ElectraConfig(**SIZES)
    ids = torch.randint(5, 64, (B, L))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = {"ElectraForMaskedLM": ids, "ElectraForPreTraining": ids % 2}
    models = {head: getattr(transformers, head)(config).train() for head in HEADS}
    if patched:
        for model in models.values():
            hf.patch(model)

    def take():
        for head, model in models.items():
            model.zero_grad(set_to_none=True)
            model(**batch, labels=labels[head]).loss.backward()

    return take


def layers() -> dict[str, Callable[[], None]]:
    """Return forward and backward of both layers; a decoder's has as many sources' tokens as targets'."""
    from electra_fast.config import ElectraConfig
    from electra_fast.decoder import DecoderLayer
    from electra_fast.modules import EncoderLayer, Layout

    config = ElectraConfig(hidden=32, heads=2, ffn=64, dropout=0.0)
    encoder, decoder = EncoderLayer(config), DecoderLayer(config)
    x, states = (torch.randn(B, L, 32, requires_grad=True) for _ in range(2))
    layout = Layout(torch.ones(B, L, dtype=torch.bool))
    calls = {"encoder": lambda: encoder(x, layout), "decoder": lambda: decoder(x, states, layout, layout)}
    return {name: lambda call=call: call().sum().backward() for name, call in calls.items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    for part in ("host", "host_layer", "host_step"):
        rows = on_stub.lines(part)
        print(text_table([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
        print()
    return 0
