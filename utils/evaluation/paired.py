"""Whether one model beats another on the same slides: from patients resampled alike for both, by a t test over folds
that knows how much their trainings share, and corrected for many pairs.
"""

from collections.abc import Sequence

import numpy as np

from utils.evaluation.bootstrap import interval

# Figures that differ by less are equal but for rounding.
_EQUAL = 1e-12


def paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float] | None:
    """The 95% percentile interval `(low, high)` of `first - second`, and the two-sided p of no difference.

    `first (resamples,)` and `second (resamples,)` are one figure of two models over the same resampled patients
    (`statistics.bootstrap_draws` of one seed), NaN where undefined. p is twice the share of resamples on the rarer side
    of 0, those at 0 and one more counted in: never 0, and about 0.05 where the interval ends at 0. Resamples where a
    figure is undefined do not count; None when it is undefined in more than half of them.
    """
    differences = first - second
    limits = interval(differences)
    if limits is None:
        return None
    known = differences[~np.isnan(differences)]
    rarer = min((known <= _EQUAL).sum(), (known >= -_EQUAL).sum())
    return *limits, min(1.0, 2 * float(rarer + 1) / (len(known) + 1))


def nadeau_bengio(
    differences: Sequence[float], n_train: Sequence[int], n_test: Sequence[int]
) -> tuple[float, float] | None:
    """The corrected resampled t and its two-sided p for `differences (J,)` of two runs over J folds.

    `n_train (J,)` and `n_test (J,)` count the slides each fold was trained and tested on. Trainings share most of
    their slides, so the variance of the mean is taken as (1/J + n_test/n_train) s^2, that ratio averaged over the
    folds, with J - 1 degrees of freedom (Nadeau and Bengio 2003, https://doi.org/10.1023/A:1024068626366). None for
    fewer than two folds, or differences that do not vary.
    """
    from scipy.stats import t as student  # slow to import, and not always needed

    folds = len(differences)
    if folds < 2 or np.ptp(differences) <= _EQUAL:
        return None
    ratio = np.mean(np.asarray(n_test) / np.asarray(n_train))
    t = np.mean(differences) / np.sqrt((1 / folds + ratio) * np.var(differences, ddof=1))
    return float(t), float(2 * student.sf(abs(t), folds - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p's adjusted for their number (Holm 1979, https://www.jstor.org/stable/4615733): the smallest times m, the
    next times m - 1 and so on, none smaller than the one before it, none above 1. A None stays None and does not count.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    reached = 0.0
    for rank, (p, index) in enumerate(known):
        reached = max(reached, min(1.0, (len(known) - rank) * p))
        adjusted[index] = reached
    return adjusted
