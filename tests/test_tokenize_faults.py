"""Folders of tokens that are damaged, incomplete or of something else are refused or made again."""

import contextlib
import errno
import fcntl
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
from small_tokens import assert_same, content, in_this_process, made

from electra_fast import data
from electra_fast.__main__ import main
from electra_fast.data import open_tokens, tokenize_folder, tokenizing, tokens_folder

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus", "tokens_folder"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]

FIRST, SECOND = "tokens-000000.safetensors", "tokens-000001.safetensors"


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")  # with times


def keeping_time(change):
    """Change a file without a trace in its time and size."""

    def damage(file):
        before = file.stat()
        change(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return damage


def flip(file, offset=-9):
    bytes_ = bytearray(file.read_bytes())
    bytes_[offset] ^= 1
    file.write_bytes(bytes_)


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


def by_another(file):
    """Write a shard of the same text with another vocabulary."""
    tokenizer = data.load_tokenizer(file.parent / "tokenizer" / "vocab.txt", lowercase=False)
    data.cache.write_tokens(file, ["the text"], tokenizer, data.words.WordEncoder(tokenizer))


def by_second(file):
    shutil.copy(file.parent / SECOND, file)


DAMAGES = {
    "missing": (FIRST, Path.unlink, "missing; run tokenize again with the same --out"),
    "cut": (FIRST, cut, "damaged, .*; delete it and"),
    "empty": (FIRST, lambda file: file.write_bytes(b""), "damaged, .*; delete it and"),
    "flipped": (FIRST, flip, "damaged, its SHA-256 .*; delete it and"),
    "another vocabulary": (FIRST, by_another, "tokenized with another vocabulary; delete it and"),
    "another shard": (FIRST, by_second, "not the file that was written.*; delete it and"),
    "lines missing": ("lines.bin", Path.unlink, "missing; run tokenize again"),
    "lines cut": ("lines.bin", cut, "not the file that was written"),
    "offsets flipped": ("offsets.bin", flip, "not the file that was written"),
}


def warned(is_warned):
    message = "damaged, .* it is made again"
    return pytest.warns(UserWarning, match=message) if is_warned else contextlib.nullcontext()


@pytest.mark.parametrize("name, damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_made_again(
    copied,
    folder,
    text,
    wordpiece,
    name,
    damage,
    message,
    serial,
):
    damage(copied / name)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: {message}"):
        open_tokens(copied, wordpiece)
    if name == FIRST and damage in (by_another, by_second):  # whole shards of something else are not replaced
        with pytest.raises(ValueError, match=f"{name}: .*another"):
            tokenize_folder(data.documents(text), wordpiece, copied)
        (copied / name).unlink()
    with warned("damaged" in message):
        assert not tokenize_folder(data.documents(text), wordpiece, copied).was_complete
    assert content(copied) == content(folder)
    assert_same(open_tokens(copied, wordpiece, verify=True), open_tokens(folder))


@pytest.mark.parametrize("name", [FIRST, "lines.bin"])
def test_verify_finds_a_change_that_left_size_and_time(copied, name):
    keeping_time(flip)(copied / name)
    open_tokens(copied)
    with pytest.raises(ValueError, match=f"{name}: .*SHA-256"):
        open_tokens(copied, verify=True)


def test_a_copy_without_times_is_read_and_accepted(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)
    with pytest.warns(UserWarning, match="files were read as a whole, because their times .* They are right"):
        assert_same(open_tokens(copied), open_tokens(folder))


MANIFESTS = {
    "cut": (lambda content: content[:100], "must contain JSON"),
    "a list": (lambda content: "[]", "must contain a JSON object"),
    "a number": (lambda content: content.replace('"tokens": ', '"tokens": 1', 1), "damaged, its SHA-256"),
    "format": (
        lambda content: content.replace("folder 1", "folder 9", 1),
        "must have the format .*, got .* 9",
    ),
    "nothing": (lambda content: "{}", "must have the format .*, got None"),
}


@pytest.mark.parametrize("change, message", MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_refused(copied, folder, text, wordpiece, change, message, serial):
    file = copied / "manifest.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=rf"manifest\.json:? {message}"):
        open_tokens(copied)
    with pytest.raises(ValueError, match=rf"manifest\.json:? {message}"):
        tokenize_folder(data.documents(text), wordpiece, copied)
    file.unlink()
    assert data.is_tokens_folder(copied)
    assert tokenize_folder(data.documents(text), wordpiece, copied).shards == 0
    assert content(copied) == content(folder)


def test_another_vocabulary_or_text_is_refused(copied, text, wordpiece, tmp_path, serial):
    data.save_vocab(wordpiece, tmp_path / "vocab.txt")
    cased = data.load_tokenizer(tmp_path / "vocab.txt", lowercase=False)
    with pytest.raises(ValueError, match=r"--vocab.* must be the vocabulary of .*copied, got another one"):
        open_tokens(copied, cased)
    with pytest.raises(ValueError, match="--out must have no tokens of another vocabulary"):
        made(text, cased, copied)
    other = shutil.copytree(text, tmp_path / "other")
    (other / "b.txt").write_text("and")
    with pytest.raises(ValueError, match=r"tokens of another text, .*; name another folder"):
        made(other, wordpiece, copied)
    (other / "b.txt").unlink()
    (other / "a.txt").write_text((other / "a.txt").read_text()[:25_000])
    with pytest.raises(ValueError, match=r"tokens of another text, .*; name another folder"):
        made(other, wordpiece, copied)
    content_of_shards = [file.read_bytes() for file in sorted(copied.glob("tokens-*"))]
    assert content_of_shards == [
        (copied / n).read_bytes() for n in sorted(os.listdir(copied)) if "tokens-" in n
    ]
    data.save_tokenizer(cased, copied / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer must be the tokenizer of the tokens, got another"):
        tokens_folder.tokenizer_of(copied)


def test_a_text_that_ends_before_the_last_shard_is_refused(copied, text, wordpiece, tmp_path, serial):
    first, _ = data.cache.open_arrays(copied / FIRST)
    whole = list(data.documents(text))[: int(first["documents"])]
    (tmp_path / "short.txt").write_text("\n\n".join(whole))
    with pytest.raises(ValueError, match=f"{SECOND}: the tokens of a longer text; name another folder"):
        made(tmp_path / "short.txt", wordpiece, copied)


def test_a_full_disk_is_an_error_and_the_work_is_continued(folder, text, wordpiece, tmp_path, serial):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    shards = []

    def limited(jobs, *rest):
        for size in in_this_process(jobs, *rest):
            yield size
            shards.append(size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))

    tokenizing.results = limited
    try:
        with pytest.raises(OSError, match="File too large"):
            made(text, wordpiece, tmp_path / "tokens")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        tokenizing.results = in_this_process
    assert len(shards) == 1 and not list((tmp_path / "tokens").glob("*.part"))
    assert content(made(text, wordpiece, tmp_path / "tokens")) == content(folder)


def test_too_many_unknown_words_and_no_token_are_refused_at_the_end(wordpiece, tmp_path, serial):
    (tmp_path / "text.txt").write_text("the function\n\n안녕하세요 저는 학생입니다")
    with (
        pytest.raises(ValueError, match="tokenize: --vocab must know 95% or more of the text of --data"),
        pytest.warns(
            UserWarning, match=r"tokenize: \[UNK\] for .*, so far; with more than 5% at the"
        ) as said,
    ):
        made(tmp_path / "text.txt", wordpiece, tmp_path / "tokens")
    assert len(said) == 1
    work = tokenize_folder(
        data.documents(tmp_path / "text.txt"), wordpiece, tmp_path / "tokens", allow_unknown=True
    )
    assert work.shards == 0 and open_tokens(tmp_path / "tokens").unknown.share > 0.05
    (tmp_path / "text.txt").write_text("\u200b")
    with pytest.raises(ValueError, match="tokenize: --data must contain a token, got none"):
        made(tmp_path / "text.txt", wordpiece, tmp_path / "empty")


def test_locks(text, wordpiece, tmp_path, serial, monkeypatch):
    (tmp_path / "tokens").mkdir()
    with open(tmp_path / "tokens" / ".lock-0", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"another process tokenizes into .*tokens; wait until it ends"):
            made(text, wordpiece, tmp_path / "tokens")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"tokens cannot be locked \(No locks available\); make sure"):
        made(text, wordpiece, tmp_path / "tokens")
    open_tokens(tmp_path / "tokens")


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert code not in (0, None)
    return code if isinstance(code, str) else capsys.readouterr().err


def test_the_command_and_its_refusals(corpus, tmp_path, capsys, serial, monkeypatch):
    out, vocab = tmp_path / "tokens", ["--vocab", "300"]
    main(["tokenize", "--data", str(corpus), *vocab, "--out", str(out), "--workers", "1"])
    said = capsys.readouterr().out
    for part in ("tokens: 4,320 tokens, 60 documents, 3 shards, ", " MB/s; [UNK] for 0.00% of the tokens"):
        assert part in said
    main(["tokenize", "--data", str(corpus), *vocab, "--out", str(out)])
    assert "3 shards, complete before; " in capsys.readouterr().out
    empty = tmp_path / "empty.txt"
    empty.touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        (["--workers", 0], "tokenize: --workers must be 1 or more, got 0"),
        (["--workers", "x"], "invalid int value: 'x'"),
        (["--max-word-chars", 0], "tokenize: --max-word-chars must be 1 or more, got 0"),
        (["--vocab", "4"], "tokenize: --vocab must be in"),
        (["--vocab", tmp_path / "missing"], "tokenize: --vocab must be on this machine"),
        (["--data", out], "tokenize: --data must name text, got .*tokens, a folder of tokens"),
        (["--data", empty, *vocab], "empty.txt must contain a document"),
        (["--data", corpus, *vocab, "--out", tmp_path / "full"], "must be a new folder .*contains file"),
        (["--data", corpus, *vocab, "--out", empty], "--out must be a folder that can be created"),
        (["--data", corpus, *vocab, "--out", ""], "--out must name a folder"),
        (
            ["--data", corpus, "--vocab", 300, "--cased", "--out", out],
            "--out must have no tokens of another vocabulary",
        ),
    ):
        said = refused(capsys, "tokenize", "--out", tmp_path / "x", *arguments)
        assert re.search(message, said), said
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "tokenize: RANK must be less than WORLD_SIZE, 2, got 2" in refused(
        capsys, "tokenize", "--data", corpus, "--out", out
    )
    monkeypatch.setenv("RANK", "x")
    assert "tokenize: RANK must be a number, got 'x'" in refused(capsys, "tokenize", "--out", out)
