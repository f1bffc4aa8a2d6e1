"""Paired tests of two models on the same slides, for cohorts like this one and for these very models; a t test over
folds corrected for shared training slides; and Holm's correction for many tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation.intervals import LEAST_PATIENTS, Interval, degrees, quantile
from utils.evaluation.resampling import jackknife_variance

# Values that differ by less are equal but for rounding.
_EQUAL = 1e-12


@dataclass(frozen=True)
class PairedTest:
    """The 95% interval of a difference and the two-sided p of no difference; None if they cannot be told."""

    interval: Interval
    p: float | None


def paired_test(
    difference: float | None, without: np.ndarray, patients: int, inflation: float = 1, most: float = 1
) -> PairedTest:
    """Test a `difference` of two models by a jackknife over patients.

    `without (G,)` is the difference without each patient in turn; `patients` counts those of the rarest class, on which
    the t quantile depends. The variance is multiplied by `inflation` (see `training_inflation`); no difference exceeds
    `most`. Models that answer alike have p = 1 and no interval; fewer than 5 patients have neither.
    """
    from scipy.stats import t as student

    if difference is None or len(without) < LEAST_PATIENTS:
        return PairedTest(None, None)
    error = np.sqrt(inflation * jackknife_variance(without))
    if error <= _EQUAL:
        return PairedTest(None, 1.0 if abs(difference) <= _EQUAL else None)
    half = quantile(patients, len(without)) * error
    p = 2 * student.sf(abs(difference) / error, degrees(patients, len(without)))
    return PairedTest((max(-most, float(difference - half)), min(most, float(difference + half))), float(p))


def training_inflation(n_train: Sequence[int], n_test: Sequence[int], repeats: int, patients: int) -> float:
    """Return by what the variance over patients is multiplied, so that it also covers other training slides.

    `n_train (J,)` and `n_test (J,)` count the slides each fold was trained and tested on. The trainings of a
    cross-validation share most slides, so no estimate of what other slides would change is unbiased (Bengio and
    Grandvalet 2004, https://www.jmlr.org/papers/v5/grandvalet04a.html). 1 + n_test/n_train (2.5 - 1/repeats)
    sqrt(75/patients) is what four kinds of algorithms need on average in simulation. Repeats average out the chance of
    splits and seeds, not that of the training slides, whose share of the variance grows; with more patients
    algorithms settle, and it falls.
    """
    share = float(np.mean(np.asarray(n_test) / np.asarray(n_train)))
    return 1 + share * (2.5 - 1 / repeats) * np.sqrt(75 / patients)


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
