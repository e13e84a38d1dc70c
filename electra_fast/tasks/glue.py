"""The nine tasks of GLUE (Wang et al. 2019), read from the folder that GLUE's download script makes.

https://arxiv.org/abs/1804.07461
"""

import warnings
from pathlib import Path
from typing import NamedTuple

from electra_fast.errors import must
from electra_fast.tasks.items import Text
from electra_fast.tasks.records import Record, column, number, records

SPLITS = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
MNLI = {
    "train": "train.tsv",
    "dev": "dev_matched.tsv",
    "dev_mm": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test_mm": "test_mismatched.tsv",
}
NUMBERED = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")


class GlueTask(NamedTuple):
    """What GLUE says about a task."""

    kind: str  # "classify" or "regress"
    text: str  # the columns
    pair: str | None
    label: str
    labels: tuple[str, ...]  # as in the files; empty: scores from 0 to 5
    metrics: tuple[str, ...]  # the first is the one that ELECTRA's paper reports
    files: dict[str, str] = SPLITS  # by role
    columns: tuple[str, ...] | None = None  # of the files with labels; None: their first row has them


GLUE = {
    "CoLA": GlueTask(
        "classify",
        "sentence",
        None,
        "label",
        NUMBERED,
        ("matthews",),
        columns=("source", "label", "mark", "sentence"),
    ),
    "SST-2": GlueTask("classify", "sentence", None, "label", NUMBERED, ("accuracy",)),
    "MRPC": GlueTask("classify", "#1 String", "#2 String", "Quality", NUMBERED, ("accuracy", "f1")),
    "STS-B": GlueTask("regress", "sentence1", "sentence2", "score", (), ("spearman", "pearson")),
    "QQP": GlueTask("classify", "question1", "question2", "is_duplicate", NUMBERED, ("accuracy", "f1")),
    "MNLI": GlueTask(
        "classify",
        "sentence1",
        "sentence2",
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        files=MNLI,
    ),
    "QNLI": GlueTask("classify", "question", "sentence", "label", ENTAILMENT, ("accuracy",)),
    "RTE": GlueTask("classify", "sentence1", "sentence2", "label", ENTAILMENT, ("accuracy",)),
    "WNLI": GlueTask("classify", "sentence1", "sentence2", "label", NUMBERED, ("accuracy",)),
}


def glue(folder: str | Path, name: str, role: str) -> list[Text]:
    """Return the texts of a file of GLUE.

    In files with labels, rows with too few or too many cells and rows without a text are skipped, with one
    warning that counts them; QQP has some. Of a test file every row is returned, without labels, because GLUE
    expects a prediction for each.

    Args:
        folder: contains one folder per task, as in ``CoLA/train.tsv``.
        name: a key of GLUE.
        role: train, dev or test; of MNLI also dev_mm and test_mm, the mismatched ones.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the task or the role is unknown, a row of a test file is broken, or a label is not one of
            the task's; also as in `records.records`.
    """
    if name not in GLUE:
        raise ValueError(must("glue: name", f"be one of {', '.join(GLUE)}", repr(name)))
    task = GLUE[name]
    if role not in task.files:
        raise ValueError(must(f"glue: role of {name}", f"be one of {', '.join(task.files)}", repr(role)))
    file = Path(folder) / name / task.files[role]
    if role.startswith("test"):
        return [_text(task, record) for record in records([file], quoted=False)]

    broken: list[str] = []
    texts = []
    for record in records([file], task.columns, quoted=False, broken=broken):
        text = _text(task, record)
        if text.text.strip() and (text.pair is None or text.pair.strip()):
            texts.append(text._replace(label=_label(task, record)))
        else:
            broken.append(record.where)
    if broken:
        warnings.warn(f"{file}: {len(broken)} rows without all their cells were skipped", stacklevel=2)
    return texts


def _text(task: GlueTask, record: Record) -> Text:
    pair = column(record, task.pair) if task.pair else None
    return Text(column(record, task.text), pair, None, record.where)


def _label(task: GlueTask, record: Record) -> str | float:
    label, where = column(record, task.label), f"{record.where}: {task.label}"
    if not task.labels:
        return number(record.where, task.label, label)
    if label not in task.labels:
        raise ValueError(must(where, f"be one of {', '.join(task.labels)}", repr(label)))
    return label
