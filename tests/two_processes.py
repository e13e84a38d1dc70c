"""What each of two processes computes from its half of a batch: two_processes.py RANK FOLDER.

`test_hf_processes.py` starts both once, and computes in one process what they must find.
"""

import contextlib
import datetime
import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import small_halves
import small_patched
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from electra_fast import hf
from electra_fast.hf import graphs

WORLD = 2
EXAMPLE = Path(__file__).parents[1] / "examples" / "hf_trainer.py"
MODELS = ("ElectraForPreTraining", "BertForMaskedLM")
PRETRAINERS = ("electra", "bert", "apart")  # apart: each half has its own embeddings
PARTS = ("generator", "discriminator", "generator.electra")


class Case(NamedTuple):
    model: str  # one of MODELS or PRETRAINERS
    patch: str  # never; before or after the model is wrapped; with graphs, before
    wrap: str  # a key of WRAPS


class Outcome(NamedTuple):
    losses: list[list[Tensor]]  # of each step, one per half of the batch
    gradients: dict[str, Tensor]  # of the first step
    weights: dict[str, Tensor]  # after the last step


def shard_layers(model: nn.Module) -> nn.Module:
    halves = (model.generator, model.discriminator) if hasattr(model, "generator") else (model,)
    for half in halves:
        for layer in half.base_model.encoder.layer:
            fully_shard(layer)
    return model


def shard(model: nn.Module) -> nn.Module:
    return fully_shard(shard_layers(model))


def add(model: nn.Module) -> nn.Module:
    """Add the gradients of both processes, and do not divide by their number."""

    def summed(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, summed)
    return parallel


WRAPS = {
    "DDP": DistributedDataParallel,
    "FSDP2": shard,
    "sum": add,
    "layers only": shard_layers,  # no process gets the others' gradients of the embeddings and heads
}
PATCHES = [(model, patch) for model in (*MODELS, "electra") for patch in ("before", "after")]
PATCHES += [("electra", "never"), ("bert", "before"), ("apart", "before")]
RIGHT = [Case(*patch, wrap) for patch in PATCHES for wrap in ("DDP", "FSDP2")]
WRONG = [Case("electra", "before", wrap) for wrap in ("sum", "layers only")]
GRAPHS = Case("ElectraForPreTraining", "graphs", "DDP")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in MODELS:
        return small_patched.build(name)
    options = small_halves.SPECIAL | {"share_embeddings": name != "apart"}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return small_halves.pretrainer("bert" if name == "bert" else "electra", "sdpa", options, **off).train()


def batch(name: str) -> dict[str, Tensor]:
    """Return four sequences. Both halves of the batch have the same number of tokens and of labels."""
    torch.manual_seed(1)
    inputs = small_halves.batch(24, 11, 11, 24)
    ids = inputs["input_ids"]
    labelled = (torch.arange(ids.shape[1]) % 3 == 1) & inputs["attention_mask"].bool()
    if name == "ElectraForPreTraining":
        return inputs | {"labels": ids % 2}
    return inputs | ({"labels": torch.where(labelled, ids, -100)} if name in MODELS else {})


def half(inputs: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the sequences of a rank; a pretrainer also gets an rng, so its masks are known."""
    rng = {} if "labels" in inputs else {"rng": torch.tensor([7, rank])}
    return {name: x.chunk(WORLD)[rank] for name, x in inputs.items()} | rng


def train(case: Case, wrap: Callable, parts: list[dict[str, Tensor]]) -> Outcome:
    """Take the steps of a case with the mean loss of the given parts of a batch."""
    model = build(case.model)
    if case.patch in ("before", "graphs"):
        hf.patch(model, graphs=case.patch == "graphs")
    wrapped = wrap(model)
    if case.patch == "after":
        hf.patch(wrapped)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, gradients = [], {}
    for _ in range(5 if case.patch == "graphs" else 2):  # a graph is captured at the third call
        optimizer.zero_grad()
        losses.append([wrapped(**part).loss for part in parts])
        for loss in losses[-1]:
            (loss / len(parts)).backward()
        gradients = gradients or {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return Outcome([[loss.detach() for loss in step] for step in losses], gradients, weights)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def with_graphs(part: dict[str, Tensor]) -> tuple[dict, int]:
    """Return the outcome of GRAPHS and the number of replays, by a stand-in that runs what was captured."""
    replays = []

    @contextlib.contextmanager
    def recording(_):
        yield lambda body: lambda: (replays.append(body), body())

    graphs.recording, graphs.available = recording, lambda _: True
    return train(GRAPHS, DistributedDataParallel, [part])._asdict(), len(replays)


def masked_ids() -> Tensor:
    """Return the ids that the generator gets, with the same batch and seed of torch in each process."""
    model, seen = build("electra"), []
    model.generator.base_model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(2)
    model(**batch("electra"))
    return seen[0]


def refusal(part: str) -> str:
    """Return the error of a pretrainer of which one part is sharded on its own."""
    model = build("electra")
    fully_shard(model.get_submodule(part))
    try:
        model(**batch("electra"))
    except ValueError as error:
        return str(error)
    return "none"


def state_of_shards(rank: int, folder: Path) -> dict[str, Tensor]:
    """Return the state dict of a sharded pretrainer, and save its discriminator."""
    model, options = build("electra"), StateDictOptions(full_state_dict=True)
    hf.patch(model)
    shard(model)
    state = get_model_state_dict(model, options=options)
    discriminator = get_model_state_dict(model.discriminator, options=options)
    if rank == 0:
        model.discriminator.save_pretrained(folder, state_dict=discriminator)
    return state


def printed_by_example(folder: Path) -> str:
    sys.argv = [str(EXAMPLE), "--steps", "5", "--out", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return printed.getvalue()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": WORLD, "timeout": datetime.timedelta(minutes=1)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    part = {model: [half(batch(model), rank)] for model in MODELS + PRETRAINERS}
    found = {
        "outcomes": {
            tuple(case): train(case, WRAPS[case.wrap], part[case.model])._asdict() for case in RIGHT + WRONG
        },
        "masked_ids": masked_ids(),
        "refusals": {name: refusal(name) for name in PARTS},
        "state": state_of_shards(rank, folder / "discriminator"),
        "printed": printed_by_example(folder / "example"),
        "graphs": with_graphs(*part[GRAPHS.model]),  # last, because it changes a module
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
