"""The arithmetic of the predictions for many GPUs and of the measurement of processes, and their page."""

import json
import sys

import pytest
import torch
from fake_runs import RESULT, ROOT, fake_benchmark

from benchmarks import __main__ as command_line
from benchmarks.scaling import command, failures, measure, memory, prediction
from benchmarks.scaling.prediction import Network, model, step
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.train.gradients import BUCKET

SLOW = Network(nvlink=100.0, network=10.0, latency=0.0)


@pytest.fixture
def three_seconds(monkeypatch):
    """A micro-batch takes 3 s, of which 2 s are backward, and the optimizer half a second."""
    monkeypatch.setattr(prediction, "micro_batch", lambda *_: (3.0, 0.5))


def test_an_all_reduce_has_two_levels():
    assert SLOW.all_reduce(800, 1) == 0
    assert SLOW.all_reduce(800, 8) == 2 * 7 / 8 * 800 / 100 == 14
    assert SLOW.all_reduce(800, 16) == 14 + 2 * 1 / 2 * 100 / 10 == 24
    assert SLOW.all_reduce(800, 32) == 14 + 2 * 3 / 4 * 100 / 10 == 29


def test_each_bucket_of_an_all_reduce_has_a_latency():
    late = SLOW._replace(latency=1.0)
    for size, buckets in ((1, 1), (BUCKET, 1), (BUCKET + 1, 2), (10 * BUCKET, 10)):
        assert late.all_reduce(size, 16) - SLOW.all_reduce(size, 16) == pytest.approx(4 * buckets)


def test_gradients_are_counted_in_the_model():
    small = model("small")
    shared = {id(p): p.numel() for p in Electra(ElectraConfig.small()).parameters()}
    assert small.gradients == 4 * small.parameters == 4 * sum(shared.values())
    assert small.table == 4 * 30522 * 128
    assert (small.sequences, small.length, small.steps, small.micro) == (128, 128, 1_000_000, 128)


def test_micro_batches_and_what_the_backward_pass_hides(three_seconds):
    large = model("large")  # 2048 sequences, in micro-batches of 16
    second = large.gradients / 1e9 * 2 * 7 / 8  # seconds of an all-reduce of 8 GPUs at 1 GB/s

    def exposed(nvlink):
        found = step(large, 8, "h200", Network(nvlink, 1.0, 0.0))
        assert found.sequences == 256 and found.compute == 16 * 3 and found.backward == 2
        assert found.seconds == found.compute + found.optimizer + found.exposed
        return found.exposed

    assert exposed(second * 1e9 / 5) == pytest.approx(5 - 2)
    # Everything except the word table is hidden.
    assert exposed(second * 1e9) == pytest.approx(large.table / large.gradients)


def test_less_than_one_sequence_per_gpu_has_no_number(three_seconds):
    assert step(model("base"), 256, "h200", SLOW).sequences == 1
    assert step(model("base"), 512, "h200", SLOW) is None
    rows = command.step_rows(model("base"), "h200", SLOW)
    assert [cells[2] == "less than one sequence" for cells in rows] == [False] * 5 + [True]
    assert {len(cells) for cells in rows} == {len(command.STEP_COLUMNS)}


def test_one_gpu_has_the_predicted_time():
    for preset, seconds in (("small", 0.0051), ("base", 0.170)):
        assert step(model(preset), 1, "h200", Network()).seconds == pytest.approx(seconds)
    assert prediction.share("large", "h200") == prediction.share("base", "h200")
    assert step(model("base"), 1, "h100-80gb-hbm3", Network()).seconds > 0.170  # slower copies


def test_one_gpu_has_the_measured_time_if_there_is_one(monkeypatch, tmp_path):
    steps = [fake_benchmark("step, small 128x128, step", "fused", 0.0042, {})]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    file = tmp_path / "benchmarks" / "results" / "h200.json"
    file.write_text(json.dumps(RESULT | {"benchmarks": steps}))
    monkeypatch.setattr(prediction, "ROOT", tmp_path)
    assert step(model("small"), 1, "h200", Network()).seconds == pytest.approx(0.0042)
    assert prediction.share("small", "h200")[1] == "the measured step of one h200"
    assert prediction.share("base", "h200")[1] == "the predicted step of base on one h200"
    assert prediction.measured_step("small", "h100-80gb-hbm3") is None


def test_the_state_has_18_bytes_per_parameter():
    small = model("small")
    n, kept = small.parameters, memory.activations(small.config, small.length)
    assert memory.memory(small, 32) == (4 * n, 2 * n, 4 * n, 8 * n, 32 * kept)
    assert memory.memory(small, 32).total - memory.memory(small, 32, 8).total == 7 * n
    assert memory.largest(18e9) == 1e9 and memory.largest(18e9, 8) == 18e9 / 11


def test_activations_are_those_of_a_real_forward_pass():
    config = ElectraConfig.tiny()

    def saved(B):
        storages, ids = {}, torch.full((B, 24), 200)

        def keep(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        inputs = {"key_mask": torch.ones(B, 24, dtype=torch.bool), "rng": torch.tensor([0, 1])}
        with hooks, torch.autocast("cpu", torch.bfloat16):
            Electra(config)(ids, **inputs)
        return sum(storage.nbytes() for storage in storages.values())

    assert memory.activations(config, 24) == saved(2) - saved(1)


def test_zero_sends_three_quarters_and_updates_a_part(three_seconds):
    base = model("base")  # 4 sequences per GPU of 64
    network = Network(nvlink=1e8, network=1e9, latency=0.0)
    found = step(base, 64, "h200", network)
    seconds = 3 + 0.5 / 64 + (found.reduction / 2 - 2) + found.reduction / 4
    assert memory.sharded(base, found, 64, network) == pytest.approx(seconds)


def test_failures_are_those_of_llama():
    found = failures.plan(16384, size=80e9)  # 8 s to copy
    between = 54 * 86400 / 419
    assert found.per_day == pytest.approx(419 / 54)
    assert found.interval == pytest.approx((16 * between) ** 0.5)
    assert found.lost == pytest.approx(8 / found.interval + (found.interval / 2 + 300) / between)
    others = [8 / x + x / 2 / between for x in (0.9 * found.interval, 1.1 * found.interval)]
    assert min(others) > 8 / found.interval + found.interval / 2 / between


# A program with the options and the log of `electra_fast pretrain`. It has 30 tokens per step.
STUB = """
import json, pathlib, sys
at = lambda option: sys.argv[sys.argv.index(option) + 1]
out, steps = pathlib.Path(at("--out")), int(at("--steps"))
out.mkdir(parents=True)
lines = [{"kind": "begin", "step": 0}]
for step in range(10, steps + 1, 10):
    rate = 1.0 if step == 10 else 100.0 * int(sys.argv[1])
    lines.append({"kind": "train", "step": step, "tokens": 300, "tokens_per_second": rate})
(out / "log.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def test_processes_are_compared_without_their_start(monkeypatch, tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    # CPU seconds before and after each run: 10 and 20 steps in one process, then in two.
    clock = iter([0.0, 5.0, 5.0, 16.0, 16.0, 28.0, 28.0, 48.0])
    monkeypatch.setattr(measure, "_cpu_of_children", lambda: next(clock))
    found = measure.measure(10, lambda n: [sys.executable, str(tmp_path / "stub.py"), str(n)])
    assert found == [(1, 100.0, 300 / (11 - 5)), (2, 200.0, 300 / (20 - 12))]
    lines = measure.table(found).splitlines()
    assert lines[2].split() == ["1", "100", "1.00\u00d7", "50", "1.00\u00d7"]
    assert lines[3].split() == ["2", "200", "2.00\u00d7", "38", "0.75\u00d7"]


def test_a_run_that_fails_is_named():
    failing = [sys.executable, "-c", "raise SystemExit('no such option')"]
    with pytest.raises(ValueError, match=r"scaling: .*--preset tiny.* must end without an error, got no"):
        measure.measure(20, lambda n: failing)


def test_processes_are_started_by_torchrun():
    assert measure.python(1)[1:] == ["-m", "electra_fast"]
    assert measure.python(2)[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "electra_fast")
    ]


def test_the_page_has_the_tables_of_the_command(tmp_path):
    page = tmp_path / "scaling.md"
    page.write_text((ROOT / "docs" / "scaling.md").read_text())
    command.write(page)
    assert page.read_text() == command.PAGE.read_text(), "run `python -m benchmarks scaling --write`"
    page.write_text("no comments")
    with pytest.raises(ValueError, match=r"scaling: scaling.md must have the lines <!-- scaling.*, got none"):
        command.write(page)


@pytest.mark.parametrize(
    "arguments", [["--nvlink", "0"], ["--network", "-1"], ["--network", "nan"], ["--steps", "0"]]
)
def test_a_wrong_number_is_refused(arguments, capsys):
    assert command_line.main(["scaling", *arguments]) == 2
    assert f"scaling: {arguments[0]} must be positive, got" in capsys.readouterr().err


def test_a_page_of_other_rates_is_refused(capsys):
    assert command_line.main(["scaling", "--write", "--network", "20"]) == 2
    assert "scaling: --write must come without --gpu and rates" in capsys.readouterr().err
