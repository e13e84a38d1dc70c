"""The page of results: one file of HTML. All numbers come from the results, and nothing from a network."""

from html import escape
from pathlib import Path

from benchmarks.harness.machine import slug
from benchmarks.report.answers import answers
from benchmarks.report.checks import kernels_checked
from benchmarks.report.evidence import environment, errors, everything, memory, where_others_win
from benchmarks.report.html import paragraph
from benchmarks.report.inference import inference_section
from benchmarks.report.kernels import KERNELS, kernels
from benchmarks.report.ops import ops, over_time, rates, sizes
from benchmarks.report.runs import kind, machine
from benchmarks.report.step import training_step
from benchmarks.report.text import BASIS
from benchmarks.report.yours import yours
from benchmarks.static import figures

STYLE = Path(__file__).with_name("page.css")
# Sections about the newest run of a machine.
SECTIONS = (yours, kernels_checked, training_step, ops, inference_section, where_others_win)
SECTIONS += (sizes, rates, memory, errors)
APPENDIX = (everything, environment)
LEAD = (
    "Kernels for ELECTRA's pre-training, compared with other implementations of the same computation. Each "
    "provider was timed after its results were checked, in rounds interleaved with those of the others."
)


def page(runs: list[dict], sources: str) -> str:
    """Return the page of these runs; `sources` is the hash of the current kernels."""
    machines = by_machine(runs)
    links = [f'<a href="#{slug(name)}">{escape(name)}</a>' for name in (*machines, KERNELS)]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><title>electra_fast, measured</title>',
        f"<style>{STYLE.read_text()}</style></head><body><main>",
        f"<header><h1>electra_fast, measured</h1>{paragraph(LEAD, 'lead')}",
        f"<nav>{' '.join(links)}</nav></header>",
        *(_machine(name, found, sources) for name, found in machines.items()),
        kernels(figures.load()),
        "</main></body></html>",
    ]
    return "\n".join(parts)


def by_machine(runs: list[dict]) -> dict[str, list[dict]]:
    """Return the runs of each machine, the oldest first; GPUs before CPUs."""
    found: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: (kind(run) == "cpu", run["datetime"])):
        found.setdefault(machine(run), []).append(run)
    return found


def _machine(name: str, runs: list[dict], sources: str) -> str:
    newest = runs[-1]
    m = newest["machine_info"]
    stale = m["sources"] != sources
    state = (
        '<span class="badge stale">stale: the kernels have changed since</span>'
        if stale
        else '<span class="badge">the current kernels</span>'
    )
    when = f"{newest['datetime'][:10]}, torch {m['torch']}. {BASIS[kind(newest)]}"
    return (
        f'<article id="{slug(name)}"><h2>{escape(name)} {state}</h2>{paragraph(when, "when")}'
        f"{answers(newest)}{''.join(part(newest) for part in SECTIONS)}{over_time(runs)}"
        f"{''.join(part(newest) for part in APPENDIX)}</article>"
    )
