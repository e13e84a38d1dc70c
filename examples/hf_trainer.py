"""Pre-train ELECTRA with Hugging Face's Trainer: models of transformers, task and kernels of electra_fast.

    python examples/hf_trainer.py --steps 20
    torchrun --nproc-per-node 2 examples/hf_trainer.py --steps 20  # two processes, on CPUs or GPUs
    accelerate launch --num_processes 8 examples/hf_trainer.py     # on 8 GPUs; on a CPU this starts one

The corpus is Python's own documentation. Both halves are saved as models that need only transformers. The
last lines load the discriminator and show which tokens of a sentence it considers replaced.

Each process trains on other sequences and draws other masks, and a step averages the gradients of all. So two
processes have twice the batch. The first process alone writes files and prints.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    Trainer,
    TrainingArguments,
    set_seed,
)

from electra_fast import data, hf
from electra_fast.hf import ElectraPretrainer

SIZES = {"embedding_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 64}


def learn_tokenizer(documents: list[str], folder: Path, arguments: TrainingArguments):
    """Return a tokenizer of transformers with a vocabulary that the first process trains on the documents."""
    with arguments.main_process_first():
        if arguments.should_save:
            data.save_tokenizer(data.train_tokenizer(documents, vocab_size=8000), folder)
        return AutoTokenizer.from_pretrained(folder)


def cut(documents: list[str], tokenizer) -> list[dict]:
    """Return sequences of up to 64 tokens; `ElectraPretrainer` masks them."""
    options = {"truncation": True, "max_length": 64, "return_overflowing_tokens": True}
    return [{"input_ids": ids} for ids in tokenizer(documents, **options)["input_ids"]]


def show_replaced(folder: Path, sentence: str, replaced: str) -> None:
    """Print the probability that each token was replaced. 20 steps teach how many are replaced, not which."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    discriminator = ElectraForPreTraining.from_pretrained(folder)
    inputs = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        probabilities = discriminator(**inputs).logits[0].sigmoid().tolist()
    for token, p in zip(inputs.tokens(), probabilities, strict=True):
        print(f"{p:6.1%}  {token}{'  <- replaced' if token == replaced else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/hf_trainer"), metavar="FOLDER")
    args = parser.parse_args()

    arguments = TrainingArguments(
        args.out / "checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        logging_steps=5,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # otherwise Trainer would leave CPU processes unconnected
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    set_seed(0)
    documents = list(data.documents())
    tokenizer = learn_tokenizer(documents, args.out / "discriminator", arguments)
    sequences = cut(documents, tokenizer)
    vocab_size = len(tokenizer)
    wide = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
    narrow = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256}
    generator = ElectraForMaskedLM(ElectraConfig(vocab_size=vocab_size, **SIZES, **narrow))
    discriminator = ElectraForPreTraining(ElectraConfig(vocab_size=vocab_size, **SIZES, **wide))

    pretrainer = ElectraPretrainer(generator, discriminator, tokenizer)  # the task
    patched = hf.patch(pretrainer)  # the kernels

    trainer = Trainer(
        pretrainer,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=sequences[:-64],
        eval_dataset=sequences[-64:],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if not after < before:
        raise SystemExit(f"hf_trainer: the held-out loss must decrease from {before:.2f}, got {after:.2f}")

    if arguments.should_save:  # the first process
        print(patched)
        print(f"held-out loss {before:.2f} -> {after:.2f} in {args.steps} steps")
        generator.save_pretrained(args.out / "generator")
        discriminator.save_pretrained(args.out / "discriminator")
        show_replaced(args.out / "discriminator", "the function returns a list of error", replaced="error")


if __name__ == "__main__":
    main()
