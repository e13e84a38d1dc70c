"""The log survives what happens to its file and to the terminal."""

import json

import pytest

from electra_fast.journal import Journal

pytest.importorskip("tqdm")
pytestmark = pytest.mark.filterwarnings("ignore:.*TensorBoard:")


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path, 0, 10)
    yield journal
    journal.close()


def test_after_half_a_line_the_next_record_has_a_line_of_its_own(journal):
    journal.write("train", 1, {"loss": 1.0})
    whole = journal.file.read_text()
    journal.file.write_text(whole + '{"kind": "train", "st')
    journal.write("train", 3, {"loss": 3.0})
    journal.write("train", 4, {"loss": 4.0})
    lines = journal.file.read_text().splitlines()
    assert lines[0] == whole.strip() and lines[1] == '{"kind": "train", "st'
    assert [json.loads(line)["step"] for line in (lines[0], *lines[2:])] == [1, 3, 4]
    assert len(lines) == 4 and journal.file.read_text().endswith("}\n")


def test_a_number_that_is_not_finite_is_null(journal):
    journal.write("train", 1, {"precision": float("nan")})
    assert json.loads(journal.file.read_text())["precision"] is None


def test_a_terminal_that_is_gone_does_not_end_the_run(journal, monkeypatch):
    def gone(*args, **kwargs):
        raise OSError(5, "Input/output error")

    for name in ("write", "set_postfix", "close"):
        monkeypatch.setattr(journal.bar, name, gone)
    journal.write("train", 1, {"loss": 1.0})
    journal.say("saved")
    journal.close()
    assert json.loads(journal.file.read_text())["loss"] == 1.0


def test_a_warning_stands_behind_its_step(journal, capsys):
    journal.warn(7, None)
    journal.warn(8, "look")
    assert "step 8: look" in capsys.readouterr().out
