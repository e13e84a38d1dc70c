"""The path in C++ (csrc/calls) and the path in Python of one op: the same results, gradients and refusals."""

import numpy as np
import pytest
import torch
from test_implementations import small
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from electra_fast import ops, testing

HOT = [op for op in testing.OPS if getattr(ops, op).in_cpp]
pytestmark = pytest.mark.skipif(not HOT, reason="built without electra_fast._C")
each_op = pytest.mark.parametrize("hot", HOT)


def test_every_op_of_a_layer_has_it():
    assert sorted(HOT) == ["add_norm", "attention", "attention_qkv", "bias_gelu", "linear"]


def taken(hot, args):
    """Return whether C++ serves a call."""
    return getattr(ops, hot).in_cpp((), args) is not NotImplemented


def outcome(function, args, gradients=()):
    """Return the results and gradients of a call as a list of tensors, or its error as (type, sentence)."""
    copies = {id(x): x for x in args.values() if isinstance(x, Tensor)}
    copies = {i: x.detach().requires_grad_() if x.is_floating_point() else x for i, x in copies.items()}
    args = {name: copies.get(id(x), x) for name, x in args.items()}
    try:
        y = function(**args)
        leaves = [args[name] for name in gradients if isinstance(args[name], Tensor)]
        return [y, *(torch.autograd.grad(y.sum(), leaves, allow_unused=True) if leaves else ())]
    except Exception as error:  # any error: the two paths must agree about it
        return type(error), str(error)


def agree(hot, args, gradients=()):
    function = getattr(ops, hot)
    ours, wanted = (outcome(f, args, gradients) for f in (function, function.in_python))
    if isinstance(wanted, tuple):
        assert ours == wanted
    else:
        for got, x in zip(ours, wanted, strict=True):
            assert (got is None) == (x is None)
            if x is not None:
                assert (got.dtype, got.shape, got.device) == (x.dtype, x.shape, x.device)
                assert x.is_meta or torch.equal(got.nan_to_num(7), x.nan_to_num(7))
    return wanted


@each_op
def test_it_serves_every_example_with_the_same_bits(hot, device, seed):
    for example in testing.examples(hot, seed):
        example = example.to(device=device)
        assert taken(hot, example.args), example.name
        with torch.no_grad():
            assert isinstance(agree(hot, example.args), list)
        assert isinstance(agree(hot, example.args, example.gradients), list)


@each_op
def test_positional_and_named_arguments_are_the_same(hot, device):
    args = small(hot, device, count=1)[0].args
    function = getattr(ops, hot)
    expected = function(**args)
    names = list(args)
    positional = [name for name in names if name in ("x", "residual", "weight", "bias", "q", "k", "v", "qkv")]
    for count in range(len(positional) + 1):
        named = {name: args[name] for name in reversed(names) if name not in positional[:count]}
        first = tuple(args[name] for name in positional[:count])
        y = function.in_cpp(first, named)
        assert y is not NotImplemented and torch.equal(y, expected)


@each_op
def test_wrong_names_and_counts_raise_what_python_raises(hot, device):
    args = small(hot, device, count=1)[0].args
    first = next(iter(args))
    for positional, named in [
        ((), args | {"unknown": 1}),
        ((), {name: x for name, x in args.items() if name != first}),
        ((args[first],), args),
        (tuple(args.values()) + (None,) * 20, {}),
    ]:
        function = getattr(ops, hot)
        errors = []
        for path in (function, function.in_python):
            with pytest.raises(TypeError) as caught:
                path(*positional, **named)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def changed(x):
    """Yield (what, value) for other values of an argument, most of them wrong."""
    yield from {"None": None, "a string": "1", "a list": [1.0], "True": True}.items()
    if isinstance(x, Tensor):
        yield "one axis more", x[None]
        yield "meta", x.to("meta")
        yield "a subclass", x.as_subclass(Subclass)
        yield "a parameter", torch.nn.Parameter(x, requires_grad=x.is_floating_point())
        for dtype in (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64, torch.bool):
            yield f"{dtype}", x.to(dtype)
        yield "complex", x.to(torch.complex64)
        yield "a lazy conjugate", x.to(torch.complex64).conj()
        yield "a lazy negative", torch._neg_view(x) if x.is_floating_point() else x
        if x.dim():
            yield "sparse", x.to_sparse()
            yield "one axis less", x.select(0, 0) if len(x) else x.sum(0)
            yield "one element less", x.narrow(-1, 0, max(0, x.shape[-1] - 1))
            yield "one row less", x.narrow(0, 0, max(0, len(x) - 1))
            yield "strided", torch.stack([x, x], -1)[..., 0]
            yield "transposed", x.transpose(0, -1)
    else:
        numbers = [0, 1, 2, -1, 2**31, 2**32, 2**63, 10**400]
        numbers += [0.0, 0.5, 1.0, -0.1, float("nan"), float("inf")]
        yield from ((repr(n)[:9], n) for n in numbers)
        yield from (("numpy " + repr(n), n) for n in (np.float64(0.5), np.float32(0.5), np.int64(1)))
        yield "a tensor", torch.tensor(0.5)


class Subclass(Tensor):
    """A tensor that PyTorch's functions accept, but which is not exactly a Tensor."""


@each_op
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_any_changed_argument_gives_the_same_result_or_the_same_error(hot, number, device):
    """The rules of C++ are those of Python: for each value of each argument both accept, or both refuse."""
    example = small(hot, device, count=1)[number]
    refused = 0
    defaults = getattr(ops, hot).in_python.__signature__.parameters
    args = {name: example.args.get(name, p.default) for name, p in defaults.items()}
    for name, x in args.items():
        for what, value in changed(x):
            print(f"{name} is changed to: {what}")  # pytest shows the last line if the test fails
            refused += isinstance(agree(hot, args | {name: value}, example.gradients), tuple)
    assert refused > 10


@each_op
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transformations_and_other_kinds_of_tensors_take_the_path_in_python(hot, device):
    example = small(hot, device, count=1)[0]
    first = next(name for name in example.args if name in example.gradients)

    def call(x):
        return getattr(ops, hot).in_cpp((), example.args | {first: x})

    x = example.args[first]
    assert call(x) is not NotImplemented and call(torch.nn.Parameter(x)) is not NotImplemented
    assert call(x.as_subclass(Subclass)) is NotImplemented and call(x.to("meta")) is NotImplemented
    with torch.autograd.forward_ad.dual_level():
        assert call(x) is not NotImplemented
        assert call(torch.autograd.forward_ad.make_dual(x, x)) is NotImplemented
    taken = []
    torch.func.grad(lambda x: taken.append(call(example.args[first])) or x.sum())(x)
    assert taken == [NotImplemented]
    with TorchFunctionMode():
        assert call(x) is NotImplemented


@each_op
def test_a_dispatch_mode_sees_the_operators(hot, device):
    seen = []

    class Listing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **kwargs or {})

    example = small(hot, device, count=1)[0]
    args = {n: x.clone().requires_grad_() if n in example.gradients else x for n, x in example.args.items()}
    with Listing():
        y = getattr(ops, hot).in_cpp((), args)
        assert y is not NotImplemented
        y.sum().backward()
    for direction in ("fwd", "bwd"):
        assert f"electra_fast.{hot}_{direction}.default" in seen


@each_op
def test_saved_tensors_pass_through_the_hooks_of_pytorch(hot, device):
    """Activation checkpointing and offloading to the host use these hooks."""
    example = small(hot, device, count=1)[0]
    args = {n: x.clone().requires_grad_() if n in example.gradients else x for n, x in example.args.items()}
    packed, leaves = [], [args[name] for name in example.gradients]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x) or len(packed) - 1, packed.__getitem__
    ):
        y = getattr(ops, hot).in_cpp((), args)
        gradients = torch.autograd.grad(y.sum(), leaves)
    assert len(packed) >= 2
    expected = torch.autograd.grad(getattr(ops, hot).in_python(**args).sum(), leaves)
    assert all(map(torch.equal, gradients, expected))


@each_op
def test_only_wanted_gradients_and_no_graph_without_one(hot, device):
    example = small(hot, device, count=1)[0]
    function = getattr(ops, hot)
    assert function(**example.args).grad_fn is None
    for name in example.gradients:
        args = example.args | {name: example.args[name].clone().requires_grad_()}
        y = function(**args)
        assert y.grad_fn is not None and "CppNode" in y.grad_fn.name()
        (gradient,) = torch.autograd.grad(y.sum(), args[name])
        assert gradient.shape == args[name].shape
        with torch.no_grad():
            assert function(**args).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hot", [op for op in HOT if op in ("attention", "attention_qkv", "linear")])
def test_autocast_is_that_of_python(hot, dtype, device):
    example = small(hot, device, count=1)[0]
    with torch.autocast(device, dtype):
        assert agree(hot, example.args, example.gradients)[0].dtype == dtype
        assert taken(hot, example.args)
