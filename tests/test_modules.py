"""The layers: they compute what PyTorch's own layers compute, and their dropout can be replayed."""

import dataclasses

import pytest
import torch
from test_model import spy
from torch import nn
from torch.utils.checkpoint import checkpoint

from electra_fast.config import ElectraConfig
from electra_fast.generators import GeneratorHead
from electra_fast.modules import (
    AMPLITUDE,
    DiscriminatorHead,
    Encoder,
    EncoderLayer,
    FeedForward,
    Layout,
    SelfAttention,
    SharedEmbedding,
    sinusoids,
)

CONFIG = ElectraConfig(vocab_size=300, max_positions=40, embedding=16, layers=2, hidden=32, heads=2, ffn=64)


def padded(*lengths, L):
    """Return (ids, key_mask) of random tokens."""
    ids = torch.randint(104, 300, (len(lengths), L))
    key_mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~key_mask, 0), key_mask


# --- what they compute ---


def test_layer_computes_what_pytorchs_transformer_layer_does():
    ours = EncoderLayer(CONFIG).eval()
    theirs = nn.TransformerEncoderLayer(
        32, 2, 64, activation="gelu", layer_norm_eps=CONFIG.eps, batch_first=True
    ).eval()
    attention, feed_forward = ours.attention, ours.feed_forward
    for target, source in (
        (theirs.self_attn.out_proj, attention.out),
        (theirs.norm1, attention.norm),
        (theirs.linear1, feed_forward.dense_in),
        (theirs.linear2, feed_forward.dense_out),
        (theirs.norm2, feed_forward.norm),
    ):
        target.load_state_dict(source.state_dict())
    theirs.self_attn.in_proj_weight.data = attention.qkv.weight.data
    theirs.self_attn.in_proj_bias.data = attention.qkv.bias.data

    _, key_mask = padded(12, 1, 7, L=12)
    x = torch.randn(3, 12, 32)
    expected = theirs(x, src_key_padding_mask=~key_mask)
    torch.testing.assert_close(ours(x, Layout(key_mask))[key_mask], expected[key_mask], atol=1e-5, rtol=1e-5)


def test_a_mask_instead_of_a_layout_is_refused():
    with pytest.raises(TypeError, match=r"SelfAttention: layout must be a Layout, got Tensor; pass Layout\("):
        EncoderLayer(CONFIG)(torch.zeros(1, 4, 32), torch.ones(1, 4, dtype=torch.bool))


def test_packed_sequences_give_what_padded_ones_give():
    encoder = Encoder(CONFIG).eval()
    lengths = torch.tensor([12, 1, 7])
    ids, key_mask = padded(*lengths, L=12)
    types = torch.randint(0, 2, ids.shape)
    cu_seqlens = torch.tensor([0, 12, 13, 20], dtype=torch.int32)
    packed = encoder(ids[key_mask], Layout(None, cu_seqlens, 12), type_ids=types[key_mask])
    expected = encoder(ids, Layout(key_mask), type_ids=types)[key_mask]
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)


def test_head_logits_are_those_of_its_loss():
    head = GeneratorHead(CONFIG)
    nn.init.normal_(head.bias)
    x, table = torch.randn(9, 32), torch.randn(300, 16)
    targets, rng = torch.randint(0, 300, (9,)), torch.tensor([1, 2])
    mlm = head(x, table, targets, torch.ones(9), rng)
    expected = nn.functional.cross_entropy(head.logits(x, table), targets)
    torch.testing.assert_close(mlm.loss, expected)


def test_there_is_a_projection_only_if_the_widths_differ():
    assert Encoder(CONFIG).project.weight.shape == (32, 16)
    assert Encoder(dataclasses.replace(CONFIG, embedding=32)).project is None


def test_every_parameter_gets_a_gradient():
    ids, key_mask = padded(12, 5, L=12)
    encoder, head = Encoder(CONFIG), DiscriminatorHead(CONFIG)
    head(encoder(ids, Layout(key_mask))).sin().sum().backward()
    for name, parameter in (*encoder.named_parameters(), *head.named_parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# --- initial values ---


def test_initial_values_are_those_of_the_published_code():
    config = ElectraConfig.tiny()
    encoder, rtd, mlm = Encoder(config), DiscriminatorHead(config), GeneratorHead(config)
    layer = encoder.layers[0]
    normal = (encoder.embedding.words, layer.attention.qkv.weight, layer.attention.out.weight)
    normal += (layer.feed_forward.dense_in.weight, rtd.dense.weight, mlm.dense.weight)
    for weight in normal:  # truncation at two standard deviations leaves 0.88 of one
        assert weight.abs().max() <= 0.04
        assert weight.std().item() == pytest.approx(0.0176, rel=0.05)
    for weight in (encoder.project.weight, rtd.score.weight):  # Glorot: sqrt(6 / (in + out))
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound
    for module in (encoder, rtd, mlm):
        for name, parameter in module.named_parameters():
            assert not name.endswith("bias") or not parameter.any(), name


# --- dropout ---


def modules_and_inputs():
    ids, x = padded(12, 9, L=12)[0], torch.randn(2, 12, 32)
    return [
        (SharedEmbedding(CONFIG), ids),
        (SelfAttention(CONFIG), x),
        (FeedForward(CONFIG), x),
        (EncoderLayer(CONFIG), x),
        (Encoder(CONFIG), ids),
    ]


LOCAL = dataclasses.replace(CONFIG, initial_attention="local")


def test_attention_that_is_initially_local_prefers_near_positions():
    """Of one token that fills a sequence, each position attends most to itself, and more to nearer ones."""
    torch.manual_seed(0)
    config = dataclasses.replace(LOCAL, embedding=64, hidden=64, heads=1)
    encoder = Encoder(config).eval()
    x = encoder.embedding(torch.full((1, 30), 150))[0]  # [30, 64]
    query, key, _ = encoder.layers[0].attention.qkv(x).unflatten(-1, (3, 64)).unbind(1)
    scores = query @ key.T
    assert torch.equal(query, key)
    near = [scores.diagonal(distance).mean() for distance in range(4)]
    assert near == sorted(near, reverse=True) and near[3] > scores.mean()


def test_a_shift_by_one_position_is_the_same_rotation_everywhere():
    waves = sinusoids(40, 16).double()
    pairs = torch.complex(waves[:, 1::2], waves[:, 0::2])  # [40, 8], (cosine, sine)
    turned = pairs[1:] / pairs[:-1]
    torch.testing.assert_close(turned, turned[:1].expand(39, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[0].angle(), 40.0 ** -(torch.arange(8).double() / 8), atol=1e-5, rtol=0)
    assert waves.abs().max() <= AMPLITUDE and sinusoids(5, 7).shape == (5, 7)


def test_local_attention_changes_initial_values_only():
    torch.manual_seed(0)
    local, random = Encoder(LOCAL), Encoder(CONFIG)
    assert {n: p.shape for n, p in local.named_parameters()} == {
        n: p.shape for n, p in random.named_parameters()
    }
    assert torch.equal(local.embedding.positions, sinusoids(40, 16))
    weight = local.layers[1].attention.qkv.weight
    assert torch.equal(weight[:32], weight[32:64]) and not torch.equal(weight[:32], weight[64:])
    for each in weight, local.layers[1].attention.out.weight:
        assert each.std().item() == pytest.approx(0.88 * 0.5 * 32**-0.5, rel=0.1)  # truncated
    random.load_state_dict(local.state_dict())


def test_dropout_is_a_function_of_seed_and_step():
    for module, x in modules_and_inputs():
        first = module(x, rng=torch.tensor([5, 0]))
        assert torch.equal(first, module(x, rng=torch.tensor([5, 0])))
        assert not torch.equal(first, module(x, rng=torch.tensor([5, 1])))
        assert not torch.equal(first, module(x, rng=torch.tensor([6, 0])))


def test_without_rng_manual_seed_decides():
    for module, x in modules_and_inputs():
        torch.manual_seed(0)
        first, second = module(x), module(x)
        torch.manual_seed(0)
        assert torch.equal(first, module(x))
        assert not torch.equal(first, second)


def test_no_dropout_in_eval_mode_or_at_probability_zero():
    for module, x in modules_and_inputs():
        module.eval()
        state = torch.get_rng_state()
        assert torch.equal(module(x), module(x, rng=torch.tensor([5, 0])))
        assert torch.equal(state, torch.get_rng_state())
    layer, x = EncoderLayer(dataclasses.replace(CONFIG, dropout=0.0)), torch.randn(1, 4, 32)
    assert torch.equal(layer(x), layer.eval()(x))


def test_each_use_of_dropout_has_its_own_stream():
    calls = []
    Encoder(CONFIG, spy(calls))(padded(12, L=12)[0], stream=7)
    streams = [(name, keywords["stream"]) for name, keywords, _ in calls if "stream" in keywords]
    layer = ("attention_qkv", "add_norm", "add_norm")
    assert streams == list(zip(("embed", *layer, *layer), range(7, 14), strict=True))
    assert Encoder.streams(CONFIG) == len(streams)


@pytest.mark.parametrize("rng", [None, torch.tensor([3, 4])])
def test_activation_checkpointing_replays_dropout(rng):
    layer, x = EncoderLayer(CONFIG), torch.randn(2, 12, 32, requires_grad=True)
    gradients = []
    for run in (layer, lambda *a, **k: checkpoint(layer, *a, use_reentrant=False, **k)):
        torch.manual_seed(0)
        y = run(x, rng=rng)
        gradients.append(torch.autograd.grad(y.sin().sum(), (x, *layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
