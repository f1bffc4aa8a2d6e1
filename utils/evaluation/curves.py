"""ROC and precision-recall curves, averaged over repeats, with a band over resampled patients."""

import numpy as np

from utils.evaluation.resampling import RESAMPLES, mean_of_defined, repeat_rows, resampled

# False positive rates of the band; 0 is there twice, since a curve may rise before its first false positive.
_GRID = np.append(0, np.arange(201) / 200)


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
    is_class: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    seed: int,
    *,
    repeats: np.ndarray | None = None,
    resamples: int = RESAMPLES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the 95% percentile interval of the ROC curve over resampled patients: false positive rates, low and high,
    each `(G,)`. None if the curve is undefined for the slides, or for more than half of the resamples, and for one
    patient.
    """
    if len(np.unique(patients)) == 1:
        return None
    blocks = [_curves(is_class, scores, weights, repeats) for weights in resampled(patients, seed, resamples)]
    curves = np.concatenate(blocks)
    defined = curves[~np.isnan(curves).any(axis=1)]
    if mean_roc(is_class, scores, repeats) is None or len(defined) < resamples / 2:
        return None
    low, high = np.percentile(defined, [2.5, 97.5], axis=0)
    return _GRID, low, high


def _curves(is_class: np.ndarray, scores: np.ndarray, weights: np.ndarray, repeats: np.ndarray | None) -> np.ndarray:
    """Return true positive rates `(B, G)` at `_GRID` under `weights (B, n)`; NaN if a class has no weight."""
    rows_of = _rows_by_repeat(scores, repeats)
    curves = np.full((len(rows_of), len(weights), len(_GRID)), np.nan)
    for repeat, rows in zip(curves, rows_of, strict=True):
        for curve, true, false in zip(repeat, *_positives(is_class[rows], scores[rows], weights[:, rows]), strict=True):
            if true[-1] > 0 and false[-1] > 0:
                curve[0] = 0
                curve[1:] = np.interp(_GRID[1:], np.append(0, false / false[-1]), np.append(0, true / true[-1]))
    return mean_of_defined(curves)


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
