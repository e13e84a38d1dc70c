"""The layers of a patched encoder as CUDA graphs: one call of the host launches the kernels of all layers.

A graph has fixed addresses and shapes. So each shape of a batch has its own graph, whose lengths are rounded
up to a multiple of 32, and a graph is used only while everything is as it was when it was captured: see
`_state`. The results of a call are copies, which a later call does not change.
"""

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from electra_fast import capture
from electra_fast.errors import must
from electra_fast.hf.attention import key_mask_of
from electra_fast.hf.attention_blocks import Attention, cache_of
from electra_fast.hf.fused import has_hooks

LENGTHS = 32  # a length is rounded up to a multiple of this
WARM_UP = 2  # calls of a shape before its capture, so that a shape that occurs once costs no capture
SHAPES = 8  # graphs per encoder
IDLE = 64  # calls after which an unused graph may be replaced; if all are in use, other shapes have none
# A module of another package, such as an adapter, may depend on more than its weights.
KNOWN = ("torch.", "transformers.")


class GraphedEncoder(Attention):
    """All layers of an encoder. A call outside training captures only a forward pass."""

    option, uses = "graphs", ""
    forwards = tuple(
        "hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, "
        f"{cache}, use_cache, **kwargs"
        for cache in ("past_key_values", "cache")
    )
    attributes = ("config", "layer")

    def obstacle(self):
        if self.config.is_decoder:
            return "it is a decoder, whose cache has another length in each call"
        return super().obstacle() or _graphs_of(self).obstacle()

    def unsupported(self, hidden_states, attention_mask=None, *rest, **kwargs):
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self.layer) and self.training:
            got = "gradient checkpointing, which runs the layers again in the backward pass"
            remedy = "call model.gradient_checkpointing_disable(), or patch with graphs=False"
            raise ValueError(
                must("electra_fast.hf.patch: a model with graphs", "train without it", got, remedy)
            )
        if not available(hidden_states):
            return f"a tensor on {hidden_states.device.type} has no CUDA graph"
        if type(hidden_states) is not Tensor or torch.compiler.is_compiling():
            return "it is being compiled or exported"
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            return "another capture is under way"
        options = {f"argument {i + 3}": x for i, x in enumerate(rest)} | kwargs
        if why := self.unsupported_options(options):
            return why
        if cache_of((), options) is not None:
            return "a cache is given"
        if kwargs.get("cu_seq_lens_q") is not None:
            return "a packed batch has another number of tokens in each call"
        if attention_mask is not None and key_mask_of(attention_mask, *hidden_states.shape[:2]) is None:
            return "attention_mask is not [B, L] or bool [B, 1, 1, L]"
        return None

    def fused(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_, **__):
        """Return the output of the class for hidden_states ``[B, L, W]``."""
        graph = _graphs_of(self).find(hidden_states, attention_mask)
        if graph is None:
            return self.unfused.forward(self, hidden_states, attention_mask)
        return graph.type(last_hidden_state=graph(hidden_states, attention_mask))


def available(x: Tensor) -> bool:
    return x.is_cuda


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Use another CUDA stream, in order with the current one: the default stream cannot be captured."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


class Key(NamedTuple):
    """What selects a graph of an encoder."""

    shape: tuple[int, int]  # B and the rounded length
    masked: bool
    gradient: tuple[bool, bool]  # is one computed, and that of the hidden states too
    numbers: tuple  # dtype and device of the hidden states, autocast, the precision of products


class Graphs:
    """The graphs of one encoder, and the number of calls of each shape that has none yet."""

    def __init__(self, encoder: nn.Module):
        self.encoder = weakref.ref(encoder)
        self.graphs: dict[Key, Graph] = {}
        self.calls: collections.Counter[Key] = collections.Counter()  # of shapes without a graph
        self.now = 0  # calls until now
        self.state: list = []
        self.failure: str | None = None
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module] = []

    def modules(self) -> list[nn.Module]:
        """Return all modules below the encoder. `nn.Module.modules` takes 5 times as long."""
        children = [child for m in (self.encoder(), *self._modules) for child in m._modules.values()]
        if children != self._children:
            self._modules = list(self.encoder().modules())[1:]
            self._children = [child for m in self.encoder().modules() for child in m._modules.values()]
        return self._modules

    def obstacle(self) -> str | None:
        """Return why no call can have a graph: code of a hook or an adapter would not run in a replay."""
        modules = self.modules()
        foreign = {cls for cls in set(map(type, modules)) if not cls.__module__.startswith(KNOWN)}
        hooked = [m for m in modules if has_hooks(m)] + [x for x in _tensors(modules) if x._backward_hooks]
        if not foreign and not hooked:
            return self.failure
        for name, x in (*self.encoder().named_modules(), *self.encoder().named_parameters()):
            if any(x is other for other in hooked):
                return f"{name} has hooks"
            if type(x) in foreign:
                return f"{name} is {type(x).__module__}.{type(x).__name__}"
        return None

    def find(self, hidden: Tensor, mask: Tensor | None) -> "Graph | None":
        """Return the graph of a call, captured if necessary; None if this call must run without one."""
        encoder = self.encoder()
        state = _state(encoder, self.modules())
        if state != self.state:  # a graph would read weights that are no longer there
            self.state = state
            self.graphs.clear(), self.calls.clear()
        self.now += 1
        key = _key(encoder, hidden, mask)
        if graph := self.graphs.get(key):
            graph.used_at = self.now
            return None if graph.waits() else graph
        self.calls[key] += 1
        return self.captured(encoder, key, hidden) if self.calls[key] > WARM_UP and self.has_room() else None

    def has_room(self) -> bool:
        """Return whether another graph is allowed; if necessary, drop the least recently used one."""
        if len(self.graphs) < SHAPES:
            return True
        oldest = min(self.graphs, key=lambda key: self.graphs[key].used_at)
        idle = self.now - self.graphs[oldest].used_at > IDLE
        if idle:
            del self.graphs[oldest]
        return idle

    def captured(self, encoder: nn.Module, key: Key, hidden: Tensor) -> "Graph | None":
        try:
            self.graphs[key] = graph = Graph(encoder, key, hidden)
        except RuntimeError as error:
            self.failure = f"the layers cannot be captured as a CUDA graph: {capture.cause(error)}"
            return None
        del self.calls[key]
        graph.used_at = self.now
        return graph


class Graph:
    """The forward pass of one shape, and its backward pass if a gradient is computed."""

    def __init__(self, encoder: nn.Module, key: Key, hidden: Tensor):
        B, L = key.shape
        self.encoder, self.gradient = weakref.ref(encoder), key.gradient[0]
        self.parameters = [p for p in encoder.parameters() if p.requires_grad] if self.gradient else []
        # What a replay reads. Tokens after the end of a batch are masked, but they must be numbers.
        self.hidden = hidden.new_zeros(B, L, hidden.shape[2]).requires_grad_(key.gradient[1])
        self.mask = hidden.new_ones((B, L), dtype=torch.bool) if key.masked else None
        self.upstream: Tensor | None = None
        # What a replay writes. The gradients of the parameters of one dtype are one tensor.
        self.output: Tensor
        self.hidden_gradient: Tensor | None = None
        self.parameter_gradients: dict[torch.dtype, Tensor] = {}
        self.number = 0  # of the last forward pass
        self.used_at = 0  # the call of `Graphs` that used it last
        self.waiting: weakref.ref | None = None  # the call whose backward pass needs the last forward pass
        with recording(hidden.device) as record:
            self._forward()  # once before, because libraries allocate their workspace
            if self.gradient:
                self.upstream = torch.zeros_like(self.output)
                self._backward()
            self._replay_forward = record(self._forward)
            self._replay_backward = record(self._backward) if self.gradient else None

    def _forward(self) -> None:
        encoder = self.encoder()
        # A cast of a weight that autocast keeps would be outside the graph.
        with torch.set_grad_enabled(self.gradient), _without_autocast_cache(self.hidden.device.type):
            mask = None if self.mask is None else self.mask[:, None, None]
            result = encoder.unfused.forward(encoder, self.hidden, mask)
        self.type, self.output = type(result), result.last_hidden_state

    def _backward(self) -> None:
        inputs = [*([self.hidden] if self.hidden.requires_grad else []), *self.parameters]
        with torch.autocast(self.hidden.device.type, enabled=False):
            gradients = list(torch.autograd.grad(self.output, inputs, self.upstream, allow_unused=True))
        if self.hidden.requires_grad:
            self.hidden_gradient = gradients.pop(0)
        self.used = [g is not None for g in gradients]
        by_dtype = collections.defaultdict(list)
        for g in gradients:
            if g is not None:
                by_dtype[g.dtype].append(g.flatten())
        self.parameter_gradients = {dtype: torch.cat(parts) for dtype, parts in by_dtype.items()}

    def waits(self) -> bool:
        """Return whether the backward pass of an earlier call still needs what a forward pass overwrites."""
        return self.waiting is not None and self.waiting() is not None

    def __call__(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if not self.gradient:
            return self.forward(hidden, mask)
        return _Replay.apply(self, hidden, mask, *self.parameters)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        L = hidden.shape[1]
        self.number += 1
        with torch.no_grad():
            self.hidden[:, :L].copy_(hidden)
            if self.mask is not None:
                self.mask[:, L:] = False
                self.mask[:, :L] = True if mask is None else key_mask_of(mask, *hidden.shape[:2])
        self._replay_forward()
        return self.output.detach()[:, :L].clone()

    def backward(self, number: int, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the hidden states and of each parameter."""
        if number != self.number:
            got, remedy = "one after the next call of its shape", "patch with graphs=False"
            raise RuntimeError(
                must("electra_fast.hf.patch: a backward pass", "precede the next call", got, remedy)
            )
        L = upstream.shape[1]
        self.upstream[:, :L].copy_(upstream)
        self.upstream[:, L:].zero_()
        self._replay_backward()
        hidden = None if self.hidden_gradient is None else self.hidden_gradient[:, :L].clone()
        copies = {dtype: iter(self._split(flat.clone())) for dtype, flat in self.parameter_gradients.items()}
        pairs = zip(self.parameters, self.used, strict=True)
        return hidden, *(next(copies[p.dtype]).view_as(p) if used else None for p, used in pairs)

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.parameters, self.used, strict=True)
        return flat.split([p.numel() for p, used in pairs if used and p.dtype == flat.dtype])


class _Call:
    """It lives as long as the autograd graph of a call. `Graph.waiting` refers to it weakly."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, hidden, mask, *parameters):
        ctx.graph, ctx.call = graph, _Call()
        result = graph.forward(hidden, mask)
        ctx.number, graph.waiting = graph.number, weakref.ref(ctx.call)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden, *parameters = ctx.graph.backward(ctx.number, upstream)
        ctx.call = None
        return None, hidden, None, *parameters


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[Callable]:
    """Yield `record(body)`, which returns the replay of a body."""
    with side_stream(device):
        yield capture.cuda_graph


@contextlib.contextmanager
def _without_autocast_cache(device: str) -> Iterator[None]:
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
        yield


def _key(encoder: nn.Module, hidden: Tensor, mask: Tensor | None) -> Key:
    B, L = hidden.shape[:2]
    rounded = max(LENGTHS, -(-L // LENGTHS) * LENGTHS)
    gradient = torch.is_grad_enabled() and (
        hidden.requires_grad or any(p.requires_grad for p in encoder.parameters())
    )
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    numbers = (hidden.dtype, hidden.device, autocast, torch.get_float32_matmul_precision())
    return Key(
        (B, rounded), mask is not None or rounded > L, (gradient, hidden.requires_grad and gradient), numbers
    )


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    """Return the parameters and buffers of these modules."""
    tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
    return [x for table in tables for x in table.values() if x is not None]


def _state(encoder: nn.Module, modules: list[nn.Module]) -> list:
    """Return what a captured graph depends on: the modules and their modes, the addresses of the weights."""
    state = [encoder.config._attn_implementation, encoder.training]
    for module in modules:
        state += (module, type(module), module.training, module.__dict__.get("p"))
    for x in _tensors(modules):
        state += (x.data_ptr(), x.requires_grad, x.dtype)
    return state


_graphs: "weakref.WeakKeyDictionary[nn.Module, Graphs]" = weakref.WeakKeyDictionary()


def _graphs_of(encoder: nn.Module) -> Graphs:
    """Return the graphs of an encoder. They are not in the module, because a copy must not share them."""
    if encoder not in _graphs:
        _graphs[encoder] = Graphs(encoder)
    return _graphs[encoder]
