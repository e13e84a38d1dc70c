"""The implementations that run a case: their names in the results, their labels, and their order."""

from collections.abc import Iterable

OURS = ("fused", "eager", "packed", "fused_int8", "fused_graph", "packed_graph", "pipeline_patched")
OURS += ("trainer_packed", "trainer_patched", "electra", "candidate")
LABELS = {
    "compile": "torch.compile",
    "compile_max": "torch.compile, max-autotune",
    "compile_rand4x": "torch.compile, rand4x",
    "huggingface": "Hugging Face",
    "huggingface_compile": "Hugging Face, compiled",
    "huggingface_reduce": "Hugging Face, compiled, reduce-overhead",
    "pipeline": "pipeline",
    "pipeline_sorted": "pipeline, sorted by length",
    "pipeline_patched": "pipeline, patched",
    "trainer": "Trainer",
    "trainer_grouped": "Trainer, grouped by length",
    "trainer_patched": "Trainer, patched",
    "trainer_packed": "Trainer, patched, packed",
    "eager": "fused, no graph",
    "electra": "ELECTRA, fused",
    "fused_int8": "fused, int8",
    "fused_graph": "fused, graph",
    "packed_graph": "packed, graph",
    "linear_ce": "F.linear_cross_entropy",
    "linear_ce_chunked": "F.linear_cross_entropy, chunked",
    "linear_ce_one": "F.linear_cross_entropy, one chunk",
    "linear_ce_cute": "F.linear_cross_entropy, CuTe",
    "liger": "Liger",
    "quack": "quack",
    "cce": "cut-cross-entropy",
    "sdpa_flash": "SDPA, flash",
    "sdpa_efficient": "SDPA, efficient",
    "sdpa_cudnn": "SDPA, cuDNN",
    "sdpa_math": "SDPA, math",
    "varlen_flash": "varlen_attn, flash",
    "varlen_cudnn": "varlen_attn, cuDNN",
    "flex": "FlexAttention",
    "flex_flash": "FlexAttention, FLASH",
    "flash_attn": "FlashAttention-2",
    "flash_attn_3": "FlashAttention-3",
    "flash_attn_4": "FlashAttention-4",
    "ort": "ONNX Runtime",
    "ort_int8": "ONNX Runtime, int8",
    "openvino": "OpenVINO",
    "cublaslt_tanh": "cuBLASLt, tanh GELU",
}
RIVALS = ("linear_ce_chunked", "linear_ce_one", "linear_ce", "linear_ce_cute", "liger", "quack", "cce")
RIVALS += ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "varlen_flash", "varlen_cudnn")
RIVALS += ("flex", "flex_flash", "flash_attn", "flash_attn_3", "flash_attn_4", "ort", "ort_int8", "openvino")
RIVALS += ("cublaslt_tanh",)
COMPILED = ("compile", "compile_max", "compile_rand4x", "huggingface_compile", "huggingface_reduce")
LATE = (*RIVALS, *COMPILED)  # timed after all other providers
ORDER = [*OURS, "torch", "compile", "compile_max", "compile_rand4x"]
ORDER += ["trainer", "trainer_grouped", "pipeline", "pipeline_sorted"]
ORDER += ["huggingface", "huggingface_compile", "huggingface_reduce", *RIVALS, "reference"]


def in_order(providers: Iterable[str]) -> list[str]:
    """Return each of these providers once, in the usual order; those of a user follow torch."""
    found, after = list(dict.fromkeys(providers)), ORDER.index("torch") + 1
    yours = [p for p in found if p not in ORDER]
    return [p for p in (*ORDER[:after], *yours, *ORDER[after:]) if p in found]


def label(provider: str) -> str:
    return LABELS.get(provider, provider)
