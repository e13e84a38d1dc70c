"""Host time of a training step of transformers' pre-training pair, patched over the stub driver and unpatched.

The models have ELECTRA-small's layers and calls, but so few columns and tokens that PyTorch's arithmetic on the
CPU takes no time: what remains is the host's work, which a GPU would need as well. Neither side includes the
time of CUDA's driver, which the side with more launches would pay more often. There is no dropout, because
PyTorch dispatches three operators for it on a CPU and one on a GPU.
"""

import collections
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from electra_fast import hf
from electra_fast.ops._operators import OPERATORS

B, L, ROUNDS = 2, 8, 30
SIZES = {
    "num_hidden_layers": 12, "hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4,
    "intermediate_size": 64, "vocab_size": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
HEADS = ("ElectraForMaskedLM", "ElectraForPreTraining")


class Dispatched(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.by_name = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.by_name[str(function)] += 1
        return function(*args, **(kwargs or {}))


def serve_cpu() -> torch.library.Library:
    """Make Triton's launchers serve tensors on the CPU, as they serve CUDA on a GPU, while the result lives."""
    library = torch.library.Library("electra_fast", "IMPL")
    for op, kernels in OPERATORS.items():
        if kernels.triton:
            library.impl(op, kernels.triton, "CPU", allow_override=True)
    return library


def step_of(patched: bool) -> Callable[[], None]:
    """Return a step: forward and backward of both models of the pair."""
    config = transformers.ElectraConfig(**SIZES)
    ids = torch.randint(5, 64, (B, L))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = {"ElectraForMaskedLM": ids, "ElectraForPreTraining": ids % 2}
    models = {head: getattr(transformers, head)(config).train() for head in HEADS}
    if patched:
        for model in models.values():
            hf.patch(model)

    def step():
        for head, model in models.items():
            model.zero_grad(set_to_none=True)
            model(**batch, labels=labels[head]).loss.backward()

    return step


def host_step(launches: Callable[[], int]) -> Iterator[dict]:
    """Yield operators, launches, calls of Triton's binder and milliseconds of a step of both sides."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory that no kernel has written may contain denormal numbers
    library = serve_cpu()
    bound, run = 0, JITFunction.run

    def counted(*args, **kwargs):
        nonlocal bound
        bound += 1
        return run(*args, **kwargs)

    JITFunction.run = counted
    steps = {"patched": step_of(True), "unpatched": step_of(False)}
    rows = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        before, launched = bound, launches()
        with Dispatched() as mode:
            step()
        rows[name] = {"operators": mode.by_name.total(), "launches": launches() - launched}
        rows[name]["binder"] = bound - before
    seconds = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    del library
    for name, row in rows.items():
        yield {"step": name, **row, "ms": round(1e3 * statistics.median(seconds[name]), 2)}
