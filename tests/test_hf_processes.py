"""Two processes with half of a batch each train patched models and `ElectraPretrainer` as one process does.

The fixture `found` starts the two once, over gloo on the CPU. Each test reads from their results.
"""

import os
import subprocess
import sys

import pytest
import torch
import two_processes
from test_examples import loaded
from transformers import ElectraForMaskedLM, ElectraForPreTraining
from two_processes import GRAPHS, MODELS, PARTS, RIGHT, WORLD, WRONG, Outcome, batch, build, half, train

pytest_plugins = ["corpus"]
RANKS = range(WORLD)
name_of = "-".join


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder, cache):
    """Return the results of each rank."""
    group = {
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }  # as torchrun sets them
    environment = os.environ | group | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in map(str, RANKS):
        command = [sys.executable, two_processes.__file__, rank, str(folder)]
        own = {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen(command, env=environment | own, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in RANKS]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two processes, because the order of a sum depends on it
    yield
    torch.set_num_threads(threads)


def alone(case):
    """Return the outcome of one process with both halves of the batch."""
    return train(case, lambda model: model, [half(batch(case.model), rank) for rank in RANKS])


def together(found, case):
    """Return the losses by step and rank, and the gradients and weights of each rank."""
    outcomes = [Outcome(**by_rank["outcomes"][tuple(case)]) for by_rank in found]
    losses = [[*a, *b] for a, b in zip(*(outcome.losses for outcome in outcomes), strict=True)]
    return losses, [(outcome.gradients, outcome.weights) for outcome in outcomes]


def differ(a, b):
    assert a.keys() == b.keys() and a
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("case", RIGHT, ids=name_of)
def test_two_processes_take_the_steps_of_one_bit_for_bit(found, one_thread, case):
    wanted, (losses, outcomes) = alone(case), together(found, case)
    assert losses == wanted.losses
    for gradients, weights in outcomes:
        assert differ(gradients, wanted.gradients) == differ(weights, wanted.weights) == []


@pytest.mark.parametrize("case", [c for c in RIGHT if c.model in MODELS and c.patch == "before"], ids=name_of)
def test_the_mean_over_processes_is_that_of_the_whole_batch(found, case):
    """The halves have as many tokens and labels; otherwise the mean of two means is not the mean of all."""
    wanted, (losses, outcomes) = train(case, lambda model: model, [batch(case.model)]), together(found, case)
    torch.testing.assert_close(sum(losses[0]) / WORLD, *wanted.losses[0])
    for gradients, _ in outcomes:
        torch.testing.assert_close(gradients, wanted.gradients)


@pytest.mark.parametrize("case", WRONG, ids=name_of)
def test_a_wrong_reduction_is_seen(found, one_thread, case):
    wanted, (_, outcomes) = alone(case), together(found, case)
    for gradients, _ in outcomes:
        wrong = differ(gradients, wanted.gradients)
        assert wrong and (len(wrong) == len(gradients) or case.wrap == "layers only")


def test_graphs_replay_in_both_processes(found, one_thread):
    wanted = alone(GRAPHS)  # without graphs, and so without padding to 32 tokens
    for rank in RANKS:
        outcome, replays = found[rank]["graphs"]
        assert replays == 3 * 2  # three forward and three backward passes after two calls without a graph
        torch.testing.assert_close(outcome["losses"], [[step[rank]] for step in wanted.losses])
        torch.testing.assert_close(outcome["gradients"], wanted.gradients)
    assert differ(found[0]["graphs"][0]["weights"], found[1]["graphs"][0]["weights"]) == []


def test_processes_with_one_seed_mask_other_positions(found):
    first, second = (by_rank["masked_ids"] for by_rank in found)
    model, seen = build("electra"), []
    model.generator.base_model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(2)
    model(**batch("electra"))
    assert torch.equal(first, seen[0]) and not torch.equal(first == 103, second == 103)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_sharded_on_its_own_is_refused(found, part):
    subject = f"ElectraPretrainer: {part.replace('electra', 'base_model')} must"
    for by_rank in found:
        message = by_rank["refusals"][part]
        assert message.startswith(f"{subject} not be sharded as a whole, got FSDPElectra")
        assert message.endswith("call fully_shard on the layers, then on the pretrainer")


def test_a_sharded_pretrainer_can_be_saved(found, folder):
    model = build("electra")
    assert differ(found[0]["state"], model.state_dict()) == []
    discriminator = loaded(ElectraForPreTraining, folder / "discriminator")
    assert differ(discriminator.state_dict(), model.discriminator.state_dict()) == []


def test_the_example_learns_in_two_processes(found, folder):
    printed = [by_rank["printed"] for by_rank in found]
    assert "in 5 steps" in printed[0] and "error  <- replaced" in printed[0] and printed[1] == ""
    loaded(ElectraForMaskedLM, folder / "example" / "generator")
    loaded(ElectraForPreTraining, folder / "example" / "discriminator")
