"""What a chatbot needs: the intent of a query, the best documents for it, the best reply.

Each takes a fine-tuned folder; a program that asks often loads it once, as a `Ranker` or an `IntentReader`.
"""

from collections.abc import Sequence
from pathlib import Path

from electra_fast.errors import must
from electra_fast.use.fine_tuned import IntentReader, Ranked, Ranker, Understood
from electra_fast.use.texts import listed, require_string


def rank(query: str, documents: Sequence[str], model: str | Path | Ranker) -> list[Ranked]:
    """Return the documents by the probability that they answer the query, the highest first.

    Args:
        query: a text.
        documents: texts; one that is too long is cut off.
        model: the folder of `finetune rank`, or a `Ranker`.

    Raises:
        ValueError, OSError: a text has no word, or the folder has no model of this kind.
    """
    return (model if isinstance(model, Ranker) else Ranker(model))(query, documents)


def reply(context: str | Sequence[str], candidates: Sequence[str], model: str | Path | Ranker) -> Ranked:
    """Return the candidate that is the best reply to a conversation, by a ranker.

    Args:
        context: the last message, or the turns of the conversation, the last one at the end. If they are too
            long, the first turns are left out.
        candidates: possible replies.
        model: as in `rank`, trained with conversations as queries and replies as documents.

    Raises:
        ValueError, OSError: as in `rank`; or there is no candidate.
    """
    model = model if isinstance(model, Ranker) else Ranker(model)
    context, candidates = listed("reply: context", context), listed("reply: candidates", candidates)
    if not candidates:
        raise ValueError(must("reply: candidates", "have at least one text", "none"))
    turns = [context] if isinstance(context, str) else context
    for number, turn in enumerate(turns, start=1):
        require_string(f"reply: turn {number}", turn)
    while len(turns) > 1 and model.tokens(" ".join(turns)) > model.max_len // 2:
        turns.pop(0)
    return model(" ".join(turns), candidates)[0]


def intent(texts: str | Sequence[str], model: str | Path | IntentReader) -> list[Understood] | Understood:
    """Return the intent of utterances with their slots; for one string, the result is not a list.

    Args:
        texts: texts.
        model: the folder of `finetune intent`, or an `IntentReader`.

    Raises:
        ValueError, OSError: a text has no word, or the folder has no model of this kind.
    """
    return (model if isinstance(model, IntentReader) else IntentReader(model))(texts)
