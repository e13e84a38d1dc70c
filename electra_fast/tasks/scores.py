"""The metrics of classification and regression, as scikit-learn and SciPy compute them.

The headline metric is first. Where a metric is not defined, its value is documented, and there is no warning.
"""

import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import numpy as np


def one_label(labels: np.ndarray, predicted: np.ndarray, num_labels: int) -> dict[str, float]:
    """Return accuracy, f1 and matthews of a classification with one label per item.

    Args:
        labels, predicted: ``[N]``, int, from 0 to num_labels - 1; N is 1 or more.
        num_labels: if 2, f1 is the F1 of label 1, as GLUE (Wang et al. 2019) reports for MRPC and QQP.
            Otherwise f1 is the mean F1 of the labels that occur in `labels` or in `predicted`.

    Returns:
        f1 is 0 if label 1 of 2 occurs in neither. matthews, R_K of Gorodkin (2004), is 0 if all of `labels`
        or all of `predicted` are equal.
    """
    metrics = package("sklearn.metrics")
    averaged = [1] if num_labels == 2 else None
    with warnings.catch_warnings(action="ignore"):  # matthews_corrcoef warns if there is only one label
        f1 = metrics.f1_score(labels, predicted, labels=averaged, average="macro", zero_division=0.0)
        return {
            "accuracy": float(metrics.accuracy_score(labels, predicted)),
            "f1": float(f1),
            "matthews": float(metrics.matthews_corrcoef(labels, predicted)),
        }


def several_labels(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return f1_micro, f1_macro and exact of a classification with any number of labels per item.

    Args:
        labels, predicted: ``[N, C]``, bool; N and C are 1 or more.

    Returns:
        f1_macro is the mean over all C labels. F1 is 0 if there is no true and no predicted label.
        exact is the share of the items of which all C labels are right.
    """
    f1_score = package("sklearn.metrics").f1_score
    # average="micro" and "macro" need two columns, because scikit-learn reads one as a binary classification.
    columns = zip(labels.T, predicted.T, strict=True)
    return {
        "f1_micro": float(f1_score(labels.ravel(), predicted.ravel(), zero_division=0.0)),
        "f1_macro": float(np.mean([f1_score(*column, zero_division=0.0) for column in columns])),
        "exact": float(np.mean((labels == predicted).all(1))),
    }


def regression(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return pearson, spearman and mse, all computed in float64.

    Args:
        targets, predicted: ``[N]``, float; N is 1 or more.

    Returns:
        pearson and spearman are NaN if N is 1, if all targets are equal, or if all predictions are equal.
    """
    stats = package("scipy.stats")
    targets, predicted = np.asarray(targets, np.float64), np.asarray(predicted, np.float64)
    return {
        "pearson": _correlation(stats.pearsonr, targets, predicted),
        "spearman": _correlation(stats.spearmanr, targets, predicted),
        "mse": float(np.mean((targets - predicted) ** 2)),
    }


def _correlation(of: Callable, targets: np.ndarray, predicted: np.ndarray) -> float:
    if len(targets) == 1:
        return float("nan")
    with warnings.catch_warnings(action="ignore"):  # both warn about constant input
        return float(of(targets, predicted).statistic)


def confusion(labels: np.ndarray, predicted: np.ndarray, num_labels: int) -> np.ndarray:
    """Return how many items of label i were predicted as label j, in row i and column j.

    Args:
        labels, predicted: ``[N]``, int, from 0 to num_labels - 1; N is 1 or more.

    Returns:
        ``[num_labels, num_labels]``, int64.
    """
    with warnings.catch_warnings(action="ignore"):  # scikit-learn warns if num_labels is 1
        return package("sklearn.metrics").confusion_matrix(labels, predicted, labels=range(num_labels))


def package(name: str) -> ModuleType:
    """Import a module of an optional package that computes metrics.

    Raises:
        ImportError: it is not installed; the message has the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"computing metrics needs a package: pip install electra_fast[tasks] ({error})"
        ) from None
