"""The processes that train one model together, as torchrun starts them.

    torchrun --nproc-per-node 2 -m electra_fast pretrain …

A step has the same micro-batches whatever the number of processes: process r of W (its rank) computes those
with global number r, r + W, r + 2 W, …. Batches, masks, samples and dropout are functions of (seed, number),
so only the order in which the gradients are added depends on W. Rank 0 alone reads and writes the folder of
the run; the other processes get from it what they need.
"""

import atexit
import contextlib
import datetime
import faulthandler
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from electra_fast import local
from electra_fast.errors import must
from electra_fast.versions import installed

TIMEOUT = 600.0  # seconds to wait for another process in a step
GRACE = 30.0  # seconds after it, for errors that say more
PREPARATION = datetime.timedelta(days=1)  # to wait for another process that reads or tokenizes the data
PACKAGES = ("electra_fast", "torch", "triton", "tokenizers", "numpy")  # all processes must have the same
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")  # variables that torchrun sets


class ProcessLost(ConnectionError):
    """Another process has ended or does not answer."""


class World:
    """This process and the others: `rank` is its number, `size` the number of processes.

    Args:
        command: the name of the command, for messages.
        rank: 0 is the first one.
        size: 1: there are no others, and no method communicates.
        device: the device on which this process computes.
    """

    def __init__(self, command: str, rank: int, size: int, device: torch.device):
        self.command, self.rank, self.size, self.device = command, rank, size, device
        self._preparing = self._training = None  # process groups
        self._owner = self._has_lost = False
        self._timeout, self._watched = TIMEOUT, -math.inf  # seconds, and when `watch` was called
        self._asked: tuple[Tensor, Any] | None = None  # the last call of `agree`, and its communication

    @classmethod
    def join(cls, command: str, device: str | torch.device | None, timeout: float = TIMEOUT) -> Self:
        """Return the world that torchrun describes, or one process, on its device; connect the processes.

        Args:
            command: the name of the command.
            device: None is a GPU if there is one; of several processes on a machine each gets its own GPU.
            timeout: seconds that a process waits for the others in a step.

        Raises:
            ValueError: a variable of torchrun is missing, the device cannot be used, or a machine has fewer
                GPUs than processes.
            ProcessLost: the other processes cannot be reached.
        """
        size = os.environ.get("WORLD_SIZE") or "1"
        if size == "1":
            return cls(command, 0, 1, local.device(f"{command}: --device", device))
        numbers = {name: os.environ.get(name, "") for name in NUMBERS}
        for name, number in numbers.items():
            if not number.isdecimal():
                rule, remedy = "be a number", "start several processes with torchrun"
                raise ValueError(must(f"{command}: {name}", rule, repr(number), remedy))
        if not int(numbers["RANK"]) < int(numbers["WORLD_SIZE"]):
            rule = f"be less than WORLD_SIZE, {numbers['WORLD_SIZE']}"
            raise ValueError(must(f"{command}: RANK", rule, numbers["RANK"]))
        if not os.environ.get("MASTER_ADDR"):
            raise ValueError(must(f"{command}: MASTER_ADDR", "be set", "nothing", "start it with torchrun"))
        found = _own_device(command, device, int(numbers["LOCAL_RANK"]))
        world = cls(command, int(numbers["RANK"]), int(size), found)
        world._connect(timeout)
        versions = {package: installed(package) for package in PACKAGES}
        world.require_same(versions | {"--device": found.type})
        return world

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files and the log."""
        return self.rank == 0

    def _connect(self, timeout: float) -> None:
        self._timeout = timeout
        self.watch()  # something that is not torchrun may listen at its port, and never answer
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        limit = datetime.timedelta(seconds=timeout)
        with self._lost():
            if not dist.is_initialized():
                store, rank, size = next(dist.rendezvous("env://", timeout=limit))
                # When torchrun starts processes again, its store has the addresses of the old ones (pytorch
                # 167288), which must not be found.
                store = dist.PrefixStore(f"restart {os.environ.get(RESTARTS, 0)}", store)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
                self._owner = True
            self._preparing = dist.new_group(backend=backend, timeout=PREPARATION)
            self._training = dist.new_group(backend=backend, timeout=limit)
        self.unwatch()
        # A thread of gloo needs Python's lock to free the tensors of the last operation. If the interpreter
        # has ended meanwhile, this aborts the process.
        atexit.register(self.close)

    def close(self) -> None:
        """Disconnect, unless a process was lost: this would wait for it. The end of Python calls this too."""
        atexit.unregister(self.close)
        if self.size > 1 and dist.is_initialized() and not self._has_lost:
            for group in (None,) if self._owner else (self._preparing, self._training):
                dist.destroy_process_group(group)
            group = self._preparing = self._training = None  # gloo's threads end with the last reference

    def together(self, make: Callable[[], Any]) -> Any:
        """Return ``make()``; if it raises an error of the user in any process, the run ends in all of them.

        Raises:
            ValueError, OSError, ImportError: on rank 0; the error of the first process that has one.
            SystemExit: on the other ranks, which print nothing.
        """
        if self.size == 1:
            return make()
        result = error = None
        try:
            result = make()
        except (ValueError, OSError, ImportError) as found:
            error = found
        text = error if error is None else (type(error).__name__, str(error))
        errors = self._gather(text, self._preparing)
        failed = next((rank for rank, found in enumerate(errors) if found is not None), None)
        if failed is None:
            return result
        if not self.first:
            raise SystemExit(1) from error
        if failed == 0:
            raise error
        kind, text = errors[failed]
        kinds = {k.__name__: k for k in (ValueError, ImportError, FileNotFoundError)}
        raise kinds.get(kind, OSError)(f"process {failed}: {text}")

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return the result of ``make()`` on rank 0, which all processes get; errors as in `together`."""
        result = self.together(lambda: make() if self.first else None)
        if self.size > 1:
            results = [result]
            with self._lost():
                dist.broadcast_object_list(results, src=0, group=self._preparing)
            result = results[0]
        return result

    def require_same(self, facts: dict[str, Any]) -> None:
        """Check that facts are the same in all processes.

        Raises:
            ValueError: on rank 0, and SystemExit on the others; the message has the process and both values.
        """

        def compare() -> None:
            for rank, found in enumerate(all_facts):
                for name, value in all_facts[0].items():
                    if found[name] != value:
                        got = f"{value!r} in process 0, {found[name]!r} in process {rank}"
                        raise ValueError(must(f"{self.command}: {name}", "be the same in all processes", got))

        all_facts = self._gather(facts, self._preparing)
        self.together(compare)

    def require_divides(self, micro_batches: int) -> None:
        """Check that the processes can divide the micro-batches of a step.

        Raises:
            ValueError: the message has the numbers of processes that can.
        """
        if micro_batches % self.size:
            rule = f"divide the {micro_batches} micro-batches of a step (--accumulate)"
            remedy = f"start {one_of(divisors(micro_batches))}"
            raise ValueError(must(f"{self.command}: the number of processes", rule, self.size, remedy))

    def _gather(self, value: Any, group: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            with self._lost():
                dist.all_gather_object(values, value, group=group)
        return values

    def merged(self, found: dict[int, Any]) -> list[Any]:
        """Return the values of all processes in the order of their keys, which are distinct."""
        merged = {k: value for part in self._gather(found, self._training) for k, value in part.items()}
        return [merged[key] for key in sorted(merged)]

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self._gather(None, self._preparing)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors of the training device with those of rank 0."""
        if self.size > 1:
            with self._lost():
                for x in tensors:
                    dist.broadcast(x.detach(), src=0, group=self._training)

    def add(self, x: Tensor) -> None:
        """Add the tensors of all processes in place; the host does not wait for a GPU."""
        if self.size > 1:
            with self._lost():
                dist.all_reduce(x, group=self._training)

    def start_adding(self, x: Tensor) -> Callable[[], None]:
        """Start to add the tensors of all processes in place; return a function that waits for the sum."""
        with self._lost():
            work = dist.all_reduce(x, group=self._training, async_op=True)

        def wait() -> None:
            with self._lost():
                work.wait()

        return wait

    def watch(self) -> None:
        """End this process if it does not call this again, or `unwatch`, in time.

        A collective operation in a CUDA graph has no timeout, and the host then waits for the GPU for ever.
        `GRACE` seconds after the timeout of the other operations, the interpreter prints the stack of each
        thread and ends the process.
        """
        if self.size > 1 and time.monotonic() > self._watched + 1:  # a new thread per call, so not every step
            faulthandler.dump_traceback_later(self._timeout + GRACE, exit=True, file=sys.__stderr__)
            self._watched = time.monotonic()

    def unwatch(self) -> None:
        """Wait for the GPU, which may wait for another process; allow any time until the next `watch`."""
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            faulthandler.cancel_dump_traceback_later()
            self._watched = -math.inf

    def agree(self, number: int) -> int:
        """Return the largest `number` of any process in its previous call, 0 in the first call.

        The numbers of this call travel while the next step is computed. All processes get the same result.
        """
        if self.size == 1:
            return number
        previous = self.agreed()
        asked = torch.tensor([number], device="cpu")
        with self._lost():
            work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._training, async_op=True)
        self._asked = asked, work
        return previous

    def agreed(self) -> int:
        """Return the result of the last call of `agree` now, 0 without a call."""
        if self._asked is None:
            return 0
        (asked, work), self._asked = self._asked, None
        with self._lost():
            work.wait()
        return int(asked)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Raise ProcessLost for an error of the communication."""
        try:
            yield
        except RuntimeError as error:  # among them dist.DistBackendError
            self._has_lost = True
            rule, got = "reach the other processes", str(error).partition("\n")[0]
            remedy = "one of them has ended or hangs; its own message says why"
            raise ProcessLost(must(f"{self.command}: process {self.rank}", rule, got, remedy)) from error


ALONE = World("", 0, 1, torch.device("cpu"))


def _own_device(command: str, device: str | torch.device | None, local_rank: int) -> torch.device:
    """Return the device of one of several processes on a machine: each has its own GPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "cuda" and local_rank >= (count := torch.cuda.device_count()) > 0:
        rule = f"be at most {count}, the number of GPUs of this machine"
        raise ValueError(must(f"{command}: --nproc-per-node", rule, f"{local_rank + 1} or more"))
    if str(device).startswith("cuda:"):
        rule, remedy = "be cuda or cpu with several processes", "CUDA_VISIBLE_DEVICES selects GPUs"
        raise ValueError(must(f"{command}: --device", rule, device, remedy))
    found = local.device(f"{command}: --device", f"cuda:{local_rank}" if str(device) == "cuda" else device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def of_this_process(rng: Tensor) -> Tensor:
    """Return an rng that differs between the processes of a group, which often have one seed."""
    if dist.is_available() and dist.is_initialized():
        return rng + rng.new_tensor([dist.get_rank(), 0])
    return rng


def divisors(n: int) -> list[int]:
    """Return the divisors of n, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def one_of(numbers: Sequence[int]) -> str:
    """Return numbers as a choice: 1, 2 or 4."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
