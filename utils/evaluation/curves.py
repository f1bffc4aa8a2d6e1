"""ROC and precision-recall curves, averaged over repeats, with a band over patients."""

import numpy as np

from utils.evaluation.intervals import LEAST_OF_A_CLASS, wilson
from utils.evaluation.resampling import repeat_rows

_GRID = np.arange(201) / 200  # false positive rates of the band
_EACH_RATE = 1.644854  # standard errors to either side of a 90% interval


def mean_roc(
    is_class: np.ndarray, scores: np.ndarray, repeats: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the points of the ROC curve of `scores (n,)` for `is_class (n,)` bool: false and true positive rates,
    both `(m,)`, from (0, 0) to (1, 1).

    Straight lines join the points: a step for each slide, slanted only if slides inside and outside the class share a
    score, so that the area under the curve is the AUC. Of several repeats it is the mean at equal false positive rates.
    None if a class is missing.
    """
    curves = [_roc(is_class[rows], scores[rows]) for rows in _rows_by_repeat(scores, repeats)]
    defined = [curve for curve in curves if curve is not None]
    if not defined:
        return None
    rates = np.unique(np.concatenate([false_rates for false_rates, _ in defined]))
    heights = np.mean([_heights(rates, *curve) for curve in defined], axis=0)
    points = np.stack([np.repeat(rates, 2), heights.ravel()])
    false_rates, true_rates = points[:, np.append(True, (np.diff(points) != 0).any(axis=0))]
    return false_rates, true_rates


def mean_precision(
    is_class: np.ndarray, scores: np.ndarray, repeats: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the points of the precision-recall curve of `scores (n,)` for `is_class (n,)` bool: recalls and
    precisions, both `(m,)`, from recall 0 to 1.

    It is level between the recalls that occur, so that the area under it is the average precision. Of several repeats
    it is the mean at equal recall. None if a class is missing.
    """
    curves = []
    for rows in _rows_by_repeat(scores, repeats):
        (true,), (false,) = _positives(is_class[rows], scores[rows], np.ones((1, len(rows))))
        if true[-1] > 0 and false[-1] > 0:
            rising = np.diff(true, prepend=0) > 0
            curves.append((true[rising] / true[-1], (true / (true + false))[rising]))
    if not curves:
        return None
    recalls = np.unique(np.concatenate([recall for recall, _ in curves]))
    precisions = np.mean([precision[np.searchsorted(recall, recalls)] for recall, precision in curves], axis=0)
    return np.append(0, np.repeat(recalls, 2)[:-1]), np.repeat(precisions, 2)


def roc_band(
    is_class: np.ndarray, scores: np.ndarray, patients: np.ndarray, repeats: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return a band around the points of `mean_roc`: false positive rates, its lower and its upper end, each `(G,)`.

    Around each point lies the rectangle of the Wilson intervals of both rates, of 90% each (joint confidence
    rectangles: Campbell 1994, https://doi.org/10.1002/sim.4780130508); slides of a patient count as one. The band is
    what the rectangles cover. At a false positive rate it held the truth in at least 0.91, mostly 0.96, of simulated
    cohorts. None if a class has fewer than two patients.
    """
    curve = mean_roc(is_class, scores, repeats)
    counts = [len(np.unique(patients[rows])) for rows in (~is_class, is_class)]
    if curve is None or min(counts) < LEAST_OF_A_CLASS:
        return None
    limits = np.array(
        [[wilson(rate, count, _EACH_RATE) for rate in rates] for rates, count in zip(curve, counts, strict=True)]
    )
    (false_low, false_high), (true_low, true_high) = limits.transpose(0, 2, 1)
    # Both ends rise along the curve, so the outermost rectangle that reaches a rate decides.
    last = np.searchsorted(false_low, _GRID, side="right") - 1
    first = np.minimum(np.searchsorted(false_high, _GRID), len(false_high) - 1)
    return _GRID, true_low[first], true_high[last]


def _positives(is_class: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight `(B, k)` of the true and of the false positives at each score that occurs, the highest first,
    under each row of `weights (B, n)`.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    true, false = ((weights * mask)[:, order].cumsum(axis=1)[:, last_of_ties] for mask in (is_class, ~is_class))
    return true, false


def _roc(is_class: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    (true,), (false,) = _positives(is_class, scores, np.ones((1, len(scores))))
    if not (true[-1] > 0 and false[-1] > 0):
        return None
    return np.append(0, false / false[-1]), np.append(0, true / true[-1])


def _heights(rates: np.ndarray, false_rates: np.ndarray, true_rates: np.ndarray) -> np.ndarray:
    """Return the lowest and highest true positive rate `(m, 2)` of a curve at each of the `rates (m,)`."""
    corners = np.unique(false_rates)
    arrives = true_rates[np.searchsorted(false_rates, corners, "left")]
    leaves = true_rates[np.searchsorted(false_rates, corners, "right") - 1]
    before = np.searchsorted(corners, rates, "right") - 1
    after = np.minimum(before + 1, len(corners) - 1)
    share = (rates - corners[before]) / np.maximum(corners[after] - corners[before], np.finfo(float).tiny)
    between = leaves[before] + share * (arrives[after] - leaves[before])
    at_corner = corners[before] == rates
    return np.stack([np.where(at_corner, arrives[before], between), np.where(at_corner, leaves[before], between)], 1)


def _rows_by_repeat(scores: np.ndarray, repeats: np.ndarray | None) -> list[np.ndarray]:
    """Return the indices of the rows of each repeat; all `scores (n,)` are of one repeat if there are no `repeats`."""
    return [np.arange(len(scores))] if repeats is None else repeat_rows(repeats)
