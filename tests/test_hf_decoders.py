"""Patched decoders: causal self-attention with caches, cross-attention, losses, and generated texts."""

import copy
import inspect

import pytest
import torch
import transformers
from small_patched import B, L, build, encoder_decoder, outcome

from electra_fast import hf

REAL = torch.arange(L) < torch.tensor([L, 7, 1])[:, None]  # [B, L]
CACHE = "cache" if "cache" in inspect.signature(transformers.ElectraModel.forward).parameters else None
CACHE = CACHE or "past_key_values"
BOTH = pytest.mark.parametrize("family", ["Electra", "Bert"])
# transformers recommends to compute the loss in another way.
pytestmark = pytest.mark.filterwarnings("ignore:.*the labels are passed:FutureWarning")
pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")]


def causal(family="Electra", **change):
    name = "ElectraForCausalLM" if family == "Electra" else "BertLMHeadModel"
    return build(name, is_decoder=True, **{"initializer_range": 0.3} | change).eval()


def pair(theirs):
    ours = copy.deepcopy(theirs)
    return ours, hf.patch(ours), theirs


def prompts(n):
    """Return ids of 1 to L tokens, with padding on the left."""
    lengths = torch.randint(1, L + 1, (n,))
    real = torch.arange(L) >= L - lengths[:, None]
    return {"input_ids": torch.randint(104, 300, (n, L)) * real, "attention_mask": real.long()}


def reasons(patched):
    return [row.why_not for row in patched.rows() if row.of and row.why_not and row.option != "layer"]


STATIC = {"cache_implementation": "static", "disable_compile": True}
GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True},
    "a static cache": STATIC,
    "beams in a static cache": STATIC | {"num_beams": 2},
    "without a cache": {"use_cache": False},
}


def generated(model, inputs, options):
    torch.manual_seed(1)
    options = {"pad_token_id": 0, "eos_token_id": 102, "no_repeat_ngram_size": 1} | options
    return model.generate(**inputs, max_new_tokens=12, **options)


@BOTH
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generates_the_same_tokens_from_an_encoder(family, options):
    ours, patched, theirs = pair(encoder_decoder(family))
    inputs = prompts(100 if options == {} else 20)
    found, wanted = (generated(model, inputs, options) for model in (ours, theirs))
    dynamic = {k: x for k, x in options.items() if k not in STATIC}
    if dynamic != options and not torch.equal(wanted, generated(theirs, inputs, dynamic)):
        pytest.skip("ElectraModel of transformers 5.0 writes all tokens to one place of a static cache")
    assert torch.equal(found, wanted) and len(found.unique(dim=0)) > 15
    assert reasons(patched) == []


@BOTH
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_continues_prompts_by_the_same_tokens(family, options):
    ours, patched, theirs = pair(causal(family))
    inputs = prompts(20)
    found, wanted = (generated(model, inputs, options) for model in (ours, theirs))
    assert torch.equal(found, wanted) and len(found.unique(dim=0)) > 15
    assert reasons(patched) == []


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_the_attention_implementation_generates_the_same_tokens(options):
    for theirs in (encoder_decoder(), causal()):
        ours, inputs = copy.deepcopy(theirs), prompts(10)
        ours.set_attn_implementation("electra_fast")
        assert torch.equal(generated(ours, inputs, options), generated(theirs, inputs, options))


@BOTH
def test_the_loss_of_an_encoder_decoder(family):
    ours, patched, theirs = pair(encoder_decoder(family).train().double())
    labels = torch.randint(104, 300, (B, 9)).masked_fill(
        torch.arange(9) > torch.tensor([8, 3, 0])[:, None], -100
    )
    inputs = {"input_ids": torch.randint(104, 300, (B, L)), "attention_mask": REAL.long(), "labels": labels}
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    assert "logits" not in a and da.keys() == db.keys()
    assert a.keys() == b.keys() - {"logits"}
    for found, wanted in ((a, b), (da, db)):
        for name in found:
            torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-6, atol=1e-8, msg=name)
    assert reasons(patched) == []
    shown = ours(**inputs, output_logits=True)
    torch.testing.assert_close(shown.logits, theirs(**inputs).logits, rtol=1e-6, atol=1e-8)
    ours.eval()
    torch.testing.assert_close(ours(**inputs).loss, theirs.eval()(**inputs).loss, rtol=1e-6, atol=0)


def test_the_arguments_of_an_encoder_decoder():
    ours, _, theirs = pair(encoder_decoder().train().double())
    ids, labels = torch.randint(104, 300, (B, L)), torch.randint(104, 300, (B, 5))
    states = torch.randn(B, L, 64, dtype=torch.double)
    for inputs in (
        {"input_ids": ids, "decoder_input_ids": labels.flip(0)},
        {"encoder_outputs": (states,), "attention_mask": REAL.long()},
        {"input_ids": ids, "decoder_inputs_embeds": torch.randn(B, 5, 32, dtype=torch.double)},
        {"input_ids": ids, "decoder_attention_mask": REAL[:, :5].long(), "output_hidden_states": True},
        {"input_ids": ids, "decoder_position_ids": torch.arange(5).flip(0)[None]},
    ):
        a, b = (model(**inputs, labels=labels) for model in (ours, theirs))
        torch.testing.assert_close(a.loss.double(), b.loss, rtol=1e-6, atol=0)
        assert (a.decoder_hidden_states is None) == (b.decoder_hidden_states is None)
    none = ours(input_ids=ids, labels=torch.full_like(labels, -100), decoder_input_ids=labels)
    assert none.loss == 0
    none.loss.backward()
    with pytest.raises(
        ValueError, match=r"labels must have one label per token, shape \[3, 4\], got \[3, 5\]"
    ):
        ours(input_ids=ids, labels=labels, decoder_input_ids=labels[:, :4])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.decoder.eval(), []),
        (
            lambda model: model.decoder.generator_lm_head.register_forward_hook(lambda *_: None),
            ["its decoder's generator_lm_head has hooks", "generator_lm_head has hooks"],
        ),
    ],
    ids=["in eval mode", "with a hook"],
)
def test_the_loss_of_an_encoder_decoder_whose_decoders_loss_is_not_fused(change, why):
    ours, patched, theirs = pair(encoder_decoder().train().double())
    inputs = {"input_ids": torch.randint(104, 300, (B, L)), "labels": torch.randint(104, 300, (B, 5))}
    for model in (ours, theirs):
        change(model)
    a, b = (model(**inputs) for model in (ours, theirs))
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
    assert a.logits is not None and set(reasons(patched)) == set(why)


def test_a_mask_for_other_keys_runs_unfused():
    """Chunks of a prompt have such a mask in transformers: it gives the decoder's to cross-attention."""
    ours, _, theirs = pair(encoder_decoder())
    attention = [m.decoder.electra.encoder.layer[0].crossattention.self for m in (ours, theirs)]
    x, states, one = torch.randn(B, 3, 64), torch.randn(B, L, 64), torch.ones(B, 1, 1, 1, dtype=torch.bool)
    a, b = (module(x, states, one)[0] for module in attention)
    assert torch.equal(a, b)
    assert attention[0].last_unsupported == "encoder_attention_mask is bool [3, 1, 1, 1]"


@BOTH
def test_the_loss_of_a_causal_model(family):
    ours, patched, theirs = pair(causal(family).train().double())
    ids = torch.randint(104, 300, (B, L))
    inputs = {"input_ids": ids, "attention_mask": REAL.long(), "labels": ids.masked_fill(~REAL, -100)}
    for more in ({}, {"num_items_in_batch": torch.tensor(40)}, {"shift_labels": ids.flip(0)}):
        (a, da), (b, db) = (outcome(model, inputs | more) for model in (ours, theirs))
        assert "logits" not in a
        torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-6, atol=0, check_dtype=False)
        for name in db:
            # transformers computes this loss in float32.
            torch.testing.assert_close(da[name], db[name], rtol=1e-4, atol=1e-6, msg=name)
    assert reasons(patched) == []
    targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    inputs.pop("labels")
    for mode in (True, False):
        loss = ours.train(mode)(**inputs, targets=targets).loss
        wanted = theirs(**inputs, labels=ids.masked_fill(~REAL, -100)).loss
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("static", [False, True])
@BOTH
def test_a_prompt_in_two_parts(family, static):
    """The second part has several queries and a cache, so causal attention is aligned with the last key."""
    ours, patched, theirs = pair(causal(family).double())
    inputs = prompts(B)
    results = []
    for model in (ours, theirs):
        cache = transformers.DynamicCache(config=model.config)
        if static:
            cache = transformers.StaticCache(config=model.config, max_cache_len=L + 5)
        for part in (slice(0, 12), slice(12, L)):
            ids, mask = inputs["input_ids"][:, part], inputs["attention_mask"][:, : part.stop]
            out = model(ids, attention_mask=mask, use_cache=True, **{CACHE: cache})
        results.append(out.logits)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)
    assert reasons(patched) == []


@pytest.mark.parametrize("registry", [False, True])
def test_a_given_mask_with_four_axes_is_used_as_it_is(registry):
    """A token then sees later ones too, as in transformers."""
    theirs = causal()
    ours, patched, _ = pair(theirs)
    if registry:
        ours = copy.deepcopy(theirs)
        ours.set_attn_implementation("electra_fast")
    ids = torch.randint(104, 300, (B, L))
    found, wanted = (model(ids, attention_mask=REAL[:, None, None]).logits for model in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert registry or any("attention_mask is bool" in why for why in reasons(patched))


def test_later_tokens_have_no_influence():
    model = causal()
    hf.patch(model)
    ids = torch.randint(104, 300, (1, L))
    changed = ids.clone()
    changed[0, 9] += 1
    a, b = (model(x).logits for x in (ids, changed))
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a[:, 9:], b[:, 9:])


@BOTH
def test_a_packed_batch_of_an_encoder_decoder(family):
    """``decoder_cu_seq_lens_k`` are the bounds of the encoder's sequences."""
    model = encoder_decoder(family).train().double()
    hf.patch(model)
    sources, targets = torch.tensor([L, 7, 1]), torch.tensor([5, 1, 8])
    ids, written = torch.randint(104, 300, (B, L)), torch.randint(104, 300, (B, 8))
    in_target = torch.arange(8) < targets[:, None]
    labels = written.flip(0).masked_fill(~in_target, -100)
    padded = model(ids, REAL.long(), decoder_input_ids=written, labels=labels).loss
    gradients = torch.autograd.grad(padded, model.parameters(), allow_unused=True)

    bounds = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (sources, targets)]
    positions = [torch.cat([torch.arange(n) for n in lengths])[None] for lengths in (sources, targets)]
    packed = model(
        ids[REAL][None],
        position_ids=positions[0],
        cu_seq_lens_q=bounds[0],
        max_length_q=L,
        decoder_input_ids=written[in_target][None],
        decoder_position_ids=positions[1],
        decoder_cu_seq_lens_q=bounds[1],
        decoder_max_length_q=8,
        decoder_cu_seq_lens_k=bounds[0],
        decoder_max_length_k=L,
        labels=labels[in_target][None],
    ).loss
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(packed, model.parameters(), allow_unused=True), gradients, strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_mask_that_is_shorter_than_the_cache_is_refused():
    model = causal()
    hf.patch(model)
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.randint(104, 300, (B, L))
    model(ids, use_cache=True, **{CACHE: cache})
    with pytest.raises(
        ValueError, match=r"attention_mask must have shape \[3, 21\], the tokens of the cache first"
    ):
        model(ids[:, :1], attention_mask=REAL.long(), use_cache=True, **{CACHE: cache})


@BOTH
def test_more_tokens_than_positions_are_refused(family):
    ids, longer = torch.randint(104, 300, (1, 30)), {"min_new_tokens": 42, "max_new_tokens": 42}
    model = causal(family)
    hf.patch(model)
    with pytest.raises(IndexError, match=r"position_ids must be in \[0, 40\), got 40"):
        model.generate(ids, pad_token_id=0, **longer)
    model = encoder_decoder(family)
    hf.patch(model)
    with pytest.raises(
        ValueError, match="a sequence must be at most 40, one per position of the model, got 41"
    ):
        model.generate(ids, **longer)


def test_cross_attention_without_states_is_refused():
    model = encoder_decoder()
    hf.patch(model)
    attention = model.decoder.electra.encoder.layer[0].crossattention.self
    with pytest.raises(ValueError, match="encoder_hidden_states must be given to cross-attention, got None"):
        attention(torch.randn(1, 3, 64))


# Dynamo instantiates the class; PyTorch warns about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_no_graph_break():
    model = encoder_decoder(dropout=0.1, num_hidden_layers=1).train()
    hf.patch(model)
    ids, labels = torch.randint(104, 300, (B, L)), torch.randint(104, 300, (B, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=ids, attention_mask=REAL.long(), labels=labels).loss.backward()


def test_undo_gives_the_original_results():
    theirs = encoder_decoder()
    ours, patched, _ = pair(theirs)
    inputs = prompts(3)
    generated(ours, inputs, {})
    patched.undo()
    out = [m(**inputs, decoder_input_ids=inputs["input_ids"]).logits for m in (ours, theirs)]
    assert torch.equal(*out)
