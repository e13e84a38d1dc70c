"""Checkpoints written by a thread, from a copy of the state, while training continues."""

import copy
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class State(NamedTuple):
    """The state of a run after `step` steps, as a checkpoint contains it."""

    step: int
    skipped: int  # steps
    model: nn.Module
    optimizer: dict[str, Tensor]  # the result of `optimizer.state`

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, by group and name."""
        model = {name: p.detach() for name, p in self.model.named_parameters()}
        return {"model": model, "optimizer": self.optimizer}


class Saver:
    """Writes one state at a time in a thread, from a copy in the memory of the host.

    The copy has three times the size of the parameters. The next copy uses its memory again, because a copy
    into new memory takes four times as long. Before the first copy no physical memory is used.

    Args:
        state: one of the run, for the modules and the shapes. Hooks of its model are copied too.
    """

    def __init__(self, state: State):
        on_host = {id(p): nn.Parameter(_empty(p), p.requires_grad) for p in state.model.parameters()}
        model = copy.deepcopy(state.model, on_host)  # it has these parameters in place of its own
        averages = {name: _empty(x) for name, x in state.optimizer.items()}
        self._copy = state._replace(model=model, optimizer=averages)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def step(self) -> int:
        """The step of the last copy."""
        return self._copy.step

    def save(self, state: State, write: Callable[[State], None]) -> None:
        """Copy a state and call `write` with the copy in a thread. The last write must have been waited for.

        The thread is a daemon, because a second signal must end the process at once.
        """
        self._copy = self._copy._replace(step=state.step, skipped=state.skipped)
        copies = self._copy.tensors()
        for group, named in state.tensors().items():
            for name, x in named.items():
                copies[group][name].copy_(x)
        name = "electra_fast checkpoint"
        self._thread = threading.Thread(target=self._write, args=(write,), name=name, daemon=True)
        self._thread.start()

    def _write(self, write: Callable[[State], None]) -> None:
        try:
            write(self._copy)
        except BaseException as error:
            self._error = error

    def wait(self) -> OSError | None:
        """Wait for the end of the write; return its error. An error other than an OSError is raised."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is None or isinstance(error, OSError):
            return error
        raise error


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu", requires_grad=False)
