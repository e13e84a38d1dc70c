"""Hugging Face: importing this makes "electra_fast" an attention implementation of transformers."""

from electra_fast.hf.attention import attention, mask

__all__ = ["attention", "mask"]
