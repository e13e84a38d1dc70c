"""Folders of tokens in small shards: made in this process, and compared."""

import json

import torch

from electra_fast import data
from electra_fast.data import tokenize_folder

SHARD = 10_000  # characters


def in_this_process(jobs, count, prepare, *arguments):
    yield from map(prepare(*arguments), jobs)


def made(text, tokenizer, out, **options):
    tokenize_folder(data.documents(text), tokenizer, out, **options)
    return out


def content(folder):
    """The bytes of all files, and the manifest without times."""
    files = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".lock" not in p.name}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["sha256"]
    for entry in (*manifest["shards"], *manifest["index"]):
        del entry["mtime_ns"]
    return files, manifest


def assert_same(found, expected):
    assert torch.equal(found.first_tokens(), expected.first_tokens())
    assert torch.equal(found.offsets, expected.offsets) and torch.equal(found.lines, expected.lines)
    assert found.text == expected.text and found.unknown[:3] == expected.unknown[:3]
