"""`ElectraPretrainer` under transformers' Trainer."""

import inspect

import pytest
import torch
from small_halves import RNG, L, assert_tied, batch, pretrainer
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments

from electra_fast.hf.trainer import TrainerMethods


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
    """Packed batches have labels, because of which Trainer might not divide the loss by the micro-batches."""
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


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_trainer_accepts_the_older_name(tmp_path):
    model = pretrainer()
    names = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    Trainer(model, arguments(tmp_path, max_steps=1, **names), train_dataset=texts(4)).train()
    assert model.is_gradient_checkpointing and model.is_activation_checkpointing


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_activation_checkpointing_can_be_enabled_and_disabled(name):
    model, inputs, gradients = pretrainer(hidden_dropout_prob=0.1), batch(24, 11), []
    for on in (False, True, False):
        if on:
            getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
        else:
            getattr(model, f"{name}_disable")()
        assert getattr(model, f"is_{name}") == on
        torch.manual_seed(0)
        model.zero_grad()
        model(**inputs, rng=RNG).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_the_methods_have_transformers_signatures():
    for name, ours in vars(TrainerMethods).items():
        theirs = getattr(PreTrainedModel, name, None)
        if name.startswith("_") or not inspect.isfunction(theirs):
            continue
        _self, *others = inspect.signature(ours).parameters.values()
        passes_on = any(p.kind == p.VAR_KEYWORD for p in others)
        named = [p.name for p in others if p.kind == p.POSITIONAL_OR_KEYWORD]
        expected = [p.name for p in inspect.signature(theirs).parameters.values() if p.kind != p.VAR_KEYWORD][
            1:
        ]
        assert named == (expected[: len(named)] if passes_on else expected), name


def test_shared_parameters_count_once():
    model = pretrainer()
    halves = (model.generator, model.discriminator)
    tables = sum(
        m.weight.numel()
        for m in model.generator.base_model.embeddings.children()
        if hasattr(m, "padding_idx")
    )
    norm = sum(p.numel() for p in model.generator.base_model.embeddings.LayerNorm.parameters())
    assert model.num_parameters() == sum(half.num_parameters() for half in halves) - tables - norm
    alone = sum(half.num_parameters(exclude_embeddings=True) for half in halves)
    assert model.num_parameters(exclude_embeddings=True) == alone - norm
    for p in model.generator.parameters():
        p.requires_grad = False
    trained = model.num_parameters(only_trainable=True)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad) < model.num_parameters()


def test_the_embedding_methods():
    model = pretrainer()
    table = model.generator.electra.embeddings.word_embeddings
    assert model.get_input_embeddings() is table and model.get_output_embeddings().weight is table.weight
    model.discriminator.electra.embeddings = type(model.generator.electra.embeddings)(
        model.discriminator.config
    )
    model.tie_weights()
    assert_tied(model)
    for p in model.parameters():
        p.requires_grad = False
    model.enable_input_require_grads()
    seen = []
    hook = table.register_forward_hook(lambda module, ids, x: seen.append(x.requires_grad))
    model(**batch(24, 11))
    model.disable_input_require_grads()
    model(**batch(24, 11))
    hook.remove()
    assert seen[:2] == [True, True] and not any(seen[2:])
