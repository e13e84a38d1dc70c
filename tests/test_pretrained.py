"""Each half has the names, shapes, logits and folder format of Hugging Face's model."""

import errno
import json
import re

import pytest
import torch
from towers import CONFIG, assert_all_equal, padded

from electra_fast.model import Discriminator, Electra, Generator

HALVES = {"ElectraForPreTraining": Discriminator, "ElectraForMaskedLM": Generator}


@pytest.fixture(params=HALVES)
def halves(request):
    """One of our halves and transformers' model of the same sizes, both in eval mode."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    ours = HALVES[request.param](CONFIG).eval()
    config = ours.config
    theirs = transformers.ElectraConfig(
        vocab_size=config.vocab_size,
        embedding_size=config.embedding,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        max_position_embeddings=config.max_positions,
    )
    return ours, getattr(transformers, request.param)(theirs).eval()


def assert_same_logits(ours, theirs):
    ids, key_mask = padded(24, 1, 13)
    types = torch.randint(0, 2, ids.shape)
    with torch.no_grad():
        logits = ours(ids, type_ids=types, key_mask=key_mask)
        expected = theirs(ids, attention_mask=key_mask.long(), token_type_ids=types).logits
    torch.testing.assert_close(logits[key_mask], expected[key_mask], atol=1e-5, rtol=1e-5)


def test_state_dict_is_hugging_faces(halves):
    ours, theirs = halves
    shapes = [{name: t.shape for name, t in half.state_dict().items()} for half in halves]
    assert shapes[0] == shapes[1]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_logits(ours, theirs)


def test_loads_a_hugging_face_state_dict(halves):
    ours, theirs = halves
    state = theirs.state_dict()
    state["electra.embeddings.position_ids"] = torch.arange(40)[None]  # in older files
    ours.load_state_dict(state, strict=True)
    assert_same_logits(ours, theirs)


def test_inside_electra_each_half_keeps_its_names(halves):
    ours, _ = halves
    model = Electra(CONFIG)
    half = model.generator if isinstance(ours, Generator) else model.discriminator
    assert half.state_dict().keys() == ours.state_dict().keys()
    half.load_state_dict(ours.state_dict())
    assert_all_equal(half.state_dict().values(), ours.state_dict().values())
    assert model.generator.encoder.embedding is model.discriminator.encoder.embedding


def test_transformers_reads_a_saved_folder(halves, tmp_path):
    ours, theirs = halves
    ours.save_pretrained(tmp_path)
    loaded, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_logits(ours, loaded)


def test_reads_a_folder_that_transformers_saved(halves, tmp_path):
    _, theirs = halves
    theirs.save_pretrained(tmp_path)
    loaded = type(halves[0]).from_pretrained(tmp_path)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert_same_logits(loaded, theirs)


@pytest.mark.parametrize("half", HALVES.values())
def test_a_saved_half_is_loaded_unchanged(half, tmp_path):
    ours = half(CONFIG).to(torch.bfloat16)
    ours.save_pretrained(tmp_path / "new" / "folder")
    loaded = half.from_pretrained(tmp_path / "new" / "folder")
    assert (loaded.config.layers, loaded.config.hidden) == (ours.config.layers, ours.config.hidden)
    assert ours.state_dict().keys() == loaded.state_dict().keys()
    assert_all_equal(ours.state_dict().values(), loaded.state_dict().values())


def test_weights_that_do_not_fit_are_refused_and_named(tmp_path):
    Discriminator(CONFIG).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*generator_lm_head.bias.*Unexpected.*_pred"):
        Generator.from_pretrained(tmp_path)

    ours = Generator(CONFIG)
    query = "electra.encoder.layer.0.attention.self.query.weight"
    state = ours.state_dict()
    del state[query]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{query}"'):
        ours.load_state_dict(state)
    assert ours.load_state_dict(state, strict=False).missing_keys == [query]

    with pytest.raises(RuntimeError, match=f"size mismatch for {query}"):
        ours.load_state_dict(ours.state_dict() | {query: torch.zeros(8, 16)})
    with pytest.raises(RuntimeError, match=r"generator_lm_head\.weight must equal"):
        ours.load_state_dict(ours.state_dict() | {"generator_lm_head.weight": torch.zeros(300, 24)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act in config.json must be 'gelu', got 'relu'"),
        ({"model_type": "bert"}, "model_type in config.json must be 'electra', got 'bert'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings in config.json must be True"),
        ({"attention_probs_dropout_prob": 0.3}, "attention_probs_dropout_prob in config.json"),
        ({"num_attention_heads": 5}, "hidden must be divisible by heads"),
    ],
)
def test_an_unsupported_config_is_refused(change, message, tmp_path):
    Discriminator(CONFIG).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Discriminator.from_pretrained(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must contain model\.safetensors"):
        Discriminator.from_pretrained(tmp_path)


def test_the_error_for_a_name_of_the_hub_says_how_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "`hf download google/electra-small-discriminator --local-dir electra-small-discriminator`"
    with pytest.raises(FileNotFoundError, match=re.escape(command)):
        Discriminator.from_pretrained("google/electra-small-discriminator")


@pytest.mark.parametrize("dtypes, wanted", [((16, 32), torch.float32), (("b16", 16), torch.float32)])
def test_several_dtypes_become_the_one_that_represents_them_all(tmp_path, dtypes, wanted):
    from safetensors.torch import load_file, save_file

    names = {16: torch.float16, 32: torch.float32, "b16": torch.bfloat16}
    ours = Discriminator(CONFIG)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mixed = {n: t.to(names[dtypes[i % 2]]) for i, (n, t) in enumerate(tensors.items())}
    save_file(mixed, tmp_path / "model.safetensors")
    loaded = Discriminator.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert_all_equal(loaded.state_dict().values(), [mixed[n].to(wanted) for n in loaded.state_dict()])


@pytest.mark.parametrize("failing", ["write_text", "replace", "save_file"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, failing):
    import safetensors.torch

    ours = Discriminator(CONFIG)
    ours.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        if failing == "save_file":
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = safetensors.torch if failing == "save_file" else type(tmp_path)
    monkeypatch.setattr(owner, failing, full)
    with pytest.raises(OSError, match=f"save_pretrained: {tmp_path} must be writable, got .*No space"):
        Discriminator(CONFIG).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
