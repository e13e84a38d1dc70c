"""Fast kernels for ELECTRA, and thin PyTorch modules on top of them.

    from electra_fast import Electra, ElectraConfig, ops, reference, use
    loss = Electra(ElectraConfig.small())(ids).loss
    use.detect("The cat sat on the banana of the house.", "runs/demo")

`python -m electra_fast info` shows which kernels this installation has.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "Discriminator": "model",
    "Electra": "model",
    "ElectraConfig": "config",
    "ElectraOutput": "model",
    "Generator": "model",
    "Pretraining": "train.pretrain",
    "Recipe": "train.recipe",
    "check_batch": "data",
    "info": "doctor",
    "layerwise_groups": "train.optimizer",
    "numerics": "accuracy",
}
__all__ = ["__version__", "ops", "reference", "use", *_MODULES]


def __getattr__(name: str):
    """Import on first use, so that `import electra_fast` is fast and does not import Triton."""
    if name in ("ops", "reference", "testing", "use"):
        return importlib.import_module(f"electra_fast.{name}")
    if name in _MODULES:
        return getattr(importlib.import_module(f"electra_fast.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'electra_fast' has no attribute '{name}'")
