"""What was predicted before any GPU ran the kernels, so that it stands beside what is measured.

Microseconds on an H200 in bfloat16 with dropout 0.1 under a CUDA graph, forward and backward if there is one.
DESIGN.md derives each. Copies of an H100 are 1.43 times as slow.
"""

PREDICTED = {
    ("step", "small 128x128"): 5_100,
    ("step", "base 8 of 32x512"): 170_000,
    ("mask_tokens", "small 128x128"): 3,
    ("replace_tokens", "small 128x128"): 3,
    ("rtd_loss", "small 128x128"): 4.5,
    ("embed", "small 128x128"): 38,
    ("attention", "small 128x128"): 42,
    ("attention_qkv", "small 128x128"): 42,
    ("add_norm", "small 128x128"): 21,
    ("bias_gelu", "small 128x128"): 48,
    ("mlm_head", "small 128x128"): 240,
    ("attention", "base 256x512"): 4_250,
    ("mlm_head", "base 256x512"): 5_400,
}
