"""The objectives of benchmarks/learning/objectives.py, compared with their definitions in plain PyTorch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks.learning import objectives, variants, variants_report
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.modules import Layout
from electra_fast.ops import FUSED
from electra_fast.train.recipe import Recipe

SIZES = {"layers": 1, "hidden": 32, "heads": 1, "ffn": 64, "embedding": 16, "vocab_size": 200}
SIZES |= {"generator_layers": 1, "generator_hidden": 32, "generator_heads": 1, "generator_ffn": 64}
CONFIG = ElectraConfig(**SIZES, dropout=0.0, initializer=0.3, mask_prob=0.4)
RNG = torch.tensor([3, 4])
KEY_MASK = torch.arange(20) < torch.tensor([[20], [11], [7]])
IDS = torch.randint(104, 200, (3, 20), generator=torch.Generator().manual_seed(0)).masked_fill(~KEY_MASK, 0)


def model_of(make_model, ops=FUSED):
    torch.manual_seed(0)
    return make_model(CONFIG, ops)


def replaced(model):
    """Return the masks, the text with samples, and the hidden states of the encoder that reads it."""
    masked = model.mask(IDS, RNG, Layout(KEY_MASK))
    samples = model.generator.propose(IDS, masked, Layout(KEY_MASK), type_ids=None, rng=RNG).samples
    corrupt = model.ops.replace_tokens(IDS, masked.positions, samples, masked.weights).ids
    return masked, corrupt, model.discriminator.encoder(corrupt, Layout(KEY_MASK))


@pytest.mark.parametrize("name", objectives.MODELS)
def test_every_objective_trains_all_that_it_has(name):
    make_model, ops = objectives.MODELS[name]
    model = model_of(make_model, ops)
    out = model(IDS, key_mask=KEY_MASK, rng=RNG)
    out.loss.backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    allowed = ("discriminator.head.", "types") if name in ("replace", "all tokens") else ("types",)
    assert not [n for n in unused if not any(part in n for part in allowed)]
    assert out.loss.isfinite() and out.masked > 0


def test_replace_mlm_predicts_the_masked_tokens_from_the_samples():
    model = model_of(objectives.ReplaceMLM)
    masked, corrupt, x = replaced(model)
    assert (corrupt != IDS).any()
    chosen = masked.positions[masked.weights > 0]
    logits = model.head.logits(x.flatten(0, 1)[chosen], model.discriminator.encoder.embedding.words)
    wanted = F.cross_entropy(logits, IDS.flatten()[chosen])
    torch.testing.assert_close(model(IDS, key_mask=KEY_MASK, rng=RNG).rtd_loss, wanted)


def test_all_tokens_mlm_may_copy_what_it_reads():
    model = model_of(objectives.AllTokensMLM)
    _, corrupt, x = replaced(model)
    words = model.discriminator.encoder.embedding.words
    p = model.head.logits(x, words).softmax(-1).gather(-1, IDS[..., None])[..., 0]
    copy = model.copy(x)[..., 0].sigmoid()
    wanted = -(copy * (corrupt == IDS) + (1 - copy) * p).log()[KEY_MASK].mean()
    torch.testing.assert_close(model(IDS, key_mask=KEY_MASK, rng=RNG).rtd_loss, wanted)


def test_masked_only_asks_the_discriminator_about_masked_tokens():
    model = model_of(objectives.MaskedOnly)
    masked, corrupt, x = replaced(model)
    chosen = masked.positions[masked.weights > 0]
    logits = model.discriminator.head(x).flatten()[chosen]
    wanted = F.binary_cross_entropy_with_logits(logits, (corrupt != IDS).float().flatten()[chosen])
    torch.testing.assert_close(model(IDS, key_mask=KEY_MASK, rng=RNG).rtd_loss, wanted)


def test_a_unigram_generator_samples_by_its_biases():
    model = model_of(objectives.unigram)
    with torch.no_grad():
        model.generator.bias[150] = 1.0
    masked = model.mask(IDS, RNG, Layout(KEY_MASK))
    proposal = model.generator.propose(IDS, masked, Layout(KEY_MASK), type_ids=None, rng=RNG)
    assert (proposal.samples[masked.weights > 0] == 150).all()
    targets = IDS.flatten()[masked.positions][masked.weights > 0]
    wanted = F.cross_entropy(30 * model.generator.bias.expand(len(targets), -1), targets)
    torch.testing.assert_close(proposal.loss, wanted)


def test_the_generator_alone_is_that_of_electra():
    both, alone = (model_of(make) for make in (Electra, objectives.GeneratorOnly))
    alone.generator.load_state_dict(both.generator.state_dict())
    a, b = (model(IDS, key_mask=KEY_MASK, rng=RNG) for model in (both, alone))
    assert torch.equal(a.mlm_loss, b.loss)


def test_packed_batches_give_what_padded_ones_give():
    lengths = KEY_MASK.sum(1)
    packed = {"cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(), "max_seqlen": 20}
    config = dataclasses.replace(CONFIG, mask_prob=1.0, keep_prob=0.0)  # the same masks in both
    for make_model in (objectives.MaskedLM, objectives.GeneratorOnly):
        torch.manual_seed(0)
        model = make_model(config, FUSED)
        a = model(IDS, key_mask=KEY_MASK, rng=RNG).loss
        torch.testing.assert_close(a, model(IDS[KEY_MASK], rng=RNG, **packed).loss)


@pytest.mark.parametrize("name", variants.EXPERIMENTS)
def test_variants_have_the_same_tokens_and_one_difference(name):
    experiment = variants.EXPERIMENTS[name]
    recipes = [
        variants.recipe(experiment, each, ("text",)).resolved() for each in experiment.variants.values()
    ]
    assert len({recipe.steps * recipe.batch_tokens for recipe in recipes}) == 1
    assert len(set(recipes)) == len(recipes)  # each is another run
    assert all(isinstance(recipe, Recipe) and recipe.model(300, {}) for recipe in recipes)


def test_a_collapse_is_found_where_the_answers_differ_least():
    curve = [{"step": step, "logit_std": std} for step, std in enumerate((0.5, 0.2, 0.002, 0.08))]
    assert variants_report.lowest(curve)["step"] == 2


def test_a_unigram_generator_reaches_the_frequencies():
    model = model_of(objectives.unigram)
    frequencies = 1.0 / torch.arange(1, 201)
    frequencies /= frequencies.sum()
    optimizer = torch.optim.Adam(model.generator.parameters(), lr=1e-3, betas=(0.9, 0.98))
    masked = model.mask(IDS, RNG, Layout(KEY_MASK))
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.multinomial(frequencies, len(masked.targets), True, generator=generator)
        batch = masked._replace(targets=targets, weights=torch.ones(len(targets)))
        optimizer.zero_grad()
        model.generator.propose(IDS, batch, Layout(KEY_MASK), type_ids=None, rng=RNG).loss.backward()
        optimizer.step()
    logits = objectives.UnigramGenerator.SCALE * model.generator.bias
    entropy = -(frequencies * frequencies.log()).sum()
    assert -(frequencies * logits.log_softmax(0)).sum() < entropy + 0.15
