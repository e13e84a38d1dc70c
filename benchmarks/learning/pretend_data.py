"""A small text and small files of all tasks, in the formats of the real ones; their content means nothing."""

import io
import itertools
import json
import lzma
import tarfile
from pathlib import Path

from benchmarks.learning.on_gpu import TEXTS
from benchmarks.learning.probes import PAIRS

DOCUMENTS = 2000  # of each text, so that several batches are held out
ITEMS = 40


def write(folder: Path) -> None:
    """Write everything that `on_gpu.pack` needs into a folder."""
    for name, content in {**texts(), **classified(), **pairs(), **tagged(), **spoken()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        whole = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(lzma.compress(whole) if name.endswith(".xz") else whole)


def texts() -> dict[str, str]:
    documents = (f"a text of its own, number {i}, with words that come again" for i in range(DOCUMENTS))
    return dict.fromkeys(TEXTS, "\n\n".join(documents))


def classified() -> dict[str, str]:
    """Return the files of GoEmotions, whose groups 1 and 3 are used, and of Banking77."""
    words = itertools.cycle([("bad", 1), ("good", 3)])
    rows = "".join(f"it is {word}\t{group}\tid\n" for word, group in itertools.islice(words, ITEMS))
    found = {f"goemotions/group_{split}.tsv.xz": rows for split in ("train", "dev", "test")}
    rows = "".join(f"where is my {name}?,{name}\n" for name in ("card", "money")) * (ITEMS // 2)
    return found | {f"banking77/{file}": f"text,category\n{rows}" for file in ("train.csv.xz", "test.csv")}


def pairs() -> dict[str, bytes]:
    """Return BLiMP's archive, with two paradigms."""
    pair = json.dumps({"sentence_good": "a text comes", "sentence_bad": "a text come"}) + "\n"
    archive, content = io.BytesIO(), (pair * PAIRS).encode()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("one", "two"):
            member = tarfile.TarInfo(f"blimp/{name}.jsonl")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {"blimp/blimp_data.tar.xz": archive.getvalue()}


def tagged() -> dict[str, str]:
    """Return the files of WNUT17."""
    sentences = "Ann\tB-person\nis\tO\nin\tO\nRome\tB-location\n\n" * ITEMS
    return dict.fromkeys(("wnut17/wnut17train.conll.xz", "wnut17/emerging.test.annotated"), sentences)


def spoken() -> dict[str, str]:
    """Return the files of SNIPS, with two intents."""
    found = {}
    for intent, entity in (("PlayMusic", "artist"), ("GetWeather", "city")):
        data = [{"text": f"{intent} of "}, {"text": "the one", "entity": entity}, {"text": " now"}]
        content = json.dumps({intent: [{"data": data}] * (ITEMS // 2)})
        found |= {f"snips/train_{intent}_full.json.xz": content, f"snips/validate_{intent}.json": content}
    return found
