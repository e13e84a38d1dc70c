"""Example inputs of any function: they are legal, distinct, and find faults that depend on size or dtype."""

import itertools
from dataclasses import replace

import pytest
import torch

from electra_fast import testing
from electra_fast.testing import Booleans, Floats, Integers, inputs
from electra_fast.testing.example import DTYPES, Definition

TWO_AXES = {"x": Floats("T", "W"), "weight": Floats("W", dtype=torch.float32), "eps": 1e-5}
SHAPES = {"x": Floats("T", "W")}


def sizes_of(found, axis):
    return {example.args["x"].shape[axis] for example in found}


def test_two_axes_give_about_sixty_small_examples_with_unique_names():
    found = inputs(TWO_AXES, gradients=["x", "weight"], name="scale")
    assert 40 <= len(inputs(SHAPES)) <= len(found) <= 60
    assert len({example.name for example in found}) == len(found)
    assert {example.op for example in found} == {"scale"}
    assert {example.gradients for example in found} == {("x", "weight")}
    assert {example.args["x"].dtype for example in found} == set(DTYPES)
    assert {example.args["weight"].dtype for example in found} == {torch.float32}
    assert {example.args["eps"] for example in found} == {1e-5}
    assert max(x.numel() for example in found for x in example.tensors().values()) < 4000


def test_each_axis_has_the_sizes_around_edges_and_none():
    found = [example for example in inputs(SHAPES, edges=(8, 32))]
    for axis in (0, 1):
        assert {0, 1, 7, 8, 9, 31, 32, 33, 65} <= sizes_of(found, axis)
    given = inputs(SHAPES, sizes={"W": (64, 100)})
    assert sizes_of(given, 1) == {64, 100} and 0 in sizes_of(given, 0)
    assert sizes_of(inputs(SHAPES, sizes={"W": 64}), 1) == {64}
    assert sizes_of(inputs({"x": Floats("T", 24)}), 1) == {24}


def test_the_seed_determines_every_value():
    first, second, third = (inputs(SHAPES, seed=seed) for seed in (1, 1, 2))
    same = [torch.equal(a.args["x"], b.args["x"]) for a, b in zip(first, second, strict=True)]
    other = [torch.equal(a.args["x"], b.args["x"]) for a, b in zip(first, third, strict=True)]
    assert all(same) and sum(other) < 8  # those that are empty or constant


def test_integers_stay_below_their_axis_which_is_never_empty():
    arguments = {"x": Floats("V", "E"), "ids": Integers("T", below="V"), "kind": Integers("T", below=2)}
    arguments |= {"used": Booleans("T", share=0.9)}
    found = inputs(arguments)
    for example in found:
        V, ids, kind = len(example.args["x"]), example.args["ids"], example.args["kind"]
        assert V and ((ids >= 0) & (ids < V)).all() and ((kind >= 0) & (kind < 2)).all(), example.name
        assert ids.shape == kind.shape == example.args["used"].shape
    assert any(not example.args["ids"].numel() for example in found)
    long = next(example for example in found if example.name.startswith("T = 257"))
    assert long.args["used"].dtype == torch.bool and 0.8 < long.args["used"].float().mean() < 1
    assert len(long.args["ids"].unique()) > 1


def test_every_layout_is_that_of_all_tensors_and_gradients_but_constants_keep_their_values():
    rising = torch.arange(4)
    found = inputs({"x": Floats("T", "W"), "temperature": Floats(), "bounds": rising})
    by = {example.layout: example.args for example in found if example.layout}
    assert by.keys() == {"strided", "expanded", "offset", "transposed"}
    assert by["strided"]["x"].stride(-1) == 2 and by["strided"]["bounds"].stride() == (2,)
    assert by["expanded"]["x"].stride(0) == 0 and by["offset"]["x"].storage_offset() == 1
    assert by["transposed"]["x"].stride(0) == 1
    assert all(torch.equal(args["bounds"], rising) for args in by.values())


def test_constant_rows_and_extreme_values():
    found = {example.name: example for example in inputs(TWO_AXES)}
    rows = found["constant rows torch.float32"].args
    assert (rows["x"] == rows["x"][:, :1]).all() and len(rows["x"].unique()) > 1
    extremes = {name: example for name, example in found.items() if example.extreme}
    for name, dtype in itertools.product(("3e+38", "1e+30", "1e-40", "0"), ("float32",)):
        for argument in ("x", "weight"):
            x = extremes.pop(f"|{argument}| = {name} torch.{dtype}").args[argument]
            assert (x.abs() == torch.tensor(float(name))).all() and len(x.signbit().unique()) == 2
    assert [*extremes] == ["|x| = 3e+38 torch.bfloat16", "|x| = 65504 torch.float16"]


def test_integers_alone_need_no_dtype():
    found = inputs({"ids": Integers("T", below=5, dtype=torch.int32)})
    assert {example.args["ids"].dtype for example in found} == {torch.int32}
    assert not any(example.extreme or "torch" in example.name for example in found)


def softmax(x):
    return x.softmax(-1)


def wrong_examples(function):
    """Return the names of the examples on which a function is not a softmax."""
    names, definition = [], Definition(softmax, softmax)
    for example in inputs(SHAPES, gradients=["x"]):
        try:
            testing.check_example(function, replace(example, definition=definition))
        except (AssertionError, IndexError):
            names.append(example.name.replace("torch.", ""))
    return names


def columns_after_the_first_block_are_ignored(x):
    return torch.cat([x[:, :64], x[:, 64:] - torch.inf], 1).softmax(-1)


def bfloat16_is_rounded_to_eight_bits(x):
    return (x.to(torch.float8_e5m2).to(x.dtype) if x.dtype == torch.bfloat16 else x).softmax(-1)


def strides_are_ignored(x):
    return x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset()).softmax(-1)


def no_maximum_is_subtracted(x):
    e = x.float().exp()
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


def an_empty_row_has_no_maximum(x):
    x.amax(-1)  # raises IndexError; subtracting it exceeds the budget in other rows on some machines
    return x.softmax(-1)


def test_faults_are_found_by_the_examples_made_for_them():
    assert wrong_examples(softmax) == []
    wide = [f"W = {W} float32" for W in (65, 127, 128, 129, 257)]
    wrong = wrong_examples(columns_after_the_first_block_are_ignored)
    assert wrong == [*wide, "W = 257 bfloat16", "W = 257 float16"]
    assert all(name.endswith(" bfloat16") for name in wrong_examples(bfloat16_is_rounded_to_eight_bits))
    layouts = ("strided", "expanded", "transposed")
    names = [
        f"every tensor {layout} {dtype}" for dtype in ("float32", "bfloat16", "float16") for layout in layouts
    ]
    assert wrong_examples(strides_are_ignored) == names
    large = [f"constant rows {dtype}" for dtype in ("float32", "bfloat16", "float16")]
    large += ["|x| = 3e+38 float32", "|x| = 1e+30 float32", "|x| = 3e+38 bfloat16", "|x| = 65504 float16"]
    assert wrong_examples(no_maximum_is_subtracted) == large
    assert wrong_examples(an_empty_row_has_no_maximum) == ["W = 0 float32"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": {"X": 3}}, r"inputs: sizes must have names of axes \(T, W\), got 'X'"),
        (
            {"sizes": {"W": (64, 0)}},
            r"inputs: sizes\['W'\] must be one or more positive sizes, got \(64, 0\)",
        ),
        ({"gradients": ["eps"]}, r"inputs: gradients must name Floats \(x, weight\), got 'eps'"),
        ({"dtypes": ()}, r"inputs: dtypes must be one or more floating dtypes, got \(\)"),
        ({"dtypes": [torch.int8]}, "inputs: dtypes must be one or more floating dtypes, got"),
        ({"edges": (1,)}, r"inputs: edges must be one or more sizes from 2 on, got \(1,\)"),
        ({"edges": "a"}, r"inputs: edges must be one or more sizes from 2 on, got \('a',\)"),
        ({"dtypes": "float32"}, r"inputs: dtypes must be one or more floating dtypes, got \('float32',\)"),
        ({"sizes": {"W": "a"}}, r"inputs: sizes\['W'\] must be one or more positive sizes, got \('a',\)"),
        ({"sizes": ["W"]}, r"inputs: sizes must be a dict, got \['W'\]"),
        ({"arguments": ["x"]}, r"inputs: arguments must be a dict, got \['x'\]"),
        ({"gradients": "x"}, "inputs: gradients must be a list of names, got 'x'"),
        ({"seed": 0.5}, "inputs: seed must be an integer, got 0.5"),
        (
            {"arguments": {**TWO_AXES, "T": 3}},
            "arguments must have other names than the axes, got T for both; rename",
        ),
        ({"arguments": {"n": 3}}, "arguments must have Floats, Integers or Booleans, got constants only"),
    ],
)
def test_illegal_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        inputs(**{"arguments": TWO_AXES, **options})


def test_illegal_descriptions_are_named():
    with pytest.raises(
        ValueError, match=r"Floats: dtype must be a floating dtype, got torch\.int64; use Int"
    ):
        Floats("T", dtype=torch.int64)
    with pytest.raises(ValueError, match="Integers: below must be 1 or more, or the name of an axis, got 0"):
        Integers("T", below=0)
    with pytest.raises(ValueError, match=r"Integers: below must be .*, got 2\.5"):
        Integers("T", below=2.5)
    with pytest.raises(ValueError, match="Floats: axes must be names or sizes, got -3"):
        Floats("T", -3)


def test_one_dtype_and_one_edge_need_no_tuple():
    one = inputs(TWO_AXES, dtypes=torch.float32, edges=16)
    several = inputs(TWO_AXES, dtypes=(torch.float32,), edges=(16,))
    assert [example.name for example in one] == [example.name for example in several]
