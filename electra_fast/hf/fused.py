"""Put a fused forward pass in front of the one that a module's class has, on that module alone.

`isinstance`, hooks, `state_dict`, gradient checkpointing and the class's name stay as they were; a module is
copied and pickled as it is, fused. Before an op reads the parameters of a submodule, `hindrance` looks
whether that is all there is to it, for a LoRA adapter or a hook may come at any time. If it is not, the
class's own forward pass runs.
"""

import functools
from typing import ClassVar

from torch import nn


class Fused:
    """A forward pass, `fused`, that replaces the one of the class behind it."""

    option: ClassVar[str]  # of `patch`
    runs: ClassVar[str]  # the ops that it calls
    parts: tuple[tuple[str, type[nn.Module]], ...] = ()  # submodules whose parameters an op reads
    unfused: ClassVar[type[nn.Module]]  # the class that the module had
    mixin: ClassVar[type["Fused"]]  # the class that was put in front of it

    def hindrance(self) -> str | None:
        """Say why the class's own forward pass runs, None if the fused one does."""
        for name, cls in self.parts:
            part = self.get_submodule(name)
            if type(part) is not cls:
                return f"{name} is {type(part).__module__}.{type(part).__name__}"
            if _has_hooks(part):
                return f"{name} has hooks"
        return None

    def __reduce_ex__(self, protocol):
        """Pickle and copy by the two classes that this one is made of: by its name another is found."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.mixin, self.unfused), *state


def _has_hooks(module: nn.Module) -> bool:
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(hooks) or "forward" in module.__dict__  # the latter as accelerate sets them


@functools.cache
def _class(mixin: type[Fused], unfused: type[nn.Module]) -> type[nn.Module]:
    """Return `unfused` with the forward pass of `mixin`, under the same name.

    transformers finds by the printed name of a model's class what it records of it, and writes the name into
    config.json; by the signature of `forward` its Trainer knows which columns a model takes.
    """

    @functools.wraps(unfused.forward)
    def forward(self, *args, **kwargs):
        run = unfused.forward if self.hindrance() else mixin.fused
        return run(self, *args, **kwargs)

    members = {name: getattr(unfused, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"forward": forward, "mixin": mixin, "unfused": unfused}
    return type(unfused.__name__, (mixin, unfused), members)


def _new(mixin: type[Fused], unfused: type[nn.Module]) -> nn.Module:
    cls = _class(mixin, unfused)
    return cls.__new__(cls)


def fuse(module: nn.Module, mixin: type[Fused]) -> None:
    module.__class__ = _class(mixin, type(module))


def unfuse(module: nn.Module) -> None:
    module.__class__ = module.unfused
