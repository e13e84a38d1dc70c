"""`ElectraPretrainer` has the results of transformers' own models, and does not change these."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_halves import RNG, SPECIAL, L, assert_tied, batch, halves, packed, pretrainer, tokenizer
from transformers import ElectraForMaskedLM

from electra_fast import hf, reference
from electra_fast.hf import ElectraPretrainer
from electra_fast.hf.pretrainer import _head
from electra_fast.philox import uniforms


def plainly(generator, discriminator, input_ids, attention_mask, **more):
    """The task with transformers' models and losses, with the masks and samples of RNG."""
    discriminator.base_model.embeddings = generator.base_model.embeddings
    inputs = {"attention_mask": attention_mask, **more}
    candidates = (input_ids != 0) & (input_ids != 101) & (input_ids != 102) & (input_ids != 103)
    masked = reference.mask_tokens(input_ids, candidates, RNG, mask_id=103, key_mask=attention_mask.bool())
    used = masked.weights != 0
    positions = masked.positions[used]
    labels = torch.full_like(input_ids, -100).flatten().scatter(0, positions, masked.targets[used])
    mlm = generator(masked.ids, labels=labels.view_as(input_ids), **inputs)

    logits = mlm.logits.detach().flatten(0, 1)[positions]
    samples = reference.inverse_cdf(logits.double(), uniforms(RNG, len(used))[used])
    corrupt = input_ids.flatten().scatter(0, positions, samples).view_as(input_ids)
    logits = discriminator(corrupt, **inputs).logits.view(input_ids.shape)
    real = attention_mask.bool()
    replaced = (corrupt != input_ids).to(logits.dtype)
    rtd = F.binary_cross_entropy_with_logits(logits[real], replaced[real])
    return mlm.loss + 50 * rtd, mlm.loss, rtd, replaced.sum()


def assert_same_step(model, inputs, **more):
    generator, discriminator = copy.deepcopy([model.generator, model.discriminator])
    for half in (model, generator, discriminator):
        half.double().train()
    torch.manual_seed(0)  # for the dropout
    out = model(**inputs, rng=RNG)
    torch.manual_seed(0)
    loss, mlm_loss, rtd_loss, replaced = plainly(generator, discriminator, **inputs, **more)
    for a, b in ((out.loss, loss), (out.mlm_loss, mlm_loss), (out.rtd_loss, rtd_loss)):
        torch.testing.assert_close(a, b)
    assert out.rtd_counts[0] + out.rtd_counts[2] == replaced > 0
    assert out.rtd_counts.sum() == inputs["attention_mask"].sum()

    out.loss.backward()
    loss.backward()
    plain = torch.nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    expected = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected.pop(name).grad, msg=name)
    assert not expected


@pytest.mark.parametrize("name", ["electra", "bert", "roberta"])
def test_equals_transformers(name):
    model = pretrainer(name, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    inputs = batch(24, 11, 3)
    assert_same_step(model, inputs | {"token_type_ids": torch.randint(2, inputs["input_ids"].shape)})


def test_a_sampled_padding_id_does_not_change_positions():
    model = pretrainer("roberta")
    with torch.no_grad():
        model.generator.lm_head.bias[0] = 1e3
    inputs = batch(24, 11)
    embeddings = model.generator.roberta.embeddings
    positions = embeddings.create_position_ids_from_input_ids(inputs["input_ids"], 0)
    assert_same_step(model, inputs, position_ids=positions)


def test_evaluation_has_no_dropout():
    model = pretrainer(hidden_dropout_prob=0.5).eval()
    inputs = batch(24, 11)
    losses = [model(**inputs, rng=rng).loss for rng in (RNG, RNG, RNG + 1)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    torch.manual_seed(0)
    drawn = model(**inputs).loss
    assert not torch.equal(drawn, model(**inputs).loss)
    torch.manual_seed(0)
    assert torch.equal(drawn, model(**inputs).loss)


@pytest.mark.parametrize("name", ["electra", "roberta"])
def test_each_option_has_its_effect(name):
    def step(**options):
        """Return the model, its output, and the numbers of [MASK] tokens and of replaced tokens."""
        model, seen = pretrainer(name, options=SPECIAL | options), []
        model.generator.base_model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        out = model(**batch(24, 24, 24), rng=RNG)
        return model, out, (seen[0] == 103).sum(), out.rtd_counts[0] + out.rtd_counts[2]

    _, out, hidden, _ = step(mask_prob=0.5, keep_prob=0.0)
    assert hidden == out.masked == 3 * 12
    _, out, hidden, replaced = step(disallow_correct=True, keep_prob=1.0)
    assert hidden == 0 and replaced == out.masked == 3 * 4
    _, out, _, replaced = step(mask_prob=0.5, temperature=1e-6)
    assert replaced == out.masked - out.mlm_correct
    _, out, _, _ = step(mlm_weight=2.0, rtd_weight=0.0)
    assert torch.equal(out.loss, 2 * out.mlm_loss)
    model, out, _, _ = step(share_embeddings=False)
    assert model.discriminator.base_model.embeddings is not model.generator.base_model.embeddings
    out.rtd_loss.backward()
    assert all(p.grad is None for p in model.generator.parameters())


def test_special_tokens_are_never_masked():
    model = pretrainer(options=SPECIAL | {"mask_prob": 1.0, "disallow_correct": True})
    inputs = batch(24, 11, 3)
    assert model(**inputs).masked == (24 - 2) + (11 - 2) + (3 - 2)
    inputs["input_ids"][0, 5:9] = 103
    assert model(**inputs).masked == (24 - 6) + (11 - 2) + (3 - 2)


def test_autocast_and_16_bits():
    model, inputs = pretrainer(attention="electra_fast"), batch(24, 11)
    expected = model(**inputs, rng=RNG).mlm_loss.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs, rng=RNG)
    out.loss.backward()
    torch.testing.assert_close(out.mlm_loss.bfloat16(), expected)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    out = model.bfloat16()(**inputs, rng=RNG)
    torch.testing.assert_close(out.mlm_loss.bfloat16(), expected)


@pytest.mark.parametrize("name", ["electra", "bert", "roberta"])
def test_tied_weights_stay_tied(name):
    model = pretrainer(name)
    assert_tied(copy.deepcopy(model))
    model.to(torch.bfloat16).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**batch(24, 11)).loss.backward()
    optimizer.step()
    assert_tied(model)


@pytest.mark.parametrize("name", ["electra", "bert", "roberta"])
def test_a_state_dict_contains_each_tensor_once(name):
    model, other = pretrainer(name), pretrainer(name)
    state = model.state_dict()
    assert len({x.data_ptr() for x in state.values()}) == len(state) == len(list(model.parameters()))
    other.load_state_dict(state)
    inputs = batch(24, 11)
    assert torch.equal(model.eval()(**inputs, rng=RNG).loss, other.eval()(**inputs, rng=RNG).loss)
    alias = "discriminator.base_model.embeddings.LayerNorm.weight".replace(
        "base_model", model.discriminator.base_model_prefix
    )
    with pytest.raises(RuntimeError, match=f"{alias} must equal generator.*: both are the same parameter"):
        other.load_state_dict(state | {alias: torch.zeros(1)})


@pytest.mark.parametrize("name", ["electra", "bert", "roberta"])
def test_each_half_can_be_loaded_without_this_package(name, tmp_path):
    model, ids = pretrainer(name, attention="electra_fast").eval(), batch(24, 24)["input_ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids).loss.backward()
    optimizer.step()
    for half in (model.generator, model.discriminator):
        half.save_pretrained(tmp_path)
        again, facts = type(half).from_pretrained(tmp_path, output_loading_info=True)
        assert not facts["missing_keys"] and not facts["unexpected_keys"]
        assert again.config._attn_implementation == "sdpa"
        expected = half.state_dict()
        for key, x in again.state_dict().items():
            assert torch.equal(x, expected.pop(key)), key
        assert not expected
        torch.testing.assert_close(again(ids).logits, half(ids).logits)


# Dynamo instantiates the class of an autograd function; PyTorch warns about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["electra", "bert"])
def test_no_graph_break(name):
    model, inputs = pretrainer(name, attention="electra_fast", num_hidden_layers=1), batch(24, 11)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = (call.eval()(**inputs, rng=RNG) for call in (compiled, model))
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_activation_checkpointing_changes_no_gradient():
    model, inputs = pretrainer(attention="electra_fast"), batch(24, 11)
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        model(**inputs, rng=RNG).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
        model.activation_checkpointing_enable()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_sequences_are_kept_apart():
    model = pretrainer(attention="electra_fast").eval()
    (first, second), _ = batch(24, 24).values()
    alone = model(first[None], rng=RNG)
    torch.testing.assert_close(model(**packed(first), rng=RNG).loss, alone.loss)
    both = model(**packed(first, second[:11]), rng=RNG)
    assert both.masked == 4 + 2  # 15 % of each, rounded
    hidden = []
    for neighbour in (second, second.flip(0)):
        inputs = packed(first, neighbour)
        del inputs["labels"]
        hidden.append(model.discriminator.electra(**inputs)[0][0, :L])
    assert torch.equal(*hidden)


def test_the_special_ids_are_those_of_the_tokenizer():
    named = {"mask_token": "w4", "cls_token": "w2", "pad_token": "w0", "unk_token": "w9"}
    ids = torch.arange(10)[None]
    model = ElectraPretrainer(*halves(), tokenizer(**named), mask_prob=1.0)
    assert model(ids).masked == 10 - 3  # The unknown token can be masked.


def test_berts_vocabulary_needs_no_tokenizer():
    model = ElectraPretrainer(*halves(vocab_size=30522)).eval()
    inputs = batch(24, 11)
    with pytest.raises(ValueError, match=r"begin with \[CLS\], 101, as BERT's .* got 7; pass the tokenizer"):
        model(inputs["input_ids"].index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(7)))
    torch.testing.assert_close(
        model(**inputs, rng=RNG).loss,
        ElectraPretrainer(model.generator, model.discriminator, **SPECIAL)(**inputs, rng=RNG).loss,
    )
    model(inputs["input_ids"].flip(1))  # Only the first batch is checked.


class DoubledForMaskedLM(ElectraForMaskedLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


class DoubledLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["model", "projection"])
def test_a_generator_with_a_changed_forward_pass_is_not_bypassed(change):
    model, inputs = pretrainer().eval(), batch(24, 11)
    before = model(**inputs, rng=RNG).mlm_loss
    if change == "model":
        model.generator.__class__ = DoubledForMaskedLM
    else:
        model.generator.generator_lm_head.__class__ = DoubledLinear
    assert not torch.equal(model(**inputs, rng=RNG).mlm_loss, before)


@pytest.mark.parametrize("name", ["electra", "bert"])
def test_a_patched_pretrainer_trains_the_same(name):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs, inputs = pretrainer(name, "sdpa", **off).double().train(), batch(24, 11)
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    a, b = (model(**inputs, rng=RNG) for model in (ours, theirs))
    torch.testing.assert_close(a.loss, b.loss)
    assert torch.equal(a.rtd_counts.sum(), b.rtd_counts.sum())
    for out in (a, b):
        out.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert _head(ours.generator) is not None  # It computes only the masked positions.
