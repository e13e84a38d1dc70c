"""Reports from a child process, as files, and from the command line."""

import functools
import json
from xml.etree import ElementTree

import pytest
import torch

from electra_fast import ops, testing
from electra_fast.__main__ import main
from electra_fast.testing import subject
from electra_fast.testing.child import Child, Died
from electra_fast.testing.report import RAISED, RIGHT, WRONG

F32 = [torch.float32]

# --- crashes ------------------------------------------------------------------------------------------------

CRASHES = """
import ctypes
import torch.nn.functional as F

def gelu(x, bias):
    return F.gelu(x + bias.to(x.dtype)) if x.numel() else ctypes.string_at(0)

def bias_gelu(x, bias):
    return 1.01 * gelu(x, bias)
"""


def test_a_crash_is_a_row_and_the_others_are_compared(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(CRASHES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    report = testing.report("bias_gelu", "crashing:gelu", dtypes=F32, seed=0, cases=0, isolate=True)
    (crash,) = report.of(RAISED)
    assert "no token" in crash.example and "ended with exit code -11 (SIGSEGV)" in crash.why
    assert len(report.of(RIGHT)) > 10 and not report.of(WRONG)


def test_nothing_more_is_run_after_three_crashes_in_a_row(monkeypatch):
    class Dies:
        def __init__(self, *arguments):
            pass

        def ask(self, i):
            raise Died("the process ended with exit code 1")

        def close(self):
            pass

    monkeypatch.setattr(subject, "Child", Dies)
    report = testing.report("bias_gelu", "electra_fast.reference:bias_gelu", seed=0, isolate=True)
    assert len(report.of(RAISED)) == 4 and "because 3 in a row ended the process" in report.rows[-1].why


def fails(x):
    raise RuntimeError("no reference")


def test_an_error_of_a_child_is_raised_here():
    child = Child(60, functools.partial, fails)
    try:
        with pytest.raises(RuntimeError, match="no reference"):
            child.ask(1)
        with pytest.raises(RuntimeError, match="no reference"):
            child.ask(2)
    finally:
        child.close()


def test_functions_that_cannot_be_imported_cannot_be_isolated():
    with pytest.raises(ValueError, match="must be defined in a module, with isolate, got"):
        testing.report("bias_gelu", lambda x, bias: x, isolate=True)


# --- the files and the command ------------------------------------------------------------------------------


def test_json_and_html_have_every_row(tmp_path):
    report = testing.report("rtd_loss", lambda logits, replaced: ops.rtd_loss(logits, replaced), seed=0)
    found = json.loads(report.to_json(tmp_path / "report.json"))
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert [row["verdict"] for row in found["rows"]] == [row.verdict for row in report.rows] and found["ok"]
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text and text.count("<tr>") == len(report.rows) + 1
    picture = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    dots = [dot for dot in picture.iter("circle") if dot.find("title") is not None]
    assert len(dots) == sum(bool(row.ratio) for row in report.rows) > 0


def test_the_command_prints_the_report_and_its_status_says_whether_it_is_right(tmp_path, monkeypatch, capsys):
    (tmp_path / "commanded.py").write_text(CRASHES)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--seed", "0", "--no-isolate", "--dtypes", "float32", "--without", "empty", "--cases", "0"]
    file = str(tmp_path / "report.json")
    with pytest.raises(SystemExit) as right:
        main(["check", "commanded:gelu", "--op", "bias_gelu", *options, "--json", file])
    assert right.value.code == 0 and "0 wrong, 0 raised, 1 unsupported" in capsys.readouterr().out
    with pytest.raises(SystemExit) as wrong:
        main(["check", "commanded:bias_gelu", *options])
    assert wrong.value.code == 1 and "exceeds the budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["commanded:nothing"], "check must be an importable module:function, got commanded:nothing"),
        (["exits:gelu"], "importable module:function, got exits:gelu: SystemExit: 0"),
        (["typo:gelu"], "importable module:function, got typo:gelu: SyntaxError"),
        (["torch.nn.functional:gelu"], "--op must be given, got a function called gelu"),
        (["torch.nn.functional:gelu", "--op", "geglu"], "op must be one of .*, got geglu"),
        (
            ["torch.nn.functional:gelu", "--op", "bias_gelu"],
            r"x, bias by name, got \(input, approximate",
        ),
        (["torch.nn.functional:gelu", "--op", "bias_gelu", "--dtypes", "half"], "--dtypes must be some of"),
        (
            ["torch.nn.functional:gelu", "--op", "bias_gelu", "--checks", "x"],
            "check: --checks must be 'all' or names",
        ),
        (
            ["torch.nn.functional:gelu", "--op", "bias_gelu", "--adapter", "x"],
            "check: --adapter of bias_gelu",
        ),
        (["torch.nn.functional:gelu", "--op", "bias_gelu", "--json", "no/x"], "--json must name a file in"),
    ],
)
def test_a_wrong_command_is_refused(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "commanded.py").write_text(CRASHES)
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    (tmp_path / "typo.py").write_text("def gelu(x")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["check", *arguments])
