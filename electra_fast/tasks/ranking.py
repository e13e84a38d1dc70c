"""The metrics of ranking, as trec_eval computes them."""

from statistics import fmean

import numpy as np


def ranking(relevance: list[list[float]], scores: list[list[float]], cut: int = 10) -> dict[str, float]:
    """Return mrr@<cut>, ndcg@<cut> and map, each a mean over all queries.

    - mrr: 1 / the rank of the first relevant candidate, or 0 if none of the first `cut` is relevant.
    - ndcg (Järvelin and Kekäläinen 2002): the gain of a candidate is its relevance, not 2^relevance - 1, and
      its discount is log2(rank + 1), as in trec_eval and `sklearn.metrics.ndcg_score`.
    - map: the precision at the rank of each relevant candidate, averaged; it has no cut.

    A query without a relevant candidate counts as 0 in all three. Among candidates with equal scores the
    least relevant is first, so that a model with the same score for all candidates gains nothing from their
    order in a file. (trec_eval orders them by their names.) A score of NaN is the lowest.

    Args:
        relevance: of each candidate of each query, 0 or more; 0 is not relevant. There is 1 query or more.
        scores: of the same shape; a higher score is a better rank.
        cut: 1 or more.

    Raises:
        ValueError: the shapes differ, or there is no query.
    """
    ranked = [_ranked(*query) for query in zip(relevance, scores, strict=True)]
    return {
        f"mrr@{cut}": fmean(_reciprocal_rank(query[:cut]) for query in ranked),
        f"ndcg@{cut}": fmean(_ndcg(query, cut) for query in ranked),
        "map": fmean(_average_precision(query) for query in ranked),
    }


def _ranked(relevance: list[float], scores: list[float]) -> np.ndarray:
    """Return the relevance of the candidates of a query, ordered by their scores."""
    order = np.lexsort((relevance, -np.asarray(scores, np.float64)))  # the last key is the first to sort by
    return np.asarray(relevance, np.float64)[order]


def _reciprocal_rank(ranked: np.ndarray) -> float:
    (relevant,) = np.nonzero(ranked)
    return 1 / (1 + int(relevant[0])) if relevant.size else 0.0


def _ndcg(ranked: np.ndarray, cut: int) -> float:
    ideal = _dcg(np.sort(ranked)[::-1][:cut])
    return _dcg(ranked[:cut]) / ideal if ideal else 0.0


def _dcg(ranked: np.ndarray) -> float:
    return float(np.sum(ranked / np.log2(np.arange(len(ranked)) + 2)))


def _average_precision(ranked: np.ndarray) -> float:
    ranks = np.flatnonzero(ranked) + 1
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks)) if ranks.size else 0.0
