"""Each argument of pretrain, and each file that one names, is used or refused with a readable error."""

import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import trainings

from electra_fast.__main__ import main

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]

PREVIOUS = "; the previous one is loaded"
SMALL = ["--preset", "tiny", "--set", *trainings.SIZES, "--seq", "32", "--batch-tokens", "256"]


@pytest.fixture(scope="module")
def new(corpus):
    """The arguments of a small run, without --out."""
    return ["pretrain", *SMALL, "--data", str(corpus), "--vocab", "300", "--device", "cpu", "--steps", "2"]


@pytest.fixture(scope="module")
def finished(new, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    main([*new, "--out", str(out)])
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def refused(capsys, *arguments) -> str:
    """Return the error message of a command; any exception other than SystemExit fails the test."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err  # argparse prints, and exits with 2
    assert code not in (0, None) and re.search(r"^(error: |.*pretrain: error: )", said, re.M), said
    assert "\n\t" not in said
    return said


NUMBERS = {
    "seq": ["0", "-1", "4", "1000000000000"],
    "batch-tokens": ["0", "-1", "31"],
    "accumulate": ["0", "-1", "1000000000000"],
    "steps": ["0", "-1", "1000000000000"],
    "lr": ["0", "-1", "nan", "inf", "1e400"],
    "warmup": ["-1", "3"],
    "weight-decay": ["-1", "nan", "inf", "1"],
    "beta2": ["-1", "0", "1", "nan", "inf"],
    "clip": ["-1", "0", "nan", "inf"],
    "seed": ["-1", "1000000000000000000000000000000"],
    "save-every": ["0", "-1"],
    "eval-every": ["0", "-1"],
    "eval-batches": ["0", "-1"],
    "log-every": ["0", "-1", "1000000000000"],
    "keep": ["0", "-1", "1000000000000"],
    "max-word-chars": ["0", "-1"],
}


@pytest.mark.parametrize("option, value", [(o, v) for o, values in NUMBERS.items() for v in values])
def test_a_number_out_of_range_is_refused_and_its_option_named(new, tmp_path, capsys, option, value):
    said = refused(capsys, *new, "--out", tmp_path / "run", f"--{option}", value)
    # A value may make another option wrong.
    related = {"seq": "--batch-tokens", "accumulate": "--steps", "keep": "--out"}.get(option, f"--{option}")
    assert f"pretrain: --{option} must" in said or f"pretrain: {related} must" in said, said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("option", [o for o in NUMBERS if o not in ("lr", "weight-decay", "beta2", "clip")])
@pytest.mark.parametrize("value", ["nan", "inf", "1.5", "x", ""])
def test_a_value_that_is_not_a_whole_number_is_refused(new, tmp_path, capsys, option, value):
    said = refused(capsys, *new, "--out", tmp_path / "run", f"--{option}", value)
    assert f"argument --{option}: invalid int value: '{value}'" in said


def test_every_numeric_option_is_in_the_table():
    import dataclasses
    import typing

    from electra_fast.train.recipe import Recipe

    hints = typing.get_type_hints(Recipe)
    numeric = {
        f.name
        for f in dataclasses.fields(Recipe)
        if {int, float} & {*typing.get_args(hints[f.name]), hints[f.name]}
    }
    assert {name.replace("_", "-") for name in numeric} == set(NUMBERS)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--device", "nonsense"], "--device must be cpu, or cuda .* got 'nonsense'"),
        (["--device", "cuda:99"], "--device must be cpu, or cuda .* got 'cuda:99'"),
        (["--preset", "huge"], "--preset must be one of tiny, small"),
        (["--precision", "fp8"], "--precision must be bf16 or float32, got 'fp8'"),
        (["--set", "dropout=0", "--set", "rtd_weight=0", "dropout=0.1"], "--set must give dropout once"),
        (["--set", "dropout"], "--set must have a value of type float, got 'dropout'"),
        (["--set", "dropout=nan"], "dropout must be in"),
        (["--set", "type_vocab=99999999999"], "type_vocab must be less than 2"),
        (["--vocab", "no/vocab.txt"], "--vocab must be on this machine, got no/vocab.txt"),
        (["--vocab", "google/electra-small"], "`hf download google/electra-small --local-dir electra-small`"),
        (["--vocab", "99999999999"], r"--vocab must be in \[5, 1048576\] if it is a size, got '99999999999'"),
        (["--vocab", "9" * 5000], r"--vocab must be in \[5, 1048576\]"),
        (["--vocab", "4"], r"--vocab must be in \[5, 1048576\]"),
        (["--vocab", ""], "--vocab must be a file, a folder or a size, got ''"),
        (["--data", ""], "--data must name files or folders"),
        (["--held-out", ""], "--held-out must name files or folders"),
        (["--init", ""], "--init must name files or folders"),
        (["--data", "/nope"], "--data must be on this machine, got /nope, which does not exist$"),
        (["--held-out", "x/y"], "--held-out must be on this machine, got .*/x/y, which does not exist$"),
        (["--cased", "--lowercase"], "not allowed with argument --cased"),
        (["--keep-accents", "--strip-accents"], "not allowed with argument --keep-accents"),
        (["--vocab", "²"], "--vocab must be on this machine, got ²"),
        (["--init", "google/electra-small"], "`hf download google/electra-small --local-dir electra-small`"),
        (["--held-out", __file__, "--held-out", __file__], "--held-out must name each path once, got /"),
        (["--data", "no.txt"], "no.txt"),
        (["--held-out", "no.txt"], "no.txt"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused(new, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert re.search(sentence, refused(capsys, *new, "--out", tmp_path / "run", *arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(new, tmp_path, capsys):
    assert "got 'cuda': " in refused(capsys, *new, "--out", tmp_path / "run", "--device", "cuda")


@pytest.mark.parametrize("name", [".lock", "recipe.part", "config.part"])
def test_out_may_contain_what_a_run_without_a_checkpoint_leaves(new, tmp_path, capsys, name):
    (tmp_path / name).touch()
    main([*new, "--out", str(tmp_path), "--steps", "1"])
    said = refused(capsys, *new, "--out", tmp_path)
    assert "which contains checkpoints; --resume continues its run" in said


def test_the_folder_of_a_run_is_checked(new, finished, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"name-\xff")
    for arguments, sentence in (
        (["--out", finished], "--out must be a new folder.*--resume continues its run"),
        (
            ["--out", finished / "discriminator"],
            "--out must be a new folder, .* which contains .*; name another",
        ),
        (["--out", corpus], "--out must be a new folder, .* which contains .*; name another"),
        (["--out", corpus / "text.txt"], "--out must be a folder or a new name, got .*: Not a directory"),
        (
            ["--out", corpus / "text.txt" / "run"],
            "--out must be a folder that can be created, got .*: Not a directory",
        ),
        (["--out", "/proc/x"], "--out must be a folder that can be created, got /proc/x: "),
        (["--out", "x" * 300], "--out must be .*: File name too long"),
        (["--out", ""], "--out must name a folder, got ''"),
        (["--resume", ""], "--resume must be the folder of a run, got ''"),
        (
            ["--resume", finished / "discriminator"],
            "--resume must be .*, the folder of a model; --init starts",
        ),
        (["--resume", "x/y"], "--resume must be on this machine, got x/y, .*`hf download x/y"),
        (["--resume", tmp_path], "--resume must be the folder of a run"),
        (["--out", tmp_path / name], r"--out must be a folder whose name is UTF-8, got '.*name-\\udcff'"),
    ):
        assert re.search(sentence, refused(capsys, *new, *arguments))
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "size, sentence",
    [
        ("embedding=2000000000", "must fit into the memory, got .*; lower the sizes in --set"),
        ("layers=1000000", "--set must have layers of 1000 or less, got 'layers=1000000'"),
        ("generator_layers=1001", "--set must have generator_layers of 1000 or less"),
    ],
)
def test_a_model_that_is_too_large_is_refused(corpus, tmp_path, capsys, size, sentence):
    new = ["pretrain", "--preset", "tiny", "--data", corpus, "--vocab", "300", "--device", "cpu"]
    assert re.search(sentence, refused(capsys, *new, "--out", tmp_path / "run", "--set", size))


def test_several_processes_without_torchrun_are_refused(new, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(capsys, *new, "--out", tmp_path / "run")
    assert "pretrain: RANK must be a number, got ''; start several processes with torchrun" in said
    assert not (tmp_path / "run").exists()


def changed(name, **changes):
    def change(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


config = functools.partial(changed, "config.json")  # of a half
recipe = functools.partial(changed, "recipe.json")  # of a run


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def weights(change):
    from safetensors.torch import load_file, save_file

    def changed(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return changed


QUERY = "electra.encoder.layer.0.attention.self.query.weight"
SCORE = "discriminator_predictions.dense_prediction.bias"
HALVES = {
    "cut file": (
        lambda f: os.truncate(f / "model.safetensors", 2000),
        r"model\.safetensors.*(whole|invalid)",
    ),
    "empty file": (text("model.safetensors", ""), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "with model.safetensors"),
    "pipe for weights": (pipe("model.safetensors"), "with model.safetensors"),
    "list as config": (text("config.json", "[]"), "config.json must contain a JSON object, got list"),
    "null as config": (text("config.json", "null"), "config.json must contain a JSON object, got NoneType"),
    "cut config": (text("config.json", "{"), "config.json must contain JSON, got Expecting property name"),
    "deep config": (
        text("config.json", "[" * 100_000),
        "config.json must contain JSON, got maximum recursion",
    ),
    "pipe for config": (pipe("config.json"), "config.json must be a regular file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json must be a regular file"),
    "many layers": (
        config(num_hidden_layers=10**6),
        "num_hidden_layers in .*config.json must be 1, .* 1000000",
    ),
    "more layers": (config(num_hidden_layers=10**9), "num_hidden_layers in .*config.json must be 1, "),
    "huge": (config(hidden_size=10**30), r"hidden must be less than 2\^31, got 10*; in .*config.json"),
    "large": (config(hidden_size=2**30, intermediate_size=2**30), "must fit config.json"),
    "text for eps": (config(layer_norm_eps="x"), "eps must be of type float, got 'x'; in .*config.json"),
    "text for size": (
        config(hidden_size="x"),
        "hidden must be a positive integer, got 'x'; in .*config.json",
    ),
    "text for id": (config(mask_token_id="x"), "mask_id must be of type int, got 'x'; in .*config.json"),
    "list for rate": (config(hidden_dropout_prob=[0.1]), "hidden_dropout_prob|attention_probs_dropout_prob"),
    "other model": (
        config(model_type="bert"),
        "model_type in config.json must be 'electra'.*; in .*config.json",
    ),
    "other sizes": (config(vocab_size=1000), "must fit config.json.*size mismatch"),
    "missing weight": (weights(lambda t: t.pop(QUERY)), f"must fit config.json.*Missing.*{QUERY}"),
    "unknown weight": (weights(lambda t: t.update(x=torch.ones(1))), 'must fit config.json.*Unexpected.*"x"'),
    "NaN": (weights(lambda t: t[QUERY][0].fill_(torch.nan)), f"finite weights, got NaN or inf in {QUERY}"),
    "inf": (weights(lambda t: t[SCORE].fill_(torch.inf)), f"finite weights, got NaN or inf in {SCORE}"),
    "integers": (weights(lambda t: t.update({QUERY: t[QUERY].long()})), f"got {QUERY} of torch.int64"),
}


@pytest.mark.parametrize("case", HALVES)
def test_a_half_that_cannot_be_read_is_refused_and_its_file_named(new, run, tmp_path, capsys, case):
    change, sentence = HALVES[case]
    change(run / "discriminator")
    said = refused(capsys, *new, "--out", tmp_path / "new", "--init", run / "discriminator")
    assert re.search(sentence, said) and str(run / "discriminator") in said


def test_init_refuses_a_second_discriminator(new, run, tmp_path, capsys):
    half = run / "discriminator"
    said = refused(capsys, *new, "--out", tmp_path / "new", "--init", half, "--init", half)
    assert "--init must name one discriminator, got a second one in" in said


RUNS = {
    "cut": (text("recipe.json", '{"steps": '), "recipe.json must contain JSON"),
    "null": (text("recipe.json", "null"), "recipe.json must contain a JSON object"),
    "pipe": (pipe("recipe.json"), "recipe.json must be a regular file"),
    "unknown field": (recipe(colour=1), "recipe.json must have the fields of a recipe, got colour"),
    "text for a number": (recipe(steps="2"), "steps in .*recipe.json must be of type .*int.*, got '2'"),
    "bool for a number": (recipe(accumulate=True), "accumulate in .*recipe.json must be of type int"),
    "text for a list": (recipe(data="text.txt"), "data in .*recipe.json must be of type tuple"),
    "numbers in a list": (recipe(set=[1]), "set in .*recipe.json must be of type tuple"),
    "number for a bool": (recipe(packed=0), "packed in .*recipe.json must be of type bool"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_recipe_that_cannot_be_read_is_refused_and_its_file_named(run, capsys, case):
    change, sentence = RUNS[case]
    change(run)
    assert re.search(sentence, refused(capsys, "pretrain", "--resume", run, "--device", "cpu"))


def test_another_tokenizer_is_refused(run, capsys):
    file = run / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"the"', '"thx"'))
    said = refused(capsys, "pretrain", "--resume", run, "--device", "cpu")
    assert "tokenizer must be the tokenizer with which the run was started, got another" in said


def test_a_missing_tokenizer_is_refused_with_a_remedy(run, capsys):
    shutil.rmtree(run / "tokenizer")
    said = refused(capsys, "pretrain", "--resume", run, "--device", "cpu")
    assert f"got nothing there; copy {run}/discriminator to {run}/tokenizer" in said
    gc.collect()  # releases the lock of the refused run
    shutil.copytree(run / "discriminator", run / "tokenizer")
    main(["pretrain", "--resume", str(run), "--device", "cpu"])


@pytest.mark.parametrize(
    "arguments",
    [["--cased"], ["--lowercase"], ["--strip-accents"], ["--keep-accents"], ["--max-word-chars", "9"]],
)
def test_a_resumed_run_keeps_its_normalization(run, capsys, arguments):
    before = (run / "recipe.json").read_text()
    said = refused(capsys, "pretrain", "--resume", run, "--device", "cpu", *arguments)
    assert "must stay unchanged in a resumed run, got " in said
    assert (run / "recipe.json").read_text() == before


def test_a_damaged_run_is_refused_with_a_remedy_and_plain_warnings(run):
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    command = [sys.executable, "-m", "electra_fast", "pretrain", "--resume", run, "--device", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in ended.stderr.splitlines() if "checkpoint: " in line]
    assert ended.returncode == 1 and lines[-1].startswith("error: checkpoint: ")
    assert lines[-1].endswith("got none; restore one from a copy, or start another run with --out")
    assert lines[0].startswith("warning: checkpoint: ") and lines[0].endswith(
        "no field 'format'" + PREVIOUS * (len(lines) > 2)
    )
    assert PREVIOUS not in lines[-2] and "Warning" not in ended.stderr and "warnings.warn" not in ended.stderr


def test_an_option_given_to_a_resumed_run_is_kept_even_if_it_is_the_default(new, tmp_path):
    first = {"clip": 0.5, "save_every": 2, "log_every": 2, "keep": 1, "steps": 2}
    then = {"clip": 1.0, "save_every": 1000, "log_every": 10, "keep": 3, "steps": 4}

    def options(values):
        return [
            text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))
        ]

    main([*new, *options(first), "--out", str(tmp_path)])
    main(["pretrain", "--resume", str(tmp_path), *options(then), "--device", "cpu"])
    kept = json.loads((tmp_path / "recipe.json").read_text())
    assert {name: kept[name] for name in then} == then
    main(["pretrain", "--resume", str(tmp_path), "--steps", "5", "--device", "cpu"])
    kept = json.loads((tmp_path / "recipe.json").read_text())
    assert {name: kept[name] for name in then} == then | {"steps": 5}


def test_the_values_of_a_repeated_option_are_collected(new, corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(["the model reads a text"] * 40))
    more = ["--data", str(other), "--held-out", str(corpus), "--held-out", str(other)]
    main([*new, *more, "--set", "dropout=0", "--set", "rtd_weight=0", "--out", str(tmp_path / "run")])
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())
    given = [*trainings.SIZES, "dropout=0", "rtd_weight=0"]
    assert kept["set"] == sorted([*given, "initial_attention=local"])  # the last one is the preset's
    assert kept["data"] == kept["held_out"] == [str(corpus), str(other)]


def test_a_run_that_ends_without_a_finite_loss_fails(new, tmp_path, capsys):
    said = refused(capsys, *new, "--out", tmp_path, "--lr", "1e30", "--steps", "4", "--warmup", "0")
    assert re.search("the loss on held-out text must be finite, got .*step 4.*nan.*; lower --lr", said)
