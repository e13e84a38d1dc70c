"""torch.compile makes two graphs for ten lengths, a static and a dynamic one; with dynamic=True, only one."""

import dataclasses

import pytest
import small_patched
import torch
from small_halves import halves
from towers import CONFIG

from electra_fast import hf, ops
from electra_fast.model import Discriminator, Electra, Generator

# No length is 0, 1 or equal to another size of the call: PyTorch makes separate graphs for these cases.
LENGTHS = (20, 21, 22, 25, 28, 31, 32, 33, 36, 39)
B, H, D, V, E = 5, 2, 11, 51, 17

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def _floats(*shape):
    return torch.randn(shape, requires_grad=True)


WORD, POSITION, TYPE, WEIGHT = (_floats(n, E) for n in (V, 83, 3, E))
SCALE, BIAS, VOCABULARY_BIAS = _floats(E), _floats(E), _floats(V)


def _dropout(L, options):
    return {"rng": torch.tensor([1, L]), "dropout": 0.1, "stream": 3, **options}


def _padded(L):
    return {"key_mask": torch.arange(L).expand(B, L) < L - 2}


def _packed(L):  # B * L tokens
    bounds = torch.tensor([0, 3, L, L, 3 * L, B * L], dtype=torch.int32)
    return {"cu_seqlens": bounds, "max_seqlen": 2 * L}


def _ids(*shape):
    return torch.randint(5, V, shape)


def _embed(ids, **packed):
    options = {"eps": 1e-6, "dropout": 0.1, "rng": torch.tensor([1, 2]), **packed}
    return (ids, None, None, WORD, POSITION, TYPE, SCALE, BIAS), options


def _mask(ids, layout):
    return (ids, ids > 7, torch.tensor([1, 2])), {"mask_id": 4, **layout}


def _attended(*shape):
    return tuple(_floats(*shape) for _ in range(3))


CALLS = {
    "mask_tokens": lambda L: _mask(_ids(B, L), _padded(L)),
    "mask_tokens, packed": lambda L: _mask(_ids(B * L), _packed(L)),
    "embed": lambda L: _embed(_ids(B, L)),
    "embed, packed": lambda L: _embed(_ids(B * L), cu_seqlens=_packed(L)["cu_seqlens"]),
    "linear": lambda L: ((_floats(B, L, E), WEIGHT, BIAS), {}),
    "attention": lambda L: (_attended(B, L, H, D), _dropout(L, _padded(L))),
    "attention, one tensor": lambda L: ((_floats(B, L, H, D),) * 3, {}),
    "attention, packed": lambda L: (_attended(B * L, H, D), _dropout(L, _packed(L))),
    "attention_qkv": lambda L: ((_floats(B, L, 3, H, D),), _dropout(L, _padded(L))),
    "attention_qkv, packed": lambda L: ((_floats(B * L, 3, H, D),), _dropout(L, _packed(L))),
    "add_norm": lambda L: ((_floats(B, L, E), _floats(B, L, E), SCALE, BIAS), _dropout(L, {"eps": 1e-6})),
    "add_norm, one stream per call": lambda L: (
        (_floats(B, L, E), None, SCALE, BIAS),
        _dropout(L, {"eps": 1e-6, "stream": L}),
    ),
    "bias_gelu": lambda L: ((_floats(B, L, E), BIAS), {}),
    "mlm_head": lambda L: (
        (_floats(L, E), WORD, VOCABULARY_BIAS, _ids(L), torch.ones(L), torch.tensor([1, 2])),
        {},
    ),
    "replace_tokens": lambda L: ((_ids(B, L), torch.randperm(3 * L), _ids(3 * L), torch.ones(3 * L)), {}),
    "rtd_loss": lambda L: ((_floats(B, L), torch.rand(B, L) < 0.5, torch.ones(B, L)), {}),
    "nce_loss": lambda L: (
        (_floats(B, L), torch.zeros(B, L), torch.rand(B, L) < 0.5, torch.ones(B, L)),
        {"log_odds": -1.7},
    ),
}


def compile_and_run(function, calls, dynamic, backend):
    """Run forward and backward passes; more compilations than expected are an error."""
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=dynamic, fullgraph=True, backend=backend)
    expected = 1 if dynamic else 2
    for i, (args, options) in enumerate(calls):
        with torch.compiler.set_stance("fail_on_recompile" if i >= expected else "default"):
            result = compiled(*args, **options)
        if isinstance(result, dict):
            result = result["loss"]
        results = result if isinstance(result, tuple) else (result,)
        wanted = [y.sum() for y in results if y is not None and y.requires_grad]
        if wanted:
            sum(wanted).backward()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


both = pytest.mark.parametrize("dynamic", [None, slow(True)], ids=["default", "dynamic"])


def test_every_op_has_a_call():
    assert {name.split(",")[0] for name in CALLS} == set(ops.Ops._fields)


@both
@pytest.mark.parametrize("name", CALLS)
def test_an_op_is_compiled_twice_for_ten_lengths(name, dynamic):
    calls = [CALLS[name](L) for L in LENGTHS]
    compile_and_run(getattr(ops, name.split(",")[0]), calls, dynamic, "aot_eager")


@both
@pytest.mark.parametrize(
    ("cls", "layout"),
    [
        (Electra, _padded), slow(Electra, _packed), slow(Discriminator, _padded), (Discriminator, _packed),
        slow(Generator, _padded), slow(Generator, _packed),
    ],
)  # fmt: skip
def test_a_model_is_compiled_twice_for_ten_lengths(cls, layout, dynamic):
    config = dataclasses.replace(CONFIG, layers=1, dropout=0.1, max_positions=2 * LENGTHS[-1])
    shape = (lambda L: (B, L)) if layout is _padded else (lambda L: (B * L,))
    calls = [((torch.randint(104, 300, shape(L)),), layout(L)) for L in LENGTHS]
    compile_and_run(cls(config).train(), calls, dynamic, "eager")


@both
@pytest.mark.parametrize(
    "name",
    [
        "ElectraForPreTraining", slow("ElectraForMaskedLM"), slow("ElectraForSequenceClassification"),
        slow("BertForMaskedLM"),
    ],
)  # fmt: skip
def test_a_patched_model_is_compiled_twice_for_ten_lengths(name, dynamic, monkeypatch):
    change = {}
    if name == "ElectraForSequenceClassification":  # the first call adds it to the config
        change["problem_type"] = "single_label_classification"
    model = small_patched.build(name, dropout=0.1, num_hidden_layers=1, **change)
    hf.patch(model)
    calls = []
    for L in LENGTHS:
        monkeypatch.setattr(small_patched, "L", L)
        calls.append(((), small_patched.batch(name)))
    compile_and_run(model, calls, dynamic, "eager")


def test_layers_that_are_compiled_separately_share_their_graphs():
    """The layers differ only in their dropout streams."""
    config = dataclasses.replace(CONFIG, layers=4, dropout=0.1)
    model = Discriminator(config).train()
    torch._dynamo.reset()
    for i, layer in enumerate(model.encoder.layers):
        layer.compile(fullgraph=True, backend="eager")
        with torch.compiler.set_stance("fail_on_recompile" if i >= 2 else "default"):
            x = torch.randn(B, 20, config.hidden, requires_grad=True)
            layer(x, rng=torch.tensor([1, 2]), stream=3 + 3 * i).sum().backward()


def test_compiled_results_equal_the_eager_ones_at_every_length():
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention_qkv, dynamic=True, fullgraph=True, backend="aot_eager")
    for L in LENGTHS:
        (qkv,), options = CALLS["attention_qkv, packed"](L)
        assert torch.equal(compiled(qkv, **options), ops.attention_qkv(qkv, **options))


def test_a_compiled_graph_refuses_wrong_bounds():
    torch._dynamo.reset()
    compiled = torch.compile(ops.embed, fullgraph=True, backend="aot_eager")
    args, options = _embed(_ids(B * 20), cu_seqlens=torch.tensor([0, 3, 2, 100], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="embed: cu_seqlens must rise from 0 to the number of tokens"):
        compiled(*args, **options)


def _flattened(L):
    """A batch as `DataCollatorWithFlattening` makes it."""
    bounds, T = torch.tensor([0, 3, L, 3 * L], dtype=torch.int32), 3 * L
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 2 * L, "max_length_k": 2 * L}
    return {
        "input_ids": torch.randint(104, 300, (1, T)),
        "position_ids": torch.arange(T)[None] % 20,
        **packing,
    }


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["default", "dynamic"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_pretrainer_is_compiled_twice_for_ten_lengths(layout, dynamic):
    pretrainer = hf.ElectraPretrainer(*halves(), mask_id=103, special_ids=[0, 101, 102, 103])
    hf.patch(pretrainer)
    if layout == "packed":
        for half in (pretrainer.generator, pretrainer.discriminator):
            half.set_attn_implementation("electra_fast")
    ids = [torch.randint(104, 300, (B, L)) for L in LENGTHS]
    calls = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    if layout == "packed":
        calls = [_flattened(L) for L in LENGTHS]
    compile_and_run(pretrainer, [((), inputs) for inputs in calls], dynamic, "eager")
