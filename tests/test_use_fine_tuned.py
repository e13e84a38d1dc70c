"""Fine-tuned models loaded from their folders give what transformers gives for each text alone."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_tasks import CONFIG
from small_use import LONG, TEXTS, alone, ids_of
from small_vocabulary import more_pieces

from electra_fast import data
from electra_fast.heads import IntentClassifier, QuestionAnswerer, SequenceClassifier, TokenClassifier
from electra_fast.use import Answerer, Classifier, IntentReader, Ranker, Tagger, intent, rank, reply
from electra_fast.use.fine_tuned import in_words
from electra_fast.use.texts import windows

transformers = pytest.importorskip("transformers")
pytest_plugins = ["small_tokenizer"]
TAGS = ("O", "B-animal", "I-animal", "B-colour", "I-colour")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SAME = {"rtol": 1e-6, "atol": 1e-6}
MADE = {
    "classify": lambda: SequenceClassifier(CONFIG, ("bad", "fair", "good"), "single_label_classification"),
    "several": lambda: SequenceClassifier(CONFIG, ("bad", "fair", "good"), "multi_label_classification"),
    "tag": lambda: TokenClassifier(CONFIG, TAGS),
    "answer": lambda: QuestionAnswerer(CONFIG, ("LABEL_0", "LABEL_1")),
    "rank": lambda: SequenceClassifier(CONFIG, ("relevance",)),
    "intent": lambda: IntentClassifier(CONFIG, ("play", "rate"), TAGS),
}


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """The folder of a model per task, with weights so large that all results differ."""
    found = {}
    for name, make in MADE.items():
        torch.manual_seed(1)
        head = make()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        found[name] = tmp_path_factory.mktemp(name)
        head.save_pretrained(found[name])
        data.save_tokenizer(tokenizer, found[name])
    return found


def logits_of(kind, folder, tokenizer, text, pair=None):
    """Return the outputs of transformers for one text, or one pair of texts, without padding."""
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    first = [CONFIG.cls_id, *ids_of(tokenizer, text), CONFIG.sep_id]
    second = [] if pair is None else [*ids_of(tokenizer, pair), CONFIG.sep_id]
    types = [0] * len(first) + [1] * len(second)
    with torch.no_grad():
        return model(input_ids=torch.tensor([first + second]), token_type_ids=torch.tensor([types]))


@pytest.mark.parametrize("pair", [None, "the red dog"])
def test_a_classifier(folders, tokenizer, pair):
    model = Classifier(folders["classify"], device="cpu")
    found = model(TEXTS if pair is None else [(text, pair) for text in TEXTS])
    kind = "ElectraForSequenceClassification"
    for text, each in zip(TEXTS, found, strict=True):
        shares = logits_of(kind, folders["classify"], tokenizer, text, pair).logits[0].softmax(-1).tolist()
        np.testing.assert_allclose(list(each.scores.values()), shares, **CLOSE)
        assert list(each.scores) == ["bad", "fair", "good"] and each.labels == (each.label,)
        assert each.score == max(each.scores.values()) == each.scores[each.label]


def test_a_classifier_with_several_labels_per_text(folders, tokenizer):
    for text, each in zip(TEXTS, Classifier(folders["several"])(TEXTS), strict=True):
        kind = "ElectraForSequenceClassification"
        shares = logits_of(kind, folders["several"], tokenizer, text).logits[0].sigmoid().tolist()
        np.testing.assert_allclose(list(each.scores.values()), shares, **CLOSE)
        assert each.labels == tuple(label for label, share in each.scores.items() if share > 0.5)


def test_a_text_gives_the_same_alone_among_others_and_in_threads(folders):
    model = Classifier(folders["classify"])
    together = model(TEXTS * 20)
    assert model([]) == []
    with ThreadPoolExecutor(4) as pool:
        apart = list(pool.map(model, TEXTS * 20))
    for a, b in zip(together, apart, strict=True):
        assert a.label == b.label
        np.testing.assert_allclose(list(a.scores.values()), list(b.scores.values()), **SAME)


def entities_of(tags, words):
    """Return (type, text, start, end) of entities, read from the tags word by word."""
    found = []
    for tag, (start, end) in zip(tags, words.spans, strict=True):
        if tag.startswith("I-") and found and found[-1][-1] and found[-1][0] == tag[2:]:
            found[-1][2] = end
        elif tag != "O":
            found.append([tag[2:], start, end, True])
        if tag == "O" and found:
            found[-1][-1] = False
    return [(kind, words.text[start:end], start, end) for kind, start, end, _ in found]


@pytest.mark.filterwarnings("ignore:.*windows that overlap")
def test_a_tagger_finds_entities_with_their_places_and_reads_long_texts_in_windows(folders, tokenizer):
    model, texts = Tagger(folders["tag"]), [*TEXTS, "the cat-dog (red) ran", LONG * 2]
    theirs = transformers.ElectraForTokenClassification.from_pretrained(folders["tag"]).eval()
    for text, found in zip(texts, model(texts), strict=True):
        words = in_words(text)
        pieces = [ids_of(tokenizer, word) for word in words.words]
        tags = []
        for window in windows(np.array([len(i) for i in pieces]), CONFIG.max_positions - 2):
            inside = pieces[window.begin : window.end]
            with torch.no_grad():
                ids = [CONFIG.cls_id, *(i for word in inside for i in word), CONFIG.sep_id]
                best = theirs(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
            starts = np.cumsum([1, *map(len, inside)])[:-1]
            own = slice(window.first - window.begin, window.last - window.begin)
            tags += [TAGS[best[t]] for t in starts[own]]
        assert [each[:4] for each in found] == entities_of(tags, words)
        assert all(0 < each.score <= 1 for each in found)
        alone = model(text)
        np.testing.assert_allclose([e.score for e in alone], [e.score for e in found], **SAME)
    assert len(model(LONG * 2)) > 0


def test_words_are_separate_from_the_punctuation_around_them():
    found = in_words('He said: "don\'t go to St-Malo, @ann!" 3.5%')
    assert found.words == 'He said : " don\'t go to St-Malo , @ann ! " 3.5 %'.split()
    assert all(found.text[a:b] == word for word, (a, b) in zip(found.words, found.spans, strict=True))


def test_an_answerer(folders, tokenizer):
    question, context = "who sat?", "the red cat sat in the rain"
    found, other = Answerer(folders["answer"], max_query=8)([(question, context), ("what?", LONG)])
    logits = logits_of("ElectraForQuestionAnswering", folders["answer"], tokenizer, question, context)
    encoding = tokenizer.encode(context, add_special_tokens=False)
    begin, tokens = len(ids_of(tokenizer, question)) + 2, len(encoding.ids)
    start, end = (x[0, begin : begin + tokens] for x in (logits.start_logits, logits.end_logits))
    scores = {(a, b): (start[a] + end[b]).item() for a in range(tokens) for b in range(a, tokens)}
    a, b = max(scores, key=scores.get)
    assert (found.start, found.end) == (encoding.offsets[a][0], encoding.offsets[b][1])
    assert found.text == context[found.start : found.end]
    np.testing.assert_allclose(found.score, scores[a, b], **CLOSE)
    assert other.text == LONG[other.start : other.end] != ""
    assert Answerer(folders["answer"], max_query=8)((question, context)).text == found.text


def test_a_ranker_reads_equal_documents_once(folders, monkeypatch):
    """At another place in a batch the same text may get other bits, and a wrong place among equal ones."""
    model, seen = Ranker(folders["rank"]), []
    predict = model._predict
    monkeypatch.setattr(model, "_predict", lambda items: seen.append(items[0].candidates) or predict(items))
    found = model("who ran?", ["the cat", "a dog"] * 9)
    assert seen == [["the cat", "a dog"]] and len({each.score for each in found}) == 2
    assert sorted(each.number for each in found[:9]) == [each.number for each in found[:9]]


def test_a_ranker_puts_the_most_relevant_first_and_chooses_a_reply(folders, tokenizer):
    model, query = Ranker(folders["rank"]), "who ran?"
    found = rank(query, TEXTS, model)
    kind = "ElectraForSequenceClassification"
    shares = [
        logits_of(kind, folders["rank"], tokenizer, query, text).logits.sigmoid().item() for text in TEXTS
    ]
    assert [each.number for each in found] == sorted(range(len(TEXTS)), key=lambda n: -shares[n])
    assert all(TEXTS[each.number] == each.text for each in found)
    np.testing.assert_allclose([each.score for each in found], sorted(shares, reverse=True), **CLOSE)
    assert [each.number for each in rank(query, ["the cat"] * 3, model)] == [0, 1, 2]
    assert reply(query, TEXTS, folders["rank"]).text == found[0].text
    # The first turn does not fit into half of the model.
    np.testing.assert_allclose(reply(["cat " * 30, "who", "ran?"], TEXTS, model)[2], found[0].score, **SAME)
    assert rank(query, [], model) == []


def test_an_intent_with_its_slots(folders, tokenizer):
    found = intent(TEXTS, folders["intent"])
    for text, each in zip(TEXTS, found, strict=True):
        kind = "ElectraForSequenceClassification"
        shares = logits_of(kind, folders["intent"], tokenizer, text).logits[0].softmax(-1)
        assert each.intent == ("play", "rate")[shares.argmax()]
        np.testing.assert_allclose(each.score, shares.max().item(), **CLOSE)
    theirs = transformers.ElectraForTokenClassification.from_pretrained(folders["intent"] / "slots").eval()
    best = alone(theirs, ids_of(tokenizer, TEXTS[1])).argmax(-1)
    assert [e[:4] for e in found[1].slots] == entities_of([TAGS[i] for i in best], in_words(TEXTS[1]))
    assert IntentReader(folders["intent"])(TEXTS[0]).intent == found[0].intent


def test_bad_input_is_refused(folders, tmp_path):
    model = Classifier(folders["classify"])
    with pytest.raises(ValueError, match=r"Classifier: text 2 must have a word, got ' '"):
        model(["the", " "])
    with pytest.raises(TypeError, match=r"Classifier: text 1 must be a string, got int"):
        model([(3, "a")])
    with pytest.raises(
        ValueError,
        match=r"have the head of classify .*, got ElectraForTokenClassification; finetune",
    ):
        Classifier(folders["tag"])
    with pytest.raises(ValueError, match=r"have a model with two labels or more"):
        Classifier(folders["rank"])
    with pytest.raises(ValueError, match=r"have one output for rank, got 3"):
        Ranker(folders["classify"])
    with pytest.raises(TypeError, match=r"documents must be a list of texts, got a string"):
        rank("who", "the cat", folders["rank"])
    with pytest.raises(ValueError, match=r"reply: candidates must have at least one text"):
        reply("who", [], folders["rank"])
    with pytest.raises(FileNotFoundError, match="Tagger: folder must be on this machine"):
        Tagger(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"--max-len must be at most 64"):
        Classifier(folders["classify"], max_len=65)
    more_pieces(shutil.copytree(folders["classify"], tmp_path / "more"), CONFIG.vocab_size)
    with pytest.raises(ValueError, match=r"more must have \d+ rows in its word table, for its tokenizer"):
        Classifier(tmp_path / "more")
    with pytest.raises(TypeError, match=r"Classifier: lengths must be of max_len, stride, .*, got seeds"):
        Classifier(folders["classify"], seeds=2)
    with pytest.raises(ValueError, match=r"Classifier: precision must be one of float32, bf16, got None"):
        Classifier(folders["classify"], precision=None)


INVISIBLE = "\u200b\x01"  # a tokenizer removes them
CALLS = {
    "Classifier": (Classifier, "classify", lambda model, text: model(["the", text])),
    "Tagger": (Tagger, "tag", lambda model, text: model(["the", text])),
    "IntentReader": (IntentReader, "intent", lambda model, text: model(["the", text])),
    "Answerer": (Answerer, "answer", lambda model, text: model([("who?", "the"), ("who?", text)])),
    "Ranker": (Ranker, "rank", lambda model, text: model("who?", ["the", text])),
    "reply": (Ranker, "rank", lambda model, text: reply("who?", ["the", text], model)),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_a_text_is_refused(folders, name):
    kind, folder, call = CALLS[name]
    model = kind(folders[folder], **({"max_query": 8} if kind is Answerer else {}))
    wrong = {
        "must have a word, got .*200b": INVISIBLE,
        "must be Unicode, got .*ud800, half of a surrogate pair": "a \ud800",
        "must be a string, got NoneType": None,
    }
    for rule, text in wrong.items():
        with pytest.raises(
            (TypeError, ValueError), match=rf"{kind.__name__}: (text|context|document) 2 {rule}"
        ):
            call(model, text)


def test_texts_may_be_any_iterable(folders):
    model, pair = Classifier(folders["classify"]), ("the", "red dog")
    assert model(np.array(TEXTS)) == model(text for text in TEXTS) == model(TEXTS)
    tagger, reader = Tagger(folders["tag"]), IntentReader(folders["intent"])
    assert tagger(iter(TEXTS)) == tagger(TEXTS) and reader(np.array(TEXTS)) == reader(TEXTS)
    answerer, ranker = Answerer(folders["answer"], max_query=8), Ranker(folders["rank"])
    assert answerer(np.array([pair])) == answerer(iter([pair])) == answerer([pair])
    assert ranker("who?", np.array(TEXTS)) == ranker("who?", iter(TEXTS)) == ranker("who?", TEXTS)
    assert reply(np.array(["who?"]), iter(TEXTS), ranker) == reply("who?", TEXTS, ranker)


def test_what_is_not_a_pair_is_refused(folders):
    for pair in (("a",), ("a", "b", "c"), "ab", 5):
        with pytest.raises(TypeError, match=r"Answerer: pair 2 must be a question and a context, got"):
            Answerer(folders["answer"], max_query=8)([("who?", "the"), pair])
    with pytest.raises(TypeError, match=r"Classifier: pair 2 must be a text and a second text, got"):
        Classifier(folders["classify"])(["the", ("a", "b", "c")])


def test_a_single_text_gives_the_same_among_pairs(folders):
    model = Classifier(folders["classify"])
    for among in (["the cat", ("who", "ran")], [("who", "ran"), "the cat", ("the cat", None)]):
        for text, found in zip(among, model(among), strict=True):
            alone = list(model([text])[0].scores.values())
            np.testing.assert_allclose(list(found.scores.values()), alone, **SAME)


def test_marks_belong_to_their_word_and_invisible_characters_to_none():
    assert in_words("cafe\u0301 हिन्दी में, ❤\ufe0f").words == ["cafe\u0301", "हिन्दी", "में", ",", "❤\ufe0f"]
    assert in_words("a \u200b b\x00 \x01").words == ["a", "b"]


def test_a_text_that_is_cut_off_or_unknown_is_warned_of(folders):
    with pytest.warns(UserWarning, match="Classifier: 1 of 2 texts were cut off at 64 tokens"):
        Classifier(folders["classify"])(["the cat", LONG * 4])
    with pytest.warns(UserWarning, match=r"Classifier: 50% of the tokens are .UNK."):
        Classifier(folders["classify"])("кот a")
