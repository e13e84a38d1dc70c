"""GLUE's folder: the columns of each file, the rows that are broken, and the errors."""

from pathlib import Path

import pytest

from electra_fast.config import ElectraConfig
from electra_fast.tasks.glue import GLUE, glue
from electra_fast.tasks.items import Text
from electra_fast.train.fine_tune_recipe import FineTuneRecipe

# The header and a row of each file as GLUE has them; CoLA has no header. A quote is a character of the text.
LABELLED = {
    "CoLA": ["gj04\t1\t\t\"Our friends won't buy it."],
    "SST-2": ["sentence\tlabel", 'a "smile \t1'],
    "MRPC": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r", '1\t7\t8\t"He said .\tHe spoke .\r'],
    "STS-B": [
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tAn airplane.\t4.750",
    ],
    "QQP": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhat?\tWhy?\t0"],
    "MNLI": [
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
        "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t( a )\t( b )\t(A a)\t(B b)\tOne.\tTwo.\tentailment\tneutral",
    ],
    "QNLI": ["index\tquestion\tsentence\tlabel", "0\tWho?\tShe.\tnot_entailment"],
    "RTE": ["index\tsentence1\tsentence2\tlabel", "0\tOne.\tTwo.\tentailment"],
    "WNLI": ["index\tsentence1\tsentence2\tlabel", "0\tOne.\tTwo.\t1"],
}
TEXTS = {
    "CoLA": ("\"Our friends won't buy it.", None, "1"),
    "SST-2": ('a "smile ', None, "1"),
    "MRPC": ('"He said .', "He spoke .", "1"),
    "STS-B": ("A plane.", "An airplane.", 4.75),
    "QQP": ("What?", "Why?", "0"),
    "MNLI": ("One.", "Two.", "neutral"),
    "QNLI": ("Who?", "She.", "not_entailment"),
    "RTE": ("One.", "Two.", "entailment"),
    "WNLI": ("One.", "Two.", "1"),
}
TESTS = {
    "CoLA": ["index\tsentence", "0\tBill."],
    "MRPC": ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t7\t8\tOne .\tTwo ."],
    "QQP": ["id\tquestion1\tquestion2", "0\tWhat?\t"],
}


def write(folder: Path, name: str, file: str, rows: list[str]) -> Path:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / file).write_bytes("".join(f"{row}\n" for row in rows).encode())
    return folder / name / file


@pytest.mark.parametrize("name", GLUE)
def test_the_texts_and_labels_of_a_task(tmp_path, name):
    task = GLUE[name]
    for role in [role for role in task.files if not role.startswith("test")]:
        file = write(tmp_path, name, task.files[role], LABELLED[name])
        assert glue(tmp_path, name, role) == [Text(*TEXTS[name], f"{file}, line {len(LABELLED[name])}")]
    label = TEXTS[name][2]
    assert label in task.labels if task.kind == "classify" else (task.kind, task.labels) == ("regress", ())


@pytest.mark.parametrize("name", TESTS)
def test_a_test_file_has_no_labels_and_keeps_every_row(tmp_path, name):
    file = write(tmp_path, name, "test.tsv", TESTS[name])
    expected = {"CoLA": ("Bill.", None), "MRPC": ("One .", "Two ."), "QQP": ("What?", "")}
    assert glue(tmp_path, name, "test") == [Text(*expected[name], None, f"{file}, line 2")]


def test_mnli_has_two_files_for_dev_and_test(tmp_path):
    for role, file in (("dev", "dev_matched"), ("dev_mm", "dev_mismatched"), ("test_mm", "test_mismatched")):
        write(tmp_path, "MNLI", f"{file}.tsv", ["sentence1\tsentence2\tgold_label", f"{role}\tb\tneutral"])
        found = glue(tmp_path, "MNLI", role)[0]
        assert (found.text, found.label) == (role, "neutral" if role.startswith("dev") else None)


def test_broken_rows_are_skipped_and_counted(tmp_path):
    header, row = LABELLED["QQP"]
    file = write(
        tmp_path, "QQP", "train.tsv", [header, "1\t2\t3\tWhat", "is it?\t0", row, "1\t2\t3\tWhat?\t\t0"]
    )
    message = rf"^{file}: 3 rows without all their cells were skipped$"
    with pytest.warns(UserWarning, match=message):
        assert glue(tmp_path, "QQP", "train") == [Text("What?", "Why?", "0", f"{file}, line 4")]


@pytest.mark.parametrize(
    "name, role, rows, message",
    [
        (
            "RTE",
            "train",
            ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tmaybe"],
            "line 2: label must be one of entailment, not_entailment, got 'maybe'",
        ),
        (
            "STS-B",
            "train",
            ["sentence1\tsentence2\tscore", "a\tb\tx"],
            "line 2: score must be a finite number, got 'x'",
        ),
        (
            "RTE",
            "train",
            ["sentence1\tlabel", "a\tentailment"],
            "line 2 must have a column 'sentence2', got sentence1, label",
        ),
        (
            "RTE",
            "train",
            ["sentence1\tsentence2", "a\tb"],
            "line 2 must have a column 'label', got sentence1, sentence2",
        ),
        (
            "QQP",
            "test",
            ["id\tquestion1\tquestion2", "0\ta"],
            "line 2 must have 3 cells, one per column, got 2",
        ),
    ],
)
def test_the_error_names_the_line(tmp_path, name, role, rows, message):
    file = write(tmp_path, name, f"{role}.tsv", rows)
    with pytest.raises(ValueError) as raised:
        glue(tmp_path, name, role)
    assert str(raised.value) == f"{file}, {message}"


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^glue: name must be one of CoLA, SST-2, .*WNLI, got 'cola'$"):
        glue(tmp_path, "cola", "train")
    with pytest.raises(
        ValueError, match=r"^glue: role of RTE must be one of train, dev, test, got 'dev_mm'$"
    ):
        glue(tmp_path, "RTE", "dev_mm")
    with pytest.raises(FileNotFoundError, match=r"RTE/dev\.tsv must be a regular file, got nothing there"):
        glue(tmp_path, "RTE", "dev")
    write(tmp_path, "RTE", "dev.tsv", LABELLED["RTE"][:1])
    with pytest.raises(ValueError, match=r"RTE/dev\.tsv must contain a record, got none"):
        glue(tmp_path, "RTE", "dev")


@pytest.mark.parametrize("name, epochs", [("RTE", 10), ("STS-B", 10), ("MNLI", 3)])
def test_the_epochs_are_the_papers(name, epochs):
    recipe = FineTuneRecipe(task=GLUE[name].kind, glue=name, model="m", train=("glue",)).resolved()
    assert recipe.for_model(ElectraConfig.small(), 100.0).steps == 100 * epochs
