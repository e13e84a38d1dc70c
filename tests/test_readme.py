"""Every Python block of README.md and docs/usage.md runs, one after the other, with the names of its text."""

import re
from pathlib import Path

import pytest
import torch
from small_halves import halves, tokenizer
from transformers import TrainingArguments

from electra_fast import Discriminator, ElectraConfig, ops, testing

ROOT = Path(__file__).parents[1]


def blocks(file: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text(), re.M | re.S)


def names(folder) -> dict:
    ids, key_mask = torch.randint(1000, 30_000, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
    generator, discriminator = halves()
    words = tokenizer(mask_token="w103", cls_token="w101", sep_token="w102", pad_token="w0")
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(folder / "run", use_cpu=True, dataloader_pin_memory=False, **options)
    return {
        "ids": ids,
        "key_mask": key_mask,
        "candidates": key_mask,
        "rng": torch.tensor([1, 2]),
        "samples": torch.zeros(4, dtype=torch.long),
        "logits": torch.randn(2, 16),
        "x": torch.randn(2, 16, 256),
        "residual": torch.randn(2, 16, 256),
        "norm": torch.nn.LayerNorm(256),
        "batch": {"input_ids": ids, "attention_mask": key_mask, "labels": torch.tensor([0, 1])},
        "generator": generator,
        "discriminator": discriminator,
        "tokenizer": words,
        "args": args,
        "texts": [{"input_ids": [101, *range(110, 118), 102]}] * 2,
        "my_rtd_loss": ops.rtd_loss,
        "my_softmax": lambda x: x.softmax(-1),
        "my_mask_tokens": ops.mask_tokens,
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fuzz_op = testing.fuzz_op
    monkeypatch.setattr(testing, "fuzz_op", lambda *args, seconds: fuzz_op(*args, seconds=seconds / 60))
    known = names(tmp_path)
    Discriminator(ElectraConfig.small()).save_pretrained("my-electra")
    for file, count in (("README.md", 3), ("docs/usage.md", 4)):
        assert len(blocks(file)) == count, file
        for block in blocks(file):
            if "fastapi" in block:  # tests/test_use_docs.py runs it
                continue
            exec(compile(block, file, "exec"), dict(known))
    said = capsys.readouterr().out
    assert "ElectraSelfAttention  12 of 12" in said and "electra.encoder.layer.*.attention.self" in said
