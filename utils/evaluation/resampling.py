"""Metrics of slides that are weighted: averaged over repeats, with patients drawn anew or left out."""

from collections.abc import Callable, Iterator

import numpy as np

from utils.tasks.task import Figures, Task, single

Weighted = dict[str, np.ndarray]

RESAMPLES = 1000
BLOCK_VALUES = 1 << 20
_MOST_LEFT_OUT = 1000  # with more patients, several are left out at a time


def pooled_metrics(task: Task, labels: np.ndarray, values: np.ndarray, repeats: np.ndarray) -> Figures:
    """Return every metric, computed within each repeat and averaged over the repeats where it is defined.

    `labels (n,)`, `values (n, C)`, `repeats (n,)`: one row per tested slide and repeat.
    """
    weights = np.ones((1, len(labels)))
    return single(mean_over_repeats(lambda rows: task.metrics(labels[rows], values[rows], weights[:, rows]), repeats))


def mean_over_repeats(metrics: Callable[[np.ndarray], Weighted], repeats: np.ndarray) -> Weighted:
    """Return `metrics` of the indices of each repeat's rows, averaged over the repeats where they are defined."""
    by_repeat = [metrics(rows) for rows in repeat_rows(repeats)]
    return {name: mean_of_defined(np.stack([figures[name] for figures in by_repeat])) for name in by_repeat[0]}


def repeat_rows(repeats: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the rows of each of the `repeats (n,)`."""
    return [np.flatnonzero(repeats == repeat) for repeat in np.unique(repeats)]


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis without NaN; NaN if all are NaN."""
    is_defined = ~np.isnan(values)
    count = is_defined.sum(axis=0)
    total = np.where(is_defined, values, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def resampled(patients: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Yield blocks `(b, n)` of how often each row's patient was drawn, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    names, patient_of = np.unique(patients, return_inverse=True)
    block = max(1, BLOCK_VALUES // len(patients))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        chosen = rng.integers(len(names), size=(size, len(names))) + np.arange(size)[:, None] * len(names)
        counts = np.bincount(chosen.ravel(), minlength=size * len(names)).reshape(size, -1)
        yield counts[:, patient_of].astype(np.float64)


def left_out(patients: np.ndarray, weigh: Callable[[np.ndarray], Weighted]) -> Weighted:
    """Return the metrics without each patient in turn, `(G,)`; NaN if undefined.

    `weigh` returns them for weights `(b, n)` of the rows. Of more than 1000 patients, 1000 groups are left out in turn.
    """
    patient_of = np.unique(patients, return_inverse=True)[1]
    groups = min(int(patient_of.max()) + 1, _MOST_LEFT_OUT)
    block = max(1, BLOCK_VALUES // len(patient_of))
    blocks = []
    for start in range(0, groups, block):
        numbers = np.arange(start, min(start + block, groups))
        blocks.append(weigh((patient_of % groups != numbers[:, None]).astype(np.float64)))
    return {name: np.concatenate([figures[name] for figures in blocks]) for name in blocks[0]}


def jackknife_variance(values: np.ndarray) -> float:
    """Return the variance of a metric, given its values without each patient in turn; 0 if it cannot be told.

    A metric that is undefined without a patient is left out of it (Efron 1982, The Jackknife, the Bootstrap and Other
    Resampling Plans).
    """
    defined = values[~np.isnan(values)]
    count = len(defined)
    return float(((defined - defined.mean()) ** 2).sum() * (count - 1) / count) if count else 0.0
