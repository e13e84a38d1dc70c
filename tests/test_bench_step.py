"""The benchmark of a whole step: its counts, and its tables in the report."""

import dataclasses

import torch
from fake_runs import RESULT, fake_benchmark
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import machine, roofline
from benchmarks.report import markdown, text
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.ops import REFERENCE


def with_steps(device):
    """Return RESULT with a step of fused and one of Hugging Face, on a CPU or a GPU."""
    group = "step, small 128x128, step"
    facts = {"op": "step", "unit": "tokens/s", "work": 16_000, "flops": 1e12, "paper_steps": 10**6}
    parts = {"linear": {"seconds": 3e-3, "bound": 1.5e-3}, "other": {"seconds": 1e-3, "bound": None}}
    fused = fake_benchmark(group, "fused", 0.004, {"huggingface": 4.0})
    other = fake_benchmark(group, "huggingface", 0.016, {"fused": 0.25})
    fused["extra_info"] |= facts | {"components": parts} | ({"launches": 700} if device != "cpu" else {})
    other["extra_info"] |= facts | {"operators": 4675}
    return RESULT | {
        "machine_info": RESULT["machine_info"] | {"device": device},
        "benchmarks": [*RESULT["benchmarks"], fused, other],
    }


def test_a_step_has_a_table_of_its_own_with_times_from_a_gpu_alone():
    shown = markdown.tables(with_steps("h200"), "abc")
    assert "| fused | 4.00 | 4 000 000 | 1.11 | 25% |  | 700 | 1.00 |  |" in shown
    assert "| Hugging Face | 16.0 | 1 000 000 | 4.44 | 6% | 4 675 |  | 1.00 | 4.00\u00d7 |" in shown
    shown = markdown.tables(with_steps("cpu"), "abc")
    assert "| Hugging Face | 4 675 | 1.00 | 4.00\u00d7 |" in shown and "MFU" not in shown


def test_the_table_says_where_the_time_of_a_step_goes():
    lines = text.table(with_steps("h200")).splitlines()
    at = lines.index("step, small 128x128, step, fused, time per component:")
    assert lines[at + 1].split() == "linear 3.00 ms 75.0% at least 1.50 ms".split()
    assert lines[at + 2].split() == "other 1.00 ms 25.0%".split()


def test_the_roofline_counts_the_products_that_a_step_makes():
    config = dataclasses.replace(ElectraConfig.tiny(), vocab_size=500, dropout=0.0)
    ids = torch.randint(200, 500, (3, 40))
    with FlopCounterMode(display=False) as counter:
        Electra(config, REFERENCE)(ids, rng=torch.tensor([1, 2])).loss.backward()
    assert counter.get_total_flops() == roofline.model_flops(config, 3, 40)


def test_the_roofline_of_a_step_is_printed_for_every_gpu():
    found = roofline.least(*roofline.STEPS["base 8 of 32x512"], "h200")
    once = roofline.least(*roofline.STEPS["base 8 of 32x512"][:3], 1, "h200")
    assert found["linear"] == 8 * once["linear"] and found["optimizer"] == once["optimizer"]
    lines = roofline.table().splitlines()
    assert sum("TB/s" in line for line in lines) == len(machine.REACHED)
    assert f"{1e3 * sum(found.values()):.2f}" in [line for line in lines if "total" in line][1].split()
