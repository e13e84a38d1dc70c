"""What the towers share, which gradients shared tables get, and how a broken sharing is refused."""

import copy
import dataclasses
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from towers import CONFIG, assert_all_equal, padded

from electra_fast.model import Discriminator, Electra, Generator
from electra_fast.modules import Layout
from electra_fast.ops import FUSED
from electra_fast.reference import Embedded

EQUAL = {"generator_layers": 2, "generator_hidden": 32, "generator_heads": 2, "generator_ffn": 64}
RNG = torch.tensor([11, 3])
SHARING = ("none", "embeddings", "gdes", "all")
WORDS = "electra.embeddings.word_embeddings.weight"


def electra(sharing, ops=FUSED, **change):
    return Electra(dataclasses.replace(CONFIG, **EQUAL, sharing=sharing, **change), ops)


def learned(model):
    """Return the model with random parameters, so that biases and differences are not zero."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


# --- shared tables stay shared when the model changes ---


def through_state_dict(model):
    other = Electra(model.config)
    other.load_state_dict(model.state_dict())
    return other


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Electra(model.config)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return other


def resized(model):
    model.resize_token_embeddings(310)
    model.resize_token_embeddings(300)
    return model


CHANGES = {
    "as made": lambda model: model,
    "deepcopy": copy.deepcopy,
    "to": lambda model: copy.deepcopy(model).to(torch.bfloat16).to(torch.float32),
    "load_state_dict": through_state_dict,
    "a file, assigned": through_a_file,
    "resize_token_embeddings": resized,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("sharing", SHARING)
def test_shared_tables_stay_shared(sharing, change):
    model = learned(electra(sharing))
    same = CHANGES[change](model)
    generator, discriminator = same.generator.encoder, same.discriminator.encoder
    same.check_sharing()
    assert (generator.embedding is discriminator.embedding) == (sharing in ("embeddings", "all"))
    assert (generator is discriminator) == (sharing == "all")
    assert sharing != "gdes" or discriminator.embedding.shared is generator.embedding
    assert sum(p.numel() for p in same.parameters()) == sum(p.numel() for p in model.parameters())

    pointer = generator.embedding.words.data_ptr()
    state = same.state_dict()
    assert state[f"generator.{WORDS}"].data_ptr() == pointer
    assert state["generator.generator_lm_head.weight"].data_ptr() == pointer
    if sharing in ("embeddings", "all"):
        assert state[f"discriminator.{WORDS}"].data_ptr() == pointer
    output = same(padded(24, 9)[0], rng=RNG)
    output.loss.backward()
    assert output.loss.isfinite() and all(p.grad is not None for p in same.parameters())


@pytest.mark.parametrize("sharing", SHARING)
def test_distributed_data_parallel_trains_it(sharing, tmp_path):
    ids = padded(24, 9)[0]
    model = electra(sharing)
    single = copy.deepcopy(model)
    single(ids, rng=RNG).loss.backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # No name keeps the wrapper: if it were the last owner of the group, its end could block for ever. It
        # would wait for gloo's threads while it holds Python's lock, which they need to free tensors.
        torch.nn.parallel.DistributedDataParallel(model)(ids, rng=RNG).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    model.check_sharing()
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


# --- models that no longer match their config ---


def replace_discriminator_embedding(model):
    model.discriminator.encoder.embedding = copy.deepcopy(model.discriminator.encoder.embedding)


def replace_generator_embedding(model):
    model.generator.encoder.embedding = copy.deepcopy(model.generator.encoder.embedding)


def share_tables_without_norm(model):
    own = Discriminator(model.config).encoder.embedding
    shared = model.generator.encoder.embedding
    own.words, own.positions, own.types = shared.words, shared.positions, shared.types
    model.discriminator.encoder.embedding = own


def grow_one_half(model):
    model.generator.resize_token_embeddings(310)


@pytest.mark.parametrize(
    "change", [replace_discriminator_embedding, replace_generator_embedding, share_tables_without_norm]
)
@pytest.mark.parametrize("sharing", ["embeddings", "all"])
def test_a_model_that_no_longer_shares_is_refused(change, sharing):
    model = electra(sharing)
    if sharing == "all":
        model.discriminator.encoder = copy.deepcopy(model.discriminator.encoder)
    change(model)
    with pytest.raises(ValueError, match=f"must share their embedding as sharing='{sharing}' requires"):
        model(padded(24)[0])


@pytest.mark.parametrize("change", [replace_discriminator_embedding, replace_generator_embedding])
def test_a_difference_to_another_table_is_refused(change):
    model = electra("gdes")
    change(model)
    with pytest.raises(ValueError, match="must share their embedding as sharing='gdes' requires"):
        model(padded(24)[0])


@pytest.mark.parametrize("sharing", SHARING)
def test_a_vocabulary_that_grew_in_one_half_is_refused(sharing):
    model = electra(sharing)
    grow_one_half(model)
    with pytest.raises(ValueError, match=r"be the number of rows of the word table \(310\), got 300"):
        model(padded(24)[0])


def test_a_checkpoint_of_separate_tables_does_not_load_into_shared_ones():
    with pytest.raises(RuntimeError, match=r"generator\S+word_embeddings.weight must equal discrim"):
        electra("embeddings").load_state_dict(electra("none").state_dict())


# --- where gradients come from ---


def tables_with_gradients(model, loss):
    """Return the towers whose word table gets a gradient other than 0 from a loss of the output."""
    model.zero_grad()
    ids, key_mask = padded(24, 9)
    getattr(model(ids, key_mask=key_mask, rng=RNG), loss).backward()
    generator, discriminator = model.generator.encoder.embedding, model.discriminator.encoder.embedding
    own = discriminator.difference["words"] if hasattr(discriminator, "difference") else discriminator.words
    found = {"generator": generator.words, "discriminator": own}
    return {name for name, table in found.items() if table.grad is not None and table.grad.any()}


@pytest.mark.parametrize(
    ("sharing", "mlm", "rtd"),
    [
        ("none", {"generator"}, {"discriminator"}),
        ("gdes", {"generator"}, {"discriminator"}),
        ("embeddings", {"generator", "discriminator"}, {"generator", "discriminator"}),
        ("all", {"generator", "discriminator"}, {"generator", "discriminator"}),
    ],
)
def test_each_loss_reaches_the_tables_that_it_should(sharing, mlm, rtd):
    model = learned(electra(sharing))
    assert tables_with_gradients(model, "mlm_loss") == mlm
    assert tables_with_gradients(model, "rtd_loss") == rtd


def test_rtd_loss_reaches_the_generator_only_through_the_shared_embedding():
    model = Electra(CONFIG)
    ids, key_mask = padded(24, 9)
    model(ids, key_mask=key_mask, rng=RNG).rtd_loss.backward()
    for name, parameter in model.generator.named_parameters():
        if name.startswith("encoder.embedding."):
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    assert all(p.grad is not None for p in model.discriminator.parameters())

    model.zero_grad()
    model(ids, key_mask=key_mask, rng=RNG).mlm_loss.backward()
    own = [n for n, _ in model.discriminator.named_parameters() if not n.startswith("encoder.embedding.")]
    assert all(model.discriminator.get_parameter(name).grad is None for name in own)


def test_the_shared_gradient_is_the_sum_of_three_paths():
    """The generator's lookup, its softmax, and the discriminator's lookup. Separate towers with equal tables
    show the gradient of each path."""
    plain = dataclasses.replace(CONFIG, dropout=0.0)
    shared = Electra(plain)
    separate = Electra(dataclasses.replace(plain, sharing="none"))
    separate.load_state_dict(shared.state_dict())
    ids, key_mask = padded(24, 9, 17)
    shared(ids, key_mask=key_mask, rng=RNG).loss.backward()

    output = separate(ids, key_mask=key_mask, rng=RNG)
    own = separate.discriminator.encoder.embedding.words
    (from_discriminator,) = torch.autograd.grad(output.rtd_loss, own)
    masked = FUSED.mask_tokens(ids, separate.candidates(ids), RNG, mask_id=plain.mask_id, key_mask=key_mask)
    generator, words = separate.generator, separate.generator.encoder.embedding.words
    x = generator.encoder(masked.ids, Layout(key_mask)).flatten(0, 1)[masked.positions]
    slots = (masked.targets, masked.weights, RNG)
    lookup = generator.head(x, words.detach(), *slots).loss
    softmax = generator.head(x.detach(), words, *slots).loss
    paths = [*torch.autograd.grad(lookup, words), *torch.autograd.grad(softmax, words)]
    paths.append(50 * from_discriminator)

    assert all(path.abs().max() > 1e-4 for path in paths)
    total = shared.generator.encoder.embedding.words.grad
    torch.testing.assert_close(total, sum(paths), atol=1e-6, rtol=1e-5)


class WholeTables(TorchDispatchMode):
    """Counts the tensors of the table's size that are read or written, except the table itself."""

    def __init__(self, table):
        super().__init__()
        self.table, self.read, self.written = table, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        if not function.is_view:
            self.read += sum(map(self.counts, args))
            self.written += sum(map(self.counts, results))
        return result

    def counts(self, x):
        whole = isinstance(x, torch.Tensor) and x.shape == self.table.shape
        return whole and x.data_ptr() != self.table.data_ptr()


def whole_tables(ops):
    model = Electra(CONFIG, ops)
    loss = model(padded(24, 9)[0], rng=RNG).loss
    with WholeTables(model.generator.encoder.embedding.words) as traffic:
        loss.backward()
    return traffic.read, traffic.written


def test_the_shared_gradient_reads_and_writes_three_tables():
    """The counts do not include the table that the head's forward pass writes."""

    def embed(*args, return_word=False, **kwargs):  # returns the table itself
        x = FUSED.embed(*args, **kwargs)
        return Embedded(x, args[3]) if return_word else x

    def mlm_head(*args, return_table=False, **kwargs):
        return FUSED.mlm_head(*args, **kwargs)._replace(table=args[1])

    assert whole_tables(FUSED) == (3, 3)
    assert whole_tables(FUSED._replace(embed=embed, mlm_head=mlm_head)) == (5, 5)


def test_a_frozen_table_gets_no_gradient_and_the_rest_does():
    model = Electra(CONFIG)
    words = model.generator.encoder.embedding.words.requires_grad_(False)
    model(padded(24, 9)[0], rng=RNG).loss.backward()
    assert words.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- a learned difference ---


def test_a_difference_of_zero_is_the_shared_embedding():
    shared, difference = electra("embeddings", dropout=0.0), electra("gdes", dropout=0.0)
    state = shared.state_dict()
    own = {n: t for n, t in difference.state_dict().items() if ".difference." in n}
    assert all(not t.any() for t in own.values()) and len(own) == 3
    difference.load_state_dict({n: t for n, t in state.items() if n in difference.state_dict()} | own)
    ids, key_mask = padded(24, 9)
    assert_all_equal(
        shared(ids, key_mask=key_mask, rng=RNG)[:3], difference(ids, key_mask=key_mask, rng=RNG)[:3]
    )


def test_a_difference_is_merged_into_the_folder_and_kept_in_the_state_dict(tmp_path):
    model = learned(electra("gdes")).eval()
    ids, key_mask = padded(24, 9)
    expected = model.discriminator(ids, key_mask=key_mask)
    model.discriminator.save_pretrained(tmp_path)
    loaded = Discriminator.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids, key_mask=key_mask), expected)
    assert set(loaded.state_dict()) == set(Discriminator(model.config).state_dict())

    again = through_state_dict(model)
    assert_all_equal(again.parameters(), model.parameters())
    with pytest.raises(RuntimeError, match=r"Missing key.*word_embeddings.weight"):
        Discriminator(model.config).load_state_dict(model.discriminator.state_dict())


def test_the_generator_is_saved_without_a_difference(tmp_path):
    model = learned(electra("gdes")).eval()
    ids, key_mask = padded(24, 9)
    model.generator.save_pretrained(tmp_path)
    again = Generator.from_pretrained(tmp_path)
    assert torch.equal(again(ids, key_mask=key_mask), model.generator(ids, key_mask=key_mask))
