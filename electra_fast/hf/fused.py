"""Put a fused forward pass in front of the one that a module's class has, on that module alone.

`isinstance`, hooks, `state_dict`, gradient checkpointing and the class's name stay as they were; a module is
copied and pickled as it is, fused. Three checks decide whether the class's own forward pass runs instead:

- `unknown`, in `patch`: the class is not one that the fused forward pass was written for;
- `hindrance`, at each call: a submodule is more than the parameters that an op reads, because a LoRA adapter,
  a hook or a quantised weight may be added at any time;
- `unserved`, at each call: an argument that no kernel takes.
"""

import functools
import inspect
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.tensor import DTensor

# Tensors that an op can read. The two of torch.export stand for plain ones. FSDP2 keeps parameters as DTensor
# between the calls, and gives a module plain ones for its forward pass.
READABLE = (Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor, DTensor)


class Fused:
    """A forward pass, `fused`, that replaces the one of the class behind it."""

    option: ClassVar[str]  # of `patch`
    runs: ClassVar[str]  # the ops that it calls
    forwards: ClassVar[tuple[str, ...]]  # parameters of the forward passes that `fused` was written for
    parts: tuple[tuple[str, type[nn.Module]], ...] = ()  # submodules whose parameters an op reads
    reads: tuple[str, ...] = ()  # the other attributes that `fused` reads
    unfused: ClassVar[type[nn.Module]]  # the class that the module had
    mixin: ClassVar[type["Fused"]]  # the class that was put in front of it
    declined: str | None = None  # why the last call was not served

    @classmethod
    def unknown(cls, module: nn.Module) -> str | None:
        """Say what `module` has that `fused` was not written for, None if it is known."""
        parameters = parameters_of(type(module).forward)
        if parameters not in cls.forwards:
            return f"forward({parameters}) must be forward({') or forward('.join(cls.forwards)})"
        for name in (*(name for name, _ in cls.parts), *cls.reads):
            try:
                functools.reduce(getattr, name.split("."), module)
            except AttributeError:
                return f"it has no {name}"
        return None

    def hindrance(self) -> str | None:
        """Say why the class's own forward pass runs at every call, None if the fused one may run."""
        for name, cls in self.parts:
            if why := more_than(self.get_submodule(name), cls):
                return f"{name}{why}"
        return None

    def unserved(self, *args, **kwargs) -> str | None:
        """Say why this call needs the class's own forward pass, None if it does not."""
        return None

    def __reduce_ex__(self, protocol):
        """Pickle and copy by the two classes that this one is made of: by its name another is found."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.mixin, self.unfused), *state


def parameters_of(forward) -> str:
    """Return the names and kinds of a method's parameters, without self, types and default values."""
    _, *parameters = inspect.signature(forward).parameters.values()
    bare = [p.replace(annotation=p.empty, default=p.empty) for p in parameters]
    return str(inspect.Signature(bare))[1:-1]


def more_than(part: nn.Module, cls: type[nn.Module]) -> str | None:
    """Say what makes `part` more than a `cls` whose parameters an op may read, None if it is one."""
    if type(part) is not cls:
        return f" is {type(part).__module__}.{type(part).__name__}"
    if _has_hooks(part):
        return " has hooks"
    for name, p in part._parameters.items():
        if type(p) not in READABLE:
            return (
                f".{name} is {type(p).__module__}.{type(p).__name__}" if p is not None else f" has no {name}"
            )
    return None


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
        # ONNX has no such operators.
        if torch.onnx.is_in_onnx_export() or self.hindrance():
            return unfused.forward(self, *args, **kwargs)
        why = self.unserved(*args, **kwargs)
        # A compiler or an exporter may not see an attribute change.
        if not torch.compiler.is_compiling() and why != self.declined:
            self.declined = why
        run = unfused.forward if why else mixin.fused
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
    module.__dict__.pop("declined", None)
