"""Heads for tasks: transformers' state dicts, logits and folders, gradients and dropout."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from small_heads import LABELS, SLOTS, batch, edit, loss_of, real, real_logits, small
from towers import CONFIG, assert_all_equal

from electra_fast import data
from electra_fast.heads import (
    Dropout,
    IntentClassifier,
    MultipleChoice,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
    first_tokens,
    on_encoder,
)
from electra_fast.linear import LowPrecisionWeights
from electra_fast.modules import Encoder
from electra_fast.ops import FUSED, REFERENCE, TORCH
from electra_fast.testing import assert_within_budget

pytest_plugins = ["small_tokenizer"]


def of_transformers(kind):
    """Return the class of transformers, and a config of the sizes of `small`."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.ElectraConfig(
        vocab_size=CONFIG.vocab_size,
        embedding_size=CONFIG.embedding,
        hidden_size=CONFIG.hidden,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        intermediate_size=CONFIG.ffn,
        max_position_embeddings=CONFIG.max_positions,
        id2label=dict(enumerate(LABELS[kind])),
        label2id={label: i for i, label in enumerate(LABELS[kind])},
    )
    return getattr(transformers, kind.hugging_face_class), config


@pytest.fixture(params=list(LABELS)[:4], ids=lambda kind: kind.__name__)
def pair(request):
    """One of our heads and transformers' model of the same sizes, both in eval mode."""
    kind, config = of_transformers(request.param)
    torch.manual_seed(1)
    return small(request.param), kind(config).eval()


def expected_logits(theirs, ids, type_ids, key_mask):
    """Return transformers' logits in the shape of ours."""
    given = {"input_ids": ids, "token_type_ids": type_ids, "attention_mask": key_mask.long()}
    if "MultipleChoice" in type(theirs).__name__:
        given = {name: x[:, None] for name, x in given.items()}
    with torch.no_grad():
        out = theirs(**given)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.logits[:, 0] if "MultipleChoice" in type(theirs).__name__ else out.logits


def assert_same_logits(ours, theirs):
    layouts = batch()
    expected = real(expected_logits(theirs, **layouts[0]), layouts[0])
    for given in layouts:
        with torch.no_grad():
            found = ours(**given)
        assert len(found) in (len(given["ids"]), len(given.get("cu_seqlens", [])) - 1)
        torch.testing.assert_close(real(found, given), expected, atol=1e-5, rtol=1e-5)


# --- the state dicts and folders of transformers ---


def test_state_dict_and_logits_are_transformers(pair):
    ours, theirs = pair
    shapes = [{name: x.shape for name, x in half.state_dict().items()} for half in pair]
    assert shapes[0] == shapes[1]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_logits(ours, theirs)


def test_loads_a_state_dict_of_transformers(pair):
    ours, theirs = pair
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_logits(ours, theirs)


def test_transformers_reads_a_saved_folder(pair, tmp_path):
    ours, theirs = pair
    ours.save_pretrained(tmp_path)
    loaded, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.id2label == dict(enumerate(ours.labels))
    assert loaded.config.label2id == {label: i for i, label in enumerate(ours.labels)}
    assert_same_logits(ours, loaded)


def test_reads_a_folder_that_transformers_saved(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path)
    assert not loaded.training and loaded.labels == ours.labels and loaded.problem is None
    assert_same_logits(loaded, theirs)


def test_labels_that_transformers_leaves_out(tmp_path):
    kind, config = of_transformers(SequenceClassifier)
    config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    kind(config).save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert SequenceClassifier.from_pretrained(tmp_path).labels == ("LABEL_0", "LABEL_1")
    head = on_encoder(tmp_path, lambda config: SequenceClassifier(config, ["LABEL_0", "LABEL_1"]))
    file = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(x, file[name]) for name, x in head.state_dict().items())


@pytest.mark.parametrize("kind", LABELS)
def test_a_saved_head_is_loaded_unchanged(kind, tmp_path):
    ours = small(kind)
    ours.problem = "single_label_classification"
    ours.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert (loaded.labels, loaded.problem) == (ours.labels, ours.problem)
    assert getattr(loaded, "slot_labels", None) == getattr(ours, "slot_labels", None)
    assert_all_equal(ours.state_dict().values(), loaded.state_dict().values())


PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_pipeline_for_texts_gives_the_same_scores(problem, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = small(SequenceClassifier, problem=problem)
    ours.save_pretrained(tmp_path)
    data.save_tokenizer(tokenizer, tmp_path)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path), top_k=None)
    with torch.no_grad():
        (logits,) = ours(torch.tensor([encoded(tokenizer, "the red cat sat .")]))
    wanted = {PROBLEMS[0]: logits.softmax(0), PROBLEMS[1]: logits.sigmoid(), PROBLEMS[2]: logits}[problem]
    (found,) = pipe(["the red cat sat ."])
    found = {each["label"]: each["score"] for each in found}
    assert found == pytest.approx(dict(zip(ours.labels, wanted.tolist(), strict=True)), abs=1e-5)


@pytest.mark.parametrize("kind", [TokenClassifier, IntentClassifier])
def test_the_pipeline_for_tokens_gives_the_same_tags(kind, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = small(kind)
    ours = ours.slot_tagger() if kind is IntentClassifier else ours
    ours.save_pretrained(tmp_path)
    data.save_tokenizer(tokenizer, tmp_path)
    pipe = transformers.pipeline("token-classification", model=str(tmp_path), ignore_labels=[])
    text = "when ran the red dog in"
    with torch.no_grad():
        (scores,) = ours(torch.tensor([encoded(tokenizer, text)])).softmax(-1)
    found = pipe(text)
    wanted = scores[1:-1].max(1)
    assert [each["entity"] for each in found] == [ours.labels[i] for i in wanted.indices]
    assert [each["score"] for each in found] == pytest.approx(wanted.values.tolist(), abs=1e-5)


def encoded(tokenizer, text):
    special = data.special_ids(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [special["[CLS]"], *ids, special["[SEP]"]]


def test_a_tagger_of_slots_has_the_slots_of_its_model():
    ours = small(IntentClassifier)
    before = torch.get_rng_state()
    tagger = ours.slot_tagger()
    assert torch.equal(torch.get_rng_state(), before)
    assert tagger.labels == SLOTS and not any(module.training for module in tagger.modules())
    for given in batch():
        with torch.no_grad():
            assert torch.equal(tagger(**given), ours(**given).slots)
    assert all(module.training for module in ours.train().slot_tagger().modules())


def test_transformers_loads_the_intents(tmp_path):
    kind, _ = of_transformers(IntentClassifier)
    ours = small(IntentClassifier)
    ours.save_pretrained(tmp_path)
    theirs, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    unused = {"slot_classifier.weight", "slot_classifier.bias"}
    assert report["unexpected_keys"] == unused and not report["missing_keys"]
    layouts = batch()
    expected = expected_logits(theirs, **layouts[0])
    with torch.no_grad():
        found = [ours(**given) for given in layouts]
    for out, given in zip(found, layouts, strict=True):
        torch.testing.assert_close(real(out.intents, given), expected, atol=1e-5, rtol=1e-5)
    rows, line = (real(out.slots, given) for out, given in zip(found, layouts, strict=True))
    torch.testing.assert_close(line, rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [{"1": "a", "2": "b"}, {"0": "a", "2": "b"}, ["a", "b"], "ab", 2])
@pytest.mark.parametrize("load", [SequenceClassifier.from_pretrained, on_encoder])
def test_labels_that_are_not_numbered_are_refused(bad, load, tmp_path):
    small(SequenceClassifier).save_pretrained(tmp_path)
    edit(tmp_path, id2label=bad)
    given = [] if load is not on_encoder else [lambda config: SequenceClassifier(config, "ab")]
    with pytest.raises(ValueError, match=r'id2label in config.json must be an object with the keys "0", "1"'):
        load(tmp_path, *given)


def test_an_intent_classifier_without_slot_labels_is_refused(tmp_path):
    small(SequenceClassifier).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an IntentClassifier must have slot_labels"):
        IntentClassifier.from_pretrained(tmp_path)


# --- the encoder's output at the first tokens only ---


class OfAllTokens:
    """A head that takes the first tokens from the encoder's output at all tokens."""

    only_first = False

    def head(self, x, layout, rng):
        first = first_tokens(x[..., 0], layout)
        return super().head(x.flatten(0, -2).index_select(0, first), layout, rng)


class PlainClassifier(OfAllTokens, SequenceClassifier):
    pass


class PlainChoice(OfAllTokens, MultipleChoice):
    pass


UNDROPPED = dataclasses.replace(CONFIG, dropout=0.0)


@pytest.mark.parametrize(
    "kind, plain", [(SequenceClassifier, PlainClassifier), (MultipleChoice, PlainChoice)]
)
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_rows_give_the_logits_and_gradients_of_all_tokens(kind, plain, layout):
    torch.manual_seed(2)
    given = batch()[layout]

    def results(kind, dtype, ops):
        head = small(kind, config=UNDROPPED, ops=ops).to(dtype).train()
        logits = real(head(**given), given)
        gradients = torch.autograd.grad(loss_of(logits, given), list(head.parameters()))
        names = [name for name, _ in head.named_parameters()]
        return {"logits": logits, **dict(zip(names, gradients, strict=True))}

    found = results(kind, torch.float32, FUSED)
    wanted = results(plain, torch.float64, REFERENCE)
    low = results(plain, torch.float32, TORCH)
    for name, x in wanted.items():
        assert_within_budget(name, found[name], x, low[name], factor=3.0)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
def test_every_implementation_gives_the_reference(kind, layout):
    torch.manual_seed(2)
    given = batch()[layout]

    def results(dtype, ops):
        head = small(kind, ops=ops).to(dtype).train()
        loss = loss_of(head(**given, rng=torch.tensor([5, 1])), given)
        names = [name for name, _ in head.named_parameters()]
        return {
            "loss": loss,
            **dict(zip(names, torch.autograd.grad(loss, list(head.parameters())), strict=True)),
        }

    found, wanted = results(torch.float32, FUSED), results(torch.float64, REFERENCE)
    low = results(torch.float32, TORCH)
    for name, x in wanted.items():
        assert_within_budget(name, found[name], x, low[name], factor=3.0)


# --- dropout ---


@pytest.mark.parametrize("kind", LABELS)
def test_dropout_is_a_function_of_rng(kind):
    head = small(kind).train()
    given = batch()[1]
    one, same, step, seed = (
        real_logits(head, given, rng=torch.tensor(rng)) for rng in ([5, 1], [5, 1], [5, 2], [6, 1])
    )
    assert_all_equal(one, same)
    assert not any(torch.equal(a, b) for other in (step, seed) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", LABELS)
def test_without_rng_training_draws_from_the_default_generator(kind):
    head = small(kind).train()
    given = batch()[1]
    torch.manual_seed(3)
    first, second = real_logits(head, given), real_logits(head, given)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(3)
    assert_all_equal(real_logits(head, given), first)
    state = torch.get_rng_state()
    assert_all_equal(real_logits(head.eval(), given), real_logits(head, given))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", LABELS)
def test_each_dropout_has_a_stream_of_its_own(kind, monkeypatch):
    """The encoder uses the first streams; the head must not draw the same numbers again."""
    seen = []
    head = small(kind).train()
    for module in head.modules():
        if isinstance(module, Dropout):
            monkeypatch.setattr(module, "forward", lambda x, rng, stream: seen.append(stream) or x)
    real_logits(head, batch()[1])
    used = 2 + Encoder.streams(CONFIG)
    assert seen == list(range(used, used + len(seen)))
    assert len(seen) == {QuestionAnswerer: 0, SequenceClassifier: 2, IntentClassifier: 3}.get(kind, 1)


def test_dropout_of_a_head_drops_and_scales():
    drop = Dropout(0.25)
    x, rng = torch.ones(64, 256), torch.tensor([1, 2])
    kept = drop(x, rng, 9) > 0
    assert torch.equal(drop(x, rng, 9), kept / torch.tensor(0.75))
    assert abs(kept.float().mean() - 0.75) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert torch.equal(drop.eval()(x, rng, 9), x)


# --- with the rest of PyTorch ---


@pytest.mark.parametrize("kind", LABELS)
def test_low_precision_weights_give_the_logits_of_autocast(kind):
    head, given = small(kind), batch()[1]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = real_logits(head, given)
        copies = LowPrecisionWeights(head, torch.bfloat16)
        found = real_logits(head, given)
        loss_of(head(**given), given).backward()
    assert_all_equal(found, wanted)
    assert {x.dtype for x in found} == {torch.float32}
    assert not any(torch.equal(x, x.bfloat16().float()) for x in found), "rounded to bfloat16"
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in head.parameters())
    copies.drop()
    for x, full in zip(found, real_logits(head, given), strict=True):
        assert (x.float() - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("kind", LABELS)
def test_shapes_are_those_on_the_meta_device(kind):
    head, given = small(kind), batch()[0]
    wanted = [x.shape for x in real_logits(head, {**given, "key_mask": given["key_mask"] | True})]
    with torch.device("meta"):
        ids = torch.empty(given["ids"].shape, dtype=torch.long)
        out = head.to("meta")(ids)
    found = out if isinstance(out, tuple) else (out,)
    assert [x.flatten(0, -2).shape if x.shape[:2] == ids.shape else x.shape for x in found] == wanted


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_copy_is_a_head_of_its_own(kind, twin_of, tmp_path):
    head, given = small(kind), batch()[1]
    twin = twin_of(head)
    assert_all_equal(real_logits(twin, given), real_logits(head, given))
    twin.save_pretrained(tmp_path)
    assert_all_equal(kind.from_pretrained(tmp_path).state_dict().values(), head.state_dict().values())
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(head.parameters()).any()
