"""The paper's optimizer: AdamW with its schedule and clipping; a step with a non-finite gradient is skipped.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      w -= lr (m / (sqrt(v) + eps) + decay w)

(Clark et al. 2020, appendix A, and the code published with it.) That code does not correct the bias of m and
v. It decays matrices and embedding tables, but not biases and LayerNorms. Its rate is
``lr * (1 - t/T) * min(1, t/W)``, the product of decay and warm-up, which is 0 at the first step.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from electra_fast.errors import must

LAYER = re.compile(r"\bencoder\.layers?\.(\d+)\.")
EMBEDDING = re.compile(r"\bembeddings?\.|\bembeddings_project\.|\bencoder\.project\.")
NOT_DECAYED = re.compile(r"bias$|[nN]orm\.")
CORRECTED = 2.0**30  # a number of steps t with 1 - beta^t = 1, and with t + 1 = t in float32


def layerwise_groups(
    model: nn.Module, lr: float, decay: float, *, weight_decay: float = 0.01, paper_exponent: bool = True
) -> list[dict]:
    """Return parameter groups whose rates fall from the head to the embeddings.

    Layer i = 0 … n - 1 has the rate ``lr * decay^(n - i + 1)``, the embeddings and their projection
    ``lr * decay^(n + 2)``, and the head ``lr``, as in the code published with the paper (Clark et al. 2020).
    That code decays the last layer twice; with ``paper_exponent=False`` these exponents are smaller by 1.

    Args:
        model: of this package or of transformers: ELECTRA, BERT and others with layers ``encoder.layer.i``.
        lr: the rate of the head.
        decay: the factor per layer, in (0, 1]; the paper has 0.8, for large 0.9.
        weight_decay: of all parameters except biases and LayerNorms.
        paper_exponent: see above.

    Returns:
        groups for any optimizer of torch, with ``params``, ``lr`` and ``weight_decay``.

    Raises:
        ValueError: decay is not in (0, 1], or the model has no encoder layers.
    """
    if not 0 < decay <= 1:
        raise ValueError(must("layerwise_groups: decay", "be in (0, 1]", decay))
    if not any(LAYER.search(name) for name, _ in model.named_parameters()):
        rule, got = "have encoder layers, encoder.layer.0 and so on", type(model).__name__
        raise ValueError(must("layerwise_groups: model", rule, got))
    groups = _groups(model, decay, weight_decay, int(paper_exponent))
    return [{"lr": lr * group.pop("scale")} | group for group in groups]


def _groups(model: nn.Module, decay: float, weight_decay: float, extra: int = 1) -> list[dict]:
    """Return the groups of `layerwise_groups`, with the factor of the rate as ``scale``."""
    named = list(model.named_parameters())
    layers = [int(found[1]) for name, _ in named if (found := LAYER.search(name))]
    n, groups = max(layers, default=-1) + 1, {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        exponent = 0  # of the head
        if found := LAYER.search(name):
            exponent = n - int(found[1]) + extra
        elif EMBEDDING.search(name):
            exponent = n + 1 + extra
        decayed = 0.0 if NOT_DECAYED.search(name) else weight_decay
        group = {"params": [], "scale": decay**exponent, "weight_decay": decayed}
        groups.setdefault((bool(NOT_DECAYED.search(name)), group["scale"]), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def adamw(
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = False,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Return torch's fused AdamW for a model, with its state initialized; `step` sets the rate.

    ``bias_correction=False`` is the paper's choice. torch's AdamW has no such option, but its correction has
    no effect after many steps, so the counts of steps start at `CORRECTED`. `layer_decay` is that of
    `layerwise_groups`.
    """
    groups = _groups(model, layer_decay, weight_decay)
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
        group["lr"] = _scaled(lr, group["scale"])
        # torch raises an error if a capture finds it False, and warns if it is True without a capture.
        group["capturable"] = norm.is_cuda and torch.cuda.is_current_stream_capturing()
    optimizer.step()
    return norm, skipped


def _scaled(lr: float | Tensor, scale: float) -> float | Tensor:
    """Return lr * scale, rounded to float32 for a float too, so that eager steps equal captured ones."""
    if scale == 1.0:
        return lr
    return lr * scale if isinstance(lr, Tensor) else (torch.tensor(lr, device="cpu") * scale).item()


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
