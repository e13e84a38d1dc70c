"""Encoded items: sequences, packed batches of any items, batches of one shape; words and their tags."""

import itertools
import random
import string

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from electra_fast.config import ElectraConfig
from electra_fast.heads import MultipleChoice, SequenceClassifier, TokenClassifier
from electra_fast.ops import FUSED, REFERENCE, TORCH
from electra_fast.tasks.examples import IGNORE, Examples, TaskBatches, assemble, token_ids
from electra_fast.tasks.words import encode_words, tag_labels, tag_targets, word_tags
from electra_fast.testing import assert_within_budget

pytest_plugins = ["small_tokenizer"]
CLS, SEP, UNKNOWN = 2, 3, 1  # of the small tokenizer
CONFIG = ElectraConfig(
    vocab_size=128, max_positions=64, embedding=16, layers=1, hidden=32, heads=2, ffn=64,
    pad_id=0, cls_id=CLS, sep_id=SEP, mask_id=4, dropout=0.0,
)  # fmt: skip


def texts(*lengths):
    """Return texts of these lengths, whose ids are all different."""
    ends = np.cumsum(lengths)
    return [list(range(1000 + end - n, 1000 + end)) for end, n in zip(ends, lengths, strict=True)]


def random_examples(lengths, group=1, seed=0):
    """Return items of random ids with every kind of target; a tenth of the targets is missing."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    S, T = len(lengths), lengths.sum()
    N = S // group
    item_targets = {
        "labels": np.where(rng.random(N) < 0.1, IGNORE, rng.integers(0, 3, N)),
        "scores": np.where(rng.random(N) < 0.1, np.nan, rng.normal(size=N)).astype(np.float32),
        "several": rng.random((N, 4)).astype(np.float32),
    }
    return Examples(
        rng.integers(5, 128, T).astype(np.int32),
        np.concatenate([[0], lengths.cumsum()]),
        rng.integers(1, lengths + 1),
        group=group,
        item_targets=item_targets,
        token_targets={"tags": np.where(rng.random(T) < 0.1, IGNORE, rng.integers(0, 3, T))},
    )


# --- assemble ---


def truncated_as_in_bert(a, b, most):
    """Return the pair as `_truncate_seq_pair` of the code published with BERT leaves it."""
    a, b = list(a), list(b)
    while len(a) + len(b) > most:
        (a if len(a) > len(b) else b).pop()
    return a, b


@pytest.mark.parametrize("max_len", [8, 9, 12])
def test_pairs_are_truncated_as_in_bert(max_len, tokenizer):
    lengths = [(m, n) for m in range(13) for n in range(13)]
    first, second = texts(*(m for m, _ in lengths)), texts(*(n for _, n in lengths))
    examples = assemble(first, second, tokenizer, max_len)
    wanted = [truncated_as_in_bert(a, b, max_len - 3) for a, b in zip(first, second, strict=True)]
    sequences = np.split(examples.ids, examples.offsets[1:-1])
    assert [x.tolist() for x in sequences] == [[CLS, *a, SEP, *b, SEP] for a, b in wanted]
    assert examples.first.tolist() == [len(a) + 2 for a, _ in wanted]
    assert examples.truncated == sum(m + n > max_len - 3 for m, n in lengths) > 0
    assert max(examples.lengths) == max_len and len(examples) == len(lengths)


def test_single_texts_lose_their_ends(tokenizer):
    first = texts(0, 3, 6, 7, 20)
    examples = assemble(first, None, tokenizer, 8)
    sequences = np.split(examples.ids, examples.offsets[1:-1])
    assert [x.tolist() for x in sequences] == [[CLS, *a[:6], SEP] for a in first]
    assert examples.first.tolist() == examples.lengths.tolist() == [2, 5, 8, 8, 8]
    assert examples.truncated == 2


def test_no_texts_are_no_items(tokenizer):
    examples = assemble([], None, tokenizer, 8)
    assert len(examples) == 0 and not list(examples.in_order(10))
    dtypes = (examples.ids.dtype, examples.offsets.dtype, examples.first.dtype)
    assert dtypes == (np.int32, np.int64, np.int64)


def test_token_ids_have_no_special_ids(tokenizer):
    assert token_ids(["the cat", ""], tokenizer) == [tokenizer.encode("the cat").ids, []]
    pair = assemble(*(token_ids([text], tokenizer) for text in ("the cat", "ran")), tokenizer, 8)
    wanted = ["[CLS]", "the", "cat", "[SEP]", "ran", "[SEP]"]
    assert [tokenizer.id_to_token(i) for i in pair.ids] == wanted


# --- packed batches ---


def by_a_loop(examples, items):
    """Return `Examples.batch` by its definition, one token after the other, as lists."""
    found = {name: [] for name in ("ids", "type_ids", *examples.token_targets)}
    bounds, longest = [0], 1
    for item in items:
        for s in range(item * examples.group, (item + 1) * examples.group):
            begin, end = examples.offsets[s], examples.offsets[s + 1]
            for t in range(begin, end):
                found["ids"].append(examples.ids[t])
                found["type_ids"].append(int(t - begin >= examples.first[s]))
                for name, x in examples.token_targets.items():
                    found[name].append(x[t])
            bounds.append(len(found["ids"]))
            longest = max(longest, end - begin)
    targets = {name: [x[item] for item in items] for name, x in examples.item_targets.items()}
    return found | targets | {"cu_seqlens": bounds, "max_seqlen": longest}


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("items", [[0], [4, 1, 1, 7], list(range(8))[::-1], []])
def test_a_batch_is_that_of_a_loop(group, items):
    examples = random_examples(np.random.default_rng(1).integers(1, 9, 8 * group), group)
    batch = examples.batch(np.array(items, int))
    for name, wanted in by_a_loop(examples, items).items():
        found = batch[name]
        if isinstance(found, torch.Tensor):
            np.testing.assert_array_equal(found.numpy(), np.reshape(wanted, found.shape), name)
        else:
            assert found == wanted
    kinds = {name: x.dtype for name, x in batch.items() if isinstance(x, torch.Tensor)}
    assert kinds == {
        **dict.fromkeys(("ids", "type_ids", "labels", "tags"), torch.int64),
        **dict.fromkeys(("scores", "several"), torch.float32),
        "cu_seqlens": torch.int32,
    }


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("tokens", [1, 17, 40, 10**6])
def test_in_order_has_each_item_once_within_the_budget(group, tokens):
    examples = random_examples(np.random.default_rng(2).integers(1, 9, 20 * group), group)
    found = list(examples.in_order(tokens))
    items = [i for part, _ in found for i in range(20)[part]]
    assert items == list(range(20))
    assert torch.equal(torch.cat([batch["ids"] for _, batch in found]), torch.from_numpy(examples.ids))
    sizes = [len(batch["ids"]) for _, batch in found]
    for (part, _), size in zip(found, sizes, strict=True):
        assert size <= tokens or part.stop - part.start == 1
    for (part, _), size in zip(found[:-1], sizes, strict=False):  # the next item does not fit
        assert size + examples.lengths[part.stop] > tokens


# --- batches for training ---


def items_of(batches, index):
    """Return the numbers of the items of a batch, whose "number" is a target."""
    return batches.make(index)["number"].tolist()


def numbered(lengths, batch, group=1, **options):
    examples = random_examples(lengths, group)
    examples.item_targets["number"] = np.arange(len(examples))
    return TaskBatches(examples, batch, **{"seed": 0, "pad_id": 0} | options)


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("group", [1, 3])
def test_an_epoch_has_each_item_once_in_an_order_of_its_own(batch, group):
    lengths = np.random.default_rng(3).integers(9, 12, 60 * group)  # none is longer than two others
    batches = numbered(lengths, batch, group)
    whole = [batches.order.numbers(i) for i in range(int(3 * batches.steps_per_epoch) + 2)]
    found = np.concatenate(whole)
    epochs = found[:60], found[60:120], found[120:180]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert abs(batches.steps_per_epoch * batch - 60) < 3
    filled = [i for i, numbers in enumerate(whole) if len(numbers)]
    assert all(items_of(batches, i) == whole[i].tolist() for i in filled)


def test_a_batch_is_a_function_of_seed_and_index():
    lengths = np.random.default_rng(4).integers(3, 20, 50)
    one, same, other = (numbered(lengths, 8, seed=seed) for seed in (0, 0, 1))
    backwards = [items_of(same, i) for i in range(12)[::-1]][::-1]
    assert [items_of(one, i) for i in range(12)] == backwards
    assert [items_of(other, i) for i in range(12)] != backwards


@pytest.mark.parametrize("fixed", [False, True])
def test_an_item_longer_than_a_batch_does_not_make_empty_batches(fixed):
    batches = numbered([4] * 19 + [60], 2, fixed=fixed)
    assert batches.order.capacity < 60
    found = [items_of(batches, i) for i in range(int(2 * batches.steps_per_epoch) + 1)]
    assert all(found) and set(itertools.chain(*found)) - {IGNORE} == set(range(20))
    empty = [i for i in range(len(found)) if not len(batches.order.numbers(i))]
    assert empty and all(found[i] == found[i - 1] for i in empty)


@pytest.mark.parametrize("fixed", [False, True])
def test_one_item_is_every_batch(fixed):
    batches = numbered([6], 1, fixed=fixed)
    assert batches.steps_per_epoch == 1
    assert all([i for i in items_of(batches, index) if i != IGNORE] == [0] for index in range(4))
    three = numbered([6], 3, fixed=fixed)
    assert [i for i in items_of(three, 1) if i != IGNORE] == [0]  # not larger than an epoch


DISTRIBUTIONS = {
    "sentences": lambda rng, n: rng.integers(3, 40, n),
    "equal": lambda rng, n: np.full(n, 12),
    "a long tail": lambda rng, n: np.minimum(128, 3 + rng.lognormal(2.5, 0.8, n).astype(int)),
    "few long ones": lambda rng, n: np.where(rng.random(n) < 0.03, 512, 3),
    "mostly cut off": lambda rng, n: np.minimum(128, rng.integers(20, 600, n)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("batch, group", [(1, 1), (8, 1), (32, 1), (4, 3)])
def test_fixed_batches_have_one_shape(name, batch, group):
    lengths = DISTRIBUTIONS[name](np.random.default_rng(5), 600 * group)
    fixed = numbered(lengths, batch, group, fixed=True)
    plain = TaskBatches(fixed.examples, batch, 0, 0)
    shapes = []
    for index in range(1000, 1200):
        filled, wanted = fixed.make(index), plain.make(index)
        shapes.append(str({n: getattr(x, "shape", x) for n, x in filled.items()}))
        check_filled(filled, wanted, lengths.max())
    assert max(map(shapes.count, set(shapes))) >= 0.99 * len(shapes)


def check_filled(filled, plain, longest):
    """Assert that a filled batch begins with that of `plain` and ends with nothing that has a loss."""
    assert filled.keys() == plain.keys() and filled["max_seqlen"] == longest >= plain["max_seqlen"]
    for name, x in plain.items():
        if isinstance(x, torch.Tensor):
            assert filled[name].dtype == x.dtype
            assert torch.equal(filled[name][: len(x)].nan_to_num(), x.nan_to_num())
    rest = {name: filled[name][len(plain[name]) :] for name in plain if name != "max_seqlen"}
    assert not rest["ids"].any() and not rest["type_ids"].any()
    for name in ("labels", "number", "tags"):
        assert (rest[name] == IGNORE).all()
    assert rest["scores"].isnan().all() and rest["several"].isnan().all()
    lengths = filled["cu_seqlens"].diff()
    assert filled["cu_seqlens"][-1] == len(filled["ids"]) and 0 <= lengths.min()
    assert lengths.max() <= longest
    assert len(lengths) == len(plain["cu_seqlens"]) - 1 + len(rest["cu_seqlens"])
    assert len(lengths) % len(filled["labels"]) == 0


def classified(logits, batch):
    return cross_entropy(logits, batch["labels"], ignore_index=IGNORE)


def scored(logits, batch):
    known = ~batch["several"].isnan()
    return mse_loss(logits[known], batch["several"][known].to(logits.dtype))


def tagged(logits, batch):
    return cross_entropy(logits, batch["tags"], ignore_index=IGNORE)


def chosen(logits, batch):
    return cross_entropy(logits.view(len(batch["labels"]), -1), batch["labels"], ignore_index=IGNORE)


LOSSES = {
    classified: (SequenceClassifier, "abc", 1),
    scored: (SequenceClassifier, "abcd", 1),
    tagged: (TokenClassifier, "abc", 1),
    chosen: (MultipleChoice, "a", 3),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_filling_a_batch_changes_neither_loss_nor_gradients(loss):
    kind, labels, group = LOSSES[loss]
    examples = random_examples(np.random.default_rng(6).integers(2, 20, 12 * group), group)
    plain, filled = (TaskBatches(examples, 4, 0, 0, fixed).make(1) for fixed in (False, True))
    assert len(filled["ids"]) > len(plain["ids"]) and len(filled["cu_seqlens"]) > len(plain["cu_seqlens"])

    def results(batch, dtype, ops):
        torch.manual_seed(0)
        head = kind(CONFIG, labels, ops=ops).to(dtype).train()
        given = {n: batch[n] for n in ("type_ids", "cu_seqlens", "max_seqlen")}
        value = loss(head(batch["ids"], **given), batch)
        return [value, *torch.autograd.grad(value, list(head.parameters()))], head

    found, head = results(filled, torch.float32, FUSED)
    (wanted, _), (low, _) = results(plain, torch.float64, REFERENCE), results(plain, torch.float32, TORCH)
    names = ["loss", *(name for name, _ in head.named_parameters())]
    for name, *each in zip(names, found, wanted, low, strict=True):
        if name == "score.bias":  # no softmax over options depends on it
            continue
        assert_within_budget(name, *each, factor=3.0)


# --- words ---


def pieces_of(tokenizer, word):
    return tokenizer.encode(word, add_special_tokens=False).ids or [UNKNOWN]


def test_first_pieces_of_words(tokenizer):
    words = [["the", "cat", "dogs", "xy"], ["rain"]]
    examples = encode_words(words, tokenizer, 20)
    assert [tokenizer.id_to_token(i) for i in examples.ids] == [
        *["[CLS]", "the", "cat", "dog", "##s", "x", "##y", "[SEP]"],
        *["[CLS]", "rain", "[SEP]"],
    ]
    assert [x.tolist() for x in examples.aligned] == [[1, 2, 3, 5], [9]]
    assert examples.truncated == 0


@pytest.mark.parametrize("nothing", ["\u200b", "\u0301", " ", ""])
def test_a_word_without_pieces_is_unknown(nothing, tokenizer):
    examples = encode_words([["the", nothing, "cat"], [nothing]], tokenizer, 20)
    the, cat = tokenizer.token_to_id("the"), tokenizer.token_to_id("cat")
    assert examples.ids.tolist() == [CLS, the, UNKNOWN, cat, SEP, CLS, UNKNOWN, SEP]
    assert [x.tolist() for x in examples.aligned] == [[1, 2, 3], [6]]


def test_words_beyond_the_longest_sequence_are_outside(tokenizer):
    words = [["cat"] * 5, ["the", "dogs", "rain", "ran"], ["cat"]]
    examples = encode_words(words, tokenizer, 5)
    assert examples.truncated == 2 and examples.lengths.tolist() == [5, 5, 3]
    assert [x.tolist() for x in examples.aligned] == [[1, 2, 3, -1, -1], [6, 7, -1, -1], [11]]
    logits = np.zeros((13, 2))
    logits[:, 1] = 1
    assert word_tags(logits, examples, ("O", "B-x")) == [
        ["B-x"] * 3 + ["O"] * 2,
        ["B-x"] * 2 + ["O"] * 2,
        ["B-x"],
    ]
    targets = tag_targets(examples, [["B-x"] * 5, None, ["O"]], ("O", "B-x"))
    assert targets.dtype == np.int64
    assert targets.tolist() == [IGNORE, 1, 1, 1, IGNORE, *[IGNORE] * 5, IGNORE, 0, IGNORE]


def test_a_sentence_without_words_has_no_tags(tokenizer):
    examples = encode_words([[], ["cat"]], tokenizer, 8)
    assert [x.tolist() for x in examples.aligned] == [[], [3]]
    assert tag_targets(examples, [[], ["O"]], ("O",)).tolist() == [IGNORE] * 3 + [0, IGNORE]
    assert word_tags(np.zeros((5, 1)), examples, ("O",)) == [[], ["O"]]


def test_tags_are_in_order():
    tags = ["O", "I-b", "B-a", "B-c-d", "O", "B-b"]
    assert tag_labels(tags) == ("O", "B-a", "I-a", "B-b", "I-b", "B-c-d", "I-c-d")
    assert tag_labels([]) == tag_labels(["O"]) == ("O",)


ALPHABET = [*string.ascii_lowercase, *"ÄéßАЖ中文.,'-", "\u200b", "\u0301", "\U0001f600", " "]


@pytest.mark.parametrize("max_len", [8, 25])
def test_random_words_keep_their_tags(max_len, tokenizer, seed):
    chance = random.Random(seed)
    words = [
        ["".join(chance.choices(ALPHABET, k=chance.randrange(7))) for _ in range(chance.randrange(12))]
        for _ in range(60)
    ]
    examples = encode_words(words, tokenizer, max_len)
    labels = ("O", *(f"B-{letter}" for letter in string.ascii_lowercase))
    tags = [chance.choices(labels, k=len(sentence)) for sentence in words]
    targets = tag_targets(examples, tags, labels)
    logits = np.zeros((len(examples.ids), len(labels)))
    logits[np.arange(len(targets)), np.maximum(targets, 0)] = 1
    expected, cut, number = [], 0, {label: i for i, label in enumerate(labels)}
    for s, (sentence, wanted) in enumerate(zip(words, tags, strict=True)):
        begin, found = examples.offsets[s], []
        pieces = [pieces_of(tokenizer, word) for word in sentence]
        room = max_len - 2
        ids = [*itertools.chain(*pieces)]
        cut += len(ids) > room
        assert examples.ids[begin : examples.offsets[s + 1]].tolist() == [CLS, *ids[:room], SEP]
        at = 0
        for word, tag in zip(pieces, wanted, strict=True):
            assert at >= room or targets[begin + 1 + at] == number[tag]
            found.append(tag if at < room else "O")
            at += len(word)
        expected.append(found)
    assert word_tags(logits, examples, labels) == expected
    starts = sum(int((positions >= 0).sum()) for positions in examples.aligned)
    assert (targets != IGNORE).sum() == starts
    assert examples.truncated == cut > 0
