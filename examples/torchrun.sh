#!/bin/sh
# Pre-train with two processes on the CPU, continue with one, fine-tune with two.
#
#     PATH=.venv/bin:$PATH sh examples/torchrun.sh runs/torchrun
#
# On a machine with 8 GPUs leave out --device cpu and write --nproc-per-node 8. Any number of processes that
# divides the micro-batches of a step (--accumulate) trains the same model.
set -e
out=${1:-runs/torchrun}

torchrun --standalone --nproc-per-node 2 -m electra_fast pretrain --device cpu --out "$out/pretrained" \
    --preset tiny --batch-tokens 512 --accumulate 2 --steps 20 --save-every 10
python -m electra_fast pretrain --device cpu --resume "$out/pretrained" --steps 30

cat > "$out/train.csv" <<CSV
text,label
what a wonderful film,good
I loved every minute,good
a boring and silly story,bad
I left after an hour,bad
CSV
torchrun --standalone --nproc-per-node 2 -m electra_fast finetune classify --device cpu --out "$out/classifier" \
    --model "$out/pretrained" --train "$out/train.csv" --dev "$out/train.csv" --batch 2 --accumulate 2 --steps 4
