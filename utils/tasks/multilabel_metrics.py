"""Metrics of several labels of which each is present or absent, or unknown; an undefined one is NaN.

Each is computed for many weightings of the same slides at once; a weight of k counts as k copies of the slide. A slide
whose label is unknown does not count for that label.
"""

from collections.abc import Callable, Sequence

import numpy as np

from utils.tasks.bases import Basis, PairRanking, Precision
from utils.tasks.ranking_metrics import auc_and_precision, within_strata

METRICS = ("auc", "average_precision")
UNKNOWN = -1


def metric_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return `METRICS`, the means over the labels, then those of each label."""
    return *METRICS, *(name for label in labels for name in names_of(label))


def names_of(label: str) -> tuple[str, str]:
    """Return the names of the metrics of a label."""
    return f"auc_{label}", f"average_precision_{label}"


def multilabel_metrics(
    targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the metrics `metric_names(labels)` under each row of `weights (B, n)`, as `(B,)`.

    `targets (n, K)` are 1, 0 or `UNKNOWN`, `probabilities (n, K)`. The mean over the labels is undefined if a label's
    metric is: slides both with and without the label have to be known.
    """

    def figures(label: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return auc_and_precision(targets[rows, label] == 1, probabilities[rows, label], weights[:, rows])

    return _by_label(figures, targets, labels)


def multilabel_metrics_within(
    targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, strata: np.ndarray, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the same metrics, of slides compared with those of the same stratum `(n,)` only."""

    def figures(label: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positive, scores = targets[rows, label] == 1, probabilities[rows, label]
        return within_strata(positive, scores, weights[:, rows], strata[rows])

    return _by_label(figures, targets, labels)


def _by_label(
    figures: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]], targets: np.ndarray, labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the metrics given the `figures` of a label among the rows `(n,)` bool where it is known."""
    each = [figures(label, known) for label, known in enumerate((targets != UNKNOWN).T)]
    named = [dict(zip(names_of(label), pair, strict=True)) for label, pair in zip(labels, each, strict=True)]
    means = dict(zip(METRICS, np.mean(each, axis=0), strict=True))
    return means | {name: figure for entry in named for name, figure in entry.items()}


def basis(metric: str, targets: np.ndarray, labels: Sequence[str]) -> Basis:
    """Return what a metric rests on: the slides with and without each label, or the label it is of."""
    own = [index for index, label in enumerate(labels) if metric in names_of(label)]
    columns = targets[:, own or range(len(labels))].T
    kind = PairRanking if metric == "auc" or metric.startswith("auc_") else Precision
    return kind(columns == 1, columns == 0)
