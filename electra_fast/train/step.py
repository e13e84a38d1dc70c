"""One step of training: forward and backward of its micro-batches, clipping, AdamW, a row of metrics.

The host does not synchronize with the device in a step. On a GPU the step is captured once as a CUDA graph
and replayed: a step of ELECTRA-small has about 1000 launches, and with 5 to 10 us per launch the host would
be slower than the device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from electra_fast.capture import cause
from electra_fast.linear import LowPrecisionWeights
from electra_fast.train import optimizer
from electra_fast.train.evaluation import moments, recorded, standard_deviation
from electra_fast.train.gradients import GradientBuckets
from electra_fast.train.loader import Batch
from electra_fast.train.metrics import MetricBuffer

WARM_UP = 3  # steps before the capture, in which libraries choose algorithms and allocate memory


class Step:
    """`step(batches, rngs, rate, row)` takes one optimizer step.

    Args:
        model: a module whose forward has the arguments of a batch and ``rng``. It returns an output with
            ``loss`` and ``numbers()``, the first metrics of a row: `Electra`, or a `TaskModel`.
        optim: the result of `optimizer.adamw`.
        clip: the norm to which gradients are clipped.
        dtype: the autocast dtype, None for float32. With it the weights have copies in that dtype.
        metrics: the buffer for the metrics of the steps.
        capture: `cuda_graph`, or None to launch the kernels of each step one by one.
        buckets: the gradients, if other processes compute micro-batches of the same step.

    ``why_eager`` says why a step was not replayed although it should have been.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: torch.optim.AdamW,
        *,
        clip: float,
        dtype: torch.dtype | None,
        metrics: MetricBuffer,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None,
        buckets: GradientBuckets | None = None,
    ):
        self.model, self.optim, self.clip, self.metrics = model, optim, clip, metrics
        self.dtype, self.capture, self.buckets = dtype, capture, buckets
        self.copies = LowPrecisionWeights(model, dtype) if dtype is not None else None
        self.why_eager: str | None = None
        self._taken, self._replay = 0, None
        self._logits: tuple[Tensor, Tensor | None] | None = None  # of the last micro-batch, and their weights

    def __call__(self, batches: list[Batch], rngs: Tensor, rate: float, row: int) -> None:
        """Take a step.

        Args:
            batches: its micro-batches in this process, each the keyword arguments of the model's forward.
            rngs: int64 ``[micro-batches, 2]`` = (seed, micro-batch), on the host.
            rate: the learning rate.
            row: the row of `metrics` for this step.
        """
        device = self.metrics.rows.device
        # Rounded to float32 in eager steps too, so that they equal captured ones.
        rounded = torch.tensor(rate, dtype=torch.float32, device="cpu")
        inputs = {
            "rngs": _sent(rngs, device),
            "rate": _sent(rounded, device) if self.capture else rounded.item(),
            "row": _sent(torch.tensor([row], device="cpu"), device),
        }
        self._taken += 1
        if self.capture is not None and self._taken > WARM_UP:
            if self._replay is None:
                self._record(batches, inputs)
            if self.capture is not None and _shapes(batches) == _shapes(self._batches):
                for captured, given in zip([self._inputs, *self._batches], [inputs, *batches], strict=True):
                    for name, x in captured.items():
                        if isinstance(x, Tensor):
                            x.copy_(given[name])
                self._logits = self._captured_logits  # an eager step in between has changed them
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
            self._captured_logits = self._logits
        except RuntimeError as error:
            self.capture = None
            self._zero_gradients()
            self.why_eager = f"the step cannot be captured as a CUDA graph: {cause(error)}"

    def _body(self, batches: list[Batch], rngs: Tensor, rate: float | Tensor, row: Tensor) -> None:
        sums, buckets = 0, self.buckets
        micro_batches = len(batches) * (1 if buckets is None else buckets.world.size)
        for left, batch, rng in zip(range(len(batches))[::-1], batches, rngs, strict=True):
            autocast = torch.autocast(rngs.device.type, self.dtype, enabled=self.dtype is not None)
            with autocast, recorded(self.model) as seen:
                out = self.model(**batch, rng=rng)
            if buckets is not None:
                buckets.before(last=left == 0)
            (out.loss / micro_batches).backward()
            sums = sums + out.numbers().detach().double()
        self._logits = (seen[-1].output.detach(), seen[-1].weights) if seen else None
        if buckets is not None:
            buckets.wait()
        norm, skipped = optimizer.step(self.optim, rate, self.clip)
        self._zero_gradients()
        if self.copies is not None:
            self.copies.refresh()
        self.metrics.write(row, [sums, norm, skipped])

    def _zero_gradients(self) -> None:
        if self.buckets is None:
            self.optim.zero_grad(set_to_none=True)
        else:
            self.buckets.zero()

    def logit_std(self) -> Tensor:
        """Return the standard deviation of the discriminator's logits in the step's last micro-batch.

        A float64 scalar on the device, NaN without a discriminator. It is computed here, once per line of the
        log, because it would add ten kernels to each step. A captured step writes its logits to the same
        memory in each replay.
        """
        if self._logits is None:
            return self.metrics.rows.new_full((), torch.nan)
        return standard_deviation(moments(*self._logits))


def _sent(x: Tensor, device: torch.device) -> Tensor:
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def _cloned(named: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}


def _shapes(batches: list[Batch]) -> list[dict[str, Any]]:
    return [{k: list(x.shape) if isinstance(x, Tensor) else x for k, x in batch.items()} for batch in batches]
