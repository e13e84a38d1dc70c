"""The model: its sizes, the results of a step, randomness, learning, and errors for bad inputs."""

import dataclasses

import pytest
import torch
from towers import CONFIG, assert_all_equal, padded

from electra_fast.config import ElectraConfig
from electra_fast.model import Discriminator, Electra, Generator
from electra_fast.ops import FUSED, REFERENCE, Ops

PLAIN = dataclasses.replace(CONFIG, dropout=0.0)
RNG = torch.tensor([11, 3])


def spy(calls, ops=FUSED):
    """Return `ops`, but each call appends (name, keywords, result) to `calls`."""

    def watch(name, op):
        def watched(*args, **kwargs):
            result = op(*args, **kwargs)
            calls.append((name, kwargs, result))
            return result

        return watched

    return Ops(*(watch(name, op) for name, op in ops._asdict().items()))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


# --- sizes ---


@pytest.mark.parametrize(
    ("preset", "discriminator", "generator", "union"),
    [
        ("small", 13_549_057, 4_620_026, 14_196_219),
        ("base", 109_483_009, 33_740_602, 119_386_427),
        ("large", 335_142_913, 51_295_290, 354_655_291),
    ],
)
def test_presets_have_the_papers_number_of_parameters(preset, discriminator, generator, union):
    with torch.device("meta"):
        model = Electra(getattr(ElectraConfig, preset)())
    for part, expected in (
        (model.discriminator, discriminator),
        (model.generator, generator),
        (model, union),
    ):
        assert sum(p.numel() for p in part.parameters()) == expected


# --- what one step computes ---


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["dropout", "plain"])
def test_fused_ops_give_what_the_reference_gives(config):
    calls, expected_calls = [], []
    model = Electra(config, spy(calls))
    reference = Electra(config, spy(expected_calls, REFERENCE))
    reference.load_state_dict(model.state_dict())
    ids, key_mask = padded(24, 9, 2, 17)

    output = model(ids, key_mask=key_mask, rng=RNG)
    expected = reference(ids, key_mask=key_mask, rng=RNG)
    for name, result, wanted in zip(output._fields, output, expected, strict=True):
        torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5, msg=name)
    for (name, _, result), (_, _, wanted) in zip(calls, expected_calls, strict=True):
        if name in ("mask_tokens", "replace_tokens"):  # integers: equal to the bit
            assert_all_equal(result, wanted)

    output.loss.backward()
    expected.loss.backward()
    for (name, a), b in zip(gradients(model).items(), gradients(reference).values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=name)


def test_output_is_the_weighted_sum_and_its_counts():
    calls = []
    config = dataclasses.replace(CONFIG, mlm_weight=2.0, rtd_weight=7.0)
    ids, key_mask = padded(24, 9, 2)
    output = Electra(config, spy(calls))(ids, key_mask=key_mask, rng=RNG)
    results = {name: result for name, _, result in calls}

    assert torch.equal(output.loss, 2 * output.mlm_loss + 7 * output.rtd_loss)
    assert output.masked == 4 + 1  # 15 % of 24 and of 9; the third has only special tokens
    assert output.mlm_correct <= output.masked
    assert output.rtd_counts.sum() == key_mask.sum()
    replaced = results["replace_tokens"].replaced
    assert output.rtd_counts[0] + output.rtd_counts[2] == replaced.sum()
    assert not output.mlm_correct.requires_grad and not output.rtd_counts.requires_grad


def test_special_tokens_and_padding_are_neither_masked_nor_replaced():
    calls = []
    config = dataclasses.replace(CONFIG, mask_prob=1.0, keep_prob=0.0)
    ids, key_mask = padded(24, 9)
    ids[0, 5] = config.mask_id
    Electra(config, spy(calls))(ids, key_mask=key_mask, rng=RNG)
    results = {name: result for name, _, result in calls}

    ordinary = ids >= 104
    masked, corrupt = results["mask_tokens"], results["replace_tokens"]
    assert torch.equal(masked.ids == config.mask_id, ordinary | (ids == config.mask_id))
    assert torch.equal(corrupt.ids[~ordinary], ids[~ordinary])
    assert torch.equal(corrupt.replaced, corrupt.ids != ids)


def test_nothing_to_mask_gives_loss_zero_and_no_nan():
    model = Electra(CONFIG)
    ids, key_mask = padded(0, 0)
    output = model(ids, key_mask=key_mask, rng=RNG)
    output.loss.backward()
    assert output.loss == 0 and output.masked == 0
    assert all(g is None or not g.any() for g in gradients(model).values())


def test_packed_sequences_give_the_logits_of_padded_ones():
    ids, key_mask = padded(24, 2, 13)
    packed = {"cu_seqlens": torch.tensor([0, 24, 26, 39], dtype=torch.int32), "max_seqlen": 24}
    for model in (Discriminator(CONFIG).eval(), Generator(CONFIG).eval()):
        expected = model(ids, key_mask=key_mask)[key_mask]
        torch.testing.assert_close(model(ids[key_mask], **packed), expected, atol=1e-5, rtol=1e-5)

    output = Electra(CONFIG)(ids[key_mask], **packed, rng=RNG)
    assert output.rtd_counts.sum() == 39 and output.loss.isfinite()


def test_int32_ids_give_what_int64_ids_give():
    model = Electra(CONFIG)
    ids, key_mask = padded(24, 9)
    output = model(ids, key_mask=key_mask, rng=RNG)
    assert_all_equal(output, model(ids.int(), key_mask=key_mask, rng=RNG))


def test_autocast_keeps_losses_in_float32():
    model = Electra(CONFIG)
    ids, key_mask = padded(24, 9)
    expected = model(ids, key_mask=key_mask, rng=RNG)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, key_mask=key_mask, rng=RNG)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.05, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())


# --- randomness ---


def test_rng_decides_everything():
    model = Electra(CONFIG)
    ids, key_mask = padded(24, 9)

    def step(seed, number):
        return model(ids, key_mask=key_mask, rng=torch.tensor([seed, number]))

    first = step(1, 0)
    assert_all_equal(first, step(1, 0))
    assert first.loss != step(1, 1).loss and first.loss != step(2, 0).loss


def test_without_rng_manual_seed_decides():
    model = Electra(CONFIG)
    ids, key_mask = padded(24, 9)
    torch.manual_seed(5)
    first, second = (model(ids, key_mask=key_mask) for _ in range(2))
    torch.manual_seed(5)
    assert_all_equal(first, model(ids, key_mask=key_mask))
    assert first.loss != second.loss


def test_rng_may_be_advanced_before_backward():
    model = Electra(CONFIG)
    ids, key_mask = padded(24, 9)
    expected = []
    for advance in (0, 1):
        rng = RNG.clone()
        loss = model(ids, key_mask=key_mask, rng=rng).loss
        rng[1] += advance
        expected.append(torch.autograd.grad(loss, list(model.parameters())))
    assert_all_equal(*expected)


def test_each_use_of_dropout_has_its_own_stream():
    calls = []
    Electra(CONFIG, spy(calls))(padded(24)[0], rng=RNG)
    streams = [keywords["stream"] for _, keywords, _ in calls if keywords.get("dropout")]
    assert streams == list(range(2, 2 + 4 + 7))  # the generator has one layer, the discriminator two

    calls.clear()
    Discriminator(CONFIG, spy(calls))(padded(24)[0], rng=RNG)
    of_discriminator = [keywords["stream"] for _, keywords, _ in calls if keywords.get("dropout")]
    assert of_discriminator == streams[4:]


# --- training ---


def test_learns_a_batch():
    torch.manual_seed(0)
    model = Electra(CONFIG)
    ids, key_mask = padded(*[24] * 12, 9, 17, 20, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    outputs = []
    for step in range(30):
        output = model(ids, key_mask=key_mask, rng=torch.tensor([0, step]))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        outputs.append(torch.stack([output.mlm_loss, output.rtd_loss]).detach())
    before, after = torch.stack(outputs[:3]).mean(0), torch.stack(outputs[-3:]).mean(0)
    assert after[0] < before[0] - 0.3  # of ln 300 = 5.7
    assert after[1] < before[1] - 0.1  # of ln 2 = 0.69


# Dynamo creates an instance of the autograd.Function, and PyTorch warns about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph():
    model = Electra(CONFIG)
    ids, key_mask = padded(24, 9)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        output = run(ids, key_mask=key_mask, rng=RNG)
        model.zero_grad()
        output.loss.backward()
        results.append((*output, *gradients(model).values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- bad inputs ---


def test_bad_inputs_are_named():
    model = Electra(CONFIG)
    ids, key_mask = padded(24, 9)
    for bad in (ids.float(), ids.bool(), ids.byte()):
        with pytest.raises(TypeError, match="ids must be int64 or int32"):
            model(bad)
    with pytest.raises(TypeError, match="key_mask must be bool"):
        model(ids, key_mask=key_mask.long())
    with pytest.raises(ValueError, match="ids must have shape"):
        model(ids[0])
    with pytest.raises(ValueError, match="at most 40 positions"):
        model(padded(41, L=41)[0])
    with pytest.raises(IndexError, match=r"ids must be in \[0, 300\)"):
        model(ids.masked_fill(ids == 102, 300))
    with pytest.raises(TypeError, match="rng must be int64"):
        model(ids, rng=RNG.float())
