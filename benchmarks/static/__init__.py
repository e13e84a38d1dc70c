"""Figures of every compiled kernel, without a GPU: `python -m benchmarks static` (see README.md)."""
