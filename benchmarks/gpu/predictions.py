"""Times predicted before any GPU ran the kernels, for comparison with the measured ones.

Microseconds on an H200, in bfloat16 with dropout 0.1 under a CUDA graph, with the backward pass. Copies on an
H100 are 1.43 times as slow. docs/predictions.md has these and more, with their dates.
"""

PREDICTED = {
    ("step", "small 128x128"): 5_100,
    ("step", "base 8 of 32x512"): 170_000,
    ("mask_tokens", "small 128x128"): 3,
    ("replace_tokens", "small 128x128"): 3,
    ("rtd_loss", "small 128x128"): 4.5,
    ("nce_loss", "small 128x128"): 4.5,
    ("embed", "small 128x128"): 38,
    ("attention", "small 128x128"): 42,
    ("attention", "small 128x32 to 128x128"): 33,
    ("attention", "small 128x128, causal"): 42,
    ("attention_qkv", "small 128x128"): 42,
    ("add_norm", "small 128x128"): 21,
    ("bias_gelu", "small 128x128"): 48,
    ("linear_gelu", "small 128x128"): 108,  # the two ops; docs/predictions.md has the candidate
    ("mlm_head", "small 128x128"): 240,
    ("attention", "base 256x512"): 4_250,
    ("mlm_head", "base 256x512"): 5_400,
    ("linear_gelu", "base 8 of 32x512"): 493,
    ("linear_gelu", "large 4 of 16x512"): 412,
}
