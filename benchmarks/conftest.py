"""Run the cases in order of value within a budget of time, on a clock of our own."""

import os
import time
from pathlib import Path

import pytest

from benchmarks import STARTED
from benchmarks.cases import Round
from benchmarks.gpu import lines
from benchmarks.inputs import REHEARSAL
from benchmarks.machine import budget, device, info
from benchmarks.progress import Progress
from benchmarks.report.runs import SCHEMA
from benchmarks.runner import CLOCK, Runner

RUNNER = pytest.StashKey[Runner]()
REFUSED = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser):
    group = parser.getgroup("electra_fast")
    group.addoption("--budget", type=float, help="seconds that all benchmarks may take together")
    group.addoption("--only", help="run the cases whose name holds this text; | between several")
    group.addoption("--lines", type=Path, help="append each result to this file the moment it is known")
    group.addoption("--stage", default="", help="what the lines say they belong to")
    group.addoption("--quick", action="store_true", help="no rivals, and nothing that compiles")


def pytest_configure(config):
    config.stash[REFUSED] = {"wrong": [], "fails": [], "dropped": []}
    refuse_the_interpreter()


def refuse_the_interpreter() -> None:
    """On the CPU no op is dispatched to Triton; on a GPU it must run there."""
    if device() == "cuda" and os.environ.get("TRITON_INTERPRET") == "1" and not REHEARSAL:
        raise pytest.UsageError("unset TRITON_INTERPRET: the interpreter's times are no speeds")


def pytest_collection_modifyitems(config, items):
    only, quick = config.getoption("only") or "", config.getoption("quick")
    wanted = [item for item in items if any(part in item.nodeid for part in only.split("|"))]
    kept = [item for item in wanted if not (quick and _plan(item)[0] is Round.RIVALS)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    items.sort(key=_plan)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def _plan(item) -> tuple[Round, float]:
    """Sort by round, then by value; providers of a group stay in their order."""
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
    """Spend what a whole run leaves of its budget on precision."""
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
        # The runner's own lines begin with one of the words; anything else is a failure.
        text = str(call.excinfo.value).removeprefix("Skipped: ")
        word, _, line = text.partition(": ")
        known = word in item.config.stash[REFUSED]
        refused = (word, line) if known else ("fails", text)
        item.config.stash[REFUSED][refused[0]].append(refused[1])
        lines.write(**options, kind="refused", word=refused[0], line=refused[1])
    return report


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["cpu"].pop("flags", None)  # two hundred lines
    machine_info.update(info())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["schema"] = SCHEMA
    output_json["budget"] = budget(config.getoption("budget"))
    output_json["only"], output_json["quick"] = config.getoption("only"), config.getoption("quick")
    output_json["seconds"] = time.monotonic() - STARTED
    output_json |= config.stash[REFUSED]
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"]  # its quantiles are in extra_info


def pytest_terminal_summary(terminalreporter, config):
    if RUNNER in config.stash and not config.stash[RUNNER].has_numbers():  # no JSON, so no table
        for word, lines in config.stash[REFUSED].items():
            for line in lines:
                terminalreporter.write_line(f"{word}: {line}")
