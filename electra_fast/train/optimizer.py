"""The paper's optimizer: AdamW with its schedule and clipping; a step with a non-finite gradient is skipped.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      w -= lr (m / (sqrt(v) + eps) + decay w)

(Clark et al. 2020, appendix A, and the code published with it.) That code does not correct the bias of m and
v. It decays matrices and embedding tables, but not biases and LayerNorms. Its rate is
``lr * (1 - t/T) * min(1, t/W)``, the product of decay and warm-up, which is 0 at the first step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from electra_fast.errors import must

CORRECTED = 2.0**30  # a number of steps t with 1 - beta^t = 1, and with t + 1 = t in float32


def adamw(
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = False,
) -> torch.optim.AdamW:
    """Return torch's fused AdamW for a model, with its state initialized; `step` sets the rate.

    ``bias_correction=False`` is the paper's choice. torch's AdamW has no such option, but its correction has
    no effect after many steps, so the counts of steps start at `CORRECTED`.
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
    """Clip the gradients to a global norm and update; change nothing if the norm is not finite.

    `lr` is a tensor on the device if a CUDA graph is captured, which would otherwise keep the number. Returns
    (norm, skipped), float32 scalars on the device, with skipped 0 or 1; the host does not synchronize. The
    fused kernel divides by ``grad_scale`` and does nothing if ``found_inf``, as with a GradScaler. Scaling
    before would read and write every gradient once more, and would spread one NaN to all gradients.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    skipped = (~norm.isfinite()).float()
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0)
    optimizer.found_inf = skipped
    for group in optimizer.param_groups:
        group["lr"] = lr
        # torch raises an error if a capture finds it False, and warns if it is True without a capture.
        group["capturable"] = norm.is_cuda and torch.cuda.is_current_stream_capturing()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the optimizer's state by names of parameters, for a checkpoint."""
    named = model.named_parameters()
    return {f"{key}.{name}": x for name, p in named for key, x in optimizer.state[p].items()}


def check(tensors: dict[str, Tensor]) -> None:
    """Check that no second moment in an optimizer's state is negative: its root would be NaN.

    Raises:
        ValueError: the message names the tensor.
    """
    for name, x in tensors.items():
        if name.startswith("exp_avg_sq.") and (x < 0).any():
            raise ValueError(must(f"optimizer: {name}", "not be negative", x.min().item()))


@dataclass
class Skipped:
    """Counts the skipped steps."""

    steps: int = 0  # in total
    run: int = 0  # consecutive ones up to now
    longest_run: int = 0
    first: int = 0  # the first step of the longest run

    def add(self, step: int, skipped: bool) -> None:
        self.steps += skipped
        self.run = self.run + 1 if skipped else 0
        if self.run > self.longest_run:
            self.longest_run, self.first = self.run, step - self.run + 1
