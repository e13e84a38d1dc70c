"""Choose an answer without training: which option belongs into the text, according to the discriminator."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from electra_fast.errors import must
from electra_fast.tasks.examples import token_ids
from electra_fast.use.likelihood import electric_log_probs, original_log_probs
from electra_fast.use.pretrained import Pretrained, load, most_tokens
from electra_fast.use.texts import SHOWN, listed, one_or_many, require_string, warn_unknown

TEXT, OPTION = "{text}", "{option}"
TEMPLATES = {
    "sentiment": "{text} It was {option}.",
    "topic": "{text} This is about {option}.",
    "intent": "{text} This is a question about {option}.",
}
OPTIONS = {"sentiment": ("terrible", "great")}  # used if none are given


class Chosen(NamedTuple):
    option: str
    probabilities: dict[str, float]  # of all options; their sum is 1
    scores: dict[str, float]  # of all options: the mean of log p(original) over its tokens, in nats


@one_or_many
def choose(
    prompts: Sequence[str],
    options: Sequence[str] | None,
    model: str | Path | Pretrained,
    template: str = "sentiment",
) -> list[Chosen]:
    """Return the option that fits best into each text.

    An option is put into the text, and the discriminator reads the whole in one pass, however many tokens the
    option has. Its score is the mean over its tokens of log p(x_t is the original), as in prompt-based
    learning with ELECTRA (Xia et al. 2022, arXiv 2205.15223; Ni and Kao 2022, arXiv 2207.08141). A softmax
    over the scores gives the probabilities, which are not calibrated. A text that is too long is cut off at
    its end.

    Args:
        prompts: texts, which are put into the template, or texts with {option}; for one text, the result is
            not a list.
        options: two or more; None: those of the template, which only "sentiment" has.
        model: the folder of a run or of an ElectraForPreTraining, or the result of `load`.
        template: one of TEMPLATES, or a text with {text} and then {option}.

    Raises:
        ValueError, OSError: a text has no word, an option is empty, repeated or longer than the model, the
            template is wrong, or the model cannot be loaded or has no discriminator.
    """
    split = [
        _split(n, prompt, TEMPLATES.get(template, template)) for n, prompt in enumerate(prompts, start=1)
    ]
    options = _checked(OPTIONS.get(template) if options is None else options)
    model = load(model, call="choose")
    tokenizer, most = model.tokenizer, most_tokens(model.require("choose", "discriminator"))
    inserted = token_ids(options, tokenizer)
    parts = iter(token_ids([part for prompt in split for part in prompt], tokenizer))
    sequences, starts = [], []
    for number, (before, text, between, after) in enumerate(zip(parts, parts, parts, parts, strict=True)):
        if not text and OPTION not in prompts[number]:
            got = repr(prompts[number][:SHOWN])
            raise ValueError(must(f"choose: text {number + 1}", "have a word", got))
        for option, ids in zip(options, inserted, strict=True):
            space = most - sum(map(len, (before, between, after, ids)))
            if not ids or space < 0:
                rule, got = f"have 1 to {len(ids) + space} tokens for this model and template", len(ids)
                raise ValueError(must(f"choose: option {option[:SHOWN]!r}", rule, got))
            start = [*before, *text[:space], *between]
            starts.append(len(start))
            sequences.append(np.array([*start, *ids, *after], np.int32))
    warn_unknown("choose", sequences, tokenizer)
    log_probs = electric_log_probs if model.electric else original_log_probs
    pairs = zip(log_probs(model, sequences, "choose"), starts, strict=True)
    lengths = [len(ids) for _ in prompts for ids in inserted]
    scores = [x[start : start + n].mean() for (x, start), n in zip(pairs, lengths, strict=True)]
    return [_chosen(options, row) for row in np.reshape(scores, (-1, len(options)))]


def _chosen(options: Sequence[str], scores: np.ndarray) -> Chosen:
    shares = np.exp(scores - scores.max())
    found = (dict(zip(options, x.tolist(), strict=True)) for x in (shares / shares.sum(), scores))
    return Chosen(options[int(scores.argmax())], *found)


def _checked(options: Sequence[str] | None) -> list[str]:
    rule = "be two or more different texts"
    if options is None:
        remedy = f"only the template {', '.join(OPTIONS)} has options of its own"
        raise ValueError(must("choose: options", rule, "none", remedy))
    found = listed("choose: options", options)
    for number, option in enumerate(found, start=1):
        require_string(f"choose: option {number}", option)
    if isinstance(found, str) or len(found) < 2 or len(set(found)) < len(found):
        raise ValueError(must("choose: options", rule, found))
    return found


def _split(number: int, prompt: str, template: str) -> tuple[str, str, str, str]:
    """Return the text of a prompt and what is before it, between it and the option, and after the option."""
    require_string(f"choose: text {number}", prompt)
    if OPTION in prompt:
        text, _, after = prompt.partition(OPTION)
        if OPTION in after:
            raise ValueError(must(f"choose: text {number}", f"contain {OPTION} once", repr(prompt[:SHOWN])))
        return "", text, "", after
    before, has_text, rest = template.partition(TEXT)
    between, has_option, after = rest.partition(OPTION)
    if not (has_text and has_option) or TEXT in rest or OPTION in before + after:
        rule = f"be one of {', '.join(TEMPLATES)}, or contain {TEXT} and then {OPTION}, each once"
        raise ValueError(must("choose: template", rule, repr(template)))
    return before, prompt, between, after
