"""Functions that draw their own random numbers: the right ones pass, and a property names each fault."""

import functools

import pytest
import torch
import torch.nn.functional as F

from electra_fast import baseline, ops, testing
from electra_fast.testing.adapters import ADAPTERS
from electra_fast.testing.distributions import PROPERTIES, distribution_rows
from electra_fast.testing.distributions.maskers import MASK, masker_properties
from electra_fast.testing.distributions.samplers import sampler_properties
from electra_fast.testing.report import RAISED, RIGHT, UNSUPPORTED, WRONG
from electra_fast.testing.subject import Subject
from electra_fast.testing.supports import fit

FEWER = {"M": 512, "steps": 4}  # draws of a sampler, for a fast test


def wrong(judgements):
    """Return the properties that are wrong; those that could not be judged have no ratio."""
    found = list(judgements)
    assert all(j.name.endswith(j.quantity) and bool(j.why) == (not j.ratio <= 1) for j in found), found
    return {j.quantity for j in found if j.ratio > 1}


@pytest.mark.parametrize("name", [op for op in PROPERTIES if op != "mlm_head"])
def test_plain_pytorch_with_its_own_generator_is_right(name, device):
    before = torch.get_rng_state()
    found = list(PROPERTIES[name](getattr(ops.TORCH, name), device))
    assert not [j.why for j in found if j.why] and len(found) > 12
    assert torch.equal(torch.get_rng_state(), before)


def test_the_sampler_of_plain_pytorch_is_right(device):
    assert not wrong(sampler_properties(ops.TORCH.mlm_head, device=device, **FEWER))


@pytest.mark.parametrize("name", ["attention", "add_norm", "embed"])
def test_a_mask_can_be_read_off_results_in_bfloat16(name, device):
    assert not wrong(PROPERTIES[name](getattr(ops.TORCH, name), device, torch.bfloat16))


def uniform(x, *shared, generator=None):
    """Return uniforms of the shape of x, equal along the axes `shared`."""
    shape = [1 if axis in [a % x.dim() for a in shared] else n for axis, n in enumerate(x.shape)]
    return torch.rand(shape, generator=generator).expand(x.shape)


def scaled(x, p, keep):
    return x * keep / (1 - p)


def shared(*axes):
    return lambda x, p: scaled(x, p, uniform(x, *axes) >= p)


def the_same_in_each_step(x, p):
    return scaled(x, p, uniform(x, generator=torch.Generator().manual_seed(0)) >= p)


def columns_repeat(x, p):
    keep = uniform(x[..., :32]) >= p
    return scaled(x, p, torch.cat([keep] * -(-x.shape[-1] // 32), -1))


def two_columns_share(x, p):
    keep = uniform(x) >= p
    return scaled(x, p, keep.index_copy(-1, torch.tensor([9]), keep[..., 4:5]))


def one_column_is_never_dropped(x, p):
    return scaled(x, p, (uniform(x) >= p).index_fill(-1, torch.tensor([5]), True))


SCALE, SHARE = {"scale of the kept elements"}, {"kept share"}
STEPS = {"independence of steps", "independence of streams", "independence of seeds"}
DROPOUT_FAULTS = {
    "no scale": (("attention", "add_norm"), lambda x, p: x * (uniform(x) >= p), SCALE),
    "two scales": (("embed",), lambda x, p: F.dropout(x, p) / (1 - p), SCALE),
    "p is 0.12": (("add_norm",), lambda x, p: scaled(x, p, uniform(x) >= 1.2 * p), SHARE),
    "1 - p": (("attention",), lambda x, p: scaled(x, p, uniform(x) < p), SHARE),
    "nothing is dropped": (("attention",), lambda x, p: x / (1 - p), SHARE),
    "not 0": (
        ("add_norm", "attention"),
        lambda x, p: torch.where(uniform(x) < p, 0.01 * x, x / (1 - p)),
        {"dropped elements"},
    ),
    "sequences share": (("attention",), shared(0), {"independence of sequences"}),
    "heads share": (("attention",), shared(1), {"independence of heads"}),
    "queries share": (("attention",), shared(2), {"independence of queries"}),
    "tokens share": (("add_norm",), shared(1), {"independence of tokens"}),
    "whole rows": (("add_norm",), shared(-1), {"independence of columns"}),
    "the same in each step": (("attention_qkv", "embed"), the_same_in_each_step, STEPS),
    "a key": (("attention",), one_column_is_never_dropped, {"kept share of the keys"}),
    "a column": (("embed",), one_column_is_never_dropped, {"kept share of the columns"}),
    "two columns share": (("add_norm",), two_columns_share, {"independence of columns"}),
    "columns repeat": (
        ("embed",),
        columns_repeat,
        {"independence of columns", "kept share of the tokens", "kept share of the sequences"},
    ),
}


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for fault, (names, *_) in DROPOUT_FAULTS.items() for name in names]
)
def test_a_fault_in_dropout_is_found(name, fault):
    _, drop, quantities = DROPOUT_FAULTS[fault]
    function = functools.partial(getattr(baseline, name), drop=lambda x, p, *_: drop(x, p))
    assert wrong(PROPERTIES[name](function, "cpu")) == quantities


class AnotherMaskInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx, dy):
        return F.dropout(dy, ctx.p), None


def test_another_mask_in_the_backward_pass_is_found():
    def attention(q, k, v, *, dropout, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        p = AnotherMaskInBackward.apply((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), dropout)
        return (p @ v).transpose(1, 2)

    assert wrong(PROPERTIES["attention"](attention, "cpu")) == {"gradient of q", "gradient of k"}
    add_norm = functools.partial(baseline.add_norm, drop=lambda x, p, *_: AnotherMaskInBackward.apply(x, p))
    assert wrong(PROPERTIES["add_norm"](add_norm, "cpu")) == {"gradient of x"}


def arguments(**change):
    """Return plain PyTorch's masker with other arguments."""
    return lambda **args: baseline.mask_tokens(**args | {name: f(args) for name, f in change.items()})


def results(change):
    """Return plain PyTorch's masker with other results."""

    def mask_tokens(**args):
        out = baseline.mask_tokens(**args)
        return out._replace(**change(out))

    return mask_tokens


def labels(hits, keep=lambda B, L: torch.rand(B, L) < 0.15):
    """Return a masker of the positions `hits(ids, candidates)`, without the layout of slots."""

    def function(ids, candidates):
        hit = hits(ids, candidates)
        return torch.where(hit & ~keep(*ids.shape), MASK, ids), torch.where(hit, ids, -100)

    return ADAPTERS["mask_tokens"]["labels"].wrap(function)


def the_right_number(ids, candidates):
    """Return the positions that plain PyTorch masks; the id of padding is 0."""
    return baseline.mask_tokens(ids, candidates, None, mask_id=-1, keep_prob=0.0, key_mask=ids != 0).ids == -1


def pairs(ids, candidates):
    """Return five pairs of neighbours on the ring of the candidates."""
    B, K = len(ids), ids.shape[1] - 1
    first = 2 * torch.rand(B, K // 2).argsort(1)[:, :5] + torch.randint(K, (B, 1))
    both = torch.cat([first, first + 1], 1) % K + 1
    return torch.zeros_like(candidates).scatter(1, both, True) & candidates


def overwriting(**args):
    out = baseline.mask_tokens(**args)
    args["ids"].copy_(out.ids)
    return out


ONE = torch.tensor([1])
COUNT, PADDED = "masked positions per row", "masked positions per row with padding"
MASKERS = {
    "none": (labels(the_right_number), set()),
    "each with probability 0.15": (
        labels(lambda ids, c: c & (torch.rand(ids.shape) < 0.15)),
        {COUNT, PADDED},
    ),
    "one more": (arguments(mask_prob=lambda args: 0.165), {COUNT}),
    "counts the candidates": (
        arguments(key_mask=lambda args: args["candidates"] & args.get("key_mask", torch.tensor(True))),
        {COUNT},
    ),
    "[MASK] on any token": (
        arguments(candidates=lambda args: torch.ones_like(args["candidates"])),
        {"only candidates are masked", "only candidates, if there are few"},
    ),
    "[MASK] on padding": (arguments(key_mask=lambda args: None), {"padding is not masked", PADDED}),
    "a position twice": (
        results(lambda out: {"positions": out.positions.index_copy(0, ONE, out.positions[:1])}),
        {"each position once", "targets", "only masked tokens change"},
    ),
    "targets of masked ids": (
        results(lambda out: {"targets": out.ids.flatten()[out.positions] * out.weights.long()}),
        {"targets"},
    ),
    "random words": (
        results(lambda out: {"ids": out.ids.where((out.ids != MASK) | (torch.rand(out.ids.shape) > 0.1), 7)}),
        {"changed tokens are [MASK]"},
    ),
    "another token": (
        results(lambda out: {"ids": out.ids.index_fill(1, torch.tensor([0]), MASK)}),
        {"only masked tokens change"},
    ),
    "slots in any order": (
        results(lambda out: {n: getattr(out, n).flip(0) for n in ("positions", "targets", "weights")}),
        {"order of the slots"},
    ),
    "overwrites its input": (overwriting, {"the input is not overwritten"}),
    "keeps a tenth": (arguments(keep_prob=lambda args: 0.1), {"share that keeps its id"}),
    "keeps all of a row": (
        labels(the_right_number, lambda B, L: torch.rand(B, 1) < 0.15),
        {"kept ids of the rows"},
    ),
    "keeps the first positions": (
        labels(the_right_number, lambda B, L: (torch.arange(L) < 0.15 * L).expand(B, L)),
        {"kept ids of the positions", "kept ids of the rows"},
    ),
    "the same rows": (
        labels(lambda ids, c: the_right_number(ids[:1], c[:1]).expand_as(ids)),
        {"independence of rows"},
    ),
    "the same steps": (
        labels(lambda ids, c: (torch.manual_seed(0), the_right_number(ids, c))[1]),
        {"independence of steps"},
    ),
    "pairs": (labels(pairs), {"independence of neighbours", COUNT, PADDED}),
}


@pytest.mark.parametrize("fault", MASKERS)
def test_a_fault_in_a_masker_is_found(fault):
    function, quantities = MASKERS[fault]
    function, _ = fit("test", "mask_tokens", function, None, {"random": "own"})
    assert wrong(masker_properties(function)) == quantities


def test_the_check_of_a_masker_needs_no_padding():
    def mask_tokens(ids, candidates, rng, *, mask_id, mask_prob, keep_prob):
        return ops.mask_tokens(
            ids, candidates, rng, mask_id=mask_id, mask_prob=mask_prob, keep_prob=keep_prob
        )

    testing.check_masker(mask_tokens)


def gumbel(logits, temperature, noise=torch.rand_like):
    return (logits / temperature - (-noise(logits).log()).log()).argmax(-1)


def same_noise(logits):
    return torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))


SAMPLERS = {
    "in float16": (lambda x, t: gumbel(x.half(), t), {"tail behind a gap of 8"}),
    "rows share": (lambda x, t: gumbel(x, t, lambda x: torch.rand(x.shape[1])), {"independence of slots"}),
    "the same in each step": (lambda x, t: gumbel(x, t, same_noise), {"independence of steps"}),
    "no temperature": (lambda x, t: gumbel(x, 1.0), {"temperature 2"}),
    "the 200 largest": (
        lambda x, t: gumbel(x.masked_fill(x < x.topk(200).values[:, -1:], -1e4), t),
        {"flat logits"},
    ),
    "clamped logits": (lambda x, t: gumbel(x.clamp(min=-4), t), {"temperature 2: a token of probability 0"}),
}


@pytest.mark.parametrize("fault", SAMPLERS)
def test_a_fault_in_a_sampler_is_found(fault):
    function, quantities = SAMPLERS[fault]
    function, _ = fit("test", "mlm_head", function, "sampler")

    def without_targets(*, disallow_correct=False, **args):
        if disallow_correct:
            raise NotImplementedError
        return function(**args)

    assert quantities <= wrong(sampler_properties(without_targets, **FEWER))


def rows(op, function, adapter=None, supports=None):
    """Return the report's rows about the distribution of a function, by property."""
    subject = Subject("test", op, function, adapter, supports, (), 0, "cpu", None)
    (task,) = [task for task in subject.tasks() if task.example == "distribution"]
    return {row.quantity: row for row in task.rows()}


def test_what_a_function_does_not_support_is_not_judged():
    own = {"random": "own"}
    sampled = rows("mlm_head", lambda logits, temperature: logits.argmax(-1), "sampler")
    assert sampled["disallow_correct: the target"].verdict == UNSUPPORTED
    assert sampled["flat logits"].verdict == WRONG and sampled["flat logits"].ratio > 1
    found = rows("add_norm", F.dropout, "dropout", {"gradients": ("x",)})
    assert {name for name, row in found.items() if row.verdict == UNSUPPORTED} == {
        f"gradient of {name}" for name in ("residual", "weight", "bias")
    }
    assert found["kept share"].verdict == RIGHT and found["kept share"].budget == 4
    only_bfloat16 = rows("attention", F.scaled_dot_product_attention, "sdpa", {"dtypes": (torch.bfloat16,)})
    assert {row.verdict for row in only_bfloat16.values()} == {RIGHT, UNSUPPORTED}
    assert next(iter(rows("attention", lambda q, k, v: q, None, own).values())).why == "dropout"


def test_an_error_of_the_function_is_a_row_of_the_report():
    def refuses(x, table, bias, targets, weights, *, temperature=1.0):
        if temperature != 1:
            raise ValueError("no temperature")
        return baseline.mlm_head(x, table, bias, targets, weights, None)

    (found,) = distribution_rows(lambda **args: 1 / 0, "embed", {}, "cpu")
    assert found.verdict == RAISED and "raised ZeroDivisionError: division by zero" in found.why
    function, _ = fit("test", "mlm_head", refuses, None, {"random": "own"})
    judged = {j.quantity: j for j in sampler_properties(function, **FEWER)}
    assert "raised ValueError: no temperature" in judged["temperature 2"].why
    assert not judged["peaked logits"].why and not judged["tail behind a gap of 12"].why
