import pytest
import torch
from conftest import both_paths

from electra_fast import testing

OP = "attention_qkv"


def test_is_attention_of_its_slices(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    qkv = torch.randn(2, 9, 3, 2, 16, device=device, requires_grad=True)
    upstream = torch.randn(2, 9, 2, 16, device=device)
    options = {"key_mask": torch.rand(2, 9, device=device) > 0.3, "dropout": 0.2, "stream": 4}
    options["rng"] = torch.tensor([1, 0], device=device)
    (dqkv,) = torch.autograd.grad(function(qkv, **options), qkv, upstream)
    slices = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    o = testing.implementations("attention")["reference"](*slices, **options)
    wanted = torch.autograd.grad(o, slices, upstream)
    assert torch.allclose(dqkv, torch.stack(wanted, 2), atol=1e-6)


@both_paths(OP)
@pytest.mark.parametrize("shape", [(2, 3, 2, 4, 8), (3, 4, 8)])
def test_refuses(shape, path):
    with pytest.raises(ValueError, match=r"attention_qkv: qkv must have shape \[\*, 3, H, D\], got"):
        path(torch.zeros(shape))


@pytest.mark.parametrize("tokens", [(2, 0), (0, 5), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("rest", [(3, 2, 16), (3, 0, 16), (3, 2, 0)], ids=str)
def test_any_axis_may_be_empty(tokens, rest, implementation, device):
    layout = {}
    if len(tokens) == 1:
        layout = {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device=device), "max_seqlen": 4}
    qkv = torch.randn(*tokens, *rest, device=device, requires_grad=True)
    with testing.guarded_memory():
        o = testing.implementations(OP)[implementation[1]](qkv, **layout)
        o.sum().backward()
    assert o.shape == qkv.select(-3, 0).shape and o.isfinite().all()
    assert qkv.grad.shape == qkv.shape and qkv.grad.isfinite().all()
