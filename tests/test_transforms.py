"""Uses of a function by PyTorch other than a call: second derivatives, vmap, flop counts, export, copies."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import small_patched
import torch
from test_implementations import small
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from towers import CONFIG, assert_all_equal, padded

from electra_fast import hf, ops, reference
from electra_fast.model import Discriminator, Electra
from electra_fast.ops import REFERENCE
from electra_fast.ops._operators import OPERATORS


def one_argument(functions, op):
    """Return (function of one float tensor, that tensor): the first example of an op."""
    example = small(op, "cpu", count=1)[0]
    name = next((n for n, x in example.args.items() if n in example.gradients), "ids")

    def call(x):
        result = getattr(functions, op)(**{**example.args, name: x})
        return result if isinstance(result, Tensor) else result[0]

    return call, example.args[name]


def penalty(functions, op, loss):
    """Return the gradient of a gradient penalty; `loss` makes a scalar of the op's result."""
    call, x = one_argument(functions, op)
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(call(x)), x, create_graph=True)
    return torch.autograd.grad(x.sum() + first.square().sum(), x)[0]


# The upstream gradient depends on x, or is constant.
@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), lambda y: y.sum()], ids=["square", "sum"])
def test_a_second_derivative_is_refused_and_the_reference_computes_it(differentiable, loss):
    op = differentiable
    remedy = rf"{op}: the second derivative .* electra_fast\.reference\.{op}, .* `undo\(\)`"
    with pytest.raises(NotImplementedError, match=remedy):
        penalty(ops, op, loss)
    assert penalty(reference, op, loss).isfinite().all()


def test_a_second_derivative_in_a_weight_with_a_copy_is_refused():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    y = ops.linear(x, weight, low_weight=weight.detach().bfloat16())
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear: the second derivative"):
        torch.autograd.grad(weight.sum() + first.sum(), weight)


def test_a_first_derivative_with_create_graph_is_the_same(differentiable):
    call, x = one_argument(ops, differentiable)
    x = x.clone().requires_grad_()
    first, again = (torch.autograd.grad(call(x).sum(), x, create_graph=g)[0] for g in (True, False))
    assert torch.equal(first, again)


def test_a_patched_model_refuses_a_gradient_penalty_until_undo():
    model = small_patched.build("ElectraForSequenceClassification")
    inputs = small_patched.batch("ElectraForSequenceClassification")
    patched = hf.patch(model)

    def gradient_penalty():
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, labels=inputs["labels"]).loss
        (first,) = torch.autograd.grad(loss, embeds, create_graph=True)
        first.square().sum().backward()

    with pytest.raises(NotImplementedError, match=r"the second derivative .* `undo\(\)`"):
        gradient_penalty()
    patched.undo()
    model.set_attn_implementation("eager")
    gradient_penalty()


forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@forward_mode
def test_functions_of_torch_func_are_refused(op):
    call, x = one_argument(ops, op)
    sentence = rf"{op}: torch\.func .* is not implemented; .* electra_fast\.reference\.{op}"
    with pytest.raises(NotImplementedError, match=sentence):
        torch.vmap(call)(torch.stack([x, x]))
    if x.is_floating_point():
        with pytest.raises(NotImplementedError, match=sentence):
            torch.func.grad(lambda x: call(x).sum())(x)
        with pytest.raises(NotImplementedError, match=sentence):
            torch.func.jvp(call, (x,), (x,))


@forward_mode
def test_forward_mode_is_refused_only_for_a_dual_tensor(differentiable):
    call, x = one_argument(ops, differentiable)
    with forward_ad.dual_level():
        call(x)
        with pytest.raises(NotImplementedError, match=f"{differentiable}: forward-mode differentiation"):
            call(forward_ad.make_dual(x, x))


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


PRODUCTS = ("linear", "attention", "attention_qkv", "mlm_head")


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_op_has_the_flops_of_its_definition(product):
    """The definition of packed attention multiplies padding too, so its count is scaled down."""
    counts = []
    for example in small(product, "cpu", count=2):
        args = {n: x.requires_grad_() if n in example.gradients else x for n, x in example.args.items()}

        def step(functions, args=args):
            result = getattr(functions, product)(**args)
            (result if isinstance(result, Tensor) else result.loss).sum().backward()

        ours, definition = (count(lambda f=f, step=step: step(f)) for f in (ops, reference))
        if "cu_seqlens" in args:
            n, longest = args["cu_seqlens"].diff(), args["max_seqlen"]
            m = args.get("cu_seqlens_k", args["cu_seqlens"]).diff()
            pairs = longest * args.get("max_seqlen_k", longest)
            definition = definition // (len(n) * pairs) * int((n * m).sum())
        assert ours == definition
        counts.append(ours)
    assert any(counts)


def test_every_op_that_multiplies_has_a_flop_formula():
    from torch.utils.flop_counter import flop_registry

    known = {str(op).removeprefix("electra_fast.") for op in flop_registry if "electra_fast" in str(op)}
    assert known == {name for name in OPERATORS if name.removesuffix("_fwd").removesuffix("_bwd") in PRODUCTS}


def test_only_wanted_gradients_have_flops():
    x, weight = torch.randn(6, 8), torch.randn(4, 8, requires_grad=True)
    assert count(lambda: ops.linear(x, weight).sum().backward()) == 2 * (2 * 6 * 8 * 4)


def test_a_packed_batch_on_the_meta_device_counts_only_longest_sequences():
    qkv = torch.empty(40, 3, 2, 16, device="meta")
    packed = {"cu_seqlens": torch.empty(4, dtype=torch.int32, device="meta"), "max_seqlen": 20}
    assert count(lambda: ops.attention_qkv(qkv, **packed)) == 2 * (3 * 20**2) * (2 * 2 * 16)


@pytest.mark.parametrize(
    "name", ["ElectraForMaskedLM", "ElectraForSequenceClassification", "BertForMaskedLM"]
)
def test_a_patched_training_step_has_the_flops_of_the_plain_one(name):
    # PyTorch does not count its own "sdpa" on a CPU.
    model, inputs = small_patched.build(name), small_patched.batch(name)
    model.set_attn_implementation("eager")
    plain = count(lambda: model(**inputs).loss.backward())
    model.set_attn_implementation("sdpa")
    with hf.patch(model):
        assert count(lambda: model(**inputs).loss.backward()) == plain


def test_flops_of_a_known_step():
    sizes = {"vocab_size": 500, "embedding_size": 32, "hidden_size": 32, "intermediate_size": 64}
    model = small_patched.build("ElectraForMaskedLM", **sizes)
    ids = torch.randint(5, 500, (3, 16))
    hf.patch(model)
    assert count(lambda: model(input_ids=ids, labels=ids).loss.backward()) == 10_211_328


def test_electra_has_the_flops_of_its_reference():
    ids, key_mask = padded(24, 9)
    rng = torch.tensor([1, 2])
    models = (Electra(CONFIG, **options) for options in ({}, {"ops": REFERENCE}))
    first, second = (count(lambda m=m: m(ids, key_mask=key_mask, rng=rng).loss.backward()) for m in models)
    assert first == second


@pytest.mark.parametrize("first", ["electra_fast.ops", "torch.utils.flop_counter"])
def test_flop_formulas_exist_in_either_order_of_imports(first):
    program = f"""
import sys, importlib, torch
importlib.import_module({first!r})
print("triton" in sys.modules)
from electra_fast import ops
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    ops.linear(torch.ones(2, 3), torch.ones(5, 3))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported, flops = done.stdout.split()
    assert flops == "60"
    assert imported == "False" or first != "electra_fast.ops"


def _exported(model, args, kwargs, shapes):
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes).module()


class _Op(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, args):
        return self.function(**args)


def test_an_op_is_exported(op):
    for example in small(op, "cpu", count=1)[:1]:
        args = example.args
        shapes = {n: dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None
                  for n, x in args.items()}  # fmt: skip
        exported = _exported(_Op(getattr(ops, op)), (args,), {}, (shapes,))
        ours, theirs = exported(args), getattr(ops, op)(**args)
        ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
        assert_all_equal((x for x in ours if x is not None), (x for x in theirs if x is not None))


@pytest.mark.parametrize("cls", [Electra, Discriminator])
def test_a_model_is_exported_for_every_batch_and_length(cls):
    model = cls(dataclasses.replace(CONFIG, layers=1)).eval()

    def call(B, L):
        ids, key_mask = padded(*[L - i for i in range(B)], L=L)
        return {"ids": ids, "key_mask": key_mask, "rng": torch.tensor([1, 2])}

    shape = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("L", min=8, max=40)}
    shapes = {"ids": shape, "key_mask": shape, "rng": None}
    exported = _exported(model, (), call(3, 24), shapes)
    for size in ((3, 24), (5, 17)):
        inputs = call(*size)
        ours, theirs = exported(**inputs), model(**inputs)
        assert_all_equal(*((x,) if isinstance(x, Tensor) else tuple(x) for x in (ours, theirs)))


def test_a_copied_functional_or_checkpointed_model_gives_the_same():
    model, rng = Electra(CONFIG).train(), torch.tensor([1, 2])
    ids, key_mask = padded(24, 9)

    def gradients(call, model=model):
        model.zero_grad()
        call(ids, key_mask=key_mask, rng=rng).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(model)
    twin = copy.deepcopy(model)
    assert_all_equal(expected, gradients(twin, twin))
    parameters = dict(model.named_parameters())
    assert_all_equal(expected, gradients(lambda *a, **k: torch.func.functional_call(model, parameters, a, k)))
    assert_all_equal(expected, gradients(lambda *a, **k: checkpoint(model, *a, use_reentrant=False, **k)))
