"""What is not on this machine, or not what it must be, is refused in a sentence that names it."""

import os

import pytest

from electra_fast import local


@pytest.mark.parametrize("name", ["google/electra-small-discriminator", "./google/electra-small"])
def test_a_name_of_the_hub_comes_with_the_command_that_downloads_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    hub, folder = name.removeprefix("./"), name.rpartition("/")[2]
    command = f"`hf download {hub} --local-dir {folder}`"
    for path in (name, os.path.abspath(name)):  # a recipe holds absolute paths
        with pytest.raises(FileNotFoundError, match="does not exist") as refused:
            local.existing("pretrain: --init", path)
        assert command in str(refused.value) and "--init must be on this machine" in str(refused.value)


@pytest.mark.parametrize("name", ["missing", "vocab/vocab.txt", "/no/such/folder", "../other/run", "a/b/c"])
def test_a_path_that_is_no_name_of_the_hub_comes_without(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as refused:
        local.existing("pretrain: --vocab", name)
    assert "hf download" not in str(refused.value) and name in str(refused.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must hold a JSON object, got list"),
        ("null", "must hold a JSON object, got NoneType"),
        ("{", "must hold JSON, got: Expecting"),
        ("", "must hold JSON"),
        ("[" * 100_000, "must hold JSON, got: maximum recursion"),
        ('{"a": ' + "9" * 5000 + "}", "must hold JSON, got: Exceeds the limit"),
        ("\ufffe", "must hold JSON"),
    ],
)
def test_what_is_no_json_object_is_refused_by_its_file(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=f"pretrain: .*config.json {message}"):
        local.json_object("pretrain", file)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for file, got in ((tmp_path / "config.json", "something else"), (tmp_path / "x", "nothing there")):
        with pytest.raises(FileNotFoundError, match=f"must be a regular file, got {got}"):
            local.json_object("pretrain", file)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "xpu"])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(ValueError, match=f"--device must be cpu, or cuda .*, got '{name}': ."):
        local.device("pretrain: --device", name)


def test_no_device_is_the_one_there_is(device):
    assert local.device("pretrain: --device", None).type == device
