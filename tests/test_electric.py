"""Electric's objective: its loss in plain PyTorch, which tokens are noise, all combinations of settings."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from test_model import spy
from towers import CONFIG, assert_all_equal, padded

from electra_fast.config import GENERATORS, OBJECTIVES, SHARING, ElectraConfig
from electra_fast.electric import log_odds
from electra_fast.model import Electra
from electra_fast.modules import Layout
from electra_fast.philox import coins, uniforms
from electra_fast.train.evaluation import area_under_curve, evaluate, recorded

EQUAL = {"generator_layers": 2, "generator_hidden": 32, "generator_heads": 2, "generator_ffn": 64}
RNG = torch.tensor([11, 3])
STEPS = 120  # of training
BOUNDS = torch.tensor([0, 24, 33, 50], dtype=torch.int32)


def electric(generator, **change):
    """Return a model with weights so large that all probabilities differ."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, objective="electric", generator=generator, **change)
    model = Electra(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch():
    torch.manual_seed(1)
    return padded(24, 9, 17)


# --- the loss ---


def plain_loss(model, ids, key_mask):
    """Return the loss from whole softmaxes and `binary_cross_entropy_with_logits`.

    The masked positions, the coins and the samples are those of the model: they are tested elsewhere.
    """
    config, kind = model.config, model.config.generator_kind
    layout, V = Layout(key_mask), model.config.vocab_size
    masked = model.mask(ids, RNG, layout)
    samples = model.generator.propose(ids, masked, layout, type_ids=None, rng=RNG).samples
    used = masked.weights > 0
    ordinary = (ids >= 104).flatten()

    if kind == "uniform":
        log_probs = torch.full((ids.numel(), V), -math.log(V), dtype=torch.float64)
    else:
        text = masked.ids if kind == "masked" else ids
        log_probs = model.generator(text, key_mask=key_mask).flatten(0, 1).log_softmax(-1)
    predicted = masked.positions[used] if kind == "masked" else torch.where(ordinary)[0]
    cloze = -log_probs[predicted, ids.flatten()[predicted]].mean()

    share = 0.5 if kind == "masked" else config.mask_prob
    noise = coins(RNG, len(samples), share)[used if kind == "masked" else ordinary]
    chosen, odds = predicted[noise], math.log(share / (1 - share))
    noised = ids.flatten().scatter(0, chosen, samples[used if kind == "masked" else ordinary][noise])
    is_noise = torch.isin(torch.arange(len(noised)), chosen)
    energies = model.discriminator(noised.view_as(ids), key_mask=key_mask).flatten()
    log_q = log_probs.detach().gather(1, noised[:, None])[:, 0]
    logits = (energies + log_q + odds)[predicted]
    nce = F.binary_cross_entropy_with_logits(logits, is_noise[predicted].double())
    return config.mlm_weight * cloze + config.rtd_weight * nce, cloze, nce


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_loss_and_its_gradients_are_those_of_plain_pytorch(generator):
    model = electric(generator, dropout=0.0, mlm_weight=2.0, rtd_weight=3.0).double()
    ids, key_mask = batch()
    out = model(ids, key_mask=key_mask, rng=RNG)
    wanted = plain_loss(model, ids, key_mask)
    for found, exact in zip(out[:3], wanted, strict=True):  # log q is float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (out.loss, wanted[0])]
    for found, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_noise_is_noise_even_if_it_equals_the_original_token():
    calls, texts = [], []
    model = electric("two_tower")
    model.ops = spy(calls)
    model.discriminator.register_forward_pre_hook(lambda _, args: texts.append(args[0]))
    ids, key_mask = batch()
    ids = ids.masked_fill(ids >= 104, 200)
    with torch.no_grad():
        model.generator.head.bias[200] = 1000.0
    model(ids, key_mask=key_mask, rng=RNG)
    assert torch.equal(texts[0], ids)
    tp, _, fn, _ = dict((name, result) for name, _, result in calls)["nce_loss"].counts.tolist()
    assert tp + fn == coins(RNG, ids.numel(), 0.15)[(ids == 200).flatten()].sum() > 0


@pytest.mark.parametrize("generator", ["two_tower", "uniform"])
def test_the_number_of_noise_tokens_says_nothing_about_a_token(generator):
    """It is binomial: with a fixed number, a discriminator could count."""
    model = electric(generator, mask_prob=0.25)
    ids = padded(*[24] * 400)[0]
    texts = []
    model.discriminator.register_forward_pre_hook(lambda _, args: texts.append(args[0]))
    model(ids, rng=RNG)
    numbers = coins(RNG, ids.numel(), 0.25).view_as(ids)[:, 1:-1].sum(1).double()
    changed = texts[0] != ids
    assert not changed[:, 0].any() and not changed[:, -1].any() and (changed.sum(1) <= numbers).all()
    assert abs(numbers.mean() - 22 * 0.25) < 0.5 and abs(numbers.var() - 22 * 0.25 * 0.75) < 1.2


def test_with_masks_half_of_the_slots_are_noise_and_only_slots_count():
    model = electric("masked", mask_prob=0.5)
    ids, key_mask = batch()
    counts = torch.zeros(4)
    for step in range(40):
        out = model(ids, key_mask=key_mask, rng=torch.tensor([0, step]))
        assert out.rtd_counts.sum() == out.masked == 12 + 5 + 9
        counts += out.rtd_counts
    assert 0.45 < (counts[0] + counts[2]) / counts.sum() < 0.55  # of 1040: three standard deviations
    assert log_odds(model.config) == 0


def test_coins_are_fair_and_independent_of_the_samples():
    n = 10_000
    tails, u = coins(RNG, n, 0.5), uniforms(RNG, n)
    assert torch.equal(tails, coins(RNG.clone(), n, 0.5)) and not torch.equal(tails, coins(RNG + 1, n, 0.5))
    assert torch.equal(tails[:10], coins(RNG, 10, 0.5))
    assert not coins(RNG, n, 0.0).any() and coins(RNG, n, 1.0).all()
    assert abs(coins(RNG, n, 0.15).double().mean() - 0.15) < 0.015
    assert abs(tails.double().mean() - 0.5) < 0.02  # four standard deviations
    assert (
        abs((u * tails).mean() - 0.25) < 0.015 and abs((tails[1:] & tails[:-1]).double().mean() - 0.25) < 0.02
    )


def test_a_masked_generator_sees_no_token_whose_probability_it_gives():
    """With `keep_prob` it would copy the tokens that it sees."""
    ids, key_mask = batch()
    for objective, kept in (("electra", 8), ("electric", 0)):
        config = dataclasses.replace(CONFIG, objective=objective, generator="masked", keep_prob=1.0)
        masked = Electra(config).mask(ids, RNG, Layout(key_mask))
        assert (masked.ids.flatten()[masked.positions] != config.mask_id)[masked.weights > 0].sum() == kept


@pytest.mark.parametrize("generator", GENERATORS)
def test_energies_become_negative_log_probabilities(generator):
    """The tokens are independent, so the probability of one does not depend on the others."""
    torch.manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    sizes = {"embedding": 8, "layers": 1, "hidden": 16, "heads": 1, "ffn": 16, "max_positions": 32}
    sizes |= {f"generator_{name}": sizes[name] for name in ("layers", "hidden", "heads", "ffn")}
    ids = {"vocab_size": 8, "pad_id": 0, "cls_id": 1, "sep_id": 2, "mask_id": 3}
    rates = {"dropout": 0.0, "mask_prob": 0.3, "rtd_weight": 1.0}
    model = Electra(ElectraConfig(**sizes, **ids, **rates, objective="electric", generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)

    def text(sequences):
        return 4 + torch.multinomial(p, sequences * 32, replacement=True).view(sequences, 32)

    for step in range(STEPS):
        optimizer.zero_grad()
        model(text(16), rng=torch.tensor([0, step])).loss.backward()
        optimizer.step()
        schedule.step()
    seen = []
    model.discriminator.register_forward_hook(lambda _, args, energies: seen.append((args[0], energies)))
    model(text(200), rng=RNG)  # with noise, as in training
    (noised, energies) = seen[0]
    found = torch.stack([energies[noised == 4 + i].mean() for i in range(4)]).detach()
    torch.testing.assert_close(found, -p.log(), atol=0.3, rtol=0)


# --- the uniform generator ---


def test_uniform_samples_are_uniform_and_have_no_parameters():
    config = dataclasses.replace(CONFIG, generator="uniform", mask_prob=1.0, vocab_size=304)
    ids = padded(*[40] * 200, L=40)[0]
    for disallow in (False, True):
        model = Electra(dataclasses.replace(config, disallow_correct=disallow))
        masked = model.mask(ids, RNG)
        assert not list(model.generator.parameters()) and masked.weights.sum() == 200 * 38
        found = model.generator.propose(ids, masked, Layout(), type_ids=None, rng=RNG)
        assert found.samples.dtype == ids.dtype and 0 <= found.samples.min() and found.samples.max() == 303
        used = found.weights > 0
        counts = torch.bincount(found.samples[used], minlength=304)
        expected = used.sum() / 304
        assert ((counts - expected) ** 2 / expected).sum() < 303 + 5 * math.sqrt(2 * 303)  # chi-square
        equal = (found.samples == ids.flatten())[used].sum()
        assert (equal == 0) == disallow
    out = model(ids, rng=RNG)
    assert out.mlm_loss == pytest.approx(math.log(304)) and not out.mlm_loss.requires_grad
    assert torch.equal(out.loss, out.mlm_loss + 50 * out.rtd_loss)


@pytest.mark.parametrize("generator", GENERATORS)
def test_padding_may_have_any_id(generator):
    model = electric(generator)
    ids, key_mask = batch()
    first, second = (model(x, key_mask=key_mask, rng=RNG) for x in (ids, ids.masked_fill(~key_mask, 250)))
    assert_all_equal(first, second)


# --- every combination ---


def combinations():
    for objective in OBJECTIVES:
        for generator in GENERATORS:
            for sharing in SHARING:
                refused = generator == "two_tower" and sharing == "all"
                refused = refused or (generator == "uniform" and sharing in ("gdes", "all"))
                if not refused:
                    yield objective, generator, sharing


@pytest.mark.parametrize(("objective", "generator", "sharing"), list(combinations()))
def test_each_parameter_gets_a_finite_gradient(objective, generator, sharing):
    """Several processes add all gradients, so none may be None; also in a packed batch and in bf16."""
    config = dataclasses.replace(CONFIG, **EQUAL, objective=objective, generator=generator, sharing=sharing)
    model = Electra(config)
    ids, key_mask = batch()
    first = model(ids, key_mask=key_mask, rng=RNG)
    assert_all_equal(first, model(ids.int(), key_mask=key_mask, rng=RNG))
    with torch.autocast("cpu", torch.bfloat16):
        second = model(ids[key_mask], cu_seqlens=BOUNDS, max_seqlen=24, rng=RNG)
    for out in (first, second):
        model.zero_grad()
        out.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert out.loss.dtype == torch.float32 and not out.rtd_counts.requires_grad
        assert torch.equal(out.loss, out.mlm_loss + 50 * out.rtd_loss)
    other = Electra(config)
    other.load_state_dict(model.state_dict())
    assert_all_equal(first, other(ids, key_mask=key_mask, rng=RNG))


def test_text_without_a_candidate_gives_loss_zero():
    for generator in ("masked", "two_tower"):
        ids, key_mask = padded(2, 0)
        out = electric(generator)(ids, key_mask=key_mask, rng=RNG)
        out.loss.backward()
        assert out.loss == 0 and out.masked == 0


def test_the_vocabulary_can_be_resized():
    for generator in GENERATORS:
        model = electric(generator)
        model.resize_token_embeddings(310)
        ids, key_mask = batch()
        model(ids + 10 * (ids == 299), key_mask=key_mask, rng=RNG).loss.backward()
        assert model.generator.config.vocab_size == 310


# --- static shapes ---


@pytest.mark.parametrize("generator", GENERATORS)
def test_no_value_is_read_and_no_shape_depends_on_one(generator):
    """Tensors on the device "meta" have no values, and take the path of a GPU."""
    config = dataclasses.replace(CONFIG, objective="electric", generator=generator)
    with torch.device("meta"):
        model, rng = Electra(config), torch.empty(2, dtype=torch.int64)
        ids, key_mask = torch.empty(3, 24, dtype=torch.int64), torch.empty(3, 24, dtype=torch.bool)
        bounds = torch.empty(4, dtype=torch.int32)
        model(ids, key_mask=key_mask, rng=rng).loss.backward()
        model(ids.flatten(), cu_seqlens=bounds, max_seqlen=24, rng=rng).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# Dynamo creates an instance of the autograd.Function, and PyTorch warns about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("generator", GENERATORS)
def test_it_compiles_into_one_graph(generator, packed):
    torch._dynamo.reset()
    model = electric(generator)
    ids, key_mask = batch()
    args = {"ids": ids, "key_mask": key_mask, "rng": RNG}
    if packed:
        args = {"ids": ids[key_mask], "cu_seqlens": BOUNDS, "max_seqlen": 24, "rng": RNG}
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = run(**args)
        model.zero_grad()
        out.loss.backward()
        results.append((*out, *(p.grad for p in model.parameters())))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# --- evaluation ---


def test_an_evaluation_is_about_noise_and_energies():
    model = electric("two_tower", dropout=0.0)
    ids, key_mask = batch()
    model.eval()
    with torch.no_grad(), recorded(model) as seen:
        out = model(ids, key_mask=key_mask, rng=torch.tensor([2**62, 0]))
    (judged,) = seen
    real = judged.weights > 0
    assert real.sum() == (ids >= 104).sum()
    loss = F.binary_cross_entropy_with_logits(judged.logits()[real], judged.replaced[real].float())
    torch.testing.assert_close(out.rtd_loss, loss)
    second = evaluate(model, [{"ids": ids, "key_mask": key_mask}])
    assert second["replaced"] == pytest.approx(judged.replaced[real].double().mean().item())
    energies = judged.output[real].double()
    assert second["logit_std"] == pytest.approx(energies.std(correction=0).item(), rel=1e-6)
    assert second["auc"] == area_under_curve(judged.logits(), judged.replaced, judged.weights)
