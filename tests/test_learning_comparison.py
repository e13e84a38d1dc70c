"""What LEARNING.md says about a comparison at equal FLOPs and about ablations is what was found."""

import json

import pytest

from benchmarks.learning import __main__ as command
from benchmarks.learning import ablations, ablations_report, equal_compute_report, report, results
from benchmarks.learning.objectives import MODELS
from benchmarks.learning.transfer import NEW_WEIGHTS, TASKS


def curve(*aucs):
    keep = {"mlm_loss": 5.0, "mlm_accuracy": 0.2, "rtd_loss": 0.3, "replaced": 0.1, "logit_std": 1.0}
    return [
        keep | {"step": 10 * i, "tokens": 10**6 * i, "auc": a, "auc_low": a - 0.01, "auc_high": a + 0.01}
        for i, a in enumerate(aucs)
    ]


def comparison(aucs=(0.5, 0.6, 0.6, 0.7), values=(0.9, 0.8, 0.89)):
    """Return a result of `equal_compute`; `values` are those of the tasks from each start."""
    probes = [{"step": 10 * i, "sentiment": (0.7, 0.68, 0.72), "pairs": (0.5, 0.4, 0.6)} for i in range(4)]
    facts = {"steps": 30, "flops": 2e6, "train_tokens": 1000, "vocabulary": 300, "seconds": 120.0}
    facts |= {"loss_without_context": 5.5, "curve": curve(*aucs), "probes": {"curve": probes}}
    words = {"sentiment_words": (0.8, 0.78, 0.82), "sentiment_majority": 0.36}
    starts = dict(zip(("fused", "masked", NEW_WEIGHTS), values, strict=True))
    tasks = [
        {
            "task": task,
            "start": start,
            "seed": seed,
            "metric": "f1",
            "value": value + seed / 100,
            "majority": 0.1,
        }
        for task in TASKS
        for start, value in starts.items()
        for seed in range(3)
    ]
    found = {"preset": "tiny", "set": ["dropout=0"], "seq": 32, "lr": 1e-3, "batch_tokens": 1024}
    found |= {"precision": "bf16", "machine": "here", "torch": "2", "device": "cpu", "tasks": tasks}
    models = {"fused": facts | {"probes": facts["probes"] | words}, "masked": facts}
    return found | {"models": models, "words": dict.fromkeys(TASKS, 0.5)}


@pytest.mark.parametrize(
    ("aucs", "said"),
    [
        ((0.5, 0.6, 0.6, 0.7), "the AUC rises: +0.100"),
        ((0.5, 0.6, 0.6, 0.605), "the AUC does not change significantly: +0.005"),
        ((0.5, 0.6, 0.7, 0.6), "the AUC falls: -0.100"),
    ],
)
def test_the_second_half_is_compared_with_its_own_beginning(aucs, said):
    page = "\n".join(equal_compute_report.section(comparison(aucs), "picture.svg"))
    assert said in page and "![curves](picture.svg)" in page
    assert "The MLM loss of the generator is 0.500 nats below the loss without context, 5.500" in page


def test_a_difference_is_bold_only_if_it_is_more_than_two_standard_errors():
    page = "\n".join(equal_compute_report.section(comparison(), "p"))
    (row,) = (line for line in page.splitlines() if line.startswith("| Banking77 |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2] == "0.910 ± 0.006" and cells[5:7] == ["0.500", "0.100"]
    assert cells[7] == "**+0.100 ± 0.008**" and cells[8] == "+0.010 ± 0.008"


def test_report_adds_a_result_to_the_page(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "learning.json").write_text('{"runs": [], "machine": "here", "torch": "2"}')
    (tmp_path / "found.json").write_text(json.dumps(comparison()))
    monkeypatch.setattr(results, "FILE", folder / "learning.json")
    monkeypatch.setattr(report, "CURVES", folder / "learning.svg")
    monkeypatch.setattr(report, "PAGE", tmp_path / "LEARNING.md")
    command.main(["report", str(tmp_path / "found.json")])
    assert "../results/equal_compute-tiny-cpu.svg" in (tmp_path / "LEARNING.md").read_text()
    assert "RTD AUC" in (folder / "equal_compute-tiny-cpu.svg").read_text()
    command.main(["report"])  # it is kept
    assert "at equal FLOPs: preset tiny" in (tmp_path / "LEARNING.md").read_text()


def test_ablations_are_judged_by_the_half_that_is_trained(tmp_path):
    runs = ablations.runs((str(tmp_path),))
    assert {run.model for run in runs.values()} <= set(MODELS)
    halves = {name: ablations.encoder(run).name for name, run in runs.items()}
    assert halves.pop("masked LM") == "generator" and set(halves.values()) == {"discriminator"}
    run = {"name": "ELECTRA", "train_tokens": 9, "vocabulary": 9, "seconds": 60.0, "curve": curve(0.6)}
    run["probes"] = {"sentiment": (0.7, 0.6, 0.8), "sentiment_untrained": (0.6, 0.5, 0.7)}
    tasks = [
        {"task": task, "start": start, "seed": seed, "value": value + 0.1 * seed}
        for task in TASKS
        for start, value in (("ELECTRA", 0.5 if task == "snips" else 0.3), (NEW_WEIGHTS, 0.25))
        for seed in (0, 1)
    ]
    page = "\n".join(
        ablations_report.section({"runs": [run], "tasks": tasks, "machine": "here", "torch": "2"})
    )
    # Of two seeds the standard error is half of their difference.
    assert f"| ELECTRA | 5.000 | 0.600 | 60 | 0.700 |  |{' 0.350 ± 0.050 |' * 3} 0.550 ± 0.050 |" in page
    assert f"| new weights |  |  |  | 0.600 |  |{' 0.300 ± 0.050 |' * 4}" in page


def test_what_a_gpu_had_no_time_for_is_named():
    found = comparison()
    del found["models"]["masked"]["probes"]
    found["tasks"] = [t for t in found["tasks"] if (t["task"], t["start"]) != ("snips", "masked")]
    found["left_out"] = {"probes of masked": "it needs 40 s, and 9 s were left"}
    page = "\n".join(equal_compute_report.section(found, "p"))
    assert "Not measured: probes of masked (it needs 40 s, and 9 s were left)." in page
    assert "GoEmotions, frozen" not in page and "BLiMP" not in equal_compute_report.curves(found)
    (row,) = (line for line in page.splitlines() if line.startswith("| SNIPS |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2:4] == ["0.910 ± 0.006", ""] and cells[7:] == ["", "+0.010 ± 0.008"]
    assert "nan" not in page
