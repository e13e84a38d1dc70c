"""The page of results and the picture: their contents, and the files that they refuse."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
from fake_runs import RESULT, ROOT, fake_benchmark
from test_bench_step import with_steps

from benchmarks import __main__ as command
from benchmarks.harness import machine, providers
from benchmarks.report import kernels, losses, numbers, page, runs, svg
from benchmarks.report.ops import over_time
from benchmarks.static import figures, summary

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """A strict parser of the page: every tag must be closed. Collects the cells of its tables by section."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.links, self.titles = [], {}, [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "tr":
            self.tables.setdefault(self.titles[-1], []).append([])
        if tag in ("th", "td"):
            self.tables[self.titles[-1]][-1].append("")
        if tag == "h3":
            self.titles.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[self.titles[-1]][-1][-1] += text
        if self.open and self.open[-1] == "h3":
            self.titles[-1] += text


def saved():
    return json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())


def measured():
    """Return results with everything that a run records: spreads, errors, a bound, a loss and its reason."""
    result = copy.deepcopy(with_steps("h200"))
    group = "linear, small 128x128, forward+backward"
    result["benchmarks"] += [
        fake_benchmark(group, "fused", 0.004, {"torch": 0.75}),
        fake_benchmark(group, "torch", 0.003, {"fused": 1 / 0.75}),
    ]
    for benchmark in result["benchmarks"]:
        extra = benchmark["extra_info"]
        extra["bound"] = 0.001
        extra |= {"spread": {p: (0.9 * r, 1.2 * r) for p, r in extra["ratio"].items()}}
        extra |= {"errors": {"y": (2e-7, 1e-6), "gradient of x": (1e-7, 1e-6)}}
        extra["served_by"] = "triton" if extra["provider"] == "fused" else None
    return result


def test_the_page_is_whole_and_needs_nothing_else():
    for results in ([saved()], [measured()], [saved(), measured()]):
        text = page.page(results, "abc")
        found = Page(text)
        assert all(link.startswith("#") for link in found.links), found.links
        assert not re.search(r"https?://|@import|url\(|<script", text)
        assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_a_call_that_allocates_nothing_has_no_mark():
    result = measured()
    for benchmark in result["benchmarks"]:
        benchmark["extra_info"]["peak_bytes"] = 0
    assert "Nothing was timed" in page.page([result], "")
    result["benchmarks"][0]["extra_info"]["peak_bytes"] = 1 << 20
    assert "1.05" in page.page([result], "")


def test_every_number_where_others_win_is_that_of_the_results():
    result = saved()
    _, *rows = Page(page.page([result], "abc")).tables["Where others win"]
    wins = {}
    for benchmark in result["benchmarks"]:
        fused = benchmark["extra_info"]["ratio"].get(runs.ours(benchmark), 0.0)
        if fused > 1:
            name = (benchmark["group"], providers.label(benchmark["extra_info"]["provider"]))
            wins[name] = 1 / fused, benchmark["stats"]["median"] * 1e3
    assert len(rows) == len(wins) > 0
    for group, provider, ratio, _, ms, why in rows:
        wanted, took = wins.pop((group, provider))
        assert ratio == f"{wanted:.2f}\u00d7" and why
        assert ms == numbers.digits(took)
    assert [row[2] for row in rows] == sorted(row[2] for row in rows), "the largest loss first"


def test_where_others_never_win_the_page_says_so():
    result = copy.deepcopy(RESULT)
    assert not losses.losses(result)
    text = page.page([result], "abc")
    assert "Where others win" in Page(text).titles and "faster in none of 2 comparisons" in text


def test_why_others_win():
    result = measured()
    reasons = {c.provider: c.why for c in losses.losses(result)}
    assert reasons == {"torch": "not known"}
    fused = next(b for b in result["benchmarks"] if b["group"].startswith("linear"))
    fused["extra_info"]["served_by"] = "reference (no kernel yet)"
    assert "no kernel" in losses.losses(result)[0].why
    fused["extra_info"]["served_by"] = "triton"
    torch = result["benchmarks"][-1]["extra_info"]
    torch["spread"]["fused"] = (0.9, 1.4)
    assert losses.losses(result)[0].why == "within the spread of the rounds"


def test_what_is_stale_is_marked():
    assert "stale:" not in page.page([RESULT], "abc")
    assert "stale:" in page.page([RESULT], "abd")
    assert ("stale:" in page.page([saved()], machine.source_hash())) == (
        saved()["machine_info"]["sources"] != machine.source_hash()
    )


def test_the_page_has_spread_errors_bound_memory_and_the_paper_s_hours():
    found = Page(page.page([measured()], "abc"))
    step = dict(zip(*found.tables["The training step"][:2], strict=True))
    assert (
        step["ms"] == "4.00"
        and step["tokens / s"] == "4 000 000"
        and step["hours, paper's schedule"] == "1.11"
    )
    assert found.tables["Where others win"][1][3] == "0.62 - 0.83"
    linear = [row for row in found.tables["Error and allowed error"] if row[0].startswith("linear")]
    assert linear[0] == ["linear, small 128x128", "y", "2.0e-07", "2.0e-07", "1.0e-06", "20.0%"]
    rates = {row[0]: row[1] for row in found.tables["Rates and the roofline"]}
    assert rates["linear, small 128x128"].endswith(", 25%")
    step = Page(page.page([with_steps("cpu")], "abc")).tables["The training step"][0]
    assert "CPU hours, paper's schedule" in step and "tokens / CPU s" in step, "CPU times are marked"


def test_the_page_has_what_the_compilers_made_of_each_kernel():
    committed = figures.load()
    found = Page(page.page([RESULT], "abc")).tables
    head, *rows = found["sm_90, H200"]
    of_90 = [row for row in committed["rows"] if row["arch"] == 90]
    assert head == summary.HEAD and sum(int(row[2]) for row in rows) == len(of_90)
    others = [row for row in found["Other GPUs"] if row != head]
    assert sum(int(row[2]) for row in (*rows, *others)) == len(committed["rows"])
    assert set(kernels.COLOURS) == set(summary.MIX), "each class of instructions has a colour"
    assert len(set(kernels.COLOURS.values())) == len(kernels.COLOURS)
    assert kernels.spills([]).endswith("0 spill registers.")
    assert "attention_bwd_dq in fp32" in kernels.spills(committed["rows"])


def test_runs_are_by_machine_and_over_time():
    newer, gpu = copy.deepcopy(RESULT), measured()
    newer["datetime"] = "2026-12-01T08:00:00"
    gpu["machine_info"]["device_name"] = "A GPU"
    found = page.by_machine([newer, RESULT, gpu])
    assert list(found) == ["A GPU", "A CPU (2 threads, AVX2)"]
    assert found["A CPU (2 threads, AVX2)"] == [RESULT, newer]
    assert "Over time" in page.page([newer, RESULT], "abc") and "Over time" not in page.page([RESULT], "abc")
    assert "2026-12-01 08:00" in over_time([RESULT, newer])


def test_axes_hold_their_values_and_tick_at_round_ones():
    axis = svg.around("x", [0.3, 8.0], least=0.5)
    assert axis.low < 0.3 and axis.high > 8 and 1 in axis.ticks() and len(axis.ticks()) <= 9
    assert axis.percent(axis.low) == 0 and axis.percent(axis.high) == 100
    assert axis.percent(2) - axis.percent(1) == pytest.approx(axis.percent(4) - axis.percent(2))
    linear = svg.around("x", [3.0, 40.0], log=False)
    assert linear.ticks()[:3] == [0, 10, 20] and linear.percent(0) == 0
    assert set(providers.ORDER) <= set(svg.STYLES), "each provider has a colour and a shape"
    assert len(set(svg.STYLES.values())) == len(svg.STYLES), "all are different"


REFUSED = {
    "results: .* must be complete JSON": lambda r: json.dumps(r)[:-40],
    "results: .* must have schema 1, got 2": lambda r: json.dumps(r | {"schema": 2}),
    r"results: .* must have all parts of a run, got none of \['wrong'\]": lambda r: json.dumps(
        {k: v for k, v in r.items() if k != "wrong"}
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_bad_file_gets_a_sentence(sentence, tmp_path, capsys):
    file, out = tmp_path / "bad.json", tmp_path / "page.html"
    file.write_text(REFUSED[sentence](RESULT))
    assert command.main(["report", str(file), "--out", str(out)]) == 2
    assert re.search(sentence, capsys.readouterr().err) and not out.exists()


def test_what_is_no_run_is_left_out_by_name_and_no_runs_make_no_page(tmp_path, capsys):
    learning = ROOT / "benchmarks" / "results" / "learning.json"
    run, out = tmp_path / "a.json", tmp_path / "page.html"
    run.write_text(json.dumps(RESULT))
    assert command.main(["report", str(learning), str(run), "--out", str(out)]) == 0
    assert "learning.json must be a run" in capsys.readouterr().err and "A CPU" in out.read_text()
    out.unlink()
    assert command.main(["report", str(learning), "--out", str(out)]) == 2
    assert "files must contain a run, got none" in capsys.readouterr().err and not out.exists()
    assert command.main(["report", str(tmp_path / "none.json"), "--out", str(out)]) == 2
    assert "must be readable" in capsys.readouterr().err
    assert command.main(["report", str(run)]) == 2
    assert "files must come with --out" in capsys.readouterr().err
