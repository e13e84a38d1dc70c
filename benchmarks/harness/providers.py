"""The implementations that run a case: their names in the results, their labels, and their order."""

OURS = ("fused", "eager", "packed", "candidate")
LABELS = {
    "compile": "torch.compile",
    "compile_max": "torch.compile, max-autotune",
    "huggingface": "Hugging Face",
    "huggingface_compile": "Hugging Face, compiled",
    "eager": "fused, no graph",
    "linear_ce": "F.linear_cross_entropy",
    "linear_ce_chunked": "F.linear_cross_entropy, chunked",
    "liger": "Liger",
    "cce": "cut-cross-entropy",
    "sdpa_flash": "SDPA, flash",
    "sdpa_efficient": "SDPA, efficient",
    "sdpa_cudnn": "SDPA, cuDNN",
    "sdpa_math": "SDPA, math",
    "flex": "FlexAttention",
    "flash_attn": "flash-attn",
    "cublaslt_tanh": "cuBLASLt, tanh GELU",
}
RIVALS = ("linear_ce_chunked", "linear_ce", "liger", "cce")
RIVALS += ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "flex", "flash_attn", "cublaslt_tanh")
COMPILED = ("compile", "compile_max", "huggingface_compile")
LATE = (*RIVALS, *COMPILED)  # timed after all other providers
ORDER = [*OURS, "torch", "compile", "compile_max", "huggingface", "huggingface_compile"]
ORDER += [*RIVALS, "reference"]


def label(provider: str) -> str:
    return LABELS.get(provider, provider)
