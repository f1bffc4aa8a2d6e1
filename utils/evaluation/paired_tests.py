"""Paired tests of two models on the same slides: a bootstrap over patients, a t test over folds corrected for shared
training slides, and Holm's correction for many pairs.
"""

from collections.abc import Sequence

import numpy as np

from utils.evaluation.bootstrap import interval

# Values that differ by less are equal but for rounding.
_EQUAL = 1e-12


def paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float] | None:
    """Return the 95% percentile interval `(low, high)` of `first - second`, and the two-sided p of no difference.

    `first (resamples,)` and `second (resamples,)` are a metric of two models over the same resampled patients
    (`bootstrap.bootstrap_draws` with one seed), NaN if undefined. p is twice the share of resamples on the rarer side
    of 0, plus those at 0 and one more: it is never 0, and about 0.05 if the interval ends at 0. Undefined resamples are
    left out; None if they are more than half.
    """
    differences = first - second
    limits = interval(differences)
    if limits is None:
        return None
    defined = differences[~np.isnan(differences)]
    rarer = min((defined <= _EQUAL).sum(), (defined >= -_EQUAL).sum())
    return *limits, min(1.0, 2 * float(rarer + 1) / (len(defined) + 1))


def nadeau_bengio(
    differences: Sequence[float], n_train: Sequence[int], n_test: Sequence[int]
) -> tuple[float, float] | None:
    """Return the corrected resampled t and its two-sided p for `differences (J,)` of two runs over J folds.

    `n_train (J,)` and `n_test (J,)` count the slides each fold was trained and tested on. Trainings share most of
    their slides, so the variance of the mean is (1/J + n_test/n_train) s^2, with n_test/n_train averaged over the folds
    and J - 1 degrees of freedom (Nadeau and Bengio 2003, https://doi.org/10.1023/A:1024068626366). None for fewer than
    two folds, or differences that do not vary.
    """
    from scipy.stats import t as student  # slow to import, and not always needed

    folds = len(differences)
    if folds < 2 or np.ptp(differences) <= _EQUAL:
        return None
    ratio = np.mean(np.asarray(n_test) / np.asarray(n_train))
    t = np.mean(differences) / np.sqrt((1 / folds + ratio) * np.var(differences, ddof=1))
    return float(t), float(2 * student.sf(abs(t), folds - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values adjusted for their number m (Holm 1979, https://www.jstor.org/stable/4615733).

    The smallest is multiplied by m, the next by m - 1 and so on; none is smaller than the one before it, or above 1.
    A None stays None and does not count.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    ascending = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, index) in enumerate(ascending):
        largest = max(largest, min(1.0, (len(ascending) - rank) * p))
        adjusted[index] = largest
    return adjusted
