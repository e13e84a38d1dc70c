"""Scores of texts against the ones that were wanted: ROUGE-L and BLEU, by the packages of their authors.

ROUGE-L is the F1 of the longest common subsequence of words (Lin 2004), by rouge-score; BLEU compares n-grams
(Papineni et al. 2002), by sacrebleu (Post 2018). Both ignore the case, as vocabularies of BERT do.
"""

import importlib
import re
from collections.abc import Sequence
from typing import Any

WORD = re.compile(r"[^\W_]+")  # for English the words of rouge-score, whose own rule removes other letters


class _Words:
    """The words of a text, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def rouge_l(written: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """Return ROUGE-L of each text, from 0 to 1.

    Raises:
        ImportError: rouge-score is missing.
    """
    scorer = _imported("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    return [scorer.score(true, text)["rougeL"].fmeasure for text, true in zip(written, wanted, strict=True)]


def bleu(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return BLEU of all texts together, from 0 to 1.

    Raises:
        ImportError: sacrebleu is missing.
    """
    sacrebleu = _imported("sacrebleu")
    return sacrebleu.corpus_bleu(list(written), [list(wanted)], lowercase=True).score / 100


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = "the metrics of write need packages: pip install electra_fast[write]"
        raise ImportError(f"{text} ({error})") from None
