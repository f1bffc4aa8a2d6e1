"""How sure a figure is: patient-cluster bootstrap intervals, and the figures of several repeats as one."""

from collections.abc import Iterator, Sequence

import numpy as np

from utils.learning.metrics import metric_names, plain_figures, weighted_metrics

RESAMPLES = 1000
# False positive rates; 0 comes twice, since a curve starts at (0, 0) and may rise before its first false positive.
_GRID = np.append(0, np.arange(201) / 200)
_BLOCK_VALUES = 1 << 20


def pooled_metrics(
    labels: np.ndarray, probabilities: np.ndarray, repeats: np.ndarray, class_names: Sequence[str] = ()
) -> dict[str, float | None]:
    """`classification_metrics` within each repeat, averaged over the repeats where the figure is defined.

    `labels (n,)`, `probabilities (n, C)`, `repeats (n,)`: one row per tested slide and repeat.
    """
    return plain_figures(_pooled(labels, probabilities, np.ones((1, len(labels))), repeats, class_names))


def bootstrap_intervals(
    labels: np.ndarray,
    probabilities: np.ndarray,
    cases: np.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
    *,
    repeats: np.ndarray | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, tuple[float, float] | None]:
    """95% percentile intervals of `pooled_metrics` over resampled patients.

    They are conditional on the trained models: what another cohort of patients would have given, not what another
    training would. Resamples in which a figure is undefined do not count for it; None when it is undefined in more
    than half of them.
    """
    drawn = bootstrap_draws(labels, probabilities, cases, seed, resamples, repeats=repeats, class_names=class_names)
    return {name: interval(values) for name, values in drawn.items()}


def bootstrap_draws(
    labels: np.ndarray,
    probabilities: np.ndarray,
    cases: np.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
    *,
    repeats: np.ndarray | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """`pooled_metrics` of each resample, `(resamples,)`; NaN where undefined.

    `labels (n,)`, `probabilities (n, C)`, `cases (n,)`, `repeats (n,)`. Patients are drawn; all slides of a drawn
    patient, of all repeats, come along. Who is drawn depends on the seed and the set of patients alone, so that the
    draws of two models on the same patients are pairs.
    """
    repeats = np.zeros(len(labels)) if repeats is None else repeats
    blocks = [
        _pooled(labels, probabilities, weights, repeats, class_names) for weights in _resampled(cases, seed, resamples)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in metric_names(class_names)}


def mean_roc(
    is_class: np.ndarray, scores: np.ndarray, repeats: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """The ROC curve of `scores (n,)` for `is_class (n,)` bool, averaged over repeats at equal false positive rates.

    Returns the false positive rates and the true ones, both `(G,)`, from (0, 0) to (1, 1), linear between the curve's
    points; None where a class is missing.
    """
    (curve,) = _curves(is_class, scores, np.ones((1, len(scores))), repeats)
    return None if np.isnan(curve).any() else (_GRID, curve)


def roc_band(
    is_class: np.ndarray,
    scores: np.ndarray,
    cases: np.ndarray,
    seed: int,
    *,
    repeats: np.ndarray | None = None,
    resamples: int = RESAMPLES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """`mean_roc` and, at each of its false positive rates, the 95% percentile interval over resampled patients.

    Returns false positive rate, mean, low and high, each `(G,)`; None where the curve is undefined, or is so in more
    than half of the resamples.
    """
    curve = mean_roc(is_class, scores, repeats)
    blocks = [_curves(is_class, scores, weights, repeats) for weights in _resampled(cases, seed, resamples)]
    drawn = np.concatenate(blocks)
    known = drawn[~np.isnan(drawn).any(axis=1)]
    if curve is None or len(known) < resamples / 2:
        return None
    low, high = np.percentile(known, [2.5, 97.5], axis=0)
    return *curve, low, high


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """2.5th and 97.5th percentile of the values that are no NaN; None when those are fewer than half."""
    known = values[~np.isnan(values)]
    if len(known) < len(values) / 2:
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _pooled(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, repeats: np.ndarray, class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    parts = [
        weighted_metrics(labels[rows], probabilities[rows], weights[:, rows], class_names) for rows in _rows_of(repeats)
    ]
    return {name: _known_mean(np.stack([part[name] for part in parts])) for name in metric_names(class_names)}


def _curves(is_class: np.ndarray, scores: np.ndarray, weights: np.ndarray, repeats: np.ndarray | None) -> np.ndarray:
    """True positive rates at `_GRID` under each row of `weights (B, n)`: `(B, G)`, NaN where a class has no weight."""
    repeats = np.zeros(len(scores)) if repeats is None else repeats
    curves = np.full((len(np.unique(repeats)), len(weights), len(_GRID)), np.nan)
    for part, rows in zip(curves, _rows_of(repeats), strict=True):
        order = rows[np.argsort(-scores[rows], kind="stable")]
        last_of_ties = np.append(np.diff(scores[order]) != 0, True)
        for curve, weight in zip(part, weights[:, order], strict=True):
            hits, alarms = ((weight * kind[order]).cumsum()[last_of_ties] for kind in (is_class, ~is_class))
            if hits[-1] > 0 and alarms[-1] > 0:
                curve[0] = 0
                curve[1:] = np.interp(_GRID[1:], np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1]))
    return _known_mean(curves)


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
