"""`hf.patch(model, graphs=True)` gives the results of the same model without graphs.

On a GPU these are CUDA graphs. Elsewhere a stand-in runs the captured code at each replay, and first
overwrites what the last replay wrote, as a graph does.
"""

import contextlib
import copy
import pickle

import peft
import pytest
import torch
import transformers
from small_patched import B, build
from torch import Tensor

from electra_fast import capture, hf
from electra_fast.hf import graphs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class StandIn:
    """Counts captures and replays."""

    def __init__(self):
        self.captures, self.replays = [], 0

    @contextlib.contextmanager
    def recording(self, device):
        if not CUDA:
            yield self.record
            return
        with graphs.side_stream(device):
            yield self.record

    def record(self, body):
        self.captures.append(body.__name__)
        replay = capture.cuda_graph(body) if CUDA else lambda: overwrite(body.__self__, body)

        def counted():
            self.replays += 1
            replay()

        return counted


def overwrite(graph, body):
    written = [graph.output] if body.__name__ == "_forward" else [*graph.parameter_gradients.values()]
    for x in written:
        x.detach().fill_(torch.nan)
    body()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(graphs, "recording", stand_in.recording)
    if not CUDA:
        monkeypatch.setattr(graphs, "available", lambda x: True)
    return stand_in


def pair(name="ElectraForSequenceClassification", **options):
    """Return the same model with and without graphs."""
    torch.manual_seed(0)
    plain = build(name, **options).to(DEVICE)
    graphed = copy.deepcopy(plain)
    hf.patch(plain)
    hf.patch(graphed, graphs=True)
    return graphed, plain


def inputs(seed, L=20, labels=True):
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(L) < torch.randint(1, L + 1, (B, 1), generator=generator)
    real[0] = True
    ids = torch.randint(104, 300, (B, L), generator=generator) * real
    batch = {"input_ids": ids, "attention_mask": real.long()}
    if labels:
        batch["labels"] = torch.randint(0, 2, (B,), generator=generator)
    return {name: x.to(DEVICE) for name, x in batch.items()}


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def assert_close(ours, wanted):
    for x, y in zip(ours, wanted, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ElectraForSequenceClassification", "BertForSequenceClassification"])
def test_training_is_the_same_after_warm_up(name, stand_in):
    graphed, plain = pair(name)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (graphed, plain)]
    kept = []
    for step in range(8):
        ours, wanted = (gradients(m, inputs(step)) for m in (graphed, plain))
        assert_close(ours, wanted)
        kept.append(([x if x is None else x.clone() for x in ours], ours))
        for optimizer in optimizers:
            optimizer.step()
    assert stand_in.captures == ["_forward", "_backward"]
    assert stand_in.replays == 2 * (8 - graphs.WARM_UP)
    for then, now in kept:  # no later replay has changed the gradients of a step
        assert_close(now, then)


def test_lengths_share_the_graph_of_their_multiple_of_32(stand_in):
    graphed, plain = pair(max_position_embeddings=80)
    for step, L in enumerate([20, 25, 32, 7, 33, 64, 40, 50]):
        batch = inputs(step, L)
        assert_close(gradients(graphed, batch), gradients(plain, batch))
    assert len(stand_in.captures) == 4 and stand_in.replays == 2 * (2 + 2)


def test_without_a_mask_and_with_one_are_different_graphs(stand_in):
    graphed, plain = pair()
    for step in range(8):
        batch = inputs(step, 32)
        if step % 2:
            batch["attention_mask"] = None
        assert_close(gradients(graphed, batch), gradients(plain, batch))
    assert len(stand_in.captures) == 4


def test_inference_captures_no_backward_pass_and_results_are_kept(stand_in):
    graphed, plain = (m.eval() for m in pair("ElectraModel"))
    results = []
    with torch.no_grad():
        for step in range(6):
            batch = inputs(step, labels=False)
            ours, wanted = (m(**batch).last_hidden_state for m in (graphed, plain))
            results.append((ours, wanted))
    assert stand_in.captures == ["_forward"] and stand_in.replays == 6 - graphs.WARM_UP
    for ours, wanted in results:
        assert_close([ours], [wanted])


def test_two_calls_before_their_backward_passes(stand_in):
    """The second call runs without a graph, because the first one still needs its activations."""
    graphed, plain = pair()
    for _ in range(5):
        losses = []
        for model in (graphed, plain):
            model.zero_grad()
            losses.append([model(**inputs(step)).loss for step in (1, 2)])
            sum(losses[-1]).backward()
        assert_close(losses[0], losses[1])
        assert_close([p.grad for p in graphed.parameters()], [p.grad for p in plain.parameters()])
    assert stand_in.replays > 0


def test_a_call_without_a_backward_pass_does_not_block_the_graph(stand_in):
    graphed, plain = pair()
    for step in range(4):
        gradients(graphed, inputs(step))
    graphed(**inputs(9))  # its loss is dropped
    before = stand_in.replays
    assert_close(gradients(graphed, inputs(5)), gradients(plain, inputs(5)))
    assert stand_in.replays == before + 2


def test_a_backward_pass_after_a_later_call_is_refused():
    graphed, _ = pair()
    for step in range(4):
        gradients(graphed, inputs(step))
    loss = graphed(**inputs(5)).loss
    if CUDA:  # the stand-in cannot go back twice
        loss.backward(retain_graph=True)
    else:
        graphs._graphs[graphed.electra.encoder].graphs.popitem()[1].number += 1
    with pytest.raises(RuntimeError, match=r"a backward pass must precede the next call"):
        if CUDA:
            graphed(**inputs(6))
        loss.backward()


def test_gradients_accumulate_over_micro_batches(stand_in):
    graphed, plain = pair()
    for _ in range(4):
        for model in (graphed, plain):
            model.zero_grad()
            for step in range(3):
                (model(**inputs(step)).loss / 3).backward()
        assert_close([p.grad for p in graphed.parameters()], [p.grad for p in plain.parameters()])
    assert stand_in.replays >= 2 * 10


def larger(model):
    return {name: 1.5 * x for name, x in model.state_dict().items()}


def replaced(model):
    torch.manual_seed(5)
    model.electra.encoder.layer[1].output.dense = torch.nn.Linear(96, 64).to(DEVICE)


def frozen(model):
    model.electra.encoder.layer[0].requires_grad_(False)


CHANGES = {
    "new data": lambda model: [setattr(p, "data", 1.5 * p.data) for p in model.electra.encoder.parameters()],
    "data in place": lambda model: [p.data.mul_(1.5) for p in model.electra.encoder.parameters()],
    "loaded": lambda model: model.load_state_dict(larger(model)),
    "assigned": lambda model: model.load_state_dict(larger(model), assign=True),
    "converted": lambda model: model.bfloat16().float(),
    "evaluated": lambda model: model.eval(),
    "replaced": replaced,
    "frozen": frozen,
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_weight_is_ever_stale(change):
    graphed, plain = pair()
    for step in range(4):
        gradients(graphed, inputs(step))
    for model in (graphed, plain):
        model.zero_grad()
        CHANGES[change](model)
    for step in range(5):
        assert_close(gradients(graphed, inputs(step)), gradients(plain, inputs(step)))


def test_unfreezing_after_the_capture_gives_gradients():
    graphed, plain = pair()
    for model in (graphed, plain):
        frozen(model)
    for step in range(4):
        assert_close(gradients(graphed, inputs(step)), gradients(plain, inputs(step)))
    for model in (graphed, plain):
        model.requires_grad_(True)
    for step in range(5):
        assert_close(gradients(graphed, inputs(step)), gradients(plain, inputs(step)))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_run_without_a_graph_and_the_merged_model_with_one(stand_in):
    graphed, _ = pair()
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(graphed, config)
    for step in range(4):
        gradients(adapted, inputs(step))
    assert stand_in.captures == []
    merged = adapted.merge_and_unload().requires_grad_(True)
    hf.patch(merged, graphs=True)
    plain = copy.deepcopy(merged)
    hf.Patched(plain).undo()
    for step in range(4):
        assert_close(gradients(merged, inputs(step)), gradients(plain, inputs(step)))
    assert stand_in.captures == ["_forward", "_backward"]


def test_dropout_differs_between_replays():
    graphed, _ = pair(dropout=0.5)
    losses = [gradients(graphed, inputs(0))[0].item() for _ in range(8)]
    assert len(set(losses)) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_has_a_graph_of_its_own(dtype, stand_in):
    graphed, plain = pair()
    for step in range(8):
        with torch.autocast(DEVICE, dtype, enabled=step % 2 == 0):
            ours, wanted = (gradients(m, inputs(step)) for m in (graphed, plain))
        for x, y in zip(ours, wanted, strict=True):
            assert x is None or (x - y).norm() <= 0.02 * y.norm() + 1e-4
    assert len(stand_in.captures) == 4


def test_the_least_recently_used_shape_is_dropped_but_none_that_is_in_use(stand_in, monkeypatch):
    monkeypatch.setattr(graphs, "SHAPES", 2)
    monkeypatch.setattr(graphs, "IDLE", 10)
    graphed, _ = (m.eval() for m in pair("ElectraModel", max_position_embeddings=128))

    def run(*lengths):
        with torch.no_grad():
            for step in range(4):
                for L in lengths:
                    graphed(**inputs(step, L, labels=False))
        return [key.shape for key in graphs._graphs[graphed.encoder].graphs]

    assert run(32, 64, 96) == [(B, 32), (B, 64)]
    assert len(stand_in.captures) == 2, "three shapes in turn must not replace each other"
    assert run(64, 96) == [(B, 32), (B, 64)]
    assert run(64, 96) == [(B, 64), (B, 96)]


def test_a_rare_shape_is_not_captured(stand_in):
    graphed, _ = pair(max_position_embeddings=128)
    for L in (20, 40, 70, 100):
        for step in range(graphs.WARM_UP):
            gradients(graphed, inputs(step, L))
    assert stand_in.captures == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_captures_its_own_graphs(duplicate, stand_in):
    graphed, _ = pair()
    for step in range(3):
        gradients(graphed, inputs(step))
    twin = duplicate(graphed)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    plain = copy.deepcopy(twin)
    hf.Patched(plain).undo()
    for step in range(4):
        assert_close(gradients(twin, inputs(step)), gradients(plain, inputs(step)))
    assert len(stand_in.captures) == 4


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated")
def test_checkpointing_is_refused_by_name():
    graphed, _ = pair()
    graphed.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"graphs must train without it, got gradient checkpointing"):
        graphed(**inputs(0))
    graphed.gradient_checkpointing_disable()
    graphed(**inputs(0)).loss.backward()


def test_a_failed_capture_runs_without_a_graph_and_the_table_says_why(monkeypatch):
    @contextlib.contextmanager
    def recording(device):
        def fails(body):
            raise RuntimeError("operation not permitted when stream is capturing")

        yield fails

    monkeypatch.setattr(graphs, "recording", recording)
    graphed, plain = pair()
    for step in range(5):
        assert_close(gradients(graphed, inputs(step)), gradients(plain, inputs(step)))
    assert "cannot be captured as a CUDA graph: operation not permitted" in str(hf.Patched(graphed))


def test_hooks_and_hidden_states_run_without_a_graph(stand_in):
    graphed, plain = pair("ElectraModel")
    seen = []
    handle = graphed.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    for step in range(5):
        graphed(**inputs(step, labels=False))
    assert len(seen) == 5 and stand_in.captures == []
    handle.remove()
    for _ in range(4):
        ours, wanted = (m(**inputs(1, labels=False), output_hidden_states=True) for m in (graphed, plain))
        assert_close(ours.hidden_states, wanted.hidden_states)


def test_the_table_names_it_and_undo_reverts_it():
    graphed, _ = pair()
    patched = hf.Patched(graphed)
    row = next(row for row in patched.rows() if row.option == "graphs")
    assert (row.block, row.fused, row.of) == ("ElectraEncoder", 1, 1)
    patched.undo()
    assert type(graphed.electra.encoder) is transformers.models.electra.modeling_electra.ElectraEncoder
    assert "graphs" not in str(hf.patch(graphed))


def test_trainer_accumulates_the_same_losses(tmp_path):
    data = [{k: x[i].cpu() for k, x in inputs(step).items()} for step in range(8) for i in range(B)]
    losses = []
    for model in pair():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=B,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not CUDA,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([Tensor([row["loss"]]) for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 12
    assert_close(*losses)
