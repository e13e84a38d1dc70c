"""A replayed step is the same step: a CUDA graph on a GPU, elsewhere a stand-in that runs the step again."""

import contextlib
import json

import pytest
import torch
import trainings

from electra_fast.data import Batches
from electra_fast.model import Electra
from electra_fast.train import step as steps
from electra_fast.train.pretrain import Pretraining

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]


def run(corpus, out, capture=None, **changes):
    """Train, with `capture` in place of `cuda_graph` if given; return the run and its log without times."""
    device = changes.pop("device", "cpu")
    model = {"make_model": changes.pop("make_model", Electra), "graph": changes.pop("graph", True)}
    options = {"steps": 9, "lr": 2e-3, "log_every": 1} | changes
    training = Pretraining(trainings.recipe(corpus, **options), out, device=device, **model)
    if capture is not None:
        training.take_step.capture = capture
    training.run()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return training, [{k: v for k, v in line.items() if "second" not in k} for line in lines]


LAYOUTS = [{}, {"packed": True}, {"accumulate": 3}, {"packed": True, "precision": "bf16"}]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_a_replay_is_the_step_bit_for_bit(corpus, tmp_path, options):
    replays = []

    def stand_in(body):
        def replay():
            replays.append(1)
            body()

        return replay

    _, wanted = run(corpus, tmp_path / "eager", **options)
    replayed, log = run(corpus, tmp_path / "replayed", stand_in, **options)
    assert len(replays) == 9 - steps.WARM_UP and replayed.take_step.why_eager is None
    assert log == wanted
    assert (
        len({line["mlm_loss"] for line in log if line["kind"] == "train"}) == 9
    )  # each step has its own draws
    assert trainings.state(tmp_path / "eager", 9) == trainings.state(tmp_path / "replayed", 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_a_cuda_graph_is_the_step_bit_for_bit(corpus, tmp_path, options):
    logs = []
    for name, graph in (("eager", False), ("graph", True)):
        training, log = run(corpus, tmp_path / name, device="cuda", graph=graph, **options)
        assert training.take_step.why_eager is None and (training.take_step._replay is not None) == graph
        logs.append(log)
    assert logs[0] == logs[1]
    assert trainings.state(tmp_path / "eager", 9) == trainings.state(tmp_path / "graph", 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no device to wait for")
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_the_host_never_waits_in_a_step(corpus, tmp_path, options):
    training = Pretraining(trainings.recipe(corpus, **options), tmp_path, device="cuda", graph=False)
    with contextlib.closing(training.loader.prefetch()) as batches:
        training._one_step(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            training._one_step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_so(corpus, tmp_path, capsys):
    def fails(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    _, wanted = run(corpus, tmp_path / "eager")
    _, log = run(corpus, tmp_path / "fails", fails)
    said = [line for line in capsys.readouterr().out.splitlines() if "CUDA graph" in line]
    assert log == wanted and len(said) == 1
    assert said[0].startswith("step 4: not a CUDA graph, the step cannot be captured")
    assert "permitted" in said[0]


def test_a_batch_of_another_shape_runs_eagerly_and_says_so(corpus, tmp_path, monkeypatch, capsys):
    fixed_shape = Batches.fixed_shape

    def odd(batches, index):
        batch = fixed_shape(batches, index)
        more = torch.nn.functional.pad(batch.cu_seqlens, (0, index == 6), value=len(batch.ids))
        return batch._replace(cu_seqlens=more)

    monkeypatch.setattr(Batches, "fixed_shape", odd)
    _, wanted = run(corpus, tmp_path / "eager", packed=True)
    _, log = run(corpus, tmp_path / "replayed", lambda body: body, packed=True)
    assert log == wanted
    assert "not a CUDA graph, a batch has another shape" in capsys.readouterr().out


def test_fixed_shape_changes_only_the_shape_of_a_packed_batch(corpus, tmp_path):
    training, _ = run(corpus, tmp_path, packed=True, steps=1)
    model, batches = training.model.eval(), training.loader.batches
    shapes = set()
    for index in range(40):
        batch, bare = batches.fixed_shape(index), batches.packed(index)
        n = len(bare.ids)
        assert torch.equal(batch.ids[:n], bare.ids) and (batch.ids[n:] == batches.pad_id).all()
        assert (batch.cu_seqlens.diff() <= batch.max_seqlen).all() and batch.cu_seqlens[-1] == len(batch.ids)
        shapes.add((batch.ids.shape, batch.cu_seqlens.shape, batch.max_seqlen))
        if index < 5:
            rng = torch.tensor([3, index])
            with torch.no_grad():
                got, wanted = (
                    model(x.ids, cu_seqlens=x.cu_seqlens, max_seqlen=x.max_seqlen, rng=rng)
                    for x in (batch, bare)
                )
            assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, wanted, strict=True))
    assert len(shapes) == 1
