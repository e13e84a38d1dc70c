"""The two-tower generator: its definition in plain PyTorch, what each state sees, log q, and its files."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from towers import CONFIG, padded

from electra_fast.model import Electra, Generator, TwoTowerGenerator
from electra_fast.modules import Layout
from electra_fast.two_tower import neighbours

PLAIN = dataclasses.replace(CONFIG, dropout=0.0, generator_layers=2, generator_heads=2)
W = PLAIN.generator_hidden
RNG = torch.tensor([11, 3])
LENGTHS = (24, 2, 13)
BOUNDS = torch.tensor([0, 24, 26, 39], dtype=torch.int32)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    half = TwoTowerGenerator(PLAIN).double()
    for parameter in half.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return half


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return padded(*LENGTHS)


def states(generator, ids, layout):
    return generator.encoder(ids, layout)[0]


def packed(ids, key_mask):
    return ids[key_mask], Layout(None, BOUNDS, 24)


# --- the definition ---


def plain_layer(layer, x, visible):
    """Return a post-LayerNorm layer of one sequence ``[L, W]``; `visible` is bool ``[L, L]``."""
    attention, feed_forward = layer.attention, layer.feed_forward
    qkv = F.linear(x, attention.qkv.weight, attention.qkv.bias)
    q, k, v = (y.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for y in qkv.chunk(3, dim=-1))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    context = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    x = attention.norm(torch.zeros_like(x), x + F.linear(context, attention.out.weight, attention.out.bias))
    h = F.gelu(F.linear(x, feed_forward.dense_in.weight, feed_forward.dense_in.bias))
    return feed_forward.norm(torch.zeros_like(x), x + F.linear(h, *feed_forward.dense_out.parameters()))


def plain_states(encoder, ids):
    """Return the states of one sequence without padding, ``[L, 2 W]``."""
    x = F.embedding(ids, encoder.embedding.words) + encoder.embedding.positions[: len(ids)]
    norm = encoder.embedding.norm
    x = F.layer_norm(x + encoder.embedding.types[0], x.shape[-1:], norm.weight, norm.bias, norm.eps)
    x = F.linear(x, encoder.project.weight, encoder.project.bias)
    earlier = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    before, after = x, x
    for layer in encoder.layers:
        before = plain_layer(layer, before, earlier)
    for layer in encoder.reversed_layers:
        after = plain_layer(layer, after, earlier.T)
    nothing = torch.zeros_like(x[:1])
    return torch.cat([torch.cat([nothing, before[:-1]]), torch.cat([after[1:], nothing])], dim=1)


def test_padded_and_packed_states_are_those_of_each_sequence_alone(generator, batch):
    ids, key_mask = batch
    wanted = torch.cat([plain_states(generator.encoder, x[m]) for x, m in zip(ids, key_mask, strict=True)])
    found = states(generator, ids, Layout(key_mask))[key_mask]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states(generator, *packed(*batch)), wanted, rtol=1e-9, atol=1e-9)


# --- what a state sees ---


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_state_does_not_depend_on_its_token_nor_on_another_sequence(generator, batch, layout, mode):
    """Compared by bits, also in inference, where other layers are one operator that is not causal."""
    half = generator if mode == "training" else TwoTowerGenerator(PLAIN).eval()
    ids, key_mask = batch
    ids, layout = packed(ids, key_mask) if layout == "packed" else (ids, Layout(key_mask))
    flat = ids.flatten()
    real = torch.arange(len(flat)) if layout.key_mask is None else torch.where(key_mask.flatten())[0]
    sequence = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))  # of each real token
    with torch.set_grad_enabled(mode == "training"):
        first = states(half, ids, layout).flatten(0, -2)[real]
        for t in (0, 7, 23, 24, 30, 38):  # among them the first and last tokens of sequences
            changed = flat.clone()
            changed[real[t]] = 299 - changed[real[t]] % 100
            second = states(half, changed.view_as(ids), layout).flatten(0, -2)[real]
            differs = first != second
            position = torch.arange(len(real))
            inside = sequence == sequence[t]
            assert torch.equal(differs[:, :W].any(1), inside & (position > t))
            assert torch.equal(differs[:, W:].any(1), inside & (position < t))


def test_padding_is_not_a_neighbour(generator, batch):
    ids, key_mask = batch
    first = states(generator, ids, Layout(key_mask))
    second = states(generator, ids.masked_fill(~key_mask, 250), Layout(key_mask))
    assert torch.equal(first[key_mask], second[key_mask])
    assert not first[1, 0, :W].any() and not first[1, 1, W:].any()
    before, after = neighbours(ids[:1], Layout())
    assert before.sum() == after.sum() == 23 and not before[0, 0] and not after[0, -1]


# --- log q ---


def proposal(half, ids, key_mask, **options):
    model_config = dataclasses.replace(PLAIN, generator="two_tower", **options)
    masked = Electra(model_config).mask(ids, RNG, Layout(key_mask))
    return masked, half.propose(ids, masked, Layout(key_mask), type_ids=None, rng=RNG)


def test_log_q_is_the_log_softmax_of_the_logits_at_any_token(generator, batch):
    ids, key_mask = batch
    masked, found = proposal(generator, ids, key_mask)
    log_probs = generator(ids, key_mask=key_mask).log_softmax(-1).flatten(0, 1)
    real = (ids >= 104).flatten()
    for tokens in (ids.flatten(), torch.randint(300, ids.shape).flatten()):
        wanted = log_probs.gather(1, tokens[:, None])[:, 0]
        log_q = generator.log_q(found, tokens)
        assert log_q.dtype == torch.float32 and not log_q.requires_grad
        torch.testing.assert_close(log_q[real], wanted[real].float(), rtol=1e-6, atol=1e-6)
    loss = -log_probs.gather(1, ids.flatten()[:, None])[:, 0][real].mean()
    torch.testing.assert_close(found.loss, loss)
    correct = log_probs.argmax(1) == ids.flatten()
    assert found.correct == correct[real].sum() and torch.equal(found.weights, real.float())
    assert len(found.samples) == ids.numel() and len(masked.positions) < ids.numel()


def test_under_autocast_log_q_is_that_of_the_rounded_factors(batch):
    ids, key_mask = batch
    half = TwoTowerGenerator(PLAIN)
    for parameter in half.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = proposal(half, ids, key_mask)
        log_q = half.log_q(found, ids.flatten())
    states, table = found.states.bfloat16().double(), half.encoder.embedding.words.bfloat16().double()
    wanted = (states @ table.T + half.head.bias).log_softmax(-1).gather(1, ids.flatten()[:, None])[:, 0]
    real = (ids >= 104).flatten()
    torch.testing.assert_close(log_q[real], wanted[real].float(), rtol=1e-5, atol=1e-5)


# --- dropout ---


def test_each_use_of_dropout_has_its_own_stream():
    from test_model import spy

    calls = []
    config = dataclasses.replace(CONFIG, generator="two_tower")
    Electra(config, spy(calls))(padded(24)[0], rng=RNG)
    streams = [keywords["stream"] for _, keywords, _ in calls if keywords.get("dropout")]
    assert sorted(streams) == list(
        range(2, 2 + 1 + 3 + 3 + 7)
    )  # one layer per direction, two in the discriminator


# --- files ---


def test_a_folder_is_read_by_this_class_only(generator, batch, tmp_path):
    generator.save_pretrained(tmp_path)
    again = TwoTowerGenerator.from_pretrained(tmp_path)
    ids, key_mask = batch
    with torch.no_grad():
        assert torch.equal(again(ids, key_mask=key_mask), generator(ids, key_mask=key_mask))
    message = "model_type in config.json must be 'electra', got 'electra_two_tower'; TwoTowerGenerator"
    with pytest.raises(ValueError, match=message):
        Generator.from_pretrained(tmp_path)
    Generator(PLAIN).save_pretrained(tmp_path / "masked")
    with pytest.raises(ValueError, match="must be 'electra_two_tower', got 'electra'"):
        TwoTowerGenerator.from_pretrained(tmp_path / "masked")


def test_transformers_does_not_load_it_as_another_class(generator, tmp_path):
    transformers = pytest.importorskip("transformers")
    generator.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.ElectraForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type `electra_two_tower`"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
