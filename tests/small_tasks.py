"""A small model for the tests of tasks, and what must hold for every task."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from electra_fast.config import ElectraConfig
from electra_fast.tasks.examples import TaskBatches
from electra_fast.tasks.task import TaskModel, evaluate

CONFIG = ElectraConfig(
    vocab_size=128, max_positions=64, embedding=16, layers=1, hidden=32, heads=2, ffn=64,
    pad_id=0, cls_id=2, sep_id=3, mask_id=4, dropout=0.0,
)  # fmt: skip
OPTIONS = SimpleNamespace(repair=False, stride=8, max_query=8, max_answer=8)


def prepared(task, items, tokenizer):
    """Return the examples of training items, as a run makes them."""
    assert task.unlabelled(items) is None
    task.learn(items)
    task.check(items)
    return task.examples(items, tokenizer)


def model_of(task):
    """Return a model whose weights are large enough that all outputs differ."""
    torch.manual_seed(0)
    model = TaskModel(task.head(CONFIG), task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def all_items(examples):
    """Return all items as one packed batch."""
    return examples.batch(np.arange(len(examples)))


def of_hugging_face(head, folder):
    """Return the model that transformers loads from the folder of `head`."""
    kind = getattr(pytest.importorskip("transformers"), head.hugging_face_class)
    head.save_pretrained(folder)
    model, facts = kind.from_pretrained(folder, output_loading_info=True)
    assert not facts["missing_keys"], facts
    return model.eval()


def padded(examples):
    """Return all sequences as the arguments of a model of transformers, each ``[S, L]``."""
    lengths = torch.from_numpy(np.diff(examples.offsets))[:, None]
    position = torch.arange(int(lengths.max()))
    mask = position < lengths
    ids = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(
        mask, torch.from_numpy(examples.ids).long()
    )
    types = (position >= torch.from_numpy(examples.first)[:, None]) & mask
    return {"input_ids": ids, "token_type_ids": types.long(), "attention_mask": mask.long()}


def check_gradients(model, examples, without=frozenset()):
    """Assert that the loss depends on all parameters except those named in `without`."""
    model(**all_items(examples)).loss.backward()
    largest = {name: p.grad.abs().max() if p.grad is not None else 0 for name, p in model.named_parameters()}
    unused = {name for name, gradient in largest.items() if gradient < 1e-6}
    assert unused == without, largest


def check_fixed_batches(model, examples):
    """Assert that batches filled up to one shape have the losses and gradients of those that are not."""
    options = {"batch": 2, "seed": 0, "pad_id": 0}
    plain, fixed = TaskBatches(examples, **options), TaskBatches(examples, **options, fixed=True)
    sizes, shapes = set(), set()
    for index in range(4):
        batch, filled = plain.make(index), fixed.make(index)
        losses = model(**filled).loss, model(**batch).loss
        torch.testing.assert_close(*losses)
        first, second = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
        torch.testing.assert_close(first, second)
        sizes.add(len(batch["ids"]))
        shapes.add(str({n: getattr(x, "shape", x) for n, x in filled.items()}))
    assert len(sizes) > 1 and len(shapes) == 1


def trained(task, items, tokenizer, steps=60):
    """Return the evaluation, on `items`, of a model that has learned them."""
    examples = prepared(task, items, tokenizer)
    model, batch = model_of(task), all_items(examples)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return evaluate(task, model.head, items, examples)
