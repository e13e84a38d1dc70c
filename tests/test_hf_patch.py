"""A patched model of transformers computes what it did, trains as it did, and goes back to the bit."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from electra_fast import hf
from electra_fast.hf.patching import OPTIONS

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 96, "max_position_embeddings": 40}
HEADS = ("Model", "ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
HEADS += ("ForQuestionAnswering", "ForMultipleChoice")
MODELS = [family + head for family in ("Electra", "Bert") for head in HEADS]
B, L = 3, 20
# Dynamo makes an object of each class that it meets, and after a graph break looks for .grad everywhere.
compiles = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not",
)


def build(name="ElectraForPreTraining", dropout=0.0, **change):
    family = "Electra" if name.startswith("Electra") else "Bert"
    sizes = SIZES | ({"embedding_size": 32} if family == "Electra" else {})
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "summary_last_dropout")
    sizes |= dict.fromkeys(names, dropout) | change
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes)).train()


def batch(name="ElectraForPreTraining"):
    """Ids with padding, types, and the labels that the model takes."""
    real = torch.arange(L) < torch.tensor([L, 7, 1])[:, None]
    ids = torch.randint(104, 300, (B, L)) * real
    inputs = {"input_ids": ids, "attention_mask": real.long(), "token_type_ids": ids % 2}
    masked = torch.where(torch.rand(B, L) < 0.3, ids, -100)
    masked[0, 0] = 5
    head = name.removeprefix("Electra").removeprefix("Bert")
    labels = {
        "ForPreTraining": {"labels": torch.randint(0, 2, (B, L))},
        "ForMaskedLM": {"labels": masked},
        "ForSequenceClassification": {"labels": torch.randint(0, 2, (B,))},
        "ForTokenClassification": {"labels": torch.randint(0, 2, (B, L))},
        "ForQuestionAnswering": {k: torch.randint(0, 7, (B,)) for k in ("start_positions", "end_positions")},
        "ForMultipleChoice": {"labels": torch.zeros(1, dtype=torch.long)},
    }.get(head, {})
    if name == "BertForPreTraining":
        labels = {"labels": masked, "next_sentence_label": torch.randint(0, 2, (B,))}
    if head == "ForMultipleChoice":  # one example of three choices
        inputs = {k: x[None] for k, x in inputs.items()}
    return inputs | labels


def outcome(model, inputs):
    """Return the tensors that a model puts out, and the gradients of their sum or of the loss, by name."""
    model.zero_grad()
    out = {k: x for k, x in model(**inputs).items() if isinstance(x, torch.Tensor)}
    generator = torch.Generator().manual_seed(0)
    loss = out.get("loss")
    if loss is None:
        loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in out.values())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {k: x.detach() for k, x in out.items()}, gradients


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_it_did_to_fifteen_digits(name):
    theirs, inputs = build(name).double(), batch(name)
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    if name.endswith("ForMaskedLM"):
        assert a.keys() == {"loss"} and b.keys() == {"loss", "logits"}
    else:
        assert a.keys() == b.keys()
    assert da.keys() == db.keys()
    real = inputs["attention_mask"].bool()
    for k in a:
        x, y = (o[k][real] if o[k].shape[:2] == real.shape else o[k] for o in (a, b))
        # transformers' binary cross-entropy is in float32, the dtype that it gives its labels.
        rtol = 1e-6 if k == "loss" else 1e-9
        torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=1e-9)
    for k in da:
        torch.testing.assert_close(da[k], db[k], rtol=1e-6, atol=1e-9, msg=k)


def test_the_padding_row_learns_from_the_softmax_alone():
    theirs, inputs = build("ElectraForMaskedLM").double(), batch("ElectraForMaskedLM")
    inputs.pop("attention_mask")  # so that padding has a part in everything
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    rows = [outcome(m, inputs)[1]["electra.embeddings.word_embeddings.weight"][0] for m in (ours, theirs)]
    torch.testing.assert_close(*rows, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_undo_gives_the_same_bits(name):
    model, inputs = build(name, dropout=0.1), batch(name)

    def run():
        torch.manual_seed(0)
        return outcome(model, inputs)

    before, state, classes = run(), model.state_dict(), [type(m) for m in model.modules()]
    with hf.patch(model) as patched:
        assert list(model.state_dict()) == list(state)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True)
        )
        assert type(model).__name__ == name and isinstance(model, classes[0])
        assert inspect.signature(type(model).forward) == inspect.signature(classes[0].forward)
        run()
    assert [type(m) for m in model.modules()] == classes and "not asked for" in str(patched)
    for ours, theirs in zip(run(), before, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_another_model_of_the_same_config_stays_as_it_is():
    config = build().config
    one, other = (transformers.ElectraForPreTraining(config) for _ in range(2))
    inputs = batch()
    before = other.eval()(**inputs)
    hf.patch(one)
    assert "not asked for" in str(hf.Patched(other)) and config._attn_implementation == "sdpa"
    assert torch.equal(other(**inputs).logits, before.logits)


@pytest.mark.parametrize("option", OPTIONS)
def test_one_option_at_a_time(option):
    for name in ("ElectraForPreTraining", "BertForMaskedLM"):
        theirs, inputs = build(name).double(), batch(name)
        ours = copy.deepcopy(theirs)
        patched = hf.patch(ours, **{o: o == option for o in OPTIONS})
        for opt, cls, fused, *_ in patched.rows():
            assert not cls or (fused[:2] == "0 ") == (opt != option), (opt, cls, fused)
        (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
        torch.testing.assert_close(a["loss"].double(), b["loss"].double(), rtol=1e-6, atol=0)
        for k in da:
            torch.testing.assert_close(da[k], db[k], rtol=1e-6, atol=1e-9, msg=k)


def test_a_second_patch_changes_nothing():
    model = build()
    first = str(hf.patch(model))
    assert first.endswith("as before: electra.embeddings_project")
    classes = [type(m) for m in model.modules()]
    assert str(hf.patch(model)) == first and [type(m) for m in model.modules()] == classes


def test_models_that_share_an_embedding_are_patched_one_after_the_other():
    g, d = build("ElectraForMaskedLM"), build()
    d.electra.embeddings = g.electra.embeddings
    hf.patch(g)
    hf.patch(d)
    hf.patch(nn.ModuleList([g, d]))
    assert all("0 of" not in str(hf.Patched(m)) for m in (g, d))


def test_copies_and_pickles_are_patched_too():
    model, inputs = build(), batch()
    hf.patch(model).model.eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(hf.Patched(again)) == str(hf.Patched(model))
        assert torch.equal(again(**inputs).loss, model(**inputs).loss)
        hf.Patched(again).undo()
        assert type(again) is transformers.ElectraForPreTraining
    assert type(model) is not transformers.ElectraForPreTraining


def test_saves_what_an_unpatched_transformers_loads(tmp_path):
    model = build("ElectraForMaskedLM").eval()
    hf.patch(model)
    model.save_pretrained(tmp_path)
    again = transformers.ElectraForMaskedLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["ElectraForMaskedLM"]
    assert type(again) is transformers.ElectraForMaskedLM
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_hooks_and_recorded_states_stay():
    theirs, inputs = build("ElectraModel").eval(), batch("ElectraModel")
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    seen = []
    for model in (ours, theirs):
        model.encoder.layer[0].output.register_forward_hook(lambda m, args, y: seen.append(y))
    real = inputs["attention_mask"].bool()
    states = [m(**inputs, output_hidden_states=True).hidden_states for m in (ours, theirs)]
    assert len(states[0]) == len(states[1]) == 3
    for x, y in (*zip(*states, strict=True), seen):
        torch.testing.assert_close(x[real], y[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["hook", "pre-hook", "forward"])
def test_a_layer_whose_parameters_an_op_reads_can_be_hooked(way):
    model, inputs, seen = build(), batch(), []
    patched = hf.patch(model)
    dense = model.electra.encoder.layer[0].intermediate.dense
    if way == "hook":
        dense.register_forward_hook(lambda *_: seen.append(1))
    elif way == "pre-hook":
        dense.register_forward_pre_hook(lambda *_: seen.append(1))
    else:
        own = dense.forward
        dense.forward = lambda x: seen.append(1) or own(x)
    model(**inputs)
    rows = {cls: (fused, why) for _, cls, fused, _, why in patched.rows()}
    assert seen == [1] and rows["ElectraIntermediate"] == ("1 of 2", "dense has hooks")


def test_weights_are_asked_for_as_before():
    model = build().eval()
    hf.patch(model)
    assert model(**batch(), output_attentions=True).logits.shape == (B, L)
    model.set_attn_implementation("eager")
    assert model(**batch(), output_attentions=True).attentions[0].shape == (B, 2, L, L)
    assert 'the config asks for "eager"' in str(hf.Patched(model))


def test_gradient_checkpointing_replays_dropout():
    model, inputs = build("ElectraForMaskedLM", dropout=0.2), batch("ElectraForMaskedLM")
    # transformers puts a hook on the word embeddings, so that these run unfused and draw otherwise.
    hf.patch(model, embeddings=False)
    runs = []
    for enable in (False, True):
        if enable:
            for layer in model.electra.encoder.layer:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = _checkpoint
        torch.manual_seed(3)
        runs.append(outcome(model, inputs))
    for a, b in zip(*runs, strict=True):
        assert a and all(torch.equal(a[k], b[k]) for k in a)


def _checkpoint(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def test_dropout_drops_and_obeys_manual_seed():
    model, inputs = build(dropout=0.5), batch()
    hf.patch(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss)
    assert losses[0] == losses[1] != losses[2]
    model.electra.encoder.layer[0].output.dropout.eval()  # one place alone
    torch.manual_seed(1)
    assert model(**inputs).loss != losses[0]


@pytest.mark.parametrize("place", ["embeddings", "attention.self", "attention.output", "layer.1.output"])
def test_each_place_drops(place):
    model, inputs = build(dropout=0.5), batch()
    hf.patch(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Dropout) and place not in name:
            layer.p = 0.0
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(model.eval()(**inputs).loss, model(**inputs).loss)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_lora_in_place_of_any_linear_layer():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value", "dense"], init_lora_weights=False)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("ElectraForSequenceClassification"), config)
    ours = copy.deepcopy(theirs)
    patched = hf.patch(ours)
    inputs = batch("ElectraForSequenceClassification")
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-5, atol=0)
    assert da.keys() == db.keys() and any("lora_A" in k for k in da)
    for k in da:
        torch.testing.assert_close(da[k], db[k], rtol=1e-3, atol=1e-6, msg=k)
    rows = {cls: (fused, why) for _, cls, fused, _, why in patched.rows()}
    assert rows["ElectraIntermediate"] == ("0 of 2", "dense is peft.tuners.lora.layer.Linear")
    assert rows["ElectraSelfOutput"] == rows["ElectraSelfAttention"] == ("2 of 2", "")


@compiles
@pytest.mark.parametrize(("name", "breaks"), [("ElectraForPreTraining", 2), ("ElectraForMaskedLM", 0)])
def test_no_graph_break(name, breaks):
    model, inputs = build(name, dropout=0.1), batch(name)
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(**inputs).graph_break_count == breaks
    patched = hf.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**inputs).loss.backward()
    patched.undo()  # what was compiled is not what runs
    model.eval(), torch._dynamo.reset()
    inputs.pop("labels")
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embeddings", [True, False])
def test_autocast(dtype, embeddings):
    for name in ("ElectraForPreTraining", "ElectraForMaskedLM"):
        theirs, inputs = build(name), batch(name)
        ours = copy.deepcopy(theirs)
        hf.patch(ours, embeddings=embeddings)
        with torch.autocast("cpu", dtype):
            (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
            states = [m.electra(inputs["input_ids"]).last_hidden_state.dtype for m in (ours, theirs)]
        assert states[0] == states[1]
        torch.testing.assert_close(a["loss"].float(), b["loss"].float(), rtol=0.02, atol=0)
        assert all(da[k].dtype == db[k].dtype == torch.float32 for k in db)


def test_weights_in_bfloat16():
    theirs, inputs = build("ElectraForMaskedLM").bfloat16(), batch("ElectraForMaskedLM")
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    torch.testing.assert_close(a["loss"].float(), b["loss"].float(), rtol=0.02, atol=0)
    assert all(da[k].dtype == torch.bfloat16 for k in db)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    model, inputs = build(), batch()
    hf.patch(model)
    (a, da), (b, db) = outcome(DistributedDataParallel(model), inputs), outcome(model, inputs)
    assert torch.equal(a["loss"], b["loss"]) and all(torch.equal(da[f"module.{k}"], db[k]) for k in db)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("patch_first", [True, False])
def test_fully_shard(one_process, patch_first):
    theirs, inputs = build(), batch()
    ours = copy.deepcopy(theirs)
    patched = hf.patch(ours) if patch_first else None
    for part in (*ours.electra.encoder.layer, ours):
        fully_shard(part)
    patched = patched or hf.patch(ours)
    loss = ours(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, theirs(**inputs).loss, rtol=1e-5, atol=0)
    if patch_first:
        with pytest.raises(ValueError, match="undo must find FSDPElectraForPreTraining as patch left it"):
            patched.undo()
    else:
        patched.undo()
        assert type(ours).__name__ == "FSDPElectraForPreTraining" and "not asked for" in str(patched)


def test_logits_where_they_are_asked_for():
    model, inputs = build("ElectraForMaskedLM"), batch("ElectraForMaskedLM")
    hf.patch(model)
    assert model(**inputs).logits is None
    asked = model(**inputs, output_logits=True)
    assert asked.logits.shape == (B, L, 300)
    torch.testing.assert_close(asked.loss, model(**inputs).loss, rtol=1e-5, atol=0)
    as_tuple = model(**inputs, return_dict=False)
    assert len(as_tuple) == 1 and as_tuple[0] == model(**inputs).loss
    assert model.eval()(**inputs).logits.shape == (B, L, 300)


def test_no_label_costs_nothing():
    for name in ("ElectraForMaskedLM", "ElectraForPreTraining"):
        model, inputs = build(name), batch(name)
        hf.patch(model)
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        inputs["attention_mask"] = inputs["attention_mask"] * 0
        assert model(**inputs).loss == 0


def test_labels_between_0_and_1_are_transformers_business():
    theirs, inputs = build(), batch()
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    inputs["labels"] = torch.rand(B, L)
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, rtol=1e-5, atol=0)


def test_vectors_in_place_of_ids():
    theirs, inputs = build(), batch()
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    inputs["inputs_embeds"] = theirs.get_input_embeddings()(inputs.pop("input_ids")).detach()
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, rtol=1e-5, atol=0)


def test_packed_sequences():
    model, inputs = build().eval(), batch()
    hf.patch(model)
    real = inputs["attention_mask"].bool()
    places = torch.cat([torch.arange(n) for n in real.sum(1)])[None]
    bounds = torch.tensor([0, 20, 27, 28], dtype=torch.int32)
    packed = {"input_ids": inputs["input_ids"][real][None], "position_ids": places, "cu_seq_lens_q": bounds}
    packed |= {"token_type_ids": inputs["token_type_ids"][real][None], "max_length_q": 20}
    logits = model(**packed, cu_seq_lens_k=bounds, max_length_k=20).logits
    torch.testing.assert_close(logits[0], model(**inputs).logits[real], rtol=1e-4, atol=1e-5)


class Narrower(transformers.ElectraForMaskedLM):
    """A user's class with a forward pass of its own."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids[:, :5], **kwargs)


def test_a_class_of_the_users_keeps_its_forward_pass():
    model = Narrower(build("ElectraForMaskedLM").config).train()
    patched = hf.patch(model)
    assert model(torch.ones(2, 9, dtype=torch.long)).logits.shape == (2, 5, 300)
    by_class = {cls: fused for _, cls, fused, *_ in patched.rows()}
    assert by_class["ElectraSelfAttention"] == "2 of 2" and "Narrower" not in by_class


def compiled_in_place():
    model = build()
    model.compile(backend="eager")
    return model


def with_a_forward_pass_of_its_own():
    model = build()
    model.forward = model.forward
    return model


def patched_otherwise():
    model = build()
    hf.patch(model)
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: "google/electra-small", {}, TypeError, "model must be a torch.nn.Module, got str"),
        (
            lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
            {},
            TypeError,
            "model must have ELECTRA's or BERT's encoder of transformers, got RobertaModel",
        ),
        (
            lambda: build("BertModel", is_decoder=True),
            {},
            ValueError,
            "BertModel must be an encoder, got is_decoder=True",
        ),
        (
            lambda: torch.compile(build(), backend="eager"),
            {},
            ValueError,
            "OptimizedModule must not be compiled yet, got a compiled module; patch first, then compile",
        ),
        (compiled_in_place, {}, ValueError, "ElectraForPreTraining must not be compiled yet"),
        (
            with_a_forward_pass_of_its_own,
            {},
            ValueError,
            "ElectraForPreTraining must run its class's forward pass, got another, set on the module",
        ),
        (
            patched_otherwise,
            {"norm": False},
            ValueError,
            "attention.output must not be patched with other options, got norm fused already; undo()",
        ),
    ],
)
def test_what_cannot_be_patched_is_refused_by_name(model, options, error, message):
    model = model()
    before = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error) as caught:
        hf.patch(model, **options)
    assert f"electra_fast.hf.patch: {message}" in str(caught.value) or message in str(caught.value)
    assert before == ([type(m) for m in model.modules()] if before else [])


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "ElectraForMaskedLM",
            {"labels": torch.zeros(B, L - 1, dtype=torch.long)},
            ValueError,
            "electra_fast.hf: labels must have a label a token, shape [3, 20], got [3, 19]",
        ),
        (
            "ElectraForPreTraining",
            {"labels": torch.zeros(B, dtype=torch.long)},
            ValueError,
            "electra_fast.hf: labels must have a label a token, shape [3, 20], got [3]",
        ),
        (
            "ElectraForPreTraining",
            {"attention_mask": torch.ones(B, 1, L, L, dtype=torch.bool)},
            ValueError,
            "electra_fast.hf: attention_mask must be [B, L] where labels are given, got [3, 1, 20, 20]",
        ),
        (
            "ElectraModel",
            {"attention_mask": torch.ones(B, 1, L, L, dtype=torch.bool)},
            NotImplementedError,
            "electra_fast.hf: attention_mask must be [B, L], got [3, 1, 20, 20]",
        ),
        (
            "ElectraForMaskedLM",
            {"labels": torch.full((B, L), 300)},
            IndexError,
            "mlm_head: targets must be in [0, 300), got 300",
        ),
        (
            "ElectraModel",
            {"input_ids": torch.full((B, L), 300)},
            IndexError,
            "embed: ids must be in [0, 300), got 300",
        ),
    ],
)
def test_a_bad_batch_is_refused_by_name(name, change, error, message):
    model = build(name)
    hf.patch(model)
    with pytest.raises(error) as caught:
        model(**{**batch(name), **change})
    assert message in str(caught.value)
