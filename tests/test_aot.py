"""Every Triton kernel compiles for every supported GPU, without spills and within its shared memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from electra_fast.ops._register import OPERATORS

AOT = Path(__file__).with_name("aot.py")
spec = importlib.util.spec_from_file_location("aot", AOT)
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)


def compiled(*arguments) -> list[dict]:
    command = [sys.executable, AOT, *map(str, arguments)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_batches_of_many_sizes_share_one_kernel():
    names = [row["kernel"].split()[0] for row in compiled(90, "--packed")]
    assert len(names) == len(set(names)) == 17, names


@pytest.mark.parametrize("arch", sorted(set(aot.SHARED_LIMIT) - {89}))  # 89 takes what is compiled for 86
def test_compiles_within_the_resources_of(arch):
    rows = compiled(arch)
    for row in rows:
        print(row)
        assert row["arch"] == arch and row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= aot.SHARED_LIMIT[arch] * 1024, row
        assert row["tensor_core"] > 0 or row["products"] == 0, row
    launched = {row["kernel"].split()[0].removeprefix("_") for row in rows}
    for operator, implementations in OPERATORS.items():
        if implementations.triton:
            op = operator.removesuffix("_fwd").removesuffix("_bwd")
            assert any(kernel.startswith(op) for kernel in launched), f"no kernel compiled for {op}"
