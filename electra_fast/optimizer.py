"""The paper's optimizer: AdamW and its schedule, clipped, and a step that skips what is not finite.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      w -= lr (m / (sqrt(v) + eps) + decay w)

(Clark et al. 2020, appendix A, and the code published with it.) That code does not correct the bias of m and
v; it decays matrices and the embedding tables, no bias and no LayerNorm; its rate is
``lr * (1 - t/T) * min(1, t/W)``: decay and warm-up multiplied, and 0 at the first step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CORRECTED = 2.0**30  # a count of steps at which 1 - beta^t is 1, and to which float32 adds 1 without effect


def adamw(
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = False,
) -> torch.optim.AdamW:
    """Return torch's fused AdamW over a model, its averages all there; `step` sets the rate.

    ``bias_correction=False`` is the paper's. torch's AdamW has no such option; it is the same as having taken
    very many steps before.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if name.endswith("bias") or ".norm." in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    for parameter in model.parameters():
        count = 0.0 if bias_correction else CORRECTED
        count = torch.tensor(count, dtype=torch.float32, device=parameter.device)
        averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": count, **averages}
    return optimizer


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Return the rate of step 0, 1, ..., total - 1."""
    return peak * (1 - step / total) * min(1.0, step / max(1, warmup))


def step(optimizer: torch.optim.AdamW, lr: float | Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Clip the gradients to a global norm and update; where the norm is not finite nothing changes.

    `lr` is a tensor on the device where a CUDA graph is captured, which else would keep the number. Returns
    (norm, skipped), float32 scalars on the device, skipped 0 or 1: the host waits for nothing. The
    fused kernel divides by ``grad_scale`` and returns at once where ``found_inf``, as for a GradScaler. To
    scale first would read and write every gradient once more, and spread one NaN to all of them.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    skipped = (~norm.isfinite()).float()
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0)
    optimizer.found_inf = skipped
    for group in optimizer.param_groups:
        group["lr"] = lr
        # torch raises where it is captured and this is not set, and warns where it is set and not captured.
        group["capturable"] = norm.is_cuda and torch.cuda.is_current_stream_capturing()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the optimizer's state by the parameters' names, for a file."""
    named = model.named_parameters()
    return {f"{key}.{name}": x for name, p in named for key, x in optimizer.state[p].items()}


def check(tensors: dict[str, Tensor]) -> None:
    """Refuse an optimizer's state in which a second moment is negative: its root would be NaN.

    Raises:
        ValueError: names it.
    """
    for name, x in tensors.items():
        if name.startswith("exp_avg_sq.") and (x < 0).any():
            raise ValueError(f"optimizer: {name} must not be negative, got {x.min().item()}")


@dataclass
class Skipped:
    """Counts the steps that were skipped."""

    steps: int = 0  # in all
    row: int = 0  # those just now, without one between
    longest: int = 0  # of the rows
    first: int = 0  # step at which that one began

    def add(self, step: int, skipped: bool) -> None:
        self.steps += skipped
        self.row = self.row + 1 if skipped else 0
        if self.row > self.longest:
            self.longest, self.first = self.row, step - self.row + 1
