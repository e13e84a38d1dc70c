"""The examples, run as in their docstrings."""

import subprocess
import sys
from pathlib import Path

from transformers import ElectraForMaskedLM, ElectraForPreTraining, EncoderDecoderModel

pytest_plugins = ["corpus"]
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(cls, folder):
    model, facts = cls.from_pretrained(folder, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    return model


def test_hf_trainer(cache, tmp_path):
    said = run("hf_trainer.py", "--steps", "3", "--out", str(tmp_path))
    assert "in 3 steps" in said and "error  <- replaced" in said
    generator = loaded(ElectraForMaskedLM, tmp_path / "generator")
    discriminator = loaded(ElectraForPreTraining, tmp_path / "discriminator")
    tables = (half.get_input_embeddings().weight for half in (generator, discriminator))
    assert next(tables).equal(next(tables))


def test_plain_loop(cache, tmp_path):
    said = run("plain_loop.py", "--steps", "3", "--out", str(tmp_path))
    assert [line.split(":")[0] for line in said.splitlines()] == ["step 0", "step 2"]
    loaded(ElectraForPreTraining, tmp_path)


def test_titles(cache, tmp_path):
    texts = tmp_path / "articles.txt"
    names = [f"{colour} {animal}" for colour in ("red", "green", "blue") for animal in ("cat", "dog", "bird")]
    texts.write_text(
        "".join(f"The {name}\nThe {name} has number {i}.\n\n" for i in range(23) for name in names)
    )
    out = tmp_path / "model"
    sizes = ("--layers", "1", "--vocab", "200", "--batch", "4", "--minutes", "0.02")
    said = run("titles.py", "--data", str(texts), "--out", str(out), *sizes)
    assert said.count("written:") == 10 and "the first 5 words of the source      ROUGE-L 0." in said
    assert "the model                            ROUGE-L" in said
    loaded(EncoderDecoderModel, out)
