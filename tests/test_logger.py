"""A run keeps logging after its log file is damaged and after its terminal is closed."""

import json

import pytest

from electra_fast.train.logger import Logger

pytest.importorskip("tqdm")
pytestmark = pytest.mark.filterwarnings("ignore:.*TensorBoard:")


@pytest.fixture
def logger(tmp_path):
    logger = Logger(tmp_path, 0, 10)
    yield logger
    logger.close()


def test_after_an_incomplete_line_the_next_record_starts_a_new_line(logger):
    logger.write("train", 1, {"loss": 1.0})
    whole = logger.file.read_text()
    logger.file.write_text(whole + '{"kind": "train", "st')
    logger.write("train", 3, {"loss": 3.0})
    logger.write("train", 4, {"loss": 4.0})
    lines = logger.file.read_text().splitlines()
    assert lines[0] == whole.strip() and lines[1] == '{"kind": "train", "st'
    assert [json.loads(line)["step"] for line in (lines[0], *lines[2:])] == [1, 3, 4]
    assert len(lines) == 4 and logger.file.read_text().endswith("}\n")


def test_a_number_that_is_not_finite_is_null(logger):
    logger.write("train", 1, {"precision": float("nan")})
    assert json.loads(logger.file.read_text())["precision"] is None


def test_a_closed_terminal_does_not_end_the_run(logger, monkeypatch):
    def closed(*args, **kwargs):
        raise OSError(5, "Input/output error")

    for name in ("write", "set_postfix", "close"):
        monkeypatch.setattr(logger.bar, name, closed)
    logger.write("train", 1, {"loss": 1.0})
    logger.say("saved")
    logger.close()
    assert json.loads(logger.file.read_text())["loss"] == 1.0


def test_a_warning_is_printed_with_its_step(logger, capsys):
    logger.warn(7, None)
    logger.warn(8, "look")
    assert "step 8: look" in capsys.readouterr().out
