"""Kernels that make ELECTRA pre-training fast, under thin PyTorch modules.

    from electra_fast import Electra, ElectraConfig, ops, reference
    loss = Electra(ElectraConfig.small())(ids).loss

`python -m electra_fast info` says which kernels this installation has.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Discriminator": "model",
    "Electra": "model",
    "ElectraConfig": "config",
    "ElectraOutput": "model",
    "Generator": "model",
    "Pretraining": "pretrain",
    "Recipe": "recipe",
    "check_batch": "data",
    "info": "installation",
    "numerics": "accuracy",
}
__all__ = ["__version__", "ops", "reference", *_HOME]


def __getattr__(name: str):
    """Import on first use, so that `import electra_fast` costs nothing and Triton is still to be imported."""
    if name in ("ops", "reference", "testing"):
        return importlib.import_module(f"electra_fast.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"electra_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'electra_fast' has no attribute '{name}'")
