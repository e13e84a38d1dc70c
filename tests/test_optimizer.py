"""The paper's AdamW, compared with its formulas in float64."""

import re

import pytest
import torch
from torch import nn

import electra_fast
from electra_fast.config import ElectraConfig
from electra_fast.heads import IntentClassifier, SequenceClassifier
from electra_fast.model import Discriminator, Electra
from electra_fast.train import optimizer

CONFIG = ElectraConfig(
    vocab_size=150, max_positions=20, embedding=8, layers=3, hidden=16, heads=2, ffn=24,
    generator_layers=2, generator_hidden=8, generator_heads=1, generator_ffn=16,
)  # fmt: skip


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def gradients(model, steps, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [
        [scale * torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(steps)
    ]


def take_step(model, optim, grads, lr=0.01, clip=1e9):
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    return optimizer.step(optim, lr, clip)


def by_formula(model, steps, lr=0.01, clip=1e9, b1=0.9, b2=0.999, eps=1e-6, decay=0.01):
    found = []
    norms = [torch.stack([g.double().norm() for g in grads]).norm() for grads in steps]
    for i, (name, p) in enumerate(model.named_parameters()):
        w, m, v = p.detach().double(), 0.0, 0.0
        for grads, norm in zip(steps, norms, strict=True):
            g = grads[i].double() * min(1.0, clip / norm)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            # torch decays first and then updates, w (1 - lr decay) - lr m / ..., which is the same
            w = w - lr * (m / (v.sqrt() + eps) + (0.0 if name.endswith("bias") else decay) * w)
        found.append(w)
    return found


@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_it_is_adamw_without_bias_correction(clip):
    net = model()
    steps = gradients(net, 5)
    wanted = by_formula(net, steps, clip=clip)
    optim = optimizer.adamw(net)
    for grads in steps:
        norm, skipped = take_step(net, optim, grads, clip=clip)
        assert skipped == 0 and torch.isclose(norm, torch.cat([g.flatten() for g in grads]).norm())
    for p, w in zip(net.parameters(), wanted, strict=True):
        assert torch.allclose(p.double(), w, rtol=1e-6, atol=1e-7)


def test_with_bias_correction_it_is_torchs_adamw():
    net, twin = model(), model()
    ours = optimizer.adamw(net, bias_correction=True, weight_decay=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, eps=1e-6, weight_decay=0.0, fused=True)
    for grads in gradients(net, 4):
        take_step(net, ours, grads)
        for p, g in zip(twin.parameters(), grads, strict=True):
            p.grad = g.clone()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    net = model()
    optim = optimizer.adamw(net)
    first, second, third = gradients(net, 3)
    take_step(net, optim, first)
    before = [p.detach().clone() for p in net.parameters()]
    state = {name: x.clone() for name, x in optimizer.state(net, optim).items()}
    second[2][0] = bad
    _, skipped = take_step(net, optim, second)
    assert skipped == 1
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(x, state[name]) for name, x in optimizer.state(net, optim).items())
    take_step(net, optim, third)
    wanted = by_formula(model(), [first, third])
    assert all(
        torch.allclose(p.double(), w, rtol=1e-6, atol=1e-7)
        for p, w in zip(net.parameters(), wanted, strict=True)
    )


def test_skipped_steps_and_their_longest_run_are_counted():
    skipped = optimizer.Skipped(5)
    for step, bad in enumerate([0, 1, 0, 1, 1, 1, 0, 1, 1]):
        skipped.add(step, bool(bad))
    assert (skipped.steps, skipped.longest_run, skipped.first) == (5 + 6, 3, 3)


def test_it_decays_only_matrices_and_embeddings():
    net = Electra(ElectraConfig.tiny())
    decayed, plain = optimizer.adamw(net).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    names = {p: name for name, p in net.named_parameters()}
    assert {names[p] for p in plain["params"]} == {n for p, n in names.items() if p.ndim == 1}
    assert {p.ndim for p in decayed["params"]} == {2}
    assert any(n.endswith("embedding.words") for n in map(names.get, decayed["params"]))


def test_the_schedule_is_the_papers():
    rate = [optimizer.learning_rate(t, peak=2.0, warmup=4, total=10) for t in range(10)]
    wanted = [2.0 * (1 - t / 10) * min(1, t / 4) for t in range(10)]
    assert rate == wanted and rate[0] == 0
    assert optimizer.learning_rate(0, peak=1.0, warmup=0, total=1) == 0


def test_a_negative_second_moment_is_refused():
    model = nn.Linear(3, 2)
    state = optimizer.state(model, optimizer.adamw(model))
    optimizer.check(state)
    state["exp_avg"] = -torch.ones(2)
    optimizer.check(state)
    state["exp_avg_sq.bias"] = torch.tensor([1.0, -0.5])
    with pytest.raises(ValueError, match=r"exp_avg_sq.bias must not be negative, got -0.5"):
        optimizer.check(state)


# --- rates by layer ---


def exponents_as_published(name, n):
    """Return n + 2 - depth, as `_get_layer_lrs` of the code published with the paper has it."""
    if found := re.search(r"encoder\.layers?\.(\d+)\.", name):
        return n + 2 - (int(found[1]) + 1)
    embeddings = ("embeddings.", "embeddings_project.", "encoder.embedding.", "encoder.project.")
    return n + 2 if any(part in name for part in embeddings) else 0


def head_of_ours():
    return SequenceClassifier(CONFIG, ["a", "b", "c"])


def as_a_task():
    return nn.ModuleDict({"head": IntentClassifier(CONFIG, ["a", "b"], ["O", "B-x"])})


def of_transformers(kind, config, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = getattr(transformers, config)(
        **sizes, intermediate_size=24, max_position_embeddings=20, **options
    )
    return getattr(transformers, kind)(config)


MODELS = {
    "SequenceClassifier": head_of_ours,
    "TaskModel": as_a_task,
    "Discriminator": lambda: Discriminator(CONFIG),
    "ELECTRA": lambda: of_transformers("ElectraForSequenceClassification", "ElectraConfig", embedding_size=8),
    "ELECTRA for answers": lambda: of_transformers("ElectraForQuestionAnswering", "ElectraConfig"),
    "ELECTRA's generator": lambda: of_transformers("ElectraForMaskedLM", "ElectraConfig", embedding_size=8),
    "BERT": lambda: of_transformers("BertForTokenClassification", "BertConfig"),
    "BERT with a pooler": lambda: of_transformers("BertForSequenceClassification", "BertConfig"),
    "RoBERTa": lambda: of_transformers("RobertaForMaskedLM", "RobertaConfig"),
}


@pytest.mark.parametrize("paper_exponent", [True, False])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_rates_by_layer_are_those_published(make, paper_exponent):
    net = make()
    groups = optimizer.layerwise_groups(net, 0.5, 0.8, weight_decay=0.03, paper_exponent=paper_exponent)
    found = {p: group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert set(found) == set(net.parameters())
    norms = {
        f"{name}.{n}"
        for name, m in net.named_modules()
        if isinstance(m, nn.LayerNorm)
        for n in ("weight", "bias")
    }
    n = 3
    for name, parameter in net.named_parameters():
        exponent = exponents_as_published(name, n)
        exponent -= exponent > 0 and not paper_exponent
        assert found[parameter]["lr"] == pytest.approx(0.5 * 0.8**exponent, rel=1e-12), name
        undecayed = name.endswith("bias") or name in norms
        assert found[parameter]["weight_decay"] == (0.0 if undecayed else 0.03), name
    assert {frozenset(group) for group in groups} == {frozenset(("params", "lr", "weight_decay"))}
    assert len(groups) == len({(g["lr"], g["weight_decay"]) for g in groups}), "groups are not split further"
    torch.optim.SGD(groups)


def test_a_rate_that_is_a_tensor_gives_the_same_bits():
    """A captured step reads the rate from memory, as float32."""

    def trained(kind):
        torch.manual_seed(0)
        net = head_of_ours()
        optim = optimizer.adamw(net, layer_decay=0.8)
        for i, grads in enumerate(gradients(net, 5)):
            take_step(net, optim, grads, lr=kind(torch.tensor(3e-4 * (i + 1) / 7)), clip=1.0)
        return list(net.parameters())

    assert all(map(torch.equal, trained(torch.Tensor.item), trained(torch.Tensor.clone)))


def test_a_frozen_parameter_is_in_no_group_and_the_rates_of_others_stay():
    net = head_of_ours()
    rates = {p: g["lr"] for g in optimizer.layerwise_groups(net, 1.0, 0.5) for p in g["params"]}
    for layer in net.encoder.layers:
        layer.requires_grad_(False)
    frozen = {p for layer in net.encoder.layers for p in layer.parameters()}
    found = {p: g["lr"] for g in optimizer.layerwise_groups(net, 1.0, 0.5) for p in g["params"]}
    assert found == {p: rate for p, rate in rates.items() if p not in frozen}


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.01, float("nan")])
def test_a_decay_outside_of_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"^layerwise_groups: decay must be in \(0, 1\], got"):
        electra_fast.layerwise_groups(head_of_ours(), 1e-4, decay)


def test_a_model_without_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"model must have encoder layers, encoder\.layer\.0 .*, got Sequential"
    ):
        optimizer.layerwise_groups(model(), 1e-4, 0.8)


def test_the_public_name_is_that_of_the_optimizer():
    assert electra_fast.layerwise_groups is optimizer.layerwise_groups


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("make", [head_of_ours, MODELS["BERT"]], ids=["ours", "BERT"])
def test_a_step_moves_each_layer_by_its_rate(make, rate):
    net, twin = make(), make()
    twin.load_state_dict(net.state_dict())
    ours = optimizer.adamw(net, bias_correction=True, weight_decay=0.1, layer_decay=0.5)
    norms = {p for m in twin.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    groups = []
    for name, p in twin.named_parameters():
        lr = float(rate) * 0.5 ** exponents_as_published(name, 3)
        undecayed = p in norms or name.endswith("bias")
        groups.append({"params": [p], "lr": lr, "weight_decay": 0.0 if undecayed else 0.1})
    theirs = torch.optim.AdamW(groups, eps=1e-6, fused=True)
    for grads in gradients(net, 3):
        take_step(net, ours, grads, lr=rate)
        for p, g in zip(twin.parameters(), grads, strict=True):
            p.grad = g.clone()
        theirs.step()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert float(rate) == pytest.approx(0.01), "the caller's rate is not changed"


def test_pre_training_has_two_groups_in_the_order_of_the_parameters():
    """As in older versions, whose checkpoints must continue to fit."""
    net = Electra(CONFIG)
    plain = [p for name, p in net.named_parameters() if name.endswith("bias") or ".norm." in name]
    decayed = [p for p in net.parameters() if not any(p is other for other in plain)]
    first, second = optimizer.adamw(net).param_groups
    for group, wanted in ((first, decayed), (second, plain)):
        assert all(a is b for a, b in zip(group["params"], wanted, strict=True))
        assert group["scale"] == 1.0
