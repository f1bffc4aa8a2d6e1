"""How well risks rank patients, and survival curves predict them, where some patients are censored.

A target is a time above 0 and an event: 1 if it occurred at that time, 0 if the patient was censored then. Each metric
is computed for many weightings of the same patients at once; a weight of k counts as k copies of the patient.

Some metrics weight patients by the inverse probability of not being censored. It is the Kaplan-Meier estimate of the
evaluated patients themselves, under the same weights. An event at time t takes the probability just before t.
"""

from collections.abc import Callable

import numpy as np

from utils.tasks.survival_curves import ProductLimit, product_limit

_BLOCK_PAIRS = 1 << 22
# Relative to the largest risk: equal answers of a network differ by the rounding of float32.
_SAME_RISK = 1e-5


def concordance(
    targets: np.ndarray, risks: np.ndarray, weights: np.ndarray, strata: np.ndarray | None = None
) -> np.ndarray:
    """Return Harrell's C under each row of `weights (B, n)`, as `(B,)`; NaN without a comparable pair (Harrell et al.
    1982, https://doi.org/10.1001/jama.1982.03320430047030).

    It is the share of comparable pairs in which the patient with the earlier event has the higher risk; equal `risks
    (n,)` count half. A pair is comparable if the earlier time is an event. Of equal times, an event comes before
    censoring; two events are not comparable. With `strata (n,)`, only patients of the same stratum are compared.
    """
    return _pair_share(targets, weights, weights, strata, _wins(risks))


def concordance_ipcw(
    targets: np.ndarray, risks: np.ndarray, weights: np.ndarray, tau: float, strata: np.ndarray | None = None
) -> np.ndarray:
    """Return Uno's C under each row of `weights (B, n)`, as `(B,)`; NaN without a comparable pair (Uno et al. 2011,
    https://doi.org/10.1002/sim.4154).

    As `concordance`, but only events before the time `tau` count, each weighted by the squared inverse probability of
    not being censored before it. If patients are still followed at `tau`, the result does not depend on how many were
    censored. All `strata` share that probability.
    """
    first_weights = weights * _event_weights(targets, weights) ** 2 * (targets[:, 0] < tau)
    return _pair_share(targets, weights, first_weights, strata, _wins(risks))


def tied_share(targets: np.ndarray, risks: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Return the share of comparable pairs (see `concordance`) with equal risks; NaN without a pair.

    At 1 all risks that are compared are equal, and the C-index is 0.5 whatever the patients are.
    """
    once = np.ones((1, len(targets)))
    (share,) = _pair_share(targets, once, once, strata, lambda first, others: risks[first, None] == risks[others])
    return float(share)


def constant_strata(risks: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Return the strata, such as folds, in which all `risks (n,)` are equal up to rounding: the model is dead."""
    names = np.unique(strata)
    spreads = [(np.ptp(risks[strata == name]), np.abs(risks[strata == name]).max()) for name in names]
    return names[[spread <= _SAME_RISK * largest for spread, largest in spreads]]


def brier_scores(targets: np.ndarray, curves: np.ndarray, times: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the Brier score at each time under each row of `weights (B, n)`, as `(B, T)` (Graf et al. 1999,
    https://doi.org/10.1002/(SICI)1097-0258(19990915/30)18:17/18%3C2529::AID-SIM274%3E3.0.CO;2-5).

    `targets (n, 2)`; `curves (n, T)` are the probabilities that no event has occurred until each of the `times (T,)`.
    Patients whose state is known at a time are weighted by the inverse probability of not being censored before it was.
    NaN from the end of follow-up on, if the last patient was censored.
    """
    ended = (targets[:, :1] <= times) & (targets[:, 1:] == 1)
    errors_of_ended = (weights * _event_weights(targets, weights)) @ (ended * curves**2)
    errors_of_others = weights @ ((targets[:, :1] > times) * (1 - curves) ** 2)
    with np.errstate(invalid="ignore"):
        errors = errors_of_ended + errors_of_others / _censoring(targets, weights).after(times)
        return errors / weights.sum(axis=1, keepdims=True)


def integrated_brier(targets: np.ndarray, curves: np.ndarray, times: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean Brier score from `times[0]` to `times[-1]` under each row of `weights (B, n)`, as `(B,)`.

    As `brier_scores`, between the rising `times (T,)` by the trapezoid rule. NaN if a score is undefined.
    """
    scores = brier_scores(targets, curves, times, weights)
    if len(times) == 1:
        return scores[:, 0]
    return np.trapezoid(scores, times, axis=1) / (times[-1] - times[0])


def dynamic_auc(targets: np.ndarray, risks: np.ndarray, times: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the cumulative/dynamic AUC at each of the `times (T,)` under each row of `weights (B, n)`, as `(B, T)`
    (Uno et al. 2007, https://doi.org/10.1198/016214507000000149).

    It is the probability that a patient with an event until the time has a higher risk than one without event then;
    equal `risks (n,)` count half. Patients with an event are weighted by the inverse probability of not being censored
    before it. NaN if either group is empty.
    """
    order = np.argsort(risks, kind="stable")
    risks, targets, weights = risks[order], targets[order], weights[:, order]
    lower, as_low = (np.searchsorted(risks, risks, side) for side in ("left", "right"))
    event_weights = weights * _event_weights(targets, weights)
    aucs = np.empty((len(weights), len(times)))
    for column, time in enumerate(times):
        cases = event_weights * (targets[:, 0] <= time)
        controls = np.zeros((len(weights), len(risks) + 1))
        (weights * (targets[:, 0] > time)).cumsum(axis=1, out=controls[:, 1:])
        won = (cases * (controls[:, lower] + controls[:, as_low])).sum(axis=1) / 2
        with np.errstate(invalid="ignore"):
            aucs[:, column] = won / (cases.sum(axis=1) * controls[:, -1])
    return aucs


def _censoring(targets: np.ndarray, weights: np.ndarray) -> ProductLimit:
    return product_limit(targets, weights, of_censoring=True)


def _event_weights(targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the inverse probability `(B, n)` of not being censored before each event; 0 for censored patients."""
    times, events = targets.T
    uncensored = _censoring(targets, weights).before(times)
    return np.divide(events, uncensored, out=np.zeros_like(uncensored), where=uncensored > 0)


def _wins(risks: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function that scores pairs of rows: 1 if the first has the higher risk, 0.5 if both are equal."""
    return lambda first, others: (np.sign(risks[first, None] - risks[others]) + 1) / 2


def _pair_share(
    targets: np.ndarray,
    weights: np.ndarray,
    first_weights: np.ndarray,
    strata: np.ndarray | None,
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return the mean score `(B,)` of comparable pairs; NaN without one.

    A pair has the product of the weight of the patient with the earlier event, in `first_weights (B, n)`, and that of
    the other, in `weights (B, n)`. `score` gives the scores `(E, m)` of E rows with m others.
    """
    times, events = targets.T
    strata = np.zeros(len(targets)) if strata is None else strata
    scored, compared = np.zeros((2, len(weights)))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        with_event = rows[events[rows] == 1]
        blocks = -(-len(with_event) * len(rows) // _BLOCK_PAIRS)
        for first in np.array_split(with_event, max(1, blocks)):
            is_later = (times[first, None] < times[rows]) | ((times[first, None] == times[rows]) & (events[rows] == 0))
            scores = is_later * score(first, rows)
            scored += (first_weights[:, first] * (weights[:, rows] @ scores.T)).sum(axis=1)
            compared += (first_weights[:, first] * (weights[:, rows] @ is_later.T.astype(float))).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return scored / compared
