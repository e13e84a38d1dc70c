"""Writing: sources and targets as packed batches, the metrics, and runs from the files to the folder."""

import json
import math
from types import SimpleNamespace

import fine_tunings
import numpy as np
import pytest
import torch
from small_tasks import all_items, check_gradients, model_of, prepared, trained
from torch.nn.functional import cross_entropy

from electra_fast.__main__ import main
from electra_fast.decoder import EncoderDecoder, Sequences
from electra_fast.tasks.generation import generate, generator, target_log_probs
from electra_fast.tasks.items import Writing
from electra_fast.tasks.readers import writings
from electra_fast.tasks.text_scores import bleu, rouge_l
from electra_fast.tasks.write import Prediction, Write
from electra_fast.train.fine_tune import FineTuning
from electra_fast.train.results import evaluate_folder

for package in ("transformers", "rouge_score", "sacrebleu"):
    pytest.importorskip(package)
pytest_plugins = ["small_tokenizer", "corpus"]
pytestmark = pytest.mark.filterwarnings("ignore:.*TensorBoard:")
OPTIONS = SimpleNamespace(beams=1, source=None, target=None, columns=())
ITEMS = [
    Writing("the red cat sat in the rain", "red cat", "train.jsonl, line 1"),
    Writing("a blue bird", "blue bird flew", "train.jsonl, line 2"),
    Writing("who ran in the rain ? the green dog", "dog", "train.jsonl, line 3"),
]


@pytest.fixture
def task():
    return Write(OPTIONS)


# --- sequences, loss and metrics ---


def test_the_decoder_reads_a_target_and_predicts_its_next_token(task, tokenizer):
    batch = prepared(task, ITEMS, tokenizer).batch(np.array([1, 2]))
    pieces = {n: [tokenizer.id_to_token(i) for i in batch[n]] for n in ("ids", "target_ids", "labels")}
    assert pieces["ids"][:5] == ["[CLS]", "a", "blue", "bird", "[SEP]"]
    assert pieces["target_ids"] == ["[CLS]", "blue", "bird", "flew", "[CLS]", "dog"]
    assert pieces["labels"] == ["blue", "bird", "flew", "[SEP]", "dog", "[SEP]"]
    assert batch["cu_seqlens"].tolist() == [0, 5, 16] and batch["target_cu_seqlens"].tolist() == [0, 4, 6]
    assert (batch["max_seqlen"], batch["target_max_seqlen"]) == (11, 4)


def test_a_batch_counts_the_tokens_of_both(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    batch = all_items(examples)
    assert examples.lengths.tolist() == [9 + 3, 5 + 4, 11 + 2]
    assert examples.lengths.sum() == len(batch["ids"]) + len(batch["labels"])


def test_long_sources_and_targets_are_cut_off_and_counted(task, tokenizer):
    task.max_len, task.max_target = 8, 3
    examples = prepared(task, ITEMS, tokenizer)
    assert examples.truncated == 4  # two sources and two targets
    batch = all_items(examples)
    assert batch["cu_seqlens"].tolist() == [0, 8, 13, 21]
    assert batch["labels"].tolist() == [
        tokenizer.token_to_id(w) for w in "red [SEP] blue [SEP] dog [SEP]".split()
    ]


def test_the_loss_is_the_mean_over_all_target_tokens(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    model, batch = model_of(task), all_items(examples)
    wanted, nats = [], target_log_probs(model.head, examples, 20)
    for i in range(3):
        alone = examples.batch(np.array([i]))
        ids = (Sequences(alone[name][None]) for name in ("ids", "target_ids"))
        logits = model.head.logits(*ids).squeeze(0)
        wanted.append(cross_entropy(logits, alone["labels"], reduction="sum"))
        assert nats[i] == pytest.approx(-wanted[-1].item(), rel=1e-5)
    torch.testing.assert_close(model(**batch).loss, sum(wanted) / len(batch["labels"]))


def test_log_probs_do_not_change_the_mode_of_the_model(task, tokenizer):
    model = model_of(task).train()
    target_log_probs(model.head, prepared(task, ITEMS, tokenizer), 20)
    assert model.training and model.head.decoder.training


def test_the_hash_of_the_data_depends_on_the_targets(task, tokenizer):
    def bytes_of(target):
        items = [ITEMS[0]._replace(target=target)]
        return b"".join(x.tobytes() for x in task.examples(items, tokenizer).arrays())

    assert bytes_of("red cat") != bytes_of("red dog")


def test_gradients(task, tokenizer):
    check_gradients(model_of(task), prepared(task, ITEMS, tokenizer))


def test_it_learns_and_generates_what_transformers_generates(task, tokenizer, tmp_path):
    import transformers

    found, metrics = trained(task, ITEMS, tokenizer, steps=120)
    assert [each.text for each in found] == [item.target for item in ITEMS]
    assert metrics["rouge_l"] == 1 and 1 <= metrics["perplexity"] < 1.5
    assert next(iter(metrics)) == task.metric
    torch.manual_seed(1)
    model = EncoderDecoder(model_of(task).head.config).eval()
    model.save_pretrained(tmp_path)
    plain = transformers.EncoderDecoderModel.from_pretrained(tmp_path)
    sources = task.examples(ITEMS, tokenizer).sources()
    for beams in (1, 3):
        ids = generate(generator(model), sources, beams=beams, new_tokens=6)
        for source, got in zip(sources, ids, strict=True):
            alone = plain.generate(torch.from_numpy(source).long()[None], num_beams=beams, max_new_tokens=6)
            assert alone[0, 1:].tolist() == got


def test_metrics_are_those_of_their_packages(task):
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    wanted = ["The Cat, sat 3 times!", "a dog_house of 2 birds", "rain"]
    written = ["the cat sat 3 times", "A dog house has birds", "snow"]
    theirs = RougeScorer(["rougeL"])
    pairs = list(zip(written, wanted, strict=True))
    assert rouge_l(written, wanted) == [theirs.score(true, text)["rougeL"].fmeasure for text, true in pairs]
    assert bleu(written, wanted) == sacrebleu.corpus_bleu(written, [wanted], lowercase=True).score / 100
    assert rouge_l(["красный кот"], ["Красный кот!"]) == [1]  # rouge-score's words have English letters only
    found = [Prediction(text, -2.0, 3) for text in written]
    items = [Writing("a", true, "") for true in wanted]
    assert task.metrics(items, found)["perplexity"] == pytest.approx(math.exp(2 / 3))
    assert task.metrics(items, [each._replace(log_prob=-1e9) for each in found])["perplexity"] < math.inf


def test_the_baseline_is_the_first_five_words(task):
    items = [Writing("a b c d e f g", "a b c d e", ""), Writing("x", "y z", "")]
    scores = task.majority(items, items)
    assert scores["rouge_l"] == 0.5 and math.isnan(scores["perplexity"])


def test_what_the_page_and_the_lines_show(task):
    found = Prediction("red dog", -1.5, 3)
    record = {"source": ITEMS[0].source, "target": "red cat", "predicted": "red dog", "target_log_prob": -1.5}
    assert task.record(ITEMS[0], found) == record
    assert task.record(ITEMS[0]._replace(target=None), found)["target_log_prob"] is None
    assert task.error(ITEMS[0], found) == 0.5
    long = ITEMS[0]._replace(source="a" * 300)
    assert task.shown(long, found)["source"] == "a" * 200 + "…"
    assert task.details([long], [found])[0].rows == [("a" * 200 + "…", "red cat", "red dog", 0.5)]


# --- files ---


def test_columns_and_errors_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(text, **options):
        (tmp_path / "a.jsonl").write_text(text)
        return writings(["a.jsonl"], **options)

    row = '{"article": "long text", "headline": "title", "id": "x"}\n'
    assert read(row) == [Writing("long text", "title", "a.jsonl, line 1")]
    assert read(row, source="headline", target="id")[0][:2] == ("title", "x")
    assert read('{"source": "text"}')[0].target is None
    for text, options, error in (
        ('{"source": "a", "target": " "}', {}, "a.jsonl, line 1: target must not be empty"),
        ('{"source": "", "target": "b"}', {}, "a.jsonl, line 1: source must not be empty"),
        ('{"source": "a", "target": 3}', {}, "a.jsonl, line 1: target must be a string, got 3"),
        ('{"x": "a"}', {}, "a.jsonl must have a column 'source', got x; name it with --source"),
        ('{"source": "a"}', {"target": "b"}, "a.jsonl must have a column 'b', got source; name it with"),
        ('{"source": "a", "target": "b"}\n{"source": "a"}', {}, "line 2 must have a column 'target'"),
    ):
        with pytest.raises(ValueError, match=error):
            read(text, **options)


def test_a_source_or_target_without_a_token_is_refused(task, tokenizer):
    with pytest.raises(ValueError, match="line 1: the target must have a token"):
        task.examples([ITEMS[0]._replace(target="\u200b")], tokenizer)
    with pytest.raises(ValueError, match="line 1: the source must have a token"):
        task.examples([ITEMS[0]._replace(source="\u200b")], tokenizer)


def test_items_without_targets(task, tokenizer):
    items = [ITEMS[0], ITEMS[1]._replace(target=None)]
    assert task.unlabelled(items) == "train.jsonl, line 2: there is no target; name its column with --target"
    found = task.predict(model_of(task).head, task.examples(items, tokenizer), items)
    assert math.isfinite(found[0].log_prob) and math.isnan(found[1].log_prob)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"metrics of write need packages: pip install electra_fast.write."):
        Write(OPTIONS).learn(ITEMS)


# --- runs ---

RUN = {"task": "write", "source": "text", "target": "label", "max_target": 6, "steps": 100, "lr": 1e-2}
RUN |= {"bias_correction": True, "beta2": 0.98, "save_every": 25, "eval_every": 40}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return fine_tunings.files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(paths, tmp_path_factory, cache):
    """(folder, results) of a run that is not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, fine_tunings.small(paths, out, **RUN)


def test_a_run_learns_and_says_what_it_wrote(finished):
    out, results = finished
    assert results["dev"]["rouge_l"] > 0.8 > results["majority"]["rouge_l"] + 0.3, results
    assert results["majority"]["perplexity"] is None and results["dev"]["perplexity"] < 2
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    each = rouge_l([r["predicted"] for r in records], [r["target"] for r in records])
    assert sum(each) / len(each) == pytest.approx(results["test"]["rouge_l"])
    page = (out / "report.html").read_text()
    assert "Samples" in page and "the first 5 words of the source" in page
    lines = [json.loads(line) for line in (out / "seed-0/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "dev"] == [40, 80, 100]


def test_evaluate_gives_the_same_numbers_again(finished, paths, capsys):
    out, results = finished
    assert evaluate_folder("write", out, [paths["test"]], device="cpu") == results["test"]
    main(["evaluate", "write", "--model", str(out), "--data", paths["dev"], "--device", "cpu"])
    assert f"rouge_l {results['dev']['rouge_l']:.4f}" in capsys.readouterr().out


def test_killed_it_resumes_to_the_same_bits(finished, paths, tmp_path, monkeypatch):
    one_step = FineTuning._one_step

    def until_step_30(training, batches):
        if training.step == 30:
            raise KeyboardInterrupt
        one_step(training, batches)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FineTuning, "_one_step", until_step_30)
        fine_tunings.small(paths, tmp_path / "run", **RUN)
    fine_tunings.small(paths, tmp_path / "run", **RUN)
    assert fine_tunings.result(tmp_path / "run") == fine_tunings.result(finished[0])


def test_during_training_only_some_items_are_written(paths, tmp_path, cache, monkeypatch):
    seen = []
    predict = Write.predict

    def counted(task, model, examples, items, *rest):
        seen.append(len(items))
        return predict(task, model, examples, items, *rest)

    monkeypatch.setattr(Write, "predict", counted)
    monkeypatch.setattr(Write, "dev_items", 10)
    fine_tunings.small(
        {**paths, "test": paths["dev"]}, tmp_path / "run", **RUN | {"steps": 9, "eval_every": 8}
    )
    assert seen == [10, 40, 40]  # step 8, the last step, --test


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_target": 2}, "--max-target must be 3 or more, got 2"),
        ({"max_target": 33}, "--max-target must be at most 32, for this model, got 33"),
        ({"beams": 0}, "--beams must be 1 or more, got 0"),
        ({"init_head": "x"}, "--init-head must be left out for write"),
        ({"target": "nothing"}, "train.csv must have a column 'nothing'"),
    ],
)
def test_wrong_options_are_refused(paths, tmp_path, cache, changes, error):
    with pytest.raises(ValueError, match=error):
        fine_tunings.small(paths, tmp_path / "run", **RUN | changes)


def test_a_folder_without_a_decoder_is_refused(paths, tmp_path, cache, finished):
    out = tmp_path / "run"
    fine_tunings.small(paths, out, steps=1)
    with pytest.raises(ValueError, match="be a model of finetune write, got classify"):
        evaluate_folder("write", out, [paths["dev"]], device="cpu")
    (out / "recipe.json").unlink()
    with pytest.raises(ValueError, match=r"have the head of write \(EncoderDecoderModel\), got Electra"):
        evaluate_folder("write", out, [paths["dev"]], device="cpu")
    with pytest.raises(
        ValueError, match=r"model_type in config.json must be 'electra', got 'encoder-decoder'"
    ):
        fine_tunings.small(paths, tmp_path / "next", preset=None, vocab=None, set=(), model=str(finished[0]))
