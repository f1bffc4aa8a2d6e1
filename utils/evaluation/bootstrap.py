"""How sure a figure is: patient-cluster bootstrap intervals, and the figures of several repeats as one."""

from collections.abc import Iterator

import numpy as np

from utils.tasks.task import Figures, Task, plain

RESAMPLES = 1000
# False positive rates of the band; 0 comes twice, since a curve may rise before its first false positive.
_GRID = np.append(0, np.arange(201) / 200)
_BLOCK_VALUES = 1 << 20


def pooled_metrics(task: Task, labels: np.ndarray, values: np.ndarray, repeats: np.ndarray) -> Figures:
    """Return every metric within each repeat, averaged over the repeats where it is defined.

    `labels (n,)`, `values (n, C)`, `repeats (n,)`: one row per tested slide and repeat.
    """
    return plain(_pooled(task, labels, values, np.ones((1, len(labels))), repeats))


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
    """95% percentile intervals of `pooled_metrics` over resampled patients.

    They are conditional on the trained models: what another cohort of patients would have given, not what another
    training would. Resamples in which a figure is undefined do not count for it; None when it is undefined in more
    than half of them.
    """
    drawn = bootstrap_draws(task, labels, values, cases, seed, resamples, repeats=repeats)
    return {name: interval(values) for name, values in drawn.items()}


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
    """`pooled_metrics` of each resample, `(resamples,)`; NaN where undefined.

    `labels (n,)`, `values (n, C)`, `cases (n,)`, `repeats (n,)`. Patients are drawn; all slides of a drawn
    patient, of all repeats, come along. Who is drawn depends on the seed and the set of patients alone, so that the
    draws of two models on the same patients are pairs.
    """
    repeats = np.zeros(len(labels)) if repeats is None else repeats
    blocks = [_pooled(task, labels, values, weights, repeats) for weights in _resampled(cases, seed, resamples)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def mean_roc(
    is_class: np.ndarray, scores: np.ndarray, repeats: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the ROC curve of `scores (n,)` for `is_class (n,)` bool, point by point: its false positive rates and its
    true ones, both `(m,)`, from (0, 0) to (1, 1).

    Straight lines between the points are the curve: a step for each slide, and a slanted line only where slides of
    both kinds share a score, so that the area below is the AUC. Of several repeats it is the mean at equal false
    positive rates. None where a class is missing.
    """
    curves = [_roc(is_class[rows], scores[rows]) for rows in _rows_of_or_all(scores, repeats)]
    known = [curve for curve in curves if curve is not None]
    if not known:
        return None
    rates = np.unique(np.concatenate([alarms for alarms, _ in known]))
    heights = np.mean([_heights(rates, *curve) for curve in known], axis=0)
    points = np.stack([np.repeat(rates, 2), heights.ravel()])
    alarms, hits = points[:, np.append(True, (np.diff(points) != 0).any(axis=0))]
    return alarms, hits


def mean_precision(
    is_class: np.ndarray, scores: np.ndarray, repeats: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the precision-recall curve of `scores (n,)` for `is_class (n,)` bool, point by point: recalls and
    precisions, both `(m,)`, from recall 0 to 1.

    It is level between the recalls that occur, so that the area below is the average precision. Of several repeats it
    is the mean at equal recall. None where a class is missing.
    """
    curves = []
    for rows in _rows_of_or_all(scores, repeats):
        (hits,), (alarms,) = _cumulative(is_class[rows], scores[rows], np.ones((1, len(rows))))
        if hits[-1] > 0 and alarms[-1] > 0:
            rising = np.diff(hits, prepend=0) > 0
            curves.append((hits[rising] / hits[-1], (hits / (hits + alarms))[rising]))
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
    each `(G,)`. None where the curve is undefined, or is so in more than half of the resamples.
    """
    blocks = [_curves(is_class, scores, weights, repeats) for weights in _resampled(cases, seed, resamples)]
    drawn = np.concatenate(blocks)
    known = drawn[~np.isnan(drawn).any(axis=1)]
    if mean_roc(is_class, scores, repeats) is None or len(known) < resamples / 2:
        return None
    low, high = np.percentile(known, [2.5, 97.5], axis=0)
    return _GRID, low, high


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """2.5th and 97.5th percentile of the values that are no NaN; None when those are fewer than half."""
    known = values[~np.isnan(values)]
    if len(known) < len(values) / 2:
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _pooled(
    task: Task, labels: np.ndarray, values: np.ndarray, weights: np.ndarray, repeats: np.ndarray
) -> dict[str, np.ndarray]:
    figures = [task.metrics(labels[rows], values[rows], weights[:, rows]) for rows in _rows_of(repeats)]
    return {name: _known_mean(np.stack([each[name] for each in figures])) for name in figures[0]}


def _curves(is_class: np.ndarray, scores: np.ndarray, weights: np.ndarray, repeats: np.ndarray | None) -> np.ndarray:
    """True positive rates at `_GRID` under each row of `weights (B, n)`: `(B, G)`, NaN where a class has no weight."""
    parts = _rows_of_or_all(scores, repeats)
    curves = np.full((len(parts), len(weights), len(_GRID)), np.nan)
    for part, rows in zip(curves, parts, strict=True):
        for curve, hits, alarms in zip(part, *_cumulative(is_class[rows], scores[rows], weights[:, rows]), strict=True):
            if hits[-1] > 0 and alarms[-1] > 0:
                curve[0] = 0
                curve[1:] = np.interp(_GRID[1:], np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1]))
    return _known_mean(curves)


def _cumulative(is_class: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Under each row of `weights (B, n)`, the weight of the class, and of the others, that scores at least as high as
    each score that occurs, the highest first: `(B, k)` each.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    hits, alarms = ((weights * kind)[:, order].cumsum(axis=1)[:, last_of_ties] for kind in (is_class, ~is_class))
    return hits, alarms


def _roc(is_class: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    (hits,), (alarms,) = _cumulative(is_class, scores, np.ones((1, len(scores))))
    if not (hits[-1] > 0 and alarms[-1] > 0):
        return None
    return np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1])


def _heights(rates: np.ndarray, alarms: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """`(m, 2)`: where a curve arrives, and where it leaves, at each of the `rates (m,)`; different where it rises."""
    known = np.unique(alarms)
    arrives = hits[np.searchsorted(alarms, known, "left")]
    leaves = hits[np.searchsorted(alarms, known, "right") - 1]
    before = np.searchsorted(known, rates, "right") - 1
    after = np.minimum(before + 1, len(known) - 1)
    share = (rates - known[before]) / np.maximum(known[after] - known[before], np.finfo(float).tiny)
    between = leaves[before] + share * (arrives[after] - leaves[before])
    is_known = known[before] == rates
    return np.stack([np.where(is_known, arrives[before], between), np.where(is_known, leaves[before], between)], axis=1)


def _rows_of_or_all(scores: np.ndarray, repeats: np.ndarray | None) -> list[np.ndarray]:
    return _rows_of(np.zeros(len(scores)) if repeats is None else repeats)


def _rows_of(repeats: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(repeats == repeat) for repeat in np.unique(repeats)]


def _known_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is no NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _resampled(cases: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each row's patient was drawn: `(b, n)` blocks, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    patients, patient_of = np.unique(cases, return_inverse=True)
    block = max(1, _BLOCK_VALUES // len(cases))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        chosen = rng.integers(len(patients), size=(size, len(patients))) + np.arange(size)[:, None] * len(patients)
        counts = np.bincount(chosen.ravel(), minlength=size * len(patients)).reshape(size, -1)
        yield counts[:, patient_of].astype(np.float64)
