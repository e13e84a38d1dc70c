"""Inference on a CPU: the operator for a layer is as exact as its modules and never uses old weights."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from electra_fast import inference
from electra_fast.config import ElectraConfig
from electra_fast.model import Discriminator
from electra_fast.modules import Encoder, EncoderLayer, Layout
from electra_fast.ops import REFERENCE
from electra_fast.ops import encoder_layer as ops
from electra_fast.ops._operators import OPERATORS
from electra_fast.testing.budget import assert_within_budget

CONFIG = ElectraConfig(vocab_size=300, max_positions=90, embedding=16, layers=2, hidden=72, heads=3, ffn=200)
DTYPES = (torch.float32, torch.bfloat16)
WAYS = ("float32", "bfloat16", "int8", "autocast")


@pytest.fixture(autouse=True)
def _seed(seed):
    torch.manual_seed(seed)


def random_layer(config=CONFIG) -> EncoderLayer:
    """Return a layer in which no parameter has a value that hides an error, such as a bias of 0."""
    layer = EncoderLayer(config).eval()
    with torch.no_grad():
        for name, x in layer.named_parameters():
            x.copy_(torch.randn(x.shape) * 0.1 + ("norm.weight" in name))
    return layer


LAYOUTS = {
    "one": ((1, 1), Layout()),
    "16": ((1, 16), Layout()),
    "padded": ((3, 37), Layout(torch.arange(37) < torch.tensor([37, 1, 20])[:, None])),
    "hidden": ((2, 9), Layout(torch.zeros(2, 9, dtype=torch.bool))),
    "long": ((2, 81), Layout()),
    "packed": ((70,), Layout(None, torch.tensor([0, 1, 1, 41, 70], dtype=torch.int32), 40)),
    "empty": ((0, 5), Layout()),
    "no tokens": ((0,), Layout(None, torch.tensor([0], dtype=torch.int32), 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_within_the_error_budget(dtype, layout, layer_calls):
    shape, layout = LAYOUTS[layout]
    layer = random_layer().to(dtype)
    x = torch.randn(*shape, CONFIG.hidden).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double(), layout)
    blocks = layer(x, layout)
    assert not layer_calls
    with torch.no_grad():
        y = layer(x, layout)
    assert len(layer_calls) == 1 and y.dtype == dtype
    assert_within_budget("y", y, exact, blocks.detach())


@pytest.mark.parametrize("layout", ["16", "padded", "packed"])
def test_int8_errs_by_its_quantisation(layout):
    """A product of quantised factors errs by at most 1/127 of a weight's and 1/255 of a token's range."""
    shape, layout = LAYOUTS[layout]
    layer, x = random_layer(), torch.randn(*shape, CONFIG.hidden)
    with torch.inference_mode():
        exact, y = layer(x, layout), layer(x, layout, int8=True)
    error = (y - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_computes_what_the_definition_does(way):
    if OPERATORS["encoder_layer"].cpu is None:
        pytest.skip("the extension is not built")
    layer, x = random_layer(), torch.randn(3, 37, CONFIG.hidden)
    dtype = {"float32": torch.float32, "int8": torch.int8}.get(way, torch.bfloat16)
    x = x.to(torch.bfloat16) if way == "bfloat16" else x
    weights, key_mask = layer._parts().pack(dtype), LAYOUTS["padded"][1].key_mask
    for mask, bounds in ((key_mask, None), (None, torch.tensor([0, 37, 74, 111], dtype=torch.int32))):
        args = (x if mask is not None else x.flatten(0, 1), weights, mask, bounds, 37, 3, 0.2, 1e-12)
        ours, definition = (f(*args) for f in (ops.encoder_layer, OPERATORS["encoder_layer"].reference))
        eps = 2e-6 if way == "float32" else 2e-2  # a value at a rounding boundary may take the other side
        assert (ours - definition).float().norm() <= eps * definition.float().norm()


@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_threads_gives_the_same_bits(way):
    layer, threads, results = random_layer(), torch.get_num_threads(), []
    layer = layer.bfloat16() if way == "bfloat16" else layer
    tokens = [torch.randn(n, CONFIG.hidden).to(next(layer.parameters()).dtype) for n in (5, 64, 300)]
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with torch.inference_mode(), torch.autocast("cpu", enabled=way == "autocast"):
                results.append([layer(x[None], int8=way == "int8") for x in tokens])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("int8", [False, True])
def test_padding_may_contain_anything(int8):
    layer, x = random_layer(), torch.randn(2, 9, CONFIG.hidden)
    key_mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    with torch.inference_mode():
        clean = layer(x, Layout(key_mask), int8=int8)
        x[1, 4:] = torch.nan
        dirty = layer(x, Layout(key_mask), int8=int8)
    assert torch.equal(clean[key_mask], dirty[key_mask]) and dirty[~key_mask].isnan().all()


def test_quantisation_of_extreme_rows():
    weight, bias = torch.randn(8, 16), torch.randn(8)
    x = torch.tensor([0.0, 1e-42, 1.0, 1e37, torch.inf, torch.nan])[:, None].expand(6, 16)
    y = ops._linear(x, *ops.pack([weight], [bias], torch.int8))
    torch.testing.assert_close(y[:2], bias.expand(2, 8))
    torch.testing.assert_close(y[2], weight.sum(1) + bias, atol=0.1, rtol=0)
    assert y[3].isfinite().all() and y[4:].isnan().all()


def test_packed_columns_keep_a_row_of_zeros():
    panels, columns = ops.pack([torch.zeros(3, 8)], [torch.arange(3.0)], torch.int8)
    assert not panels.any() and torch.equal(columns[1], torch.ones(3))


# --- when it is used ---


def test_training_gradients_and_other_ops_use_the_modules(layer_calls):
    layer, x = random_layer(), torch.randn(1, 7, CONFIG.hidden)
    layer(x).sum().backward()
    assert layer.attention.qkv.weight.grad is not None
    with torch.no_grad():
        layer.train()(x)
        EncoderLayer(CONFIG, REFERENCE).eval()(x)
        layer.eval().double()(x.double())
        layer.float().half()(x.half())
    assert not layer_calls


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(hook, layer_calls):
    layer, seen = random_layer(), []
    for module in list(layer.modules())[1:]:
        handle = getattr(module, hook)(lambda *_: seen.append(1))
        with torch.no_grad():
            layer(torch.randn(1, 7, CONFIG.hidden))
        handle.remove()
    assert not layer_calls and len(seen) == len(list(layer.modules())) - 1


def test_a_replaced_module_is_called(layer_calls):
    layer = random_layer()
    layer.feed_forward.dense_out = nn.Linear(CONFIG.ffn, CONFIG.hidden)
    with torch.no_grad():
        layer(torch.randn(1, 7, CONFIG.hidden))
    assert not layer_calls


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_compiles_without_the_operator(layer_calls):
    layer, x = random_layer(), torch.randn(1, 7, CONFIG.hidden)
    with torch.no_grad():
        expected = layer(x)
        layer_calls.clear()
        y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not layer_calls


def test_int8_is_asked_for_and_trains_in_float(layer_calls):
    encoder, ids = Encoder(CONFIG).eval(), torch.randint(5, 300, (2, 9))
    encoder.int8 = True
    with torch.inference_mode():
        encoder(ids)
    assert set(layer_calls) == {ops.pack([torch.ones(1, 1)], [torch.ones(1)], torch.int8)[0].dtype}
    with pytest.warns(inference.Int8Warning, match="int8 was requested, .*: gradients are enabled"):
        x = encoder(ids)
    assert x.requires_grad
    layer_calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.train()(ids).sum().backward()
    assert not layer_calls and all(p.grad is not None for p in encoder.layers.parameters())


def test_wrong_layouts_are_refused_with_the_same_sentences():
    layer, x = random_layer(), torch.randn(2, 9, CONFIG.hidden)
    for layout in (
        Layout(torch.ones(2, 8, dtype=torch.bool)),
        Layout(torch.ones(2, 9)),
        Layout(torch.ones(2, 9, dtype=torch.bool), torch.tensor([0, 9])),
        Layout(None, torch.tensor([0, 18]), 18),
    ):
        messages = []
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode, pytest.raises((TypeError, ValueError)) as error:
                layer(x, layout)
            messages.append(str(error.value).split(", got")[0])
        assert messages[0] == messages[1]


def test_flops_are_counted(layer_calls):
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = random_layer(), torch.randn(2, 7, CONFIG.hidden)
    W, F = CONFIG.hidden, CONFIG.ffn
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert (
        counter.get_total_flops() == 2 * 14 * (4 * W * W + 2 * W * F) + 4 * 2 * 7 * 7 * W and not layer_calls
    )


# --- weights that change ---


def optimizer(layer):
    layer(torch.randn(1, 7, CONFIG.hidden)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def fused_optimizer(layer):
    layer(torch.randn(1, 7, CONFIG.hidden)).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def in_place(layer):
    with torch.no_grad():
        layer.attention.qkv.weight[5, 3] += 1.0


def data_assigned(layer):
    layer.feed_forward.dense_in.weight.data = torch.randn_like(layer.feed_forward.dense_in.weight)


def data_copied(layer):
    layer.feed_forward.dense_in.weight.data.copy_(torch.randn(CONFIG.ffn, CONFIG.hidden))


def data_scaled(layer):
    layer.attention.out.weight.data.mul_(1.5)


def norm_scaled(layer):
    layer.feed_forward.norm.weight.data.mul_(1.5)


def bias_shifted(layer):
    layer.attention.qkv.bias.data.add_(0.5)


def tenth_pruned(layer):
    weight = layer.feed_forward.dense_out.weight
    weight.data[weight.abs() < weight.abs().quantile(0.3)] = 0


def loaded(layer):
    layer.load_state_dict(random_layer().state_dict())


def assigned(layer):
    layer.load_state_dict(random_layer().state_dict(), assign=True)


def parameter_replaced(layer):
    layer.attention.out.weight = nn.Parameter(torch.randn(CONFIG.hidden, CONFIG.hidden))


CHANGES = (optimizer, fused_optimizer, in_place, data_assigned, data_copied, data_scaled, norm_scaled)
CHANGES += (bias_shifted, tenth_pruned, loaded, assigned, parameter_replaced)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("int8", [False, True])
def test_changed_weights_are_used(change, int8):
    layer, x = random_layer(), torch.randn(1, 7, CONFIG.hidden)
    with torch.inference_mode():
        before = layer(x, int8=int8)
    change(layer)
    with torch.inference_mode():
        after = layer(x, int8=int8)
        expected = copy.deepcopy(layer)(x, int8=int8)
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_weights_are_packed_once(monkeypatch):
    layer, x, packs = random_layer(), torch.randn(1, 7, CONFIG.hidden), []
    monkeypatch.setattr(inference, "pack", lambda *args: packs.append(1) or ops.pack(*args))
    with torch.inference_mode():
        for _ in range(3):
            layer(x)
        assert len(packs) == 4
        layer(x, int8=True)
        layer(x)
    assert len(packs) == 8


def test_training_frees_the_packed_weights():
    layer, x = random_layer(), torch.randn(1, 7, CONFIG.hidden)
    with torch.inference_mode():
        layer(x)
    assert layer in inference._PACKED
    layer.train()(x)
    assert layer not in inference._PACKED


def test_copies_pickles_and_state_dicts_do_not_contain_packed_weights():
    model, ids = Discriminator(CONFIG).eval(), torch.randint(5, 300, (2, 9))
    state, size = set(model.state_dict()), len(pickle.dumps(model))
    with torch.inference_mode():
        logits = model(ids)
        assert set(model.state_dict()) == state and len(pickle.dumps(model)) == size
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(ids), logits)
            again.encoder.layers[0].attention.qkv.weight.mul_(2.0)
            assert not torch.equal(again(ids), logits) and torch.equal(model(ids), logits)
