"""The encoder and decoder: transformers' logits, loss and folders; packed as padded; what a token sees."""

import dataclasses
import json

import pytest
import torch
from small_tasks import CONFIG
from torch.nn.functional import cross_entropy

from electra_fast.decoder import IGNORE, EncoderDecoder, Sequences
from electra_fast.model import Discriminator
from electra_fast.modules import Layout

TWO_LAYERS = dataclasses.replace(CONFIG, layers=2)
SOURCES, TARGETS = (9, 4, 7), (5, 6, 1)  # lengths
RNG = torch.tensor([11, 3])


def model_of(config=TWO_LAYERS):
    """Return a model in eval mode whose weights are large enough that all outputs differ."""
    torch.manual_seed(0)
    model = EncoderDecoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


def padded(lengths, seed):
    """Return sequences of these lengths; their padding has ids too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, CONFIG.vocab_size, (len(lengths), max(lengths)), generator=generator)
    return Sequences(ids, Layout(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]))


def packed(sequences):
    mask = sequences.layout.key_mask
    bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return Sequences(sequences.ids[mask], Layout(None, bounds, int(mask.sum(1).max())))


@pytest.fixture(scope="module")
def batch():
    """(source, target, labels), padded."""
    source, target = padded(SOURCES, 1), padded(TARGETS, 2)
    labels = padded(TARGETS, 3).ids.masked_fill(~target.layout.key_mask, IGNORE)
    labels[1, 2] = IGNORE
    return source, target, labels


def packed_batch(source, target, labels):
    return packed(source), packed(target), labels[target.layout.key_mask]


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """The model that transformers loads from the folder, and the folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder_decoder")
    model.save_pretrained(folder)
    loaded, facts = transformers.EncoderDecoderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(facts.values()), facts
    return loaded.eval(), folder


def arguments(source, target):
    inputs = {"input_ids": source.ids, "attention_mask": source.layout.key_mask.long()}
    mask = target.layout.key_mask.long()
    return inputs | {"decoder_input_ids": target.ids, "decoder_attention_mask": mask}


def test_transformers_loads_the_folder_with_the_same_logits_and_loss(model, theirs, batch):
    loaded, _ = theirs
    source, target, labels = batch
    with torch.no_grad():
        out = loaded(**arguments(source, target))
        real = target.layout.key_mask
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(model.logits(source, target)[real], out.logits[real], **close)
        wanted = cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        torch.testing.assert_close(model(*batch), wanted, **close)
        chosen = out.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        wanted = chosen.masked_fill(labels == IGNORE, 0)
        torch.testing.assert_close(model.log_probs(*batch), wanted, **close)


def test_the_state_dict_is_transformers_in_both_directions(model, theirs, tmp_path):
    loaded, _ = theirs
    state = loaded.state_dict()
    assert {n: x.shape for n, x in model.state_dict().items()} == {n: x.shape for n, x in state.items()}
    other = EncoderDecoder(TWO_LAYERS)
    other.load_state_dict(state, strict=True)
    loaded.load_state_dict(other.state_dict(), strict=True)
    loaded.save_pretrained(tmp_path)
    again = EncoderDecoder.from_pretrained(tmp_path)
    for wanted, *found in zip(model.parameters(), other.parameters(), again.parameters(), strict=True):
        assert all(x.equal(wanted) for x in found)


def test_the_folder_says_where_a_target_begins_and_ends(theirs):
    loaded, folder = theirs
    ends = {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    for name in ("config.json", "generation_config.json"):
        assert ends.items() <= json.loads((folder / name).read_text()).items()
    assert ends.items() <= loaded.generation_config.to_dict().items()


def test_a_tied_table_that_differs_is_refused(model):
    state = model.state_dict()
    state["decoder.generator_lm_head.weight"] = state["decoder.generator_lm_head.weight"] + 1
    rule = "decoder.generator_lm_head.weight must equal decoder.electra.embeddings.word_embeddings.weight"
    with pytest.raises(RuntimeError, match=rule):
        EncoderDecoder(TWO_LAYERS).load_state_dict(state)


def test_halves_of_other_sizes_are_refused(theirs, tmp_path):
    _, folder = theirs
    described = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")

    def refused(match, **changes):
        (tmp_path / "config.json").write_text(json.dumps(described | changes))
        with pytest.raises(ValueError, match=match):
            EncoderDecoder.from_pretrained(tmp_path)

    refused("an encoder and a decoder of the same sizes", decoder=described["decoder"] | {"hidden_size": 64})
    refused("have an object for each of encoder and decoder", decoder=None)
    refused("is_decoder in config.json must be True", decoder=described["decoder"] | {"is_decoder": False})
    refused("model_type in config.json must be 'encoder-decoder', got 'electra'", model_type="electra")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_packed_batch_gives_the_loss_and_gradients_of_a_padded_one(batch, dropout):
    """Dropout is a function of a token's number in the batch, so it is compared for full batches."""
    model = model_of(dataclasses.replace(TWO_LAYERS, dropout=dropout)).double().train()
    if dropout:
        source, target = padded((6, 6), 1), padded((5, 5), 2)
        batch = source, target, padded((5, 5), 3).ids
    losses = [model(*each, rng=RNG) for each in (batch, packed_batch(*batch))]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert (model(*batch, rng=RNG + 1) == losses[0]) == (dropout == 0)


def test_each_use_of_dropout_has_a_stream_of_its_own(batch):
    from test_model import spy

    calls = []
    model = EncoderDecoder(dataclasses.replace(TWO_LAYERS, dropout=0.5), spy(calls)).train()
    model(*batch, rng=RNG)
    streams = [keywords["stream"] for _, keywords, _ in calls if keywords.get("dropout")]
    assert sorted(streams) == list(range(2, 2 + (1 + 2 * 3) + (1 + 2 * 5)))


def test_gradients_are_transformers(model, theirs, batch):
    loaded, _ = theirs
    source, target, labels = batch
    loaded.zero_grad()
    logits = loaded(**arguments(source, target)).logits.flatten(0, 1)
    cross_entropy(logits, labels.flatten(), ignore_index=IGNORE).backward()
    wanted = {name: p.grad for name, p in loaded.named_parameters()}
    model.zero_grad()
    model(*batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
        parts = [wanted[n] for n in model.hugging_face_names(name)]
        torch.testing.assert_close(parameter.grad, torch.cat(parts), rtol=1e-4, atol=1e-6)


def test_what_a_token_of_the_target_sees(model, batch):
    """It sees the tokens before it and its whole source; compared by bits, packed."""
    source, target, _ = packed_batch(*batch)
    with torch.no_grad():
        before = model.logits(source, target)

        def changed(what, t):
            ids = what.ids.clone()
            ids[t] = ids[t] % 100 + 6
            found = model.logits(
                *((what._replace(ids=ids), target) if what is source else (source, what._replace(ids=ids)))
            )
            return (found != before).any(-1).nonzero().flatten().tolist()

        assert changed(target, 0) == [0, 1, 2, 3, 4]
        assert changed(target, 7) == [7, 8, 9, 10]  # the third token of the second target
        assert changed(source, 10) == [5, 6, 7, 8, 9, 10]  # the second token of the second source
        assert changed(source, 19) == [11]


def test_all_labels_ignored_is_a_loss_of_0(batch):
    model = model_of()
    source, target, labels = batch
    loss = model(source, target, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert not model.log_probs(source, target, torch.full_like(labels, IGNORE)).any()


def test_it_starts_from_a_discriminator(tmp_path):
    torch.manual_seed(1)
    discriminator = Discriminator(TWO_LAYERS)
    discriminator.save_pretrained(tmp_path)
    model = EncoderDecoder.on_discriminator(tmp_path, dropout=0.25)
    assert model.config == dataclasses.replace(
        TWO_LAYERS, dropout=0.25, generator_layers=2, generator_hidden=32, generator_heads=2, generator_ffn=64
    )
    tower = discriminator.encoder
    assert model.encoder.state_dict().keys() == tower.state_dict().keys()
    for half in (model.encoder, model.decoder):
        assert half.embedding.words.equal(tower.embedding.words)
        assert half.layers[1].feed_forward.dense_in.weight.equal(tower.layers[1].feed_forward.dense_in.weight)
        assert half.layers[1].attention.qkv.weight.equal(tower.layers[1].attention.qkv.weight)
    assert model.encoder.embedding.words is not model.decoder.embedding.words
    with pytest.raises(ValueError, match="have the encoder of an ELECTRA"):
        (tmp_path / "model.safetensors").write_bytes(_without_words(tmp_path))
        EncoderDecoder.on_discriminator(tmp_path)


def _without_words(folder):
    from safetensors.torch import load_file, save

    tensors = load_file(folder / "model.safetensors")
    return save({name: x for name, x in tensors.items() if "word_embeddings" not in name})


def test_the_vocabulary_is_resized_in_all_tables():
    model = model_of()
    model.resize_token_embeddings(130)
    assert len(model.encoder.embedding.words) == len(model.decoder.embedding.words) == 130
    assert len(model.decoder.head.bias) == 130 == model.config.vocab_size


def test_transformers_generates_fused_with_the_weights_of_the_model(model, batch):
    generating = pytest.importorskip("electra_fast.hf.generating")
    state = torch.get_rng_state()
    fused = generating.generator(model)
    assert torch.get_rng_state().equal(state)
    assert fused.decoder.electra.embeddings.word_embeddings.weight is fused.decoder.generator_lm_head.weight
    source, target, _ = batch
    with torch.no_grad():
        torch.testing.assert_close(
            fused(**arguments(source, target)).logits, model.logits(source, target), rtol=1e-5, atol=1e-5
        )
