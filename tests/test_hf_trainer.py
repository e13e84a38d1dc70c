"""`ElectraPretrainer` under transformers' Trainer."""

import torch
from small_halves import L, assert_tied, batch, pretrainer
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments


def arguments(folder, **options):
    return TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def texts(n):
    return [{k: x[0] for k, x in batch(L - i % 9).items()} for i in range(n)]


def test_trainer_resumes_bit_for_bit(tmp_path):
    data = texts(32)
    options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}

    def trained(seed, resume=None):
        torch.manual_seed(seed)
        model = pretrainer(attention="electra_fast", hidden_dropout_prob=0.1)
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=data, eval_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(0)
    again = trained(1, resume=str(tmp_path / "checkpoint-2"))
    assert_tied(again.model)
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert whole.evaluate()["eval_loss"] > 0


def test_trainer_averages_over_micro_batches(tmp_path):
    """Packed batches come with labels, by whose number Trainer would not divide the loss for us."""
    model = pretrainer(attention="electra_fast")
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4, logging_steps=1, save_strategy="no"),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        train_dataset=[{"input_ids": ids} for ids in batch(*[L] * 16)["input_ids"].tolist()],
    )
    trainer.train()
    (loss,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert 30 < loss < 50  # 50 log 2 + log V is 40 at random


def test_trainer_checkpoints_activations(tmp_path):
    model = pretrainer()
    newer = hasattr(model.generator, "activation_checkpointing_enable")
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    options = arguments(tmp_path, max_steps=1, **{name: True})
    Trainer(model, options, train_dataset=texts(4)).train()
    assert all(getattr(half, f"is_{name}") for half in (model.generator, model.discriminator))
