"""Confidence intervals of metrics by resampling patients, and metrics averaged over repeats."""

from collections.abc import Iterator

import numpy as np

from utils.tasks.task import Figures, Task, single

Interval = tuple[float, float] | None

RESAMPLES = 1000
# Of fewer patients an interval of no width says that there are few, not that other patients would give the same: all
# of nine are right in one of twenty cohorts even if 28% of such patients are not.
MANY_PATIENTS = 10
# False positive rates of the band; 0 is there twice, since a curve may rise before its first false positive.
_GRID = np.append(0, np.arange(201) / 200)
BLOCK_VALUES = 1 << 20
_ROUNDING = 1e-9


def pooled_metrics(task: Task, labels: np.ndarray, values: np.ndarray, repeats: np.ndarray) -> Figures:
    """Return every metric, computed within each repeat and averaged over the repeats where it is defined.

    `labels (n,)`, `values (n, C)`, `repeats (n,)`: one row per tested slide and repeat.
    """
    return single(_pooled(task, labels, values, np.ones((1, len(labels))), repeats))


def bootstrap_intervals(
    task: Task,
    labels: np.ndarray,
    values: np.ndarray,
    cases: np.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
    *,
    repeats: np.ndarray | None = None,
) -> dict[str, tuple[float, float] | None]:
    """Return 95% percentile intervals of `pooled_metrics` over resampled patients.

    They are conditional on the trained models: they cover other patients, not other trainings. Resamples in which a
    metric is undefined are left out; it has None if they are more than half. It also has None if there is one patient,
    or if there are fewer than 10 and all resamples give the same figure.
    """
    draws = bootstrap_draws(task, labels, values, cases, seed, resamples, repeats=repeats)
    patients = len(np.unique(cases))
    return {name: _unless_too_few(interval(values), patients) for name, values in draws.items()}


def mean_interval(values: np.ndarray, cases: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Return the 95% percentile interval of the mean of slides' `values (n,)` over resampled patients, `cases (n,)`.

    None under the conditions of `bootstrap_intervals`.
    """
    draws = [weights @ values / weights.sum(axis=1) for weights in _resampled(cases, seed, resamples)]
    return _unless_too_few(interval(np.concatenate(draws)), len(np.unique(cases)))


def _unless_too_few(limits: Interval, patients: int) -> Interval:
    has_width = limits is not None and limits[1] - limits[0] > _ROUNDING
    return limits if patients >= MANY_PATIENTS or (patients > 1 and has_width) else None


def bootstrap_draws(
    task: Task,
    labels: np.ndarray,
    values: np.ndarray,
    cases: np.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
    *,
    repeats: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return `pooled_metrics` of each resample, `(resamples,)`; NaN if undefined.

    `labels (n,)`, `values (n, C)`, `cases (n,)`, `repeats (n,)`. Patients are drawn, with all their slides in all
    repeats. The draws depend only on the seed and the set of patients, so that those of two models on the same patients
    are paired.
    """
    blocks = [_pooled(task, labels, values, weights, repeats) for weights in _resampled(cases, seed, resamples)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def mean_roc(
    is_class: np.ndarray, scores: np.ndarray, repeats: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the points of the ROC curve of `scores (n,)` for `is_class (n,)` bool: false and true positive rates,
    both `(m,)`, from (0, 0) to (1, 1).

    Straight lines join the points: a step for each slide, slanted only if slides inside and outside the class share a
    score, so that the area under the curve is the AUC. Of several repeats it is the mean at equal false positive rates.
    None if a class is missing.
    """
    curves = [_roc(is_class[rows], scores[rows]) for rows in _repeat_rows(scores, repeats)]
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
    for rows in _repeat_rows(scores, repeats):
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
    cases: np.ndarray,
    seed: int,
    *,
    repeats: np.ndarray | None = None,
    resamples: int = RESAMPLES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the 95% percentile interval of the ROC curve over resampled patients: false positive rates, low and high,
    each `(G,)`. None if the curve is undefined for the slides, or for more than half of the resamples, and for one
    patient.
    """
    if len(np.unique(cases)) == 1:
        return None
    blocks = [_curves(is_class, scores, weights, repeats) for weights in _resampled(cases, seed, resamples)]
    curves = np.concatenate(blocks)
    defined = curves[~np.isnan(curves).any(axis=1)]
    if mean_roc(is_class, scores, repeats) is None or len(defined) < resamples / 2:
        return None
    low, high = np.percentile(defined, [2.5, 97.5], axis=0)
    return _GRID, low, high


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return the 2.5th and 97.5th percentile of the values without NaN; None if more than half are NaN."""
    defined = values[~np.isnan(values)]
    if len(defined) < len(values) / 2:
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _pooled(
    task: Task, labels: np.ndarray, values: np.ndarray, weights: np.ndarray, repeats: np.ndarray | None
) -> dict[str, np.ndarray]:
    by_repeat = [task.metrics(labels[rows], values[rows], weights[:, rows]) for rows in _repeat_rows(labels, repeats)]
    return {name: _mean(np.stack([metrics[name] for metrics in by_repeat])) for name in by_repeat[0]}


def _curves(is_class: np.ndarray, scores: np.ndarray, weights: np.ndarray, repeats: np.ndarray | None) -> np.ndarray:
    """Return true positive rates `(B, G)` at `_GRID` under `weights (B, n)`; NaN if a class has no weight."""
    rows_of = _repeat_rows(scores, repeats)
    curves = np.full((len(rows_of), len(weights), len(_GRID)), np.nan)
    for repeat, rows in zip(curves, rows_of, strict=True):
        for curve, true, false in zip(repeat, *_positives(is_class[rows], scores[rows], weights[:, rows]), strict=True):
            if true[-1] > 0 and false[-1] > 0:
                curve[0] = 0
                curve[1:] = np.interp(_GRID[1:], np.append(0, false / false[-1]), np.append(0, true / true[-1]))
    return _mean(curves)


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


def _repeat_rows(values: np.ndarray, repeats: np.ndarray | None) -> list[np.ndarray]:
    """Return the indices of the rows of each repeat; all `values (n,)` are of one repeat if there are no `repeats`."""
    repeats = np.zeros(len(values)) if repeats is None else repeats
    return [np.flatnonzero(repeats == repeat) for repeat in np.unique(repeats)]


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis without NaN; NaN if all are NaN."""
    is_defined = ~np.isnan(values)
    count = is_defined.sum(axis=0)
    total = np.where(is_defined, values, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _resampled(cases: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield blocks `(b, n)` of how often each row's patient was drawn, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    patients, patient_of = np.unique(cases, return_inverse=True)
    block = max(1, BLOCK_VALUES // len(cases))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        chosen = rng.integers(len(patients), size=(size, len(patients))) + np.arange(size)[:, None] * len(patients)
        counts = np.bincount(chosen.ravel(), minlength=size * len(patients)).reshape(size, -1)
        yield counts[:, patient_of].astype(np.float64)
