"""Errors about missing files, files of the wrong kind and unusable devices name the argument or the file."""

import os

import pytest

from electra_fast import local


@pytest.mark.parametrize("name", ["google/electra-small-discriminator", "./google/electra-small"])
def test_an_error_about_a_hub_model_contains_the_download_command(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    hub, folder = name.removeprefix("./"), name.rpartition("/")[2]
    command = f"`hf download {hub} --local-dir {folder}`"
    for path in (name, os.path.abspath(name)):  # Recipes contain absolute paths.
        with pytest.raises(FileNotFoundError, match="does not exist") as refused:
            local.existing("pretrain: --init", path)
        assert command in str(refused.value) and "--init must be on this machine" in str(refused.value)


@pytest.mark.parametrize("name", ["missing", "vocab/vocab.txt", "/no/such/folder", "../other/run", "a/b/c"])
def test_an_error_about_another_path_contains_no_download_command(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as refused:
        local.existing("pretrain: --vocab", name)
    assert "hf download" not in str(refused.value) and name in str(refused.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must contain a JSON object, got list"),
        ("null", "must contain a JSON object, got NoneType"),
        ("{", "must contain JSON, got Expecting"),
        ("", "must contain JSON"),
        ("[" * 100_000, "must contain JSON, got maximum recursion"),
        ('{"a": ' + "9" * 5000 + "}", "must contain JSON, got Exceeds the limit"),
        ("\ufffe", "must contain JSON"),
    ],
)
def test_an_error_about_invalid_json_names_the_file(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=f"pretrain: .*config.json {message}"):
        local.json_object("pretrain", file)


def test_a_fifo_raises_an_error_instead_of_blocking(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"pretrain: .*config.json must be a regular file, got a FIFO"):
        local.json_object("pretrain", tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"pretrain: .*x must be a regular file, got nothing there"):
        local.json_object("pretrain", tmp_path / "x")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "xpu"])
def test_an_unusable_device_raises_an_error(name):
    with pytest.raises(ValueError, match=f"--device must be cpu, or cuda .*, got '{name}': ."):
        local.device("pretrain: --device", name)


def test_the_default_device_is_a_gpu_if_there_is_one(device):
    assert local.device("pretrain: --device", None).type == device
