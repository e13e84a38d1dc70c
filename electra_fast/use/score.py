"""How probable a text is: to choose among the hypotheses of a translator, or to filter texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from electra_fast.errors import must
from electra_fast.use.likelihood import LOG_PROBS, scorers
from electra_fast.use.pretrained import Pretrained, load
from electra_fast.use.texts import Text, one_or_many, tokens_of


class Score(NamedTuple):
    """Sums over the tokens of a text, in nats; a longer text has lower sums."""

    text: str
    tokens: int
    generator: float | None  # the pseudo-log-likelihood, None if it was not asked for
    discriminator: float | None  # the log-probability that each token is the original
    electric: float | None  # the negative energy: the log-probability of each token, up to a constant near 0


@one_or_many
def score(texts: Sequence[Text], model: str | Path | Pretrained, by: str | None = None) -> list[Score]:
    """Return scores of texts: the higher, the more probable.

        generator       sum over t of log p_G(x_t | x without x_t), each token masked in turn
        discriminator   sum over t of log p_D(x_t is the original | x), in one pass
        electric        sum over t of -E(x)_t, in one pass, by a discriminator of objective=electric

    The first is the pseudo-log-likelihood (Salazar et al. 2020). It needs as many passes as the text has
    tokens. The last one estimates it (Clark et al. 2020b, section 4). Texts of different lengths are compared
    by the sum per token.

    Args:
        texts: texts, or lists of token ids without [CLS] and [SEP]; for one text, the result is not a list.
        model: the folder of a run, of an ElectraForPreTraining or of an ElectraForMaskedLM, or the result of
            `load`.
        by: generator, discriminator or electric; None: electric if the model was trained so, else its halves.

    Raises:
        ValueError, OSError: a text has no word, or the model cannot be loaded, does not have this half or was
            trained with another objective.
    """
    if by not in (None, *LOG_PROBS):
        raise ValueError(must("score: by", f"be one of {', '.join(LOG_PROBS)}", repr(by)))
    model = load(model, call="score")
    found = tokens_of("score", texts, model.tokenizer)
    ids = [tokens.ids for tokens in found]
    wanted = scorers(model) if by is None else [by]
    sums = {
        name: [float(x.sum(dtype="float64")) for x in log_probs(model, ids)]
        if name in wanted
        else [None] * len(ids)
        for name, log_probs in LOG_PROBS.items()
    }
    rows = zip(found, *sums.values(), strict=True)
    return [Score(tokens.text, len(tokens.ids), *each) for tokens, *each in rows]
