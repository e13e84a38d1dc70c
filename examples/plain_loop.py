"""Pre-train ELECTRA in a loop of fifteen lines: models of transformers, without Trainer or accelerate.

    python examples/plain_loop.py --steps 20

The corpus is Python's own documentation; batches and kernels come from electra_fast.
"""

import argparse

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_fast import data, hf
from electra_fast.hf import ElectraPretrainer

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", metavar="FOLDER", default="runs/plain_loop", help="for the discriminator")
args = parser.parse_args()
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

documents = data.documents()
tokenizer = data.train_tokenizer(documents, vocab_size=8000)
batches = data.Batches(data.tokenize(documents, tokenizer), seq_len=64, batch_size=16)

sizes = {"vocab_size": tokenizer.get_vocab_size(), "embedding_size": 64, "num_hidden_layers": 4}
narrow = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256}
wide = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
special = data.special_ids(tokenizer)
mask_id, _ = special["[MASK]"], special.pop("[UNK]")  # [UNK] is not special: unknown words are masked too
pretrainer = ElectraPretrainer(
    ElectraForMaskedLM(ElectraConfig(**sizes, **narrow)),
    ElectraForPreTraining(ElectraConfig(**sizes, **wide)),
    mask_id=mask_id,
    special_ids=special.values(),
).to(device)
hf.patch(pretrainer)

optimizer = torch.optim.AdamW(pretrainer.parameters(), lr=1e-3, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
for step in range(args.steps):
    ids, key_mask, _ = batches.padded(step)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        out = pretrainer(ids.to(device), key_mask.to(device))
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(pretrainer.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == args.steps - 1:
        print(f"step {step}: generator {out.mlm_loss:.3f}, discriminator {out.rtd_loss:.4f}")
    if not out.loss.isfinite():
        raise SystemExit(f"plain_loop: the loss of step {step} must be finite, got {out.loss}")

pretrainer.discriminator.save_pretrained(args.out)
data.save_tokenizer(tokenizer, args.out)
