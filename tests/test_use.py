"""What a pre-trained model says about texts is what transformers says about each of them alone."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from small_use import CONFIG, LONG, TEXTS, alone, ids_of, masked_alone
from small_vocabulary import more_pieces

from electra_fast.use import choose, detect, load, score, suggest
from electra_fast.use.detect import Detected, Word, marked, page
from electra_fast.use.likelihood import masked_log_probs
from electra_fast.use.texts import tokens_of, windows

pytest.importorskip("tokenizers")
pytest_plugins = ["small_tokenizer", "small_run"]
MOST = CONFIG.max_positions - 2
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SAME = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def model(small_run):
    return load(small_run, device="cpu")


def test_detect_is_transformers_discriminator_on_each_text_alone(model, their_halves, tokenizer):
    for text, found in zip(TEXTS, detect(TEXTS, model), strict=True):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        shares, words = alone(their_halves[0], encoding.ids).sigmoid().tolist(), {}
        for word, share in zip(encoding.word_ids, shares, strict=True):
            words[word] = max(share, words.get(word, 0))
        np.testing.assert_allclose([word.probability for word in found.words], list(words.values()), **CLOSE)
        assert [word.text for word in found.words] == [text[word.start : word.end] for word in found.words]
        assert "".join(word.text for word in found.words) == text.replace(" ", "")


def test_a_text_gives_the_same_alone_as_among_others(model):
    for text, found in zip(TEXTS, detect(TEXTS, model), strict=True):
        alone = detect(text, model)
        assert alone.text == found.text
        np.testing.assert_allclose(alone.words[0][1:], found.words[0][1:], **SAME)
    for text, found in zip(TEXTS, score(TEXTS, model), strict=True):
        np.testing.assert_allclose(score(text, model)[1:4], found[1:4], **SAME)


def test_the_order_is_that_of_the_texts(model):
    assert [found.text for found in detect(TEXTS[::-1], model)] == TEXTS[::-1]
    assert detect([], model) == score([], model) == choose([], ["red", "blue"], model) == []
    assert suggest([], model) == []


def test_scores_are_those_of_a_plain_loop(model, their_halves, tokenizer):
    discriminator, generator = their_halves
    for text, found in zip(TEXTS, score(TEXTS, model), strict=True):
        ids = ids_of(tokenizer, text)
        likelihood = sum(masked_alone(generator, ids, t)[i].item() for t, i in enumerate(ids))
        original = -torch.nn.functional.softplus(alone(discriminator, ids)).sum().item()
        assert found.tokens == len(ids)
        np.testing.assert_allclose(found.generator, likelihood, rtol=1e-5)
        np.testing.assert_allclose(found.discriminator, original, rtol=1e-5)
        assert found.electric is None


def test_only_the_given_positions_are_scored(model, their_halves, tokenizer):
    ids = [np.array(ids_of(tokenizer, text)) for text in TEXTS]
    positions = [np.array([2, 0]), np.array([], int), np.array([0]), np.array([5])]
    found = masked_log_probs(model, ids, positions)
    for each, where, got in zip(ids, positions, found, strict=True):
        expected = [masked_alone(their_halves[1], each.tolist(), t)[each[t]].item() for t in where]
        np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*windows that overlap")
def test_a_long_text_is_read_in_windows(model, their_halves, tokenizer):
    ids = ids_of(tokenizer, LONG)
    assert len(ids) > MOST
    cut = windows(np.ones(len(ids), int), MOST)
    logits, likelihood = [], 0.0
    for window in cut:
        part, own = (
            ids[window.begin : window.end],
            slice(window.first - window.begin, window.last - window.begin),
        )
        logits += alone(their_halves[0], part)[own].tolist()
        for t in range(window.first, window.last):
            likelihood += masked_alone(their_halves[1], part, t - window.begin)[ids[t]].item()
    (tokens,) = tokens_of("test", [LONG], tokenizer)
    highest = [max(np.array(logits)[tokens.words == word]) for word in range(tokens.words[-1] + 1)]
    found = [math.log(w.probability / (1 - w.probability)) for w in detect(LONG, model).words]
    np.testing.assert_allclose(found, highest, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score(LONG, model, "generator").generator, likelihood, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 21, 22, 23, 40, 100, 1000])
def test_windows_cover_each_token_once_with_context_on_both_sides(tokens):
    cut = windows(np.ones(tokens, int), 22)
    assert [t for window in cut for t in range(window.first, window.last)] == list(range(tokens))
    for window in cut:
        assert window.begin <= window.first < window.last <= window.end <= window.begin + 22
        assert window.first - window.begin >= 2 or window.begin == 0
        assert window.end - window.last >= 2 or window.end == tokens


def test_windows_of_words_hold_as_many_tokens_as_fit():
    sizes = np.array([3, 1, 30, 1, 1, 8, 8, 8, 1])
    cut = windows(sizes, 10)
    assert [t for window in cut for t in range(window.first, window.last)] == list(range(9))
    assert all(sizes[w.begin : w.end].sum() <= 10 or w.end == w.begin + 1 for w in cut)


def test_ids_are_texts_too(model, tokenizer):
    ids = [ids_of(tokenizer, text) for text in TEXTS]
    by_ids, by_text = detect(ids, model), detect(TEXTS, model)
    for a, b in zip(by_ids, by_text, strict=True):
        np.testing.assert_allclose([w.probability for w in a.words], [w.probability for w in b.words], **SAME)
    assert by_ids[0].text == detect(ids[0], model).text == "the cat sat ."
    np.testing.assert_allclose(score(ids, model)[0][1:4], score(TEXTS[0], model)[1:4], **SAME)


def test_choose_compares_the_tokens_of_the_options(model, their_halves, tokenizer):
    options, text = ["red", "dark blue"], "the cat sat."
    found = choose(text, options, model, "{text} It was {option}.")
    for option in options:
        before, inside, after = (ids_of(tokenizer, part) for part in (f"{text} It was", option, "."))
        logits = alone(their_halves[0], [*before, *inside, *after])[len(before) : len(before) + len(inside)]
        expected = -torch.nn.functional.softplus(logits).mean().item()
        np.testing.assert_allclose(found.scores[option], expected, rtol=1e-5)
    assert found.option == max(found.scores, key=found.scores.get)
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert choose("the cat sat. It was {option}.", options, model).scores == found.scores
    assert choose([text] * 2, options, model, "{text} It was {option}.") == [found] * 2


def test_a_text_too_long_for_an_option_is_cut_off_at_its_end(model):
    fits = choose("{option} the cat ran", ["red", "blue"], model)
    short, long = (
        choose(text, ["red", "blue"], model, "{text} {option}") for text in ("the " * 21, LONG * 9)
    )
    assert set(short.scores) == set(fits.scores) == set(long.scores)
    assert choose("the " * 40, ["red", "blue"], model, "{text} {option}").scores == short.scores


def test_suggestions_are_the_generators_and_ranked_by_the_discriminator(model, their_halves, tokenizer):
    text, (start, end) = "the catx sat.", (4, 8)
    found = suggest(text, model, [(start, end)], top=4)
    (one,) = found.suggestions
    assert (one.word, one.start, one.end) == ("catx", 4, 8)
    before, after = (ids_of(tokenizer, part) for part in ("the", "sat."))
    shares = masked_alone(their_halves[1], [*before, 0, *after], 1).exp()
    expected = {}
    for piece, i in tokenizer.get_vocab().items():
        if not piece.startswith(("##", "[")) and piece.isalnum() and piece != "cat":
            expected[piece] = shares[i].item()
    best = sorted(expected, key=expected.get)[-4:]
    assert {each.text for each in one.candidates} == set(best)
    for each in one.candidates:
        ids = [*before, tokenizer.token_to_id(each.text), *after]
        np.testing.assert_allclose(each.generator, expected[each.text], **CLOSE)
        np.testing.assert_allclose(
            each.discriminator, alone(their_halves[0], ids)[1].sigmoid().item(), **CLOSE
        )
    replaced = [each.discriminator for each in one.candidates]
    assert replaced == sorted(replaced)
    better = one.candidates[0].discriminator < one.probability
    assert found.corrected() == (f"the {one.candidates[0].text} sat." if better else text)


@pytest.mark.filterwarnings("ignore:.*windows that overlap")
def test_suggestions_without_spans_are_for_the_words_that_detect_finds(model):
    words = sorted(detect(LONG, model).words, key=lambda word: -word.probability)
    threshold = (words[2].probability + words[3].probability) / 2
    found = suggest([LONG, TEXTS[0]], model, threshold=threshold, top=1)[0]
    assert {(s.start, s.end, s.probability) for s in found.suggestions} == {w[1:] for w in words[:3]}


def test_a_page_shades_the_words_and_escapes_the_text():
    found = Detected("a <b> c", [Word("a", 0, 1, 0.1), Word("<", 2, 3, 0.9), Word("b", 3, 4, 0.6)])
    assert marked(found) == "a [< 0.90][b 0.60]> c"
    html = page([found], "<model>")
    assert (
        "&lt;model&gt;" in html
        and '90%, transparent)" title="0.900">&lt;</span>' in html
        and "<b>" not in html
    )


@pytest.mark.parametrize("options", [{"int8": True}, {"precision": "bf16"}])
def test_lower_precision_is_near(model, small_run, options):
    low = load(small_run, device="cpu", **options)
    for name, tolerance in (("generator", 0.05), ("discriminator", 0.05)):
        a, b = ([getattr(each, name) for each in score(TEXTS, m)] for m in (model, low))
        assert a != b
        np.testing.assert_allclose(b, a, rtol=tolerance)


def test_bad_input_is_refused(model, small_run, tmp_path):
    for call in (detect, score, suggest):
        with pytest.raises(ValueError, match=rf"{call.__name__}: text 2 must have a word, got '  '"):
            call(["the", "  "], model)
        with pytest.raises(TypeError, match=r"text 1 must be a string or a list of ids, got NoneType"):
            call([None], model)
    with pytest.raises(ValueError, match=r"ids must be in the vocabulary, got 5000"):
        detect([[5, 5000]], model)
    with pytest.raises(ValueError, match=r"ids must be in the vocabulary, got 'a'"):
        detect([5, "a"], model)
    with pytest.raises(ValueError, match=r"by must be one of generator, discriminator, electric, got 'both'"):
        score("the", model, "both")
    with pytest.raises(ValueError, match=r"top must be 1 or more, got 0"):
        suggest("the", model, top=0)
    with pytest.raises(ValueError, match=r"each span must contain a word of its text, got \(3, 4\)"):
        suggest("the cat", model, [(3, 4)])
    options = {
        "be two or more different texts": ["red"],
        "be two or more different texts, got red": "red",
        r"option '' must have 1 to \d+ tokens for this model and template, got 0": ["red", ""],
        "option 'the the.*' must have 1 to 16 tokens for this model and template, got 30": ["a", "the " * 30],
    }
    for rule, given in options.items():
        with pytest.raises(ValueError, match=rule):
            choose("the", given, model)
    with pytest.raises(ValueError, match=r"template must be one of sentiment, .*, got 'no option'"):
        choose("the", ["a", "b"], model, "no option")
    with pytest.raises(
        ValueError, match=r"choose: options must be .*, got none; only the template sentiment"
    ):
        choose("the", None, model, "topic")


def test_texts_may_be_any_iterable_and_ids_any_array(model, tokenizer):
    expected = detect(TEXTS, model)
    numpy_ids = [np.array(ids_of(tokenizer, text)) for text in TEXTS]
    for texts in (tuple(TEXTS), np.array(TEXTS), (text for text in TEXTS), dict.fromkeys(TEXTS).keys()):
        assert detect(texts, model) == expected
    assert choose(iter(TEXTS), np.array(["red", "blue"]), model) == choose(TEXTS, ("red", "blue"), model)
    assert suggest(np.array(TEXTS), model, threshold=0, top=1) == suggest(TEXTS, model, threshold=0, top=1)
    by_ids = detect(numpy_ids, model)
    assert detect(map(torch.tensor, numpy_ids), model) == detect(map(list, numpy_ids), model) == by_ids
    one = numpy_ids[0]
    assert detect(one, model) == detect(torch.tensor(one), model) == detect(one.tolist(), model)


@pytest.mark.parametrize(
    "texts, error",
    [
        (b"the", r"texts must be a string or a list, got bytes"),
        (None, r"texts must be a string or a list, got NoneType"),
        ({"the": 1}, r"texts must be a string or a list, got dict"),
        (["the", [5, 6]], r"text 2 must be a string, got list"),
        ([[5, 6], "the"], r"text 1 must be a string, got list"),
        ([b"the"], r"text 1 must be a string or a list of ids, got bytes"),
        ([[5, 2**40]], r"text 1: ids must be in the vocabulary, got 1099511627776"),
        (["the", "a \ud800"], r"text 2 must be Unicode, got \\ud800, half of a surrogate pair"),
    ],
)
def test_what_is_not_a_text_is_refused(model, texts, error):
    for call in (detect, score, suggest):
        with pytest.raises((TypeError, ValueError), match=f"{call.__name__}: {error}"):
            call(texts, model)


def test_choose_refuses_texts_options_and_templates_that_it_would_misread(model):
    wrong = {
        "choose: text 2 must have a word, got ' '": (["the", " "], ["a", "b"]),
        "choose: text 1 must have a word, got .*200b": ("\u200b", ["a", "b"]),
        r"choose: text 1 must be Unicode, got \\ud800": ("\ud800", ["a", "b"]),
        "choose: text 1 must be a string, got list": ([5, 6], ["a", "b"]),
        "choose: text 1 must contain {option} once": ("{option} {option}", ["a", "b"]),
        "choose: option 2 must be a string, got int": ("the", ["a", 1]),
        r"choose: option 1 must be Unicode, got \\ud800": ("the", ["\ud800", "a"]),
    }
    for rule, (text, options) in wrong.items():
        with pytest.raises((TypeError, ValueError), match=rule):
            choose(text, options, model)
    for template in ("{text}{text} {option}", "{text} {option} {option}", "{option} {text}"):
        with pytest.raises(
            ValueError, match=r"template must be .*, each once, got"
        ):  # not: options, got none
            choose("the", None, model, template)
    assert choose("{option} ran", ["a", "b"], model).option in "ab"


def test_suggest_refuses_spans_and_thresholds_that_it_would_misread(model):
    with pytest.raises(ValueError, match=r"each span must be \(start, end\), in a list for each text, got 4"):
        suggest("the cat", model, (4, 7))
    with pytest.raises(ValueError, match=r"spans must have a list for each of 2 texts, got 1"):
        suggest(["the cat", "a"], model, [[(4, 7)]])
    for threshold in (math.nan, -1, 2):
        with pytest.raises(ValueError, match=rf"threshold must be in \[0, 1\], got {threshold}"):
            suggest("the cat", model, threshold=threshold)


def test_a_word_has_its_accents(model):
    text = "cafe\u0301 re\u0301sume\u0301! ra\u0301n"  # the tokenizer removes the accents
    found = detect(text, model)
    assert [word.text for word in found.words] == ["cafe\u0301", "re\u0301sume\u0301", "!", "ra\u0301n"]
    assert all(word.text == text[word.start : word.end] for word in found.words)
    assert marked(found, 1) == text
    suggested = suggest(text, model, [(0, 1)], top=1).suggestions[0]
    assert (suggested.word, suggested.end) == ("cafe\u0301", 5)
    (before, after) = detect("!\u0301a", model).words
    assert before.end <= after.start


def test_models_of_another_kind_are_refused(small_run, model, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"detect: model must have a discriminator, got .*generator"):
        detect("the", small_run / "generator")
    with pytest.raises(ValueError, match=r"suggest: model must have a generator"):
        suggest("the", small_run / "discriminator")
    assert score("the", small_run / "discriminator").generator is None
    bert = tmp_path / "bert"
    bert.mkdir()
    described = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (bert / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"be the folder of a pre-trained ELECTRA.* with BertForMaskedLM"):
        detect("the", bert)
    with pytest.raises(FileNotFoundError, match=r"detect: model must be on this machine"):
        detect("the", tmp_path / "nothing")
    (bert / "config.json").unlink()
    (bert / "recipe.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"detect: model must be .*; pretrain writes discriminator/ with each"
    ):
        detect("the", bert)
    with pytest.raises(TypeError, match=r"detect: model must be a path, got Discriminator"):
        detect("the", model.discriminator)
    shutil.copytree(small_run / "discriminator", larger := tmp_path / "larger")
    more_pieces(larger, CONFIG.vocab_size)
    with pytest.raises(ValueError, match=r"larger must have \d+ rows in its word table, .*, got 128"):
        detect("the", larger)
    bare = tmp_path / "bare"
    model.discriminator.save_pretrained(bare)
    with pytest.raises(
        FileNotFoundError, match=r"bare must contain tokenizer.json or vocab.txt, got neither"
    ):
        detect("the", bare)


def test_a_text_that_is_longer_than_the_model_is_warned_of(model):
    with pytest.warns(
        UserWarning, match="detect: 1 of 2 texts have more than 22 tokens; they are read in 3 windo"
    ):
        detect([TEXTS[0], LONG], model)


def test_a_text_that_the_vocabulary_does_not_know_is_warned_of(model):
    with pytest.warns(UserWarning, match="detect: 67% of the tokens are .UNK.; the vocabulary of the model"):
        detect("кот и a", model)
