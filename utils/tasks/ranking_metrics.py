"""How well scores rank positive slides above negative ones, under many weightings of the same slides.

A weight of k counts as k copies of the slide; an undefined figure is NaN.
"""

import numpy as np

from utils.tasks.weighted import ratio


def auc_and_precision(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUC and average precision, each `(B,)`, of `scores (n,)` for `positive (n,)` bool under `weights (B, n)`.

    AUC is the probability that a positive scores higher than a negative, ties counted half. Average precision is the
    mean over the positives of the precision among all slides that score at least as high. NaN unless both positives
    and negatives have weight.
    """
    order = np.argsort(-scores, kind="stable")
    descending, positive = -scores[order], positive[order]
    weights = np.take(weights, order, axis=1)
    positive_weights = weights[:, positive]
    # For each positive: the weight of all slides, and of all positives, that score higher, or at least as high.
    higher, as_high = (np.searchsorted(descending, descending[positive], side) for side in ("left", "right"))
    positives_until = np.concatenate([[0], positive.cumsum()])
    sums, positive_sums = _from_zero(weights), _from_zero(positive_weights)
    all_higher, all_as_high = sums[:, higher], sums[:, as_high]
    positive_higher = positive_sums[:, positives_until[higher]]
    positive_as_high = positive_sums[:, positives_until[as_high]]
    positives = positive_sums[:, -1]
    negatives = sums[:, -1] - positives
    losses = (positive_weights * (all_higher - positive_higher + all_as_high - positive_as_high)).sum(axis=1) / 2
    precision = ratio(positive_as_high, all_as_high, empty=0)
    defined = np.where(negatives > 0, positives, 0)
    return 1 - ratio(losses, defined * negatives), ratio((positive_weights * precision).sum(axis=1), defined)


def within_strata(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray, strata: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return AUC and average precision as `auc_and_precision`, of slides compared with those of the same stratum `(n,)`
    only.

    The AUC is the share of all such pairs in which the positive scores higher; the average precision is the mean of the
    strata's, weighted by their positives.
    """
    sums = np.zeros((4, len(weights)))  # of AUC and average precision, then of their weights
    for stratum in np.unique(strata):
        rows = strata == stratum
        figures = auc_and_precision(positive[rows], scores[rows], weights[:, rows])
        positives, negatives = weights[:, rows] @ positive[rows], weights[:, rows] @ ~positive[rows]
        shares = positives * negatives, positives * (negatives > 0)
        sums += [*(np.nan_to_num(figure) * share for figure, share in zip(figures, shares, strict=True)), *shares]
    return ratio(sums[0], sums[2]), ratio(sums[1], sums[3])


def _from_zero(values: np.ndarray) -> np.ndarray:
    sums = np.zeros((len(values), values.shape[1] + 1))
    values.cumsum(axis=1, out=sums[:, 1:])
    return sums
