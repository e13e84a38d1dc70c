"""The JSON of a run: reading, checking, and access by group and provider."""

import json
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.machine import ROOT
from benchmarks.harness.providers import ORDER, in_order, label
from electra_fast.errors import must

SCHEMA = 1  # version of our additions to pytest-benchmark's JSON; a file without the field has version 1
PARTS = {"machine_info", "benchmarks", "datetime", "wrong", "fails", "dropped"}
AGAIN = "write it again with `python -m benchmarks`"


class NotARun(ValueError):
    """The file is valid JSON but not a run."""


def read(file: Path) -> dict:
    """Return the results of a run; ValueError explains what is wrong with the file."""
    try:
        result = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(must(f"results: {file}", "be readable", repr(error.strerror), AGAIN)) from None
    except ValueError as error:
        raise ValueError(must(f"results: {file}", "be complete JSON", error, AGAIN)) from None
    if not isinstance(result, dict) or "benchmarks" not in result:
        raise NotARun(must(f"results: {file}", "be a run of `python -m benchmarks`", "another document"))
    schema = result.get("schema", 1)
    if schema != SCHEMA:
        raise ValueError(must(f"results: {file}", f"have schema {SCHEMA}", repr(schema), AGAIN))
    if missing := sorted(PARTS - set(result)):
        raise ValueError(must(f"results: {file}", "have all parts of a run", f"none of {missing}", AGAIN))
    return result


def files(root: Path = ROOT) -> list[Path]:
    """Return the files of the committed runs, one per device."""
    others = ("learning", "static")  # not runs
    return sorted(f for f in (root / "benchmarks" / "results").glob("*.json") if f.stem not in others)


def kind(result: dict) -> str:
    return "cpu" if result["machine_info"]["device"] == "cpu" else "cuda"


def machine(result: dict) -> str:
    """Return the name of the machine that all its results share."""
    m = result["machine_info"]
    on_cpu = f" ({m['threads']} threads, {m['cpu_capability']})" if kind(result) == "cpu" else ""
    return f"{m['device_name']}{on_cpu}"


def headline(result: dict) -> str:
    """Return the device, the date and the version of torch."""
    return f"{machine(result)}, {result['datetime'][:10]}, torch {result['machine_info']['torch']}"


def groups(result: dict) -> dict[str, dict[str, dict | str]]:
    """Return by group and provider a benchmark, or "wrong" or "fails" in its place."""
    found: dict[str, dict[str, dict | str]] = {}
    for benchmark in result["benchmarks"]:
        found.setdefault(benchmark["group"], {})[benchmark["extra_info"]["provider"]] = benchmark
    for word in ("wrong", "fails"):
        for line in result[word]:
            group, _, provider = line.split(": ")[0].rpartition(", ")
            if provider in ORDER or provider in result.get("yours", {}):
                found.setdefault(group, {})[provider] = word
    return {g: {p: of[p] for p in in_order(of)} for g, of in found.items()}


MODELS = ("patch", "infer", "infer_texts", "fine_tune", "write", "host")  # cases of models of transformers


class Case(NamedTuple):
    """The parts of a group's name."""

    op: str
    size: str
    passes: str


def case(group: str) -> Case:
    op, rest = group.split(", ", 1)
    return Case(op, *rest.rsplit(", ", 1))  # a size's name may contain commas


def with_backward(result: dict) -> dict[str, dict[str, dict | str]]:
    """Return the groups, without the forward-only ones of cases that are also timed with backward."""
    found = groups(result)
    twice = {name.removesuffix("+backward") for name in found if name.endswith("+backward")}
    return {name: providers for name, providers in found.items() if name not in twice}


def ours(benchmark: dict) -> str:
    """Return the one of ours with which this provider is compared: fused, or for int8 our int8."""
    return benchmark["extra_info"].get("against", "fused")


def compared(provider: str, benchmark: dict) -> str:
    """Return the provider's label, with that of the one of ours if it is not fused."""
    against = ours(benchmark)
    return label(provider) if against == "fused" else f"{label(provider)} ({label(against)})"


def times_fused(benchmark: dict) -> float | None:
    """Return this provider's time over that of fused in the same rounds."""
    ratio = benchmark["extra_info"]["ratio"].get(ours(benchmark))
    return 1 / ratio if ratio else None


def spread(benchmark: dict) -> tuple[float, float] | None:
    """Return the 20th and 80th percentile of `times_fused` over the rounds; None in the oldest results."""
    found = benchmark["extra_info"].get("spread", {}).get(ours(benchmark))
    return (1 / found[1], 1 / found[0]) if found else None


def is_plain(benchmark: dict) -> bool:
    """Whether `fused` had no kernel on this device and ran the reference."""
    return (benchmark["extra_info"]["served_by"] or "").startswith("reference")
