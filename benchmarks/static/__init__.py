"""What the compilers make of every kernel, without a GPU: `python -m benchmarks static` (see README.md)."""
