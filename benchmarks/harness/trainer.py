"""transformers' Trainer as its users run it, with padded batches and with packed ones.

An epoch calls the parts that `Trainer.train` calls: its data loader, `training_step`, clipping, AdamW and the
schedule. So the start of `train`, about 0.4 s, its log and its checkpoints are not timed.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.harness.inputs import CUDA, REHEARSAL
from electra_fast.tasks.examples import Examples

Item = dict[str, Any]  # of a data set: ``input_ids``, a list, and ``labels``, an int


class PackedClassifier(transformers.ElectraForSequenceClassification):
    """The classifier on texts end to end; its head gets the first token of each, as in a padded batch."""

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> SequenceClassifierOutput:
        first = inputs["cu_seq_lens_q"][:-1].long()
        x = self.electra(**inputs).last_hidden_state[0, first]
        logits = self.classifier(x[:, None])
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def items(examples: Examples) -> list[Item]:
    """Return the items of a classification as a data set of transformers."""
    ids = np.split(examples.ids, examples.offsets[1:-1])
    labels = examples.item_targets["labels"].tolist()
    return [{"input_ids": x.tolist(), "labels": label} for x, label in zip(ids, labels, strict=True)]


def packed(items: list[Item]) -> dict[str, Any]:
    """Return a batch without padding: ids [1, T], and the bounds of the texts."""
    lengths = [len(item["input_ids"]) for item in items]
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return {
        "input_ids": torch.tensor([id for item in items for id in item["input_ids"]])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.tensor([item["labels"] for item in items]),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }


def padded() -> Callable[[list[Item]], dict[str, Any]]:
    """Return transformers' collator, with a tokenizer that knows the id of the padding only."""
    words = Tokenizer(WordLevel({"[PAD]": 0}, "[PAD]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    return transformers.DataCollatorWithPadding(tokenizer)


def trainer(
    model: transformers.PreTrainedModel, items: list[Item], batch: int, order: str, **given: Any
) -> transformers.Trainer:
    """Return a Trainer of the model on these items; `order` is a ``train_sampling_strategy``."""
    options = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written
        train_sampling_strategy=order,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        use_cpu=REHEARSAL,
        bf16=CUDA,
        adam_epsilon=1e-6,
        weight_decay=0.01,
        dataloader_pin_memory=CUDA,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **given,
    )
    collate = packed if isinstance(model, PackedClassifier) else padded()
    return transformers.Trainer(model, options, train_dataset=items, data_collator=collate)


def epoch(of: transformers.Trainer) -> Callable[[], None]:
    """Return a function that trains on all items once."""
    of.create_optimizer_and_scheduler(1_000_000)
    model, of.optimizer = of.accelerator.prepare(of.model, of.optimizer)
    of.current_gradient_accumulation_steps = 1
    loader = of.get_train_dataloader()

    def run() -> None:
        for inputs in loader:
            of.training_step(model, inputs)
            of.accelerator.clip_grad_norm_(model.parameters(), of.args.max_grad_norm)
            of.optimizer.step()
            of.lr_scheduler.step()
            model.zero_grad()

    return run
