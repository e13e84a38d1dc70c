"""Writer and `use write`: the texts and log-probabilities that transformers gives for each text alone."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_tasks import CONFIG
from small_use import LONG, TEXTS, ids_of

from electra_fast import data
from electra_fast.__main__ import main
from electra_fast.decoder import EncoderDecoder
from electra_fast.heads import SequenceClassifier
from electra_fast.tasks.generation import generate
from electra_fast.tasks.items import Writing
from electra_fast.use import Writer

transformers = pytest.importorskip("transformers")
pytest_plugins = ["small_tokenizer"]
SPECIAL = {0, 1, 2, 3, 4}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model whose weights are so large that all results differ; it often ends after a few tokens."""
    torch.manual_seed(0)
    model = EncoderDecoder(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.decoder.head.bias.data[CONFIG.sep_id] += 4  # some results end early
    folder = tmp_path_factory.mktemp("writer")
    model.save_pretrained(folder)
    data.save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def writer(folder):
    return Writer(folder, device="cpu")


def alone(folder, tokenizer, text, **options):
    """Return the text and its log-probability by transformers."""
    model = transformers.EncoderDecoderModel.from_pretrained(folder).eval()
    ids = torch.tensor([[CONFIG.cls_id, *ids_of(tokenizer, text), CONFIG.sep_id]])
    with torch.no_grad():
        written = model.generate(ids, **options)
        logits = model(input_ids=ids, decoder_input_ids=written[:, :-1]).logits.log_softmax(-1)
    chosen = logits.gather(-1, written[:, 1:, None]).sum().item()
    return tokenizer.decode([i for i in written[0].tolist() if i not in SPECIAL]), chosen


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_and_log_probabilities_are_those_of_transformers_alone(writer, folder, tokenizer, beams):
    found = writer(TEXTS, beams=beams, max_new_tokens=7)
    for text, each in zip(TEXTS, found, strict=True):
        wanted = alone(folder, tokenizer, text, num_beams=beams, max_new_tokens=7)
        assert each.text == wanted[0] and each.log_prob == pytest.approx(wanted[1], rel=1e-5)
    assert len({each.text for each in found}) > 2
    examples = writer._examples([Writing(text, None, "") for text in TEXTS])
    ids = generate(writer._generator, examples.sources(), beams=beams, new_tokens=7)
    ended = [CONFIG.sep_id in each for each in ids]
    assert any(ended) and not all(ended)


def test_one_or_many_and_in_threads(writer):
    found = writer(TEXTS, max_new_tokens=5)
    assert writer(TEXTS[1], max_new_tokens=5).text == found[1].text
    assert writer([]) == [] and writer(iter(TEXTS), max_new_tokens=5) == found
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: writer(TEXTS, max_new_tokens=5), range(8))) == [found] * 8


def test_samples_follow_pytorchs_seed(writer):
    torch.manual_seed(0)
    first = writer(TEXTS, sample=True, max_new_tokens=5)
    assert writer(TEXTS, sample=True, max_new_tokens=5) != first
    torch.manual_seed(0)
    assert writer(TEXTS, sample=True, max_new_tokens=5) == first


def test_wrong_arguments_are_refused(folder, writer, tokenizer, tmp_path):
    for options, error in (
        ({"max_new_tokens": 65}, "Writer: max_new_tokens must be from 1 to 64, the positions of the decoder"),
        ({"max_new_tokens": 0}, "Writer: max_new_tokens must be from 1 to 64"),
        ({"beams": 0}, "Writer: beams must be an integer of 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=error):
            writer(TEXTS, **options)
    with pytest.raises(ValueError, match=r"Writer: text 2 must have a word, got ' '"):
        writer(["the", " "])
    with pytest.raises(ValueError, match="Writer: int8 must be False, got True"):
        Writer(folder, int8=True)
    SequenceClassifier(CONFIG, ("a", "b")).save_pretrained(tmp_path)
    data.save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"have the head of write \(EncoderDecoderModel\)"):
        Writer(tmp_path)


def test_a_text_that_is_cut_off_is_warned_of_and_the_longest_result_is_written(writer):
    with pytest.warns(UserWarning, match="Writer: 1 of 2 texts were cut off at 64 tokens"):
        writer(["the cat", LONG * 2], max_new_tokens=2)
    writer("the", max_new_tokens=64)


def test_the_command(folder, writer, capsys):
    found = writer(TEXTS[:2], beams=2, max_new_tokens=4)
    arguments = ["use", "write", "--model", str(folder), *TEXTS[:2], "--beams", "2", "--max-new-tokens", "4"]
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{each.log_prob:.3f}  {each.text}" for each in found]
    main([*arguments, "--json"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        each._asdict() for each in found
    ]
