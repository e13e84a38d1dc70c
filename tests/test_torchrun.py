"""`torchrun … -m electra_fast pretrain`: killed processes are started again and continue by themselves."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trainings

pytest.importorskip("tokenizers")
pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")

ROOT = Path(__file__).parents[1]


def torchrun(corpus, out, *options, restarts=0):
    """Start two processes that train with checkpoints every third step; return torchrun."""
    recipe = trainings.recipe(corpus, steps=60)
    names = ("vocab", "seq", "batch_tokens", "steps", "save_every", "eval_every", "eval_batches")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        str(restarts),
    ]
    command += ["--standalone", "-m", "electra_fast", "pretrain", "--preset", "tiny", "--data", *recipe.data]
    command += ["--set", *recipe.set, "--accumulate", "2", "--device", "cpu", "--out", str(out)]
    for name in names:
        command += [f"--{name.replace('_', '-')}", str(getattr(recipe, name))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def workers(agent) -> list[int]:
    """Return the processes that torchrun has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"electra_fast" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill_one(agent, out, draw) -> None:
    """Kill one of the processes at a random moment of a random step after the first checkpoint."""
    known = set(out.glob("checkpoints/step-*"))
    while agent.poll() is None:
        new = set(out.glob("checkpoints/step-*")) - known
        if len(found := workers(agent)) == 2 and new:
            time.sleep(draw.uniform(0, 0.3))
            os.kill(draw.choice(found), signal.SIGKILL)
            return
        time.sleep(0.01)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_processes_are_started_again_and_continue(corpus, tmp_path, kills):
    agent, draw = torchrun(corpus, tmp_path / "run", restarts=kills), random.Random(kills)
    for _ in range(kills):
        kill_one(agent, tmp_path / "run", draw)
    said = agent.communicate(timeout=600)[1]
    assert agent.returncode == 0, said
    assert trainings.finish(trainings.recipe(corpus, steps=60, accumulate=2), tmp_path / "undisturbed") == 0
    assert trainings.state(tmp_path / "run", 60) == trainings.state(tmp_path / "undisturbed", 60)


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(["sh", ROOT / "examples/torchrun.sh", tmp_path], check=True, env=environment, timeout=600)
    assert (tmp_path / "classifier/model.safetensors").exists()
