"""The metrics of tagging: F1, precision and recall of whole entities, as conlleval computes them.

Source: conlleval of the CoNLL-2000 shared task (Tjong Kim Sang and Buchholz 2000). The package seqeval gives
the same results by default.
"""

from collections import Counter

from electra_fast.errors import must


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Return (type, start, end) of each entity of a sentence; `end` is the word after the last.

    Args:
        tags: "O", "B-<type>" or "I-<type>" per word. An "I-" that is first, or that follows "O" or another
            type, begins an entity.
    """
    found = set()
    start, type = 0, ""  # of the entity that is open; "": none is open
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")  # the name of "O" is ""
        if prefix == "I" and name == type:
            continue
        if type:
            found.add((type, start, position))
        start, type = position, name
    return found


def entity_scores(true: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Return f1, precision and recall over the entities of all types.

    Args:
        true, predicted: the tags of each sentence, as for `entities`.

    Returns:
        precision is 0 if no entity was predicted, recall is 0 if there is no true entity.

    Raises:
        ValueError: true and predicted differ in the number of sentences or of tags in a sentence.
    """
    return _scores(*(counts.total() for counts in _count(true, predicted)))


def per_type(true: list[list[str]], predicted: list[list[str]]) -> dict[str, dict[str, float]]:
    """Return f1, precision, recall and support of each type, sorted by type.

    The types are those of the true and of the predicted entities; support is the number of true entities.
    Arguments, results and errors are as for `entity_scores`.
    """
    right, found, wanted = _count(true, predicted)
    return {
        type: _scores(right[type], found[type], wanted[type]) | {"support": wanted[type]}
        for type in sorted(found | wanted)
    }


def _count(true: list[list[str]], predicted: list[list[str]]) -> tuple[Counter, Counter, Counter]:
    """Return how many entities of each type are predicted right, predicted, and true."""
    right, found, wanted = Counter(), Counter(), Counter()
    for sentence, (tags, guess) in enumerate(zip(true, predicted, strict=True)):
        if len(tags) != len(guess):
            subject = f"entity_scores: predicted[{sentence}]"
            raise ValueError(must(subject, f"have {len(tags)} tags", len(guess)))
        wanted_here, found_here = entities(tags), entities(guess)
        right.update(type for type, _, _ in wanted_here & found_here)
        found.update(type for type, _, _ in found_here)
        wanted.update(type for type, _, _ in wanted_here)
    return right, found, wanted


def _scores(right: int, found: int, wanted: int) -> dict[str, float]:
    precision = right / found if found else 0.0
    recall = right / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}
