"""Batches: every token once per epoch, and the same batch for the same seed and index."""

import hashlib
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from electra_fast import data
from electra_fast.config import ElectraConfig
from electra_fast.data import Batches, Encoded, Packed, Padded, check_batch, encode, held_out
from electra_fast.data.sequences import _draws, cut_pairs
from electra_fast.data.wordpiece import pieces
from electra_fast.model import Electra
from electra_fast.train.corpus import named
from electra_fast.train.loader import Loader

pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")
PAD, CLS, SEP = 0, 101, 102


def documents_of(*lengths):
    """Documents of these lengths; all ids differ, and none is special."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Encoded(torch.arange(1000, 1000 + int(offsets[-1]), dtype=torch.int32), offsets)


def sequences(batches, count):
    """The first `count` sequences, each as a list of its tokens."""
    found = []
    for index in itertools.count():
        if len(found) >= count:
            return found[:count]
        batch = batches.padded(index)
        found += [row[mask].tolist() for row, mask in zip(batch.ids, batch.key_mask, strict=True)]


# Lengths around the cut after 6 tokens.
LENGTHS = (0, 1, 5, 6, 7, 0, 12, 13, 100)


# There are 27 sequences, fewer than 64, with fewer than 1000 tokens.
FORMS = [
    {"batch_size": 1},
    {"batch_size": 4},
    {"batch_size": 64},
    {"batch_tokens": 16},
    {"batch_tokens": 1000},
]


@pytest.mark.parametrize("pairs", [False, True], ids=["one segment", "pairs"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_token_occurs_exactly_once_per_epoch(form, pairs):
    encoded = documents_of(*LENGTHS)
    batches = Batches(encoded, seq_len=8, pairs=pairs, **form)
    n = batches.num_sequences
    assert pairs or n == sum(-(-length // 6) for length in LENGTHS) == 27
    found = sequences(batches, 3 * n)
    for epoch in (found[:n], found[n : 2 * n], found[2 * n :]):
        assert sorted(t for s in epoch for t in s if t >= 1000) == encoded.ids.tolist()
    assert found[:n] != found[n : 2 * n] and sorted(found[:n]) == sorted(found[n : 2 * n])


def test_sequences_are_cls_tokens_sep_of_one_document():
    encoded = documents_of(*LENGTHS)
    batches = Batches(encoded, seq_len=8, batch_size=5)
    for sequence in sequences(batches, batches.num_sequences):
        cls, *tokens, sep = sequence
        assert cls == CLS and sep == SEP and 1 <= len(tokens) <= 6
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        ends = torch.tensor([tokens[0] - 1000, tokens[-1] - 1000])
        assert len(set(torch.searchsorted(encoded.offsets, ends, right=True).tolist())) == 1


@pytest.mark.parametrize("pairs", [False, True], ids=["one segment", "pairs"])
@pytest.mark.parametrize("form", [{"batch_size": 16}, {"batch_tokens": 1000}], ids=str)
def test_padded_and_packed_contain_the_same_sequences(trained_tokenizer, topics, form, pairs):
    batches = Batches(encode(topics, trained_tokenizer), seq_len=64, seed=3, pairs=pairs, **form)
    for index in (0, 1, 1000):
        ids, key_mask, type_ids = batches.padded(index)
        assert ids.dtype == torch.int64 and key_mask.dtype == torch.bool
        assert ids.shape == key_mask.shape == (len(ids), 64) and len(ids) == form.get("batch_size", len(ids))
        assert (ids[~key_mask] == PAD).all() and (key_mask[:, :-1] >= key_mask[:, 1:]).all()

        packed, cu_seqlens, max_seqlen, packed_types = batches.packed(index)
        assert packed.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
        assert torch.equal(packed, ids[key_mask]) and isinstance(max_seqlen, int)
        assert cu_seqlens[0] == 0 and torch.equal(cu_seqlens.diff(), key_mask.sum(1).int())
        assert max_seqlen == key_mask.sum(1).max()

        if not pairs:
            assert type_ids is None and packed_types is None
            continue
        assert type_ids.dtype == torch.int64 and torch.equal(packed_types, type_ids[key_mask])
        # The type is the number of [SEP]s before the token; the text contains none.
        before = (ids == SEP).cumsum(1) - (ids == SEP).long()
        assert torch.equal(type_ids, before * key_mask) and 0 < type_ids.float().mean() < 0.5


def test_batches_are_a_function_of_seed_and_index():
    encoded = documents_of(*LENGTHS)

    def ids(index, **options):
        return Batches(encoded, **{"seq_len": 8, "batch_size": 4, **options}).padded(index).ids

    batches = Batches(encoded, seq_len=8, batch_size=4)
    for index in (50, 0, 6, 50):  # in any order; 6 spans two epochs
        assert torch.equal(batches.padded(index).ids, ids(index))
    assert not torch.equal(ids(0), ids(1)) and not torch.equal(ids(0), ids(0, seed=1))
    # The next epoch of a seed is not the first epoch of the next seed. Any int is a seed.
    assert not torch.equal(ids(1, batch_size=27), ids(0, batch_size=27, seed=1))
    assert not torch.equal(ids(0, seed=-1), ids(0, seed=2**63))
    # The batch size does not change the order of the sequences.
    assert torch.equal(ids(0, batch_size=8), torch.cat([ids(0), ids(1)]))


def test_special_ids_are_arguments():
    batches = Batches(documents_of(2), seq_len=5, batch_size=1, pad_id=7, cls_id=8, sep_id=9)
    assert batches.padded(0).ids.tolist() == [[8, 1000, 1001, 9, 7]]


def test_wrong_arguments_raise_errors():
    encoded = documents_of(3)
    with pytest.raises(ValueError, match="seq_len must be 3 or more, got 2"):
        Batches(encoded, seq_len=2, batch_size=4)
    with pytest.raises(ValueError, match="seq_len must be 5 or more, got 4"):
        Batches(encoded, seq_len=4, pairs=True)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        Batches(encoded, seq_len=8, batch_size=0)
    with pytest.raises(ValueError, match="batch_tokens must be 16 or more, got 15"):
        Batches(encoded, seq_len=8, batch_tokens=15)
    with pytest.raises(ValueError, match="documents must contain a token, got none"):
        Batches(documents_of(0, 0))
    with pytest.raises(IndexError, match="index must be 0 or more, got -1"):
        Batches(encoded).padded(-1)


@pytest.mark.parametrize("pairs", [False, True], ids=["one segment", "pairs"])
def test_the_number_of_tokens_is_at_most_batch_tokens_and_not_much_less(pairs):
    lengths = torch.randint(0, 60, (400,), generator=torch.Generator().manual_seed(0))
    encoded = documents_of(*lengths.tolist())
    for tokens in (32, 33, 200):
        batches = Batches(encoded, seq_len=16, batch_tokens=tokens, pairs=pairs)
        found = [len(batches.packed(index).ids) for index in range(2000)]
        assert max(found) <= tokens and min(found) > tokens - 2 * 16
        assert sum(found) / len(found) == pytest.approx(tokens - 16 + 1, rel=0.01)


def documents_with_lines(*documents):
    """Documents given by the lengths of their lines."""
    lines = torch.tensor([0, *(length for document in documents for length in document)]).cumsum(0)
    offsets = lines[torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)]
    return Encoded(torch.arange(1000, 1000 + int(lines[-1]), dtype=torch.int32), offsets, lines)


def some_documents():
    """Short, long and empty lines, some longer than a sequence; one document of 16,000 tokens."""
    rng = np.random.default_rng(0)
    documents = [rng.geometric(0.05, rng.integers(1, 40)).tolist() for _ in range(300)]
    return [[0], [1], [0, 0, 5, 0], [500], *documents, rng.geometric(0.02, 320).tolist(), [16_000], []]


def pairs_one_by_one(encoded, seq_len, seed):
    """The rule as the module states it, one sequence at a time: (start, first, second)."""
    draws = zip(*_draws(seq_len, seed, 1), strict=True)
    for begin, end in zip(*(bound.tolist() for bound in encoded.bounds()), strict=True):
        while begin < end:
            length, single, longer = next(draws)
            stop = min(begin + length - (2 if single else 3), end)
            ends = [line for line in encoded.lines.unique().tolist() if begin < line <= stop]
            below = [line for line in ends if line - begin < (length - 3) // 2]
            above = [line for line in ends if line not in below] or [stop]
            border = below[-1] if below and not longer else above[0]
            if single:
                border = stop
            yield begin, border - begin, stop - border
            begin = stop


@pytest.mark.parametrize("seq_len", [5, 6, 16, 128])
def test_pairs_follow_the_rule(seq_len):
    encoded = documents_with_lines(*some_documents()[:60])
    found = np.stack(cut_pairs(encoded, seq_len, seed=7), axis=1)
    assert found.tolist() == [list(row) for row in pairs_one_by_one(encoded, seq_len, seed=7)]


@pytest.mark.parametrize("seq_len", [5, 16, 128])
def test_pairs_keep_every_token_and_divide_at_line_ends(seq_len):
    encoded = documents_with_lines(*some_documents())
    found = cut_pairs(encoded, seq_len, seed=0)
    assert (found.lengths <= seq_len).all() and (found.first > 0).all() and (found.second >= 0).all()
    stop = found.start + found.first + found.second
    assert found.start[0] == 0 and (found.start[1:] == stop[:-1]).all() and stop[-1] == len(encoded.ids)
    document = np.searchsorted(encoded.offsets.numpy(), [found.start, stop - 1], side="right")
    assert (document[0] == document[1]).all()
    border = (found.start + found.first)[found.second > 0]
    assert len(border) > 10 and np.isin(border, encoded.lines.numpy()).all()


def test_pairs_have_the_published_shares_of_single_and_short_sequences():
    L, n = 64, 60_000
    # Each line has one token, so A can end anywhere.
    encoded = documents_with_lines([1] * (L * n))
    found = cut_pairs(encoded, L, seed=0)
    single, pair = found.second == 0, found.second > 0
    lengths = found.lengths
    for share, expected in ((single, 0.1), (lengths < L, 0.05 * (L - 5) / (L - 4))):
        assert share[:n].mean() == pytest.approx(expected, abs=4 * (expected / n) ** 0.5)
    short = np.bincount(lengths[:n], minlength=L + 1)[5:L] / n  # all short lengths are equally frequent
    assert short == pytest.approx(0.05 / (L - 4), abs=5 * (0.05 / (L - 4) / n) ** 0.5)
    full = pair & (lengths == L)
    target = (L - 3) // 2
    assert set(found.first[full][:-1].tolist()) == {target - 1, target}
    assert (found.first[full] == target).mean() == pytest.approx(0.5, abs=4 * 0.5 / full.sum() ** 0.5)
    assert not np.array_equal(found.first[:n], cut_pairs(encoded, L, seed=1).first[:n])


def test_documents_of_one_line_have_one_segment():
    encoded = documents_of(*LENGTHS)
    assert (cut_pairs(encoded, 8, seed=0).second == 0).all()
    assert Batches(encoded, seq_len=8, pairs=True, batch_size=4).padded(0).type_ids.sum() == 0


def test_the_fields_of_a_batch_are_arguments_of_the_model(trained_tokenizer, topics):
    names = set(inspect.signature(Electra.forward).parameters)
    assert {*Padded._fields, *Packed._fields} <= names
    encoded = encode(topics, trained_tokenizer)
    batches = Batches(encoded, seq_len=16, batch_size=2, pairs=True)
    model = Electra(ElectraConfig.tiny())
    for batch in (batches.padded(0), batches.packed(0)):
        assert model(**batch._asdict()).loss.isfinite()


def test_held_out_documents_are_in_no_other_batch(trained_tokenizer):
    encoded = documents_of(*range(23))
    train, held = held_out(encoded, every=5)
    assert held.subset.tolist() == [4, 9, 14, 19] and train.ids is held.ids is encoded.ids
    for pairs in (False, True):
        found = []
        for part in (train, held):
            batches = Batches(part, seq_len=8, pairs=pairs)
            found.append({t for s in sequences(batches, batches.num_sequences) for t in s if t >= 1000})
        offsets = encoded.offsets.tolist()
        assert found[1] == {1000 + i for d in (4, 9, 14, 19) for i in range(*offsets[d : d + 2])}
        assert found[0] == set(encoded.ids.tolist()) - found[1]
    assert held_out(held, every=2)[1].subset.tolist() == [9, 19]
    assert (train.num_tokens, held.num_tokens) == (len(found[0]), len(found[1])) == (207, 46)
    assert set(held.first_tokens().tolist()) == found[1]
    # The first documents have 4 and 9 tokens.
    assert [len(held.first_tokens(limit)) for limit in (1, 4, 5, 13, 14)] == [4, 4, 13, 13, 27]
    for every in (1, 24):
        with pytest.raises(ValueError, match=f"every must be 2 to 23, the number of documents, got {every}"):
            held_out(encoded, every=every)


def test_uint16_ids_above_32767_do_not_become_negative():
    ids = torch.tensor([65_535, 32_768, 1], dtype=torch.int32).to(torch.uint16)
    batches = Batches(Encoded(ids, torch.tensor([0, 3])), seq_len=5, batch_size=1)
    assert batches.padded(0).ids.tolist() == [[CLS, 65_535, 32_768, 1, SEP]]


def fingerprint(texts):
    tokenizer = data.train_tokenizer(texts, vocab_size=1500)
    encoded = encode(texts, tokenizer)
    by_size = Batches(encoded, seq_len=32, seed=5)
    by_tokens = Batches(encoded, seq_len=32, batch_tokens=900, pairs=True)
    ids = [batches.padded(index).ids.tolist() for batches in (by_size, by_tokens) for index in (0, 1, 77)]
    return hashlib.sha256(f"{pieces(tokenizer)} {ids}".encode()).hexdigest()


def test_vocabulary_and_batches_are_the_same_in_another_process(tmp_path, topics, trained_tokenizer):
    code = "import sys, test_data_batches as t; print(t.fingerprint(sys.stdin.read().split(chr(0))))"
    root = Path(data.__file__).parents[2]
    other = {"PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
    other |= {"XDG_CACHE_HOME": str(tmp_path), "TOKENIZERS_PARALLELISM": "false"}  # an empty cache: it trains
    command, text, env = [sys.executable, "-c", code], chr(0).join(topics), {**os.environ, **other}
    there = subprocess.run(command, input=text, env=env, text=True, stdout=subprocess.PIPE, check=True)
    assert there.stdout.strip() == fingerprint(topics)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [100, -1, 2**31 - 1])
def test_check_batch_names_the_first_bad_id(dtype, bad):
    ids = torch.arange(12, dtype=dtype).view(3, 4)
    check_batch(ids, 100)
    ids[1, 2] = ids[2, 0] = bad
    with pytest.raises(IndexError, match=rf"ids must be in \[0, 100\), got {bad} at row 1, column 2"):
        check_batch(ids, 100)
    with pytest.raises(IndexError, match=str(2**32 + 5)):  # not narrowed to 5
        check_batch(torch.tensor([[2**32 + 5]]), 100)
    with pytest.raises(IndexError, match=rf"ids must be in \[0, 100\), got {bad} at position 6"):
        check_batch(ids.flatten(), 100)


def test_check_batch_checks_types_and_positions():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    check_batch(ids, 100, type_ids=ids + 1, position_ids=torch.arange(4) + 508)
    with pytest.raises(IndexError, match=r"type_ids must be in \[0, 2\), got 2 at row 0, column 0"):
        check_batch(ids, 100, type_ids=ids + 2)
    with pytest.raises(IndexError, match=r"position_ids must be in \[0, 512\), got 512 at position 3"):
        check_batch(ids, 100, position_ids=torch.arange(4) + 509)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_check_batch_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match=f"ids must be int32 or int64, got {dtype}"):
        check_batch(torch.zeros(2, 3, dtype=dtype), 100)


def test_check_batch_accepts_an_empty_batch_and_a_real_one(trained_tokenizer, topics):
    check_batch(torch.empty(0, 8, dtype=torch.int64), 100)
    check_batch(Batches(encode(topics, trained_tokenizer)).padded(0).ids, trained_tokenizer.get_vocab_size())


def made(batches, index):
    return named(batches.fixed_shape(index))


@pytest.mark.parametrize("where", ["meta", "cuda"])
def test_batches_are_on_the_cpu_for_any_default_device_and_dtype(tmp_path, trained_tokenizer, topics, where):
    def everything():
        encoded = data.tokenize(topics, trained_tokenizer, tmp_path)
        found = [*data.encode(topics, trained_tokenizer)[:3], *encoded[:3]]
        for part in data.held_out(encoded, 5):
            found += [*part.bounds(), part.first_tokens(), part.subset]
            for pairs in (False, True):
                packed = Batches(part, seq_len=32, batch_size=None, batch_tokens=200, pairs=pairs)
                loader = Loader(
                    packed, lambda i, packed=packed: named(packed.fixed_shape(i)), torch.device("cpu")
                )
                for batch in (Batches(part, seq_len=32, pairs=pairs).padded(3), packed.packed(2)):
                    found += [x for x in batch if isinstance(x, torch.Tensor)]
                found += [x for x in loader[1].values() if isinstance(x, torch.Tensor)]
        return found

    expected, dtype = everything(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device(where):
            found = everything()
    finally:
        torch.set_default_dtype(dtype)
    for x, y in zip(found, expected, strict=True):
        assert x.device.type == "cpu" and x.dtype == y.dtype and torch.equal(x, y)
