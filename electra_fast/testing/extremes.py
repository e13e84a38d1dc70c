"""Examples with constant rows and extreme values, for which the definition is finite in the same dtype."""

import torch

from electra_fast.testing.example import RNG, Example

CONSTANTS = torch.tensor([0.3, 3.1, 10.1, 1000.1])  # numbers for which the sum of a constant row is rounded


def _rows(g, T, W, most=3e38, dtype=torch.float32):
    """Return rows ``[T, W]`` of 3e38, 1e30, 65504, 1e-40 and 0 with both signs, limited to `most`."""
    values = torch.tensor([3e38, 1e30, 65504, 1e-40, 0])
    signs = torch.tensor([1.0, -1.0])[torch.randint(2, (T, W), generator=g)]
    return (signs * values[torch.arange(T) % 5, None]).clamp(-most, most).to(dtype)


def _normal(g, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=g)


def _embed(g):
    ids = torch.randint(6, (2, 16), generator=g)
    for eps in (1e-12, 1e-5):
        word = torch.cat([CONSTANTS[:, None].expand(4, 115), _normal(g, 4, 115)])
        args = {"ids": ids, "type_ids": None, "position_ids": None, "word": word}
        args |= {"position": torch.full((16, 115), 0.1), "type": torch.full((2, 115), 0.7)}
        args |= {"norm_weight": torch.ones(115), "norm_bias": torch.ones(115), "eps": eps}
        wanted = ("word", "position", "type", "norm_weight", "norm_bias")
        yield Example("embed", f"constant rows eps={eps}", args, wanted)


def _linear(g):
    weight = _normal(g, 8, 16, scale=0.1)
    half = {"x": torch.full((4, 16), 65504.0).half(), "weight": weight.half()}
    yield Example("linear", "65504", half, ("x", "weight"))
    for name, x in (("1e30", _normal(g, 4, 16, scale=1e30)), ("1e-40", torch.full((4, 16), 1e-40))):
        yield Example("linear", name, {"x": x, "weight": weight}, ("x", "weight"))


def _attention(g):
    """Yield scores so far apart that the softmax is one key; the gradients of q and k are only rounding."""
    for name, dtype, score, value in (
        ("1e30", torch.float32, 1e10, 1e30),
        ("65504", torch.float16, 2e4, 2e4),
    ):
        scales = {"q": score, "k": score, "v": value}
        args = {n: _normal(g, 2, 9, 2, 16, scale=s).clamp(-3 * s, 3 * s).to(dtype) for n, s in scales.items()}
        yield Example("attention", name, args, ("v",))


def _add_norm(g):
    wanted = ("x", "weight", "bias")
    for W in (115, 1000):
        norm = {"weight": torch.ones(W), "bias": torch.ones(W)}
        for eps in (1e-12, 1e-5):
            x = torch.cat([CONSTANTS[:, None].expand(4, W), _normal(g, 3, W)])
            args = {"x": x, "residual": None, **norm, "eps": eps}
            yield Example("add_norm", f"constant rows W={W} eps={eps}", args, wanted)
            args = {**args, "residual": torch.cat([torch.full((4, W), 0.1), _normal(g, 3, W)])}
            title = f"constant rows, residual W={W} eps={eps}"
            yield Example("add_norm", title, args, ("residual", *wanted))
    norm = {"residual": None, "weight": torch.ones(36), "bias": torch.zeros(36), "eps": 1e-5}
    for dtype, most in ((torch.float32, 1e18), (torch.float16, 65504)):  # the squares are finite in float32
        args = {"x": _rows(g, 5, 36, most, dtype), **norm}
        yield Example("add_norm", f"up to {most:g}", args, wanted)


def _bias_gelu(g):
    for dtype, most in ((torch.float32, 1e38), (torch.float16, 65504)):  # PyTorch computes 2x
        args = {"x": _rows(g, 5, 12, most, dtype), "bias": torch.zeros(12)}
        yield Example("bias_gelu", f"up to {most:g}", args, ("x", "bias"))


def _mlm_head(g):
    """Yield equal logits for 16 of 31 tokens and their negative for the others: the loss is log 16."""
    for top in (1e30, 3e38):
        args = {"x": _normal(g, 5, 16), "table": _normal(g, 31, 16)}
        args["bias"] = torch.where(torch.arange(31) % 2 == 0, top, -top)
        args |= {"targets": torch.zeros(5, dtype=torch.long), "weights": torch.ones(5)}
        args["rng"] = torch.tensor(RNG)
        yield Example("mlm_head", f"logits of {top:g}", args, ("x", "table", "bias"))
    # The reciprocal of their sum overflows in float32, the quotients do not.
    args = {**args, "bias": torch.zeros(31), "weights": torch.full((5,), 1e-40)}
    yield Example("mlm_head", "weights of 1e-40", args, ("x", "table", "bias"))


def _rtd_loss(g):
    """Yield wrong predictions, the sum of whose losses overflows in float32, but not the mean."""
    for dtype, most in ((torch.float32, 3e38), (torch.float16, 65504)):
        x = _rows(g, 5, 12, most, dtype)
        yield Example("rtd_loss", f"right, up to {most:g}", {"logits": x, "replaced": x > 0}, ("logits",))
        yield Example("rtd_loss", f"wrong, up to {most:g}", {"logits": x, "replaced": x < 0}, ("logits",))
    args = {"logits": _normal(g, 2, 6), "weights": torch.full((2, 6), 1e-40)}
    yield Example("rtd_loss", "weights of 1e-40", {**args, "replaced": args["logits"] > 0}, ("logits",))


def _nce_loss(g):
    """Yield those of `rtd_loss`, with one half of the logit in the energy and the other in log_q."""
    for example in _rtd_loss(g):
        half = example.args["logits"] / 2
        args = {"energies": half, "log_q": half.float(), "noise": example.args["replaced"]}
        args |= {"weights": example.args.get("weights")}
        yield Example("nce_loss", example.name, args, ("energies",))


EXTREMES = {
    "embed": _embed,
    "linear": _linear,
    "attention": _attention,
    "add_norm": _add_norm,
    "bias_gelu": _bias_gelu,
    "mlm_head": _mlm_head,
    "rtd_loss": _rtd_loss,
    "nce_loss": _nce_loss,
}
