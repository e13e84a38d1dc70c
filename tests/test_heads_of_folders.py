"""What a head takes from a folder: the encoder, the head for the same labels, rows of another head."""

import copy
import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_heads import LABELS, SLOTS, edit, small
from towers import CONFIG, assert_all_equal

from electra_fast.heads import IntentClassifier, SequenceClassifier, TokenClassifier, on_encoder
from electra_fast.model import Discriminator, Generator


def classifier(config):
    return SequenceClassifier(config, LABELS[SequenceClassifier])


@pytest.mark.parametrize("half", [Discriminator, Generator])
@pytest.mark.parametrize("saver", ["ours", "transformers"])
def test_a_new_head_on_a_pre_trained_encoder(half, saver, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    half(CONFIG).save_pretrained(tmp_path)
    if saver == "transformers":
        getattr(transformers, half.hugging_face_class).from_pretrained(tmp_path).save_pretrained(tmp_path)
    heads = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        heads.append(on_encoder(tmp_path, classifier))
    first, same, other = ({n: x for n, x in head.state_dict().items()} for head in heads)
    file = load_file(tmp_path / "model.safetensors")
    for name, x in first.items():
        assert torch.equal(x, same[name])
        if name.startswith("electra."):
            assert torch.equal(x, file[name]) and torch.equal(x, other[name])
        else:
            assert torch.equal(x, other[name]) == name.endswith("bias")
    assert heads[0].training and heads[0].labels == LABELS[SequenceClassifier]


@pytest.mark.parametrize("kind", LABELS)
def test_a_head_for_the_same_labels_is_kept(kind, tmp_path):
    ours = small(kind)
    ours.save_pretrained(tmp_path)
    more = [SLOTS] if kind is IntentClassifier else []
    found = on_encoder(tmp_path, lambda config: kind(config, LABELS[kind], *more), dropout=0.25)
    assert_all_equal(found.state_dict().values(), ours.state_dict().values())
    assert found.config.dropout == 0.25 and found.config.layers == CONFIG.layers


@pytest.mark.parametrize("labels", [("neutral", "negative", "positive"), ("negative", "neutral"), "abc"])
def test_a_head_for_other_labels_is_new(labels, tmp_path):
    ours = small(SequenceClassifier)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(5)
    found = on_encoder(tmp_path, lambda config: SequenceClassifier(config, labels))
    torch.manual_seed(5)
    new = SequenceClassifier(CONFIG, labels)
    assert_all_equal(found.classifier.parameters(), new.classifier.parameters())
    assert_all_equal(found.encoder.parameters(), ours.encoder.parameters())


def test_a_head_for_other_slots_is_new(tmp_path):
    ours = small(IntentClassifier)
    ours.save_pretrained(tmp_path)
    slots = SLOTS[:1] + SLOTS[:0:-1]
    found = on_encoder(tmp_path, lambda config: IntentClassifier(config, LABELS[IntentClassifier], slots))
    assert not torch.equal(found.classifier.out.weight, ours.classifier.out.weight)
    assert not torch.equal(found.slot_classifier.weight, ours.slot_classifier.weight)
    assert_all_equal(found.encoder.parameters(), ours.encoder.parameters())


def removed(tensors):
    del tensors["electra.encoder.layer.1.attention.self.key.bias"]


def of_another_model(tensors):
    for name in [name for name in tensors if name.startswith("electra.")]:
        tensors[name.replace("electra.", "bert.")] = tensors.pop(name)


def cut_off(tensors):
    tensors["electra.embeddings.word_embeddings.weight"] = tensors[
        "electra.embeddings.word_embeddings.weight"
    ][:200].clone()


@pytest.mark.parametrize(
    "change, message",
    [
        (removed, r"without a fitting electra\.encoder\.layer\.1\.attention\.self\.key\.bias$"),
        (of_another_model, "num_hidden_layers in .* must be 0"),
        (cut_off, r"without a fitting electra\.embeddings\.word_embeddings\.weight$"),
    ],
)
def test_a_folder_without_a_whole_encoder_is_refused(change, message, tmp_path):
    Discriminator(CONFIG).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        on_encoder(tmp_path, classifier)


def test_a_folder_of_another_size_than_its_config_is_refused(tmp_path):
    Discriminator(CONFIG).save_pretrained(tmp_path)
    edit(tmp_path, hidden_size=64)
    message = "--model must have the encoder of an ELECTRA, got .* without a fitting electra"
    with pytest.raises(ValueError, match=message):
        on_encoder(tmp_path, classifier)
    with pytest.raises(FileNotFoundError, match="nothing, which does not exist"):
        on_encoder(tmp_path / "nothing", classifier)


# --- the head of another task ---


def test_rows_of_a_head_are_copied_by_label(tmp_path):
    old = SequenceClassifier(CONFIG, ["contradiction", "entailment", "neutral"])
    old.save_pretrained(tmp_path)
    new = SequenceClassifier(CONFIG, ["entailment", "not_entailment"])
    before = copy.deepcopy(new.state_dict())
    assert new.copy_head(tmp_path) == 1
    for layer in ("weight", "bias"):
        found, was = new.state_dict()["classifier.out_proj." + layer], before["classifier.out_proj." + layer]
        assert torch.equal(found[0], old.state_dict()["classifier.out_proj." + layer][1])
        assert torch.equal(found[1], was[1])
    assert torch.equal(new.classifier.dense.weight, old.classifier.dense.weight)
    encoder = [name for name in before if name.startswith("electra.")]
    assert all(torch.equal(before[name], new.state_dict()[name]) for name in encoder)


@pytest.mark.parametrize("kind", LABELS)
def test_a_head_for_the_same_labels_is_copied_whole(kind, tmp_path):
    old, new = small(kind), small(kind, seed=1)
    old.save_pretrained(tmp_path)
    assert new.copy_head(tmp_path) == len(LABELS[kind])
    for name, x in new.state_dict().items():
        assert torch.equal(x, old.state_dict()[name]) != name.startswith("electra.")


def test_as_many_labels_as_columns_leave_the_inner_layer_in_order(tmp_path):
    labels = [f"label {i}" for i in range(CONFIG.hidden)]
    old, new = SequenceClassifier(CONFIG, labels), SequenceClassifier(CONFIG, labels[::-1])
    old.save_pretrained(tmp_path)
    assert new.copy_head(tmp_path) == CONFIG.hidden
    assert torch.equal(new.classifier.dense.weight, old.classifier.dense.weight)
    assert torch.equal(new.classifier.out.weight, old.classifier.out.weight.flip(0))


def test_slots_are_copied_by_label(tmp_path):
    old = small(IntentClassifier)
    new = IntentClassifier(CONFIG, ["rate", "play", "stop"], ["O", "B-who", "I-who"])
    old.save_pretrained(tmp_path)
    assert new.copy_head(tmp_path) == 2
    assert torch.equal(new.slot_classifier.weight[:2], old.slot_classifier.weight[[0, 3]])
    assert torch.equal(new.classifier.out.weight[:2], old.classifier.out.weight.flip(0))
    assert not torch.equal(new.slot_classifier.weight[2], old.slot_classifier.weight[2])


@pytest.mark.parametrize("new, old", list(itertools.permutations(LABELS, 2)))
def test_a_head_of_another_class_is_refused(new, old, tmp_path):
    small(old).save_pretrained(tmp_path)
    head = small(new)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=r"--init-head|slot_labels") as error:
        head.copy_head(tmp_path)
    assert "\n" not in str(error.value)
    assert_all_equal(head.state_dict().values(), before.values())


def test_a_head_of_another_size_is_refused(tmp_path):
    small(TokenClassifier, config=dataclasses.replace(CONFIG, hidden=48)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"must have the head of TokenClassifier for hidden_size 32, got .* 48$"
    ):
        small(TokenClassifier).copy_head(tmp_path)
