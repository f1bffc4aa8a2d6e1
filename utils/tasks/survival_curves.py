"""Kaplan-Meier curves with limits, the log-rank test, and calibration of predicted survival at a horizon.

A target is a time above 0 and an event: 1 if it occurred at that time, 0 if the patient was censored then. Of equal
times, events come before censoring.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_LEVEL = 0.975
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class ProductLimit:
    """A Kaplan-Meier estimate under B weightings of n patients (https://doi.org/10.1080/01621459.1958.10501452).

    Attributes
        times (n,): the patients' times, sorted.
        shares (B, n + 1): the share that is left at time 0, then after each of the patients.
    """

    times: np.ndarray
    shares: np.ndarray

    def before(self, times: np.ndarray) -> np.ndarray:
        """Return the share `(B, T)` that is left just before each of the `times (T,)`."""
        return self.shares[:, np.searchsorted(self.times, times, side="left")]

    def after(self, times: np.ndarray) -> np.ndarray:
        """Return the share `(B, T)` that is left just after each of the `times (T,)`."""
        return self.shares[:, np.searchsorted(self.times, times, side="right")]


def product_limit(targets: np.ndarray, weights: np.ndarray, of_censoring: bool = False) -> ProductLimit:
    """Return the share without event under each row of `weights (B, n)`, or the share that is not yet censored.

    `targets (n, 2)`. Where nobody is at risk any more, the share stays what it was.
    """
    times, events = targets.T
    order = np.lexsort((-events, times))
    counts = events[order] == (0 if of_censoring else 1)
    # The weight of each patient and all later ones. Factors of patients with equal times multiply to the usual factor.
    at_risk = np.zeros((len(weights), len(times) + 1))
    at_risk[:, :-1] = weights[:, order[::-1]].cumsum(axis=1)[:, ::-1]
    shares = np.ones_like(at_risk)
    np.divide(at_risk[:, 1:], at_risk[:, :-1], out=shares[:, 1:], where=counts & (at_risk[:, :-1] > 0))
    return ProductLimit(times[order], shares.cumprod(axis=1))


@dataclass(frozen=True, eq=False)
class KaplanMeier:
    """A group's Kaplan-Meier curve with 95% limits at each time.

    Attributes
        times (m,): 0, then the distinct times of the patients.
        survival (m,), low (m,), high (m,): from each time to the next; the limits are NaN where survival is 0.
        at_risk (m,), events (m,), censored (m,): the patients who reach each time, and what happens to them then.
    """

    times: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    at_risk: np.ndarray
    events: np.ndarray
    censored: np.ndarray

    @property
    def median(self) -> float | None:
        """Return the first time at which survival is half or less; None if it stays above."""
        return self._first_at_half(self.survival)

    @property
    def median_interval(self) -> tuple[float | None, float | None]:
        """Return the first times at which the lower and the upper limit are half or less; None for one that never is
        (Brookmeyer and Crowley 1982, https://doi.org/10.2307/2530286).
        """
        return self._first_at_half(self.low), self._first_at_half(self.high)

    def at(self, time: float) -> tuple[float, float, float]:
        """Return survival at a time with its limits; NaN where the follow-up does not reach it."""
        if time > self.times[-1] and self.survival[-1] > 0:
            return np.nan, np.nan, np.nan
        place = np.searchsorted(self.times, time, side="right") - 1
        return float(self.survival[place]), float(self.low[place]), float(self.high[place])

    def numbers_at_risk(self, times: np.ndarray) -> np.ndarray:
        """Return how many patients reach each of the `times (T,)` without event."""
        return np.append(self.at_risk, 0)[np.searchsorted(self.times, times, side="left")]

    def _first_at_half(self, curve: np.ndarray) -> float | None:
        places = np.flatnonzero(curve <= 0.5 + _ROUNDING)
        return float(self.times[places[0]]) if len(places) else None


def kaplan_meier(targets: np.ndarray) -> KaplanMeier:
    """Return the Kaplan-Meier curve of a group's `targets (n, 2)`, at least one.

    The limits are those of Greenwood's variance on the scale log(-log survival), which stay within 0 and 1 (Kalbfleisch
    and Prentice 2002, https://doi.org/10.1002/9781118032985, chapter 1).
    """
    from scipy.special import ndtri

    moments = np.concatenate([[0], np.unique(targets[:, 0])])
    moment_of = np.searchsorted(moments, targets[:, 0])
    patients, events = np.bincount(moment_of), np.bincount(moment_of, targets[:, 1]).astype(int)
    at_risk = patients[::-1].cumsum()[::-1]
    survival = product_limit(targets, np.ones((1, len(targets)))).after(moments)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (events / (at_risk * (at_risk - events))).cumsum()
        distance = ndtri(_LEVEL) * np.sqrt(variance) / np.abs(np.log(survival))
        low, high = (survival ** np.exp(side * distance) for side in (1, -1))  # 1 where survival is 1
    low[survival == 0] = high[survival == 0] = np.nan
    return KaplanMeier(moments, survival, low, high, at_risk, events, patients - events)


def log_rank(targets: np.ndarray, groups: np.ndarray) -> float:
    """Return the p-value of the log-rank test that all `groups (n,)` have the same survival (Peto and Peto 1972,
    https://doi.org/10.2307/2344317).

    `targets (n, 2)`. Groups that are all censored before the first event are left out. NaN for fewer than two groups,
    or if the test has no variance.
    """
    from scipy.stats import chi2

    times, events = targets.T
    moments = np.unique(times[events == 1])
    if not len(moments):
        return np.nan
    informative = np.unique(groups[times >= moments[0]])
    at_risk, observed = np.zeros((2, len(informative), len(moments)))
    for row, name in enumerate(informative):
        group_times, event_times = times[groups == name], times[(groups == name) & (events == 1)]
        at_risk[row] = len(group_times) - np.searchsorted(np.sort(group_times), moments)
        observed[row] = np.bincount(np.searchsorted(moments, event_times), minlength=len(moments))
    total, total_events = at_risk.sum(axis=0), observed.sum(axis=0)
    shares = at_risk / total
    excess = (observed - total_events * shares).sum(axis=1)
    spread = total_events * (total - total_events) / np.maximum(total - 1, 1)
    covariance = np.diag((spread * shares).sum(axis=1)) - (spread * shares) @ shares.T
    if len(informative) < 2 or not spread.any():
        return np.nan
    statistic = excess @ np.linalg.pinv(covariance, hermitian=True) @ excess
    return float(chi2.sf(statistic, len(informative) - 1))


class CalibrationGroup(NamedTuple):
    """Patients of similar predicted survival: its mean, and the Kaplan-Meier survival with its limits."""

    patients: int
    predicted: float
    observed: float
    low: float
    high: float


def calibration_at(
    targets: np.ndarray, survival: np.ndarray, horizon: float, groups: int = 5
) -> list[CalibrationGroup]:
    """Return predicted and observed survival at a horizon, in groups of about equally many patients (Demler et al.
    2015, https://doi.org/10.1002/sim.6428).

    `targets (n, 2)`; `survival (n,)` is the prediction for the horizon. Equal predictions share a group. Observed
    survival is NaN in a group whose follow-up does not reach the horizon.
    """
    lower = np.searchsorted(np.sort(survival), survival)
    numbers = lower * groups // len(survival)
    rows_of = [numbers == number for number in np.unique(numbers)]
    return [
        CalibrationGroup(int(rows.sum()), float(survival[rows].mean()), *kaplan_meier(targets[rows]).at(horizon))
        for rows in rows_of
    ]
