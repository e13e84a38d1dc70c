"""A fused forward pass for single modules: a module gets a subclass of its class with another `forward`.

`isinstance`, hooks, `state_dict`, gradient checkpointing and the name of the class do not change. Copies and
pickles of a fused module are fused too. Three checks decide whether the class's own forward pass runs
instead:

- `mismatch`, in `patch`: the class is not one that the fused forward pass was written for;
- `obstacle`, at each call: a submodule has more than the parameters that an op reads, because a LoRA adapter,
  a hook or a quantised weight may be added at any time;
- `unsupported`, at each call: no kernel supports an argument.
"""

import functools
import inspect
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.tensor import DTensor

# Types of tensors that an op can read. FakeTensor and FunctionalTensor represent plain tensors in
# torch.export. FSDP2 keeps parameters as DTensor between calls, but a forward pass gets plain ones.
READABLE = (Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor, DTensor)


class Fused:
    """A mixin whose `fused` replaces the forward pass of the class after it."""

    option: ClassVar[str]  # of `patch`
    uses: ClassVar[str]  # the ops that `fused` calls
    forwards: ClassVar[tuple[str, ...]]  # parameters of the forward passes that `fused` was written for
    parts: tuple[tuple[str, type[nn.Module]], ...] = ()  # submodules whose parameters an op reads
    attributes: tuple[str, ...] = ()  # the other attributes that `fused` reads
    unfused: ClassVar[type[nn.Module]]  # the original class of the module
    mixin: ClassVar[type["Fused"]]  # the subclass of Fused in front of it
    last_unsupported: str | None = None  # why the last call ran unfused, None if it did not

    @classmethod
    def mismatch(cls, module: nn.Module) -> str | None:
        """Return how `module` differs from the classes that `fused` was written for, None if it does not."""
        parameters = parameters_of(type(module).forward)
        if parameters not in cls.forwards:
            return f"forward({parameters}) must be forward({') or forward('.join(cls.forwards)})"
        for name in (*(name for name, _ in cls.parts), *cls.attributes):
            try:
                functools.reduce(getattr, name.split("."), module)
            except AttributeError:
                return f"it has no {name}"
        return None

    def obstacle(self) -> str | None:
        """Return why every call must run the class's own forward pass, None if the fused one can run."""
        for name, cls in self.parts:
            if why := why_not_plain(self.get_submodule(name), cls):
                return f"{name}{why}"
        return None

    def unsupported(self, *args, **kwargs) -> str | None:
        """Return why this call must run the class's own forward pass, None if the fused one can run."""
        return None

    def runs_unfused(self, why: str) -> None:
        """Do what must be done before a call runs the class's own forward pass."""

    def __reduce_ex__(self, protocol):
        """Pickle and copy by mixin and original class, because the name of this class is the original's."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.mixin, self.unfused), *state


def parameters_of(forward) -> str:
    """Return the names and kinds of a method's parameters, without self, types and default values."""
    _, *parameters = inspect.signature(forward).parameters.values()
    bare = [p.replace(annotation=p.empty, default=p.empty) for p in parameters]
    return str(inspect.Signature(bare))[1:-1]


def why_not_plain(part: nn.Module, cls: type[nn.Module]) -> str | None:
    """Return why an op cannot use `part` as the parameters of a `cls`, None if it can."""
    if type(part) is not cls:
        return f" is {type(part).__module__}.{type(part).__name__}"
    if has_hooks(part):
        return " has hooks"
    for name, p in part._parameters.items():
        if p is None:
            return f" has no {name}"
        if type(p) not in READABLE:
            return f".{name} is {type(p).__module__}.{type(p).__name__}"
    return None


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__  # accelerate sets a forward pass on the module
    )


@functools.cache
def _class(mixin: type[Fused], unfused: type[nn.Module]) -> type[nn.Module]:
    """Return `unfused` with the forward pass of `mixin`, with the same name and the same signature.

    transformers uses the name of a model's class to find which outputs it records, and writes the name into
    config.json. Its Trainer reads from the signature of `forward` which columns a model accepts.
    """

    @functools.wraps(unfused.forward)
    def forward(self, *args, **kwargs):
        # ONNX does not have the operators of this package.
        if torch.onnx.is_in_onnx_export():
            return unfused.forward(self, *args, **kwargs)
        if why := self.obstacle():
            self.runs_unfused(why)
            return unfused.forward(self, *args, **kwargs)
        why = self.unsupported(*args, **kwargs)
        # An attribute must not change while a compiler or an exporter traces.
        if not torch.compiler.is_compiling() and why != self.last_unsupported:
            self.last_unsupported = why
        if why:
            self.runs_unfused(why)
            return unfused.forward(self, *args, **kwargs)
        return mixin.fused(self, *args, **kwargs)

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
    for name in ("last_unsupported", "int8"):
        module.__dict__.pop(name, None)
