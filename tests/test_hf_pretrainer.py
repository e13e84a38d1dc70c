"""`ElectraPretrainer`: what transformers' own models compute, under Trainer and alone, and clear refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    DataCollatorWithFlattening,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForTokenClassification,
    Trainer,
    TrainingArguments,
)

from electra_fast import reference
from electra_fast.hf import ElectraPretrainer
from electra_fast.philox import uniforms

V, L = 300, 24
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40}
SPECIAL = {"mask_id": 103, "special_ids": (0, 101, 102)}
RNG = torch.tensor([-7, 3])


def electra(hidden=32, **change):
    return ElectraConfig(**SIZES | {"hidden_size": hidden, "embedding_size": 24} | change)


def halves(name="electra", **change):
    if name == "electra":
        return ElectraForMaskedLM(electra(16, **change)), ElectraForPreTraining(electra(**change))
    masked, tagger, config = {
        "bert": (BertForMaskedLM, BertForTokenClassification, BertConfig),
        "roberta": (RobertaForMaskedLM, RobertaForTokenClassification, RobertaConfig),
    }[name]
    config = config(**SIZES, num_labels=1, pad_token_id=0, **change)
    return masked(config), tagger(copy.deepcopy(config))


def pretrainer(name="electra", attention="eager", options=SPECIAL, **change):
    generator, discriminator = halves(name, **change)
    for half in (generator, discriminator):
        half.set_attn_implementation(attention)
    return ElectraPretrainer(generator, discriminator, **options)


def batch(*lengths):
    """Sentences [CLS] tokens [SEP], padded to L."""
    n, place = torch.tensor(lengths)[:, None], torch.arange(L)
    ids = torch.randint(104, V, (len(lengths), L))
    ids = ids.masked_fill(place == 0, 101).masked_fill(place == n - 1, 102).masked_fill(place >= n, 0)
    return {"input_ids": ids, "attention_mask": (place < n).long()}


def plainly(generator, discriminator, input_ids, attention_mask, places=None):
    """The task on transformers' models and losses, with the masks and samples that RNG decides."""
    discriminator.base_model.embeddings = generator.base_model.embeddings
    inputs = {"attention_mask": attention_mask} | ({} if places is None else {"position_ids": places})
    candidates = (input_ids != 0) & (input_ids != 101) & (input_ids != 102) & (input_ids != 103)
    masked = reference.mask_tokens(input_ids, candidates, RNG, mask_id=103, key_mask=attention_mask.bool())
    used = masked.weights != 0
    places = masked.positions[used]
    labels = torch.full_like(input_ids, -100).flatten().scatter(0, places, masked.targets[used])
    mlm = generator(masked.ids, labels=labels.view_as(input_ids), **inputs)

    logits = mlm.logits.detach().flatten(0, 1)[places]
    samples = reference.inverse_cdf(logits.double(), uniforms(RNG, len(used))[used])
    corrupt = input_ids.flatten().scatter(0, places, samples).view_as(input_ids)
    logits = discriminator(corrupt, **inputs).logits.view(input_ids.shape)
    real = attention_mask.bool()
    replaced = (corrupt != input_ids).to(logits.dtype)
    rtd = F.binary_cross_entropy_with_logits(logits[real], replaced[real])
    return mlm.loss + 50 * rtd, mlm.loss, rtd, replaced.sum()


def assert_same_step(model, generator, discriminator, inputs, places=None):
    for half in (model, generator, discriminator):
        half.double().train()
    torch.manual_seed(0)  # of the dropout
    out = model(**inputs, rng=RNG)
    torch.manual_seed(0)
    loss, mlm_loss, rtd_loss, replaced = plainly(generator, discriminator, **inputs, places=places)
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
def test_computes_what_transformers_computes(name):
    model = pretrainer(name, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    assert_same_step(model, *copy.deepcopy([model.generator, model.discriminator]), batch(24, 11, 3))


def test_a_drawn_padding_id_moves_no_position():
    model = pretrainer("roberta")
    with torch.no_grad():
        model.generator.lm_head.bias[0] = 1e3
    inputs = batch(24, 11)
    places = model.generator.roberta.embeddings.create_position_ids_from_input_ids(inputs["input_ids"], 0)
    plain = copy.deepcopy([model.generator, model.discriminator])
    assert_same_step(model, *plain, inputs, places)


def test_evaluation_is_the_same_task():
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
def test_each_option_is_obeyed(name):
    def step(**options):
        """Return the model, its losses, how many tokens the generator saw as [MASK], how many it replaced."""
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


def assert_tied(model):
    generator, discriminator = model.generator, model.discriminator
    assert discriminator.base_model.embeddings is generator.base_model.embeddings
    assert generator.get_output_embeddings().weight is generator.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["electra", "bert", "roberta"])
def test_the_tie_holds(name):
    model = pretrainer(name)
    assert_tied(copy.deepcopy(model))
    model.to(torch.bfloat16).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**batch(24, 11)).loss.backward()
    optimizer.step()
    assert_tied(model)


@pytest.mark.parametrize("name", ["electra", "bert", "roberta"])
def test_a_state_dict_has_each_tensor_once(name):
    model, other = pretrainer(name), pretrainer(name)
    state = model.state_dict()
    assert len({x.data_ptr() for x in state.values()}) == len(state) == len(list(model.parameters()))
    other.load_state_dict(state)
    inputs = batch(24, 11)
    assert torch.equal(model.eval()(**inputs, rng=RNG).loss, other.eval()(**inputs, rng=RNG).loss)
    twin = "discriminator.base_model.embeddings.LayerNorm.weight".replace(
        "base_model", model.discriminator.base_model_prefix
    )
    with pytest.raises(RuntimeError, match=f"{twin} must equal generator.*: the model has one of them"):
        other.load_state_dict(state | {twin: torch.zeros(1)})


@pytest.mark.parametrize("name", ["electra", "bert", "roberta"])
def test_each_half_is_saved_for_transformers_alone(name, tmp_path):
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


# Dynamo itself makes an object of an autograd function's class; PyTorch warns about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["electra", "bert"])
def test_no_graph_break(name):
    model, inputs = pretrainer(name, attention="electra_fast"), batch(24, 11)
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


def packed(*documents):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    return collator([{"input_ids": ids.tolist()} for ids in documents])


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


def arguments(folder, **options):
    return TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def texts(n, lengths=True):
    return [{k: x[0] for k, x in batch(L - i % 9 if lengths else L).items()} for i in range(n)]


def test_trainer_resumes_bit_for_bit(tmp_path):
    data = texts(32)
    options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}

    def trained(folder, resume, **more):
        torch.manual_seed(0)
        model = pretrainer(attention="electra_fast", hidden_dropout_prob=0.1)
        trainer = Trainer(model, arguments(folder, **options | more), train_dataset=data, eval_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path, None)
    again = trained(tmp_path, str(tmp_path / "checkpoint-2"))
    assert_tied(again.model)
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert whole.evaluate()["eval_loss"] > 0


def test_trainer_averages_over_micro_batches(tmp_path):
    """Packed batches come with labels, by whose number Trainer would not divide the loss for us."""
    model = pretrainer(attention="electra_fast")
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4, logging_steps=1, save_strategy="no"),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        train_dataset=[{"input_ids": row["input_ids"].tolist()} for row in texts(16, lengths=False)],
    )
    trainer.train()
    (loss,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert 30 < loss < 50  # 50 log 2 + log V is 40 at random


def test_trainer_checkpoints_activations(tmp_path):
    model = pretrainer()
    Trainer(
        model, arguments(tmp_path, max_steps=1, activation_checkpointing=True), train_dataset=texts(4)
    ).train()
    assert model.generator.is_activation_checkpointing and model.discriminator.is_activation_checkpointing


def tokenizer(**special):
    words = {f"w{i}": i for i in range(V)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w9")), **special)


def test_a_tokenizer_says_the_special_ids():
    named = {"mask_token": "w4", "cls_token": "w2", "pad_token": "w0", "unk_token": "w9"}
    ids = torch.arange(10)[None]
    model = ElectraPretrainer(*halves(), tokenizer(**named), mask_prob=1.0)
    assert model(ids).masked == 10 - 3  # the unknown token is a token


def test_two_arguments_are_enough_for_berts_vocabulary():
    model = ElectraPretrainer(*halves(vocab_size=30522)).eval()
    inputs = batch(24, 11)
    with pytest.raises(
        ValueError, match=r"begin with \[CLS\], 101, where BERT's .* got 7; pass the tokenizer"
    ):
        model(inputs["input_ids"].index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(7)))
    torch.testing.assert_close(
        model(**inputs, rng=RNG).loss,
        ElectraPretrainer(model.generator, model.discriminator, **SPECIAL)(**inputs, rng=RNG).loss,
    )
    model(inputs["input_ids"].flip(1))  # once it is known, nobody looks again


class Doubled(ElectraForMaskedLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_a_generator_with_a_forward_of_its_own_is_called():
    generator, discriminator = halves()
    doubled = Doubled(generator.config).eval()
    doubled.load_state_dict(generator.state_dict())
    model, inputs = ElectraPretrainer(doubled, discriminator.eval(), **SPECIAL), batch(24, 11)
    loss = model(**inputs, rng=RNG).mlm_loss
    doubled.__class__ = ElectraForMaskedLM
    assert not torch.equal(loss, model(**inputs, rng=RNG).mlm_loss)


def wrong_halves():
    masked, tagger = halves()
    small, _ = halves(vocab_size=200)
    narrow = ElectraForPreTraining(electra(embedding_size=20))
    causal = {"is_decoder": True, "use_cache": False}
    yield "tagger", (tagger, tagger), r"generator must be a masked language model, got ElectraForPreTraining"
    decoder = BertLMHeadModel(BertConfig(**SIZES))
    yield (
        "language model",
        (decoder, tagger),
        "generator must be a masked language model, got BertLMHeadModel",
    )
    yield "decoder", (halves("bert", **causal)[0], tagger), "generator.config.is_decoder must be False"
    yield "a decoding tagger", (masked, halves("bert", **causal)[1]), "discriminator.config.is_decoder must"
    yield "a module", (masked, torch.nn.Linear(1, 1)), "discriminator must be a PreTrainedModel, got Linear"
    yield "vocabularies", (small, tagger), "vocabulary of 200 tokens, got 300"
    shapes = r"Embedding\(300, 24, padding_idx=0\), got .*Embedding\(300, 20, .*share_embeddings=False"
    yield "shapes", (masked, narrow), shapes
    yield (
        "dropout",
        (masked, halves(hidden_dropout_prob=0.2)[1]),
        r"Dropout\(p=0.1, .*, got .*Dropout\(p=0.2, ",
    )
    yield "kinds", (masked, halves("bert")[1]), r"ElectraEmbeddings\(, got BertEmbeddings\("


@pytest.mark.parametrize("pair, message", [x[1:] for x in wrong_halves()], ids=[x[0] for x in wrong_halves()])
def test_halves_that_make_no_electra_are_refused(pair, message):
    before = pair[1].state_dict().keys()
    with pytest.raises((TypeError, ValueError), match=f"^ElectraPretrainer: .*{message}"):
        ElectraPretrainer(*pair, **SPECIAL)
    assert pair[1].state_dict().keys() == before
    if "share_embeddings" in message:
        ElectraPretrainer(*pair, **SPECIAL, share_embeddings=False)(**batch(24, 11))


WRONG_IDS = {
    "nothing": ({}, "tokenizer must be given, got none for a vocabulary of 300 tokens; or pass mask_id= and"),
    "half": ({"mask_id": 103}, r"must be given together, got \(103, None\)"),
    "outside": (SPECIAL | {"mask_id": V}, r"must be in \[0, 300\), the vocabulary, got \[0, 101, 102, 300\]"),
    "negative": (SPECIAL | {"special_ids": (-1,)}, r"must be in \[0, 300\)"),
    "no mask": ({"tokenizer": tokenizer()}, "tokenizer must have a mask token, got None; add_special_tokens"),
    "twice": ({"tokenizer": tokenizer(mask_token="w4"), "mask_id": 4}, r"be left out, got \(4, None\)"),
}


@pytest.mark.parametrize("options, message", WRONG_IDS.values(), ids=WRONG_IDS)
def test_special_ids_that_cannot_be_known_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^ElectraPretrainer: .*{message}"):
        ElectraPretrainer(*halves(), **options)


WRONG_BATCHES = {
    "no ids": ({"input_ids": None}, "input_ids must be given, .* got none"),
    "embedded": ({"input_ids": None, "inputs_embeds": torch.zeros(2, L, 24)}, "input_ids must be given"),
    "one axis": (
        {"input_ids": torch.full((L,), 150)},
        r"input_ids must be given, \[B, L\], got shape \[24\]",
    ),
    "labels": ({"labels": torch.zeros(2, L)}, "labels must be left out, .*; masking is done here"),
    "outputs": ({"output_attentions": True}, "output_attentions must be left out, got bool"),
    "4-D": (
        {"attention_mask": torch.ones(2, 1, L, L)},
        r"attention_mask must be \[2, 24\], .* got \[2, 1, 24",
    ),
    "outside": ({"input_ids": torch.full((2, L), V)}, r"ids: 300 at row 0, column 0 is outside \[0, 300\)"),
    "packed": (
        {"cu_seq_lens_q": torch.tensor([0, L])},
        "must keep packed sequences apart, got eager; call set_",
    ),
}


@pytest.mark.parametrize("change, message", WRONG_BATCHES.values(), ids=WRONG_BATCHES)
def test_batches_that_would_train_something_else_are_refused(change, message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        pretrainer()(**batch(24, 11) | change)


@pytest.mark.parametrize("order", [("generator", "discriminator"), ("discriminator", "generator")])
def test_a_vocabulary_is_resized_in_both_halves(order, tmp_path):
    model = pretrainer()
    first, second = (getattr(model, half) for half in order)
    first.resize_token_embeddings(V + 8)
    with pytest.raises(
        ValueError, match=f"{order[1]}.config.vocab_size must be the 308 rows of .*, got 300;"
    ):
        model(**batch(24, 11))
    second.resize_token_embeddings(V + 8)
    assert_tied(model)
    model(**batch(24, 11)).loss.backward()
    for half in (first, second):
        half.save_pretrained(tmp_path)
        type(half).from_pretrained(tmp_path)


def test_a_packed_batch_needs_its_positions():
    inputs = packed(*batch(24, 24)["input_ids"])
    del inputs["position_ids"]
    with pytest.raises(ValueError, match="a packed batch must have position_ids and no attention_mask, got"):
        pretrainer(attention="electra_fast")(**inputs)


def test_a_discriminator_without_a_logit_a_token_is_refused():
    generator, _ = halves("bert")
    for wrong, got in (
        (BertForTokenClassification(BertConfig(**SIZES, num_labels=2)), r"logits of shape \[2, 24, 2\]"),
        (BertForMaskedLM(BertConfig(**SIZES)), r"logits of shape \[2, 24, 300\]"),
        (BertModel(BertConfig(**SIZES)), "none"),
    ):
        model = ElectraPretrainer(generator, wrong, **SPECIAL)
        with pytest.raises(ValueError, match=rf"give one logit a token, \[2, 24\], got {got}; take Electra"):
            model(**batch(24, 11))


def test_what_no_longer_holds_together_is_refused():
    model = pretrainer()
    model.discriminator.electra.embeddings = copy.deepcopy(model.generator.electra.embeddings)
    with pytest.raises(
        ValueError, match="discriminator must have the generator's embeddings, got an embedding"
    ):
        model(**batch(24, 11))
    generator, discriminator = halves()
    generator.electra.embeddings = discriminator.electra.embeddings  # the wrong way round
    with pytest.raises(ValueError, match=r"a head of its own; generator.tie_weights\(\) ties them"):
        ElectraPretrainer(generator, discriminator, **SPECIAL)(**batch(24, 11))
    generator.tie_weights()
    ElectraPretrainer(generator, discriminator, **SPECIAL)(**batch(24, 11))
