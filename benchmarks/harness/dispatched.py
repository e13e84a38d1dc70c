"""Count the operators that PyTorch dispatches."""

import collections

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.by_name = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.by_name[str(function)] += 1
        return function(*args, **(kwargs or {}))
