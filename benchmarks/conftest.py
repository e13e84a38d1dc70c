"""The pytest plugin that runs the cases in order of value, within a time budget."""

import os
import time
from pathlib import Path

import pytest

from benchmarks import STARTED
from benchmarks.gpu import lines
from benchmarks.harness.cases import Round
from benchmarks.harness.inputs import REHEARSAL
from benchmarks.harness.machine import budget, device, info
from benchmarks.harness.progress import Progress
from benchmarks.harness.providers import LATE
from benchmarks.harness.runner import CLOCK, Runner
from benchmarks.harness.yours import facts
from benchmarks.report.runs import SCHEMA

RUNNER = pytest.StashKey[Runner]()
REFUSED = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser):
    group = parser.getgroup("electra_fast")
    group.addoption("--budget", type=float, help="seconds for all benchmarks together")
    group.addoption("--only", help="run the cases whose names contain this text; separate several by |")
    group.addoption("--lines", type=Path, help="append each result to this file immediately")
    group.addoption("--stage", default="", help="the stage that the lines name")
    group.addoption("--quick", action="store_true", help="leave out rivals and compiled providers")


def pytest_configure(config):
    config.stash[REFUSED] = {"wrong": [], "fails": [], "dropped": []}
    refuse_the_interpreter()


def refuse_the_interpreter() -> None:
    """On a GPU, Triton's kernels must not run in the interpreter; on a CPU no op is dispatched to Triton."""
    if device() == "cuda" and os.environ.get("TRITON_INTERPRET") == "1" and not REHEARSAL:
        raise pytest.UsageError("unset TRITON_INTERPRET: times of the interpreter mean nothing")


def pytest_collection_modifyitems(config, items):
    only, quick = config.getoption("only") or "", config.getoption("quick")
    wanted = [item for item in items if any(part in item.nodeid for part in only.split("|"))]
    kept = [item for item in wanted if not (quick and item.callspec.params["provider"] in LATE)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    items.sort(key=_plan)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def _plan(item) -> tuple[Round, float]:
    """Return the sort key: round, then value. The order of a group's providers does not change."""
    run = item.function.runs[tuple(item.callspec.params.values())]
    return run.round, -run.value


@pytest.fixture
def runner(request) -> Runner:
    stash = request.config.stash
    if RUNNER not in stash:
        plugins = request.config.pluginmanager.get_plugins()
        shown = [plugin.say for plugin in plugins if isinstance(plugin, Progress)]
        stash[RUNNER] = Runner(budget(request.config.getoption("budget")), STARTED, *shown)
    return stash[RUNNER]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Spend the time that remains after a whole run on precision."""
    done = yield
    if RUNNER in session.config.stash and not session.config.getoption("only"):
        session.config.stash[RUNNER].sharpen()
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    options = {"file": item.config.getoption("lines"), "stage": item.config.getoption("stage")}
    if report.when == "call" and report.passed:
        benchmark = item.funcargs["benchmark"].stats.as_dict(include_data=False)
        lines.write(**options, kind="benchmark", benchmark=benchmark)
    elif report.when == "call":
        # The runner's own messages start with one of these words; anything else is a failure.
        text = str(call.excinfo.value).removeprefix("Skipped: ")
        word, _, line = text.partition(": ")
        known = word in item.config.stash[REFUSED]
        refused = (word, line) if known else ("fails", text)
        item.config.stash[REFUSED][refused[0]].append(refused[1])
        lines.write(**options, kind="refused", word=refused[0], line=refused[1])
    return report


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["cpu"].pop("flags", None)  # two hundred lines of JSON
    machine_info.update(info())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["schema"] = SCHEMA
    output_json["budget"] = budget(config.getoption("budget"))
    output_json["only"], output_json["quick"] = config.getoption("only"), config.getoption("quick")
    output_json["seconds"] = time.monotonic() - STARTED
    output_json |= config.stash[REFUSED] | facts()
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"]  # extra_info contains the quantiles


def pytest_terminal_summary(terminalreporter, config):
    if RUNNER in config.stash and not config.stash[RUNNER].has_numbers():  # there is no JSON to print
        for word, lines in config.stash[REFUSED].items():
            for line in lines:
                terminalreporter.write_line(f"{word}: {line}")
