"""Preferences between the sentences of pairs, compared with the rules of CrowS-Pairs' published scorer."""

import csv
import difflib
import json
import lzma
import math

import numpy as np
import pytest
import torch
from small_vocabulary import PIECES

from electra_fast.use import Classifier, load, pairs
from electra_fast.use.fine_tuned import Classified
from electra_fast.use.pairs import effect_size
from electra_fast.use.pairs_files import Pair, PairSet, read_pairs
from electra_fast.use.pairs_page import page, text

transformers = pytest.importorskip("transformers")

COLUMNS = ("", "sent_more", "sent_less", "stereo_antistereo", "bias_type")
TEN = [
    ("the cat sat in the rain", "the dog sat in the rain", "stereo", "animal"),
    ("The red bird, of what?", "The blue bird, of what?", "antistereo", "colour"),
    ("cat cat dog", "cat dog cat", "antistereo", "animal"),  # difflib is not symmetric, and [CLS] matters
    ("cat cat dog", "cat dog cat", "stereo", "animal"),
    ("who is the bird in the rain", "who is the bird in the rain", "stereo", "animal"),  # neutral
    ("a red dog ran", "a dog ran", "antistereo", "colour"),  # "red" is inserted
    ("who", "what", "stereo", "other"),  # no shared token, neutral
    ("what flew in the zoo", "what flew in the rain", "stereo", "other"),  # three pieces and one
    ("is the green cat in play?", "is the red cat in play?", "stereo", "colour"),
    ("the dog ran", "the cat ran", "antistereo", "animal"),
]
GAP = "ID\tText\tPronoun\tPronoun-offset\tURL\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two halves whose weights are large, so that scores differ clearly."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(PIECES), "utf-8")
    sizes = {
        "vocab_size": len(PIECES),
        "embedding_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}
    config = transformers.ElectraConfig(**sizes, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ElectraForMaskedLM(config).save_pretrained(folder / "generator")
        transformers.ElectraForPreTraining(config).save_pretrained(folder / "discriminator")
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load(run, device="cpu")


@pytest.fixture(scope="module")
def theirs(run):
    """transformers' tokenizer and two halves."""
    kinds = {
        "generator": transformers.ElectraForMaskedLM,
        "discriminator": transformers.ElectraForPreTraining,
    }
    halves = {name: kind.from_pretrained(run / name).eval() for name, kind in kinds.items()}
    return transformers.ElectraTokenizer(str(run / "tokenizer" / "vocab.txt")), halves


@pytest.fixture
def ten(tmp_path):
    path = tmp_path / "crows.csv.xz"
    with lzma.open(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([COLUMNS, *((n, *row) for n, row in enumerate(TEN))])
    return path


def common(first, second):
    """The tokens that two sentences share, [CLS] and [SEP] included."""
    matcher = difflib.SequenceMatcher(None, [str(i) for i in first], [str(i) for i in second])
    equal = [op for op in matcher.get_opcodes() if op[0] == "equal"]
    return [i for op in equal for i in range(op[1], op[2])], [i for op in equal for i in range(op[3], op[4])]


@torch.no_grad()
def masked_score(theirs, ids, positions):
    """The sum of log-probabilities, one sentence and one mask at a time."""
    tokenizer, halves = theirs
    total = 0.0
    for position in positions:
        masked = list(ids)
        masked[position] = tokenizer.mask_token_id
        logits = halves["generator"](torch.tensor([masked])).logits[0, position]
        total += torch.log_softmax(logits, 0)[ids[position]].item()
    return total


@torch.no_grad()
def original_logs(theirs, ids):
    """The discriminator's log-probability of each token, [CLS] included."""
    logits = theirs[1]["discriminator"](torch.tensor([ids])).logits[0]
    return torch.nn.functional.logsigmoid(-logits.double()).tolist()


def published(theirs):
    """The scores of the ten pairs, (more, less), and the four numbers that the published scorer prints."""
    scores, right, counted, neutral = [], {"stereo": 0, "antistereo": 0}, {"stereo": 0, "antistereo": 0}, 0
    for more, less, direction, _ in TEN:
        sentences = (more, less) if direction == "stereo" else (less, more)
        ids = [theirs[0](sentence.lower()).input_ids for sentence in sentences]
        templates = common(*ids)
        one, two = (round(masked_score(theirs, i, t[1:-1]), 3) for i, t in zip(ids, templates, strict=True))
        scores.append((one, two) if direction == "stereo" else (two, one))
        if one == two:
            neutral += 1
            continue
        counted[direction] += 1
        right[direction] += one > two if direction == "stereo" else two > one
    metric = sum(right.values()) / len(TEN)
    return scores, metric, {name: right[name] / counted[name] for name in right}, neutral


def test_scores_and_rates_are_those_of_the_published_scorer(theirs, model, ten):
    found = pairs(ten, model)
    scores, metric, by_direction, neutral = published(theirs)
    # Two float32 sums of the same terms may round to neighbours in the third decimal.
    assert np.allclose([each[-2:] for each in found.pairs], scores, rtol=0, atol=0.0011)
    assert all(x == round(x, 3) for each in found.pairs for x in each[-2:])
    assert found.overall[:4] == ("all", 10, neutral, metric) and neutral == 2
    assert {each.name: each.rate for each in found.directions} == by_direction
    assert 0 < by_direction["stereo"] < 1, "the ten pairs must show the direction"
    assert [(each.name, each.pairs) for each in found.categories] == [
        ("animal", 5),
        ("colour", 3),
        ("other", 2),
    ]
    assert (found.data, found.by, found.tokens) == ("crows_pairs", "generator", "shared")


@pytest.mark.parametrize("tokens", ["shared", "differing"])
def test_the_discriminator_reads_both_sentences_once(theirs, model, tokens):
    row = TEN[7]
    (found,) = pairs([row[:2]], model, "discriminator", tokens=tokens).pairs
    ids = [theirs[0](sentence).input_ids for sentence in row[:2]]
    expected = []
    for each, shared in zip(ids, common(*ids), strict=True):
        logs = original_logs(theirs, each)
        other = [x for i, x in enumerate(logs) if i not in shared]
        expected.append(sum(logs[i] for i in shared[1:-1]) if tokens == "shared" else sum(other) / len(other))
    assert np.allclose(found[-2:], expected, rtol=0, atol=1e-5)


def test_a_sentence_without_own_tokens_makes_a_pair_neutral(model):
    for half in ("generator", "discriminator"):
        found = pairs([TEN[5][:2], TEN[4][:2]], model, half, tokens="differing")
        assert [each[-2:] for each in found.pairs] == [(0, 0), (0, 0)] and found.overall.neutral == 2


def test_gap_is_scored_at_the_pronoun_and_per_gender(theirs, model, tmp_path):
    texts = ['The "cat" of her sat', "In play he ran", "Him the bird flew in"]
    words = ["her", "he", "Him"]
    rows = [f"x-{n}\t{t}\t{w}\t{t.index(w)}\tu\n" for n, (t, w) in enumerate(zip(texts, words, strict=True))]
    (tmp_path / "gap.tsv").write_text(GAP + "".join(rows))
    kind, read = read_pairs([tmp_path / "gap.tsv"])
    assert kind == "gap" and [each.category for each in read] == ["feminine", "masculine", "masculine"]
    assert read[0][:2] == (texts[0], 'The "cat" of his sat') and read[0].other == 'The "cat" of him sat'
    assert [each.second for each in read[1:]] == ["In play she ran", "Her the bird flew in"]

    found = pairs(tmp_path / "gap.tsv", model)
    assert found.tokens == "differing"
    expected = []
    for form in read[0].forms():  # each pronoun is three pieces, of which the first is the same
        ids = [theirs[0](sentence).input_ids for sentence in form[:2]]
        own = [[i for i in range(len(x)) if i not in s] for x, s in zip(ids, common(*ids), strict=True)]
        expected.append([masked_score(theirs, *each) / len(each[1]) for each in zip(ids, own, strict=True)])
    best = max(expected, key=lambda scores: scores[1])
    assert np.allclose(found.pairs[0][-2:], best, rtol=0, atol=0.0011)
    rates = {each.name: each.rate for each in found.categories}
    assert found.ratio == (rates["feminine"] / rates["masculine"] if rates["masculine"] else None)


def test_winobias_is_read_from_two_files(tmp_path):
    pro, anti = tmp_path / "pro.txt.dev", tmp_path / "anti.txt.dev"
    pro.write_text(
        "1 [The guard] called the cook because [he] was late.\n2 The guard met [the cook] 's [her] dog.\n"
    )
    anti.write_text(
        "1 [The guard] called the cook because [she] was late.\n\n2 The guard met [the cook] 's [his] dog.\n"
    )
    kind, (first, second) = read_pairs([pro, anti])
    sentence = "The guard called the cook because {} was late."
    assert kind == "winobias"
    assert first == Pair(sentence.format("he"), sentence.format("she"), "masculine", "", f"{pro}, line 1")
    assert second[:3] == (
        "The guard met the cook 's her dog.",
        "The guard met the cook 's his dog.",
        "feminine",
    )


def test_own_pairs_are_read_with_named_or_known_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"first": "a cat", "second": "a dog"}) + "\n")
    (tmp_path / "b.csv").write_text("x,y,z\na cat,a dog,pets\n")
    assert read_pairs([tmp_path / "a.jsonl"]).pairs[0][:3] == ("a cat", "a dog", "")
    assert read_pairs([tmp_path / "b.csv"], "x", "y", "z").pairs[0][:3] == ("a cat", "a dog", "pets")


CROWS = "sent_more,sent_less,stereo_antistereo,bias_type\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", CROWS + "a cat,,stereo,x\n", "a.csv, line 2: sent_less must not be empty"),
        (
            "a.csv",
            CROWS + "a,b,stereo,x\na,b,both,x\n",
            "a.csv, line 3: stereo_antistereo must be stereo or anti",
        ),
        ("a.csv", CROWS, "a.csv must contain a record, got none"),
        ("a.csv", "sent_more,sent_less\na,b\n", "a.csv, line 2 must have a column 'stereo_antistereo'"),
        ("a.csv", "x,y\na,b\n", "a.csv must have a column 'first', got x, y; name it with --text"),
        ("a.csv", "text,y\na,b\n", "a.csv must have a column 'second', got text, y; name it with --pair"),
        (
            "a.tsv",
            GAP + "1\tSo he ran\the\t4\tu\n",
            "a.tsv, line 2: Pronoun-offset must be the offset of 'he'",
        ),
        ("a.tsv", GAP + "1\tSo he ran\the\tx\tu\n", "a.tsv, line 2: Pronoun-offset must be a finite number"),
        ("a.tsv", GAP + "1\tSo it ran\tit\t3\tu\n", "a.tsv, line 2: Pronoun must be one of he, him"),
        ("a.txt", "[The cook] ran because [he] could.\n", "pairs: data must be two files of WinoBias"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        read_pairs([tmp_path / name])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("[A] met [her].\n[A] met [him].\n", "anti.txt must have 1 lines, as"),
        ("[A] met [it].\n", "anti.txt, line 1 must have a pronoun in brackets"),
    ],
)
def test_errors_of_winobias(tmp_path, second, message):
    files = [tmp_path / "pro.txt", tmp_path / "anti.txt"]
    for file, content in zip(files, ("[A] met [him].\n", second), strict=True):
        file.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_pairs(files)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": []}, "pairs: data must name a file"),
        ({"tokens": "all"}, "pairs: tokens must be one of shared, differing"),
        ({"label": "x"}, "pairs: label must be left out without a classifier"),
        ({"model": None}, "pairs: model must be named"),
        ({"by": "generators"}, "pairs: by must be generator, discriminator, electric, or the folder"),
        ({"data": [("a cat",)]}, "pairs: pair 1 must have two sentences and possibly a category"),
        ({"data": [("a cat", "a dog"), ("a cat", 3)]}, "pairs: pair 2: second must be a string, got 3"),
        ({"data": [("a cat", "\u200b")]}, "pairs: pair 1 must have words"),
    ],
)
def test_errors_of_arguments(model, arguments, message):
    with pytest.raises(ValueError) as caught:
        pairs(**{"data": [("a cat", "a dog")], "model": model} | arguments)
    assert message in str(caught.value)


class Reader(Classifier):
    """A classifier that likes long texts."""

    labels = ("bad", "good")

    def __init__(self):
        pass

    def __call__(self, texts):
        shares = [len(each) / 100 for each in texts]
        return [Classified("good", x, ("good",), {"bad": 1 - x, "good": x}) for x in shares]


def test_a_classifier_scores_with_the_probability_of_a_label():
    found = pairs([("a cat", "a bird"), ("a dog", "a cat")], by=Reader(), label="bad")
    assert [each[-2:] for each in found.pairs] == [(0.95, 0.94), (0.95, 0.95)]
    assert (found.overall.rate, found.overall.neutral, found.tokens) == (0.5, 1, None)
    with pytest.raises(ValueError, match="label must be one of bad, good, got 'ugly'"):
        pairs([("a cat", "a bird")], by=Reader(), label="ugly")


def measured(*scores):
    """The result for pairs with these probabilities, as (length of the first, of the second)."""
    texts = [Pair("x" * a, "x" * b, where=f"<{n}>") for n, (a, b) in enumerate(scores)]
    return pairs(PairSet("pairs", texts), by=Reader(), label="good")


def test_intervals_are_percentiles_of_resamples():
    # Of three pairs with one preference, a resample has 0 with probability 8/27 and 3 with 1/27, above 2.5 %.
    rate = measured((2, 1), (1, 2), (1, 2)).overall
    assert (rate.low, rate.high) == (0, 1)
    assert rate == measured((2, 1), (1, 2), (1, 2)).overall
    certain = measured((2, 1), (2, 1)).overall
    assert (certain.rate, certain.low, certain.high) == (1, 1, 1)


def test_effect_size():
    assert effect_size(np.array([1.0, 3.0])) == 2 / math.sqrt(2)
    assert effect_size(np.array([1.0, 1.0])) is None and effect_size(np.array([1.0])) is None


def test_the_table_and_the_page(model, ten):
    found = pairs(ten, model)
    lines = text(found).splitlines()
    assert len(lines) == 1 + 1 + 1 + 3 + 2 + 1 and lines[2].split()[:3] == ["all", "10", "2"]
    assert json.loads(json.dumps(found))[0] == "crows_pairs"
    html = page(found._replace(pairs=[found.pairs[0]._replace(first="<b> cat")]), "a & b")
    assert "&lt;b&gt; cat" in html and "by a &amp; b" in html and "<b>" not in html
    assert html.count("<circle") == 6 and "Blodgett" in html and "http" not in html


@pytest.mark.filterwarnings("ignore:.*windows that overlap")
def test_the_page_of_gap_and_of_own_pairs_has_other_limits(model):
    texts = PairSet("gap", [Pair("x " * 80 + "he ran", "x " * 80 + "she ran", "masculine")])
    html = page(pairs(texts, model, "discriminator"), "m")
    assert "bias factor" in html and "CrowS-Pairs" not in html and "…x x" in html.replace("… ", "…")
    assert "nothing but the group" in page(measured((1, 2)), "m")
