"""One step of pre-training: forward and backward of its micro-batches, clipping, AdamW, a row of the ledger.

The host waits for nothing in it. On a GPU it is captured as one CUDA graph, once, and replayed: a step of
ELECTRA-small is some 1000 launches, and at 5 to 10 us each the host would take longer than the device.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from electra_fast import optimizer
from electra_fast.dense import Copies
from electra_fast.evaluation import moments, recorded, standard_deviation
from electra_fast.feed import Batch
from electra_fast.ledger import Ledger

WARM_UP = 3  # steps before the capture, in which libraries choose and allocate what they need

_failed: list[torch.cuda.CUDAGraph] = []  # torch 2.11's allocator of pinned memory keeps pointers to these


def cuda_graph(body: Callable[[], None]) -> Callable[[], None]:
    """Capture what `body` launches on the current stream, without running it; return the graph's replay.

    After a failed capture the next one works, and so does the default CUDA generator. torch 2.11 leaves both
    broken (pytorch 180395): the allocator keeps recording to the graph's pool, so emptying the cache raises,
    and the generator waits for the capture to end, so every draw raises. Python can end the recording. It
    cannot reset the generator, but the end of any other capture does, so a capture of one fill follows.
    The memory of a failed capture stays reserved until the process ends, in torch 2.13 too: a caller that
    needs it must capture in a process of its own.

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
        # Thread-local: the feed's thread pins memory meanwhile, which a global capture forbids.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            body()
    except Exception:
        with contextlib.suppress(RuntimeError):  # the recording has ended, as it has from torch 2.12 on
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            _failed.append(graph)
        raise
    return graph.replay


def cause(error: Exception) -> str:
    """Return the first line of the error that made a capture fail.

    The end of a failed capture raises an error of its own, in the context of the one that `body` raised.
    """
    return str(error.__context__ or error).partition("\n")[0]


class Step:
    """`step(batches, rngs, rate, place)` takes one optimizer step.

    Args:
        model: has `Electra`'s forward.
        optim: of `optimizer.adamw`.
        clip: the norm to which gradients are clipped.
        dtype: of autocast, None for float32. The weights then have copies in it, which the step refreshes.
        ledger: where the step writes what it measured.
        capture: `cuda_graph`, or None to launch everything anew each time.

    ``why_eager`` says why a step was not replayed, once it should have been.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: torch.optim.AdamW,
        *,
        clip: float,
        dtype: torch.dtype | None,
        ledger: Ledger,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None,
    ):
        self.model, self.optim, self.clip, self.ledger = model, optim, clip, ledger
        self.dtype, self.capture = dtype, capture
        self.copies = Copies(model, dtype) if dtype is not None else None
        self.why_eager: str | None = None
        self._taken, self._replay = 0, None
        self._logits: tuple[Tensor, Tensor | None] | None = None  # of the last micro-batch, and their weights

    def __call__(self, batches: list[Batch], rngs: Tensor, rate: float, place: int) -> None:
        """Take a step.

        Args:
            batches: its micro-batches, each the keyword arguments of the model's forward.
            rngs: int64 ``[micro-batches, 2]`` = (seed, micro-batch), on the host.
            rate: the learning rate.
            place: the row of the ledger.
        """
        device = self.ledger.rows.device
        # In float32, as a captured AdamW reads it: so all steps have one rate.
        rounded = torch.tensor(rate, dtype=torch.float32, device="cpu")
        inputs = {
            "rngs": _sent(rngs, device),
            "rate": _sent(rounded, device) if self.capture else rounded.item(),
            "place": _sent(torch.tensor([place], device="cpu"), device),
        }
        self._taken += 1
        if self.capture is not None and self._taken > WARM_UP:
            if self._replay is None:
                self._record(batches, inputs)
            if self.capture is not None and _shapes(batches) == _shapes(self._batches):
                for mine, given in zip([self._inputs, *self._batches], [inputs, *batches], strict=True):
                    for name, x in mine.items():
                        if isinstance(x, Tensor):
                            x.copy_(given[name])
                self._logits = self._captured  # an eager step in between has set others
                self._replay()
                return
            self.why_eager = self.why_eager or (
                f"a batch has another shape than the captured one: {_shapes(batches)}, not "
                f"{_shapes(self._batches)}"
            )
        self._body(batches, **inputs)

    def _record(self, batches: list[Batch], inputs: dict[str, Any]) -> None:
        self._inputs, self._batches = _cloned(inputs), [_cloned(batch) for batch in batches]
        body = functools.partial(self._body, self._batches, **self._inputs)
        try:
            self._replay = self.capture(body)
            self._captured = self._logits
        except RuntimeError as error:
            self.capture = None
            self.optim.zero_grad(set_to_none=True)
            self.why_eager = f"the step cannot be captured as a CUDA graph: {cause(error)}"

    def _body(self, batches: list[Batch], rngs: Tensor, rate: float | Tensor, place: Tensor) -> None:
        sums = 0
        for batch, rng in zip(batches, rngs, strict=True):
            autocast = torch.autocast(rngs.device.type, self.dtype, enabled=self.dtype is not None)
            with autocast, recorded(self.model) as seen:
                out = self.model(**batch, rng=rng)
            (out.loss / len(batches)).backward()
            numbers = (out.loss, out.mlm_loss * out.masked, out.mlm_correct, out.masked, out.rtd_loss)
            sums = sums + torch.cat([torch.stack(numbers).detach(), out.rtd_counts])
        self._logits = (seen[-1][0].detach(), seen[-1][2]) if seen else None
        norm, skipped = optimizer.step(self.optim, rate, self.clip)
        if self.copies is not None:
            self.copies.refresh()
        self.ledger.write(place, [sums, norm, skipped])

    def logit_std(self) -> Tensor:
        """Return the standard deviation of the discriminator's logits in the step's last micro-batch.

        A float64 scalar on the device, NaN without a discriminator. It is computed here and not in the step,
        which would launch ten more kernels each time: the log asks for it once per line. A captured step
        writes its logits to the same memory in each replay.
        """
        if self._logits is None:
            return self.ledger.rows.new_full((), torch.nan)
        return standard_deviation(moments(*self._logits))


def _sent(x: Tensor, device: torch.device) -> Tensor:
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def _cloned(named: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}


def _shapes(batches: list[Batch]) -> list[dict[str, Any]]:
    return [{k: list(x.shape) if isinstance(x, Tensor) else x for k, x in batch.items()} for batch in batches]
