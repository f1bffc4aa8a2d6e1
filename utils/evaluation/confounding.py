"""How well a nuisance alone predicts the label: a site, a scanner, a bag's size.

A model can learn whatever predicts the label, also what has nothing to do with the tissue. How well such a field
predicts it is measured by cross-validation over patients, and compared with labels shuffled among the patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.core.runtime import derive_seed

FOLDS = 5
REPEATS = 5
PERMUTATIONS = 999
_BINS = 5
# The prior of a value's class frequencies: the cohort's, with the weight of this many slides.
_PRIOR_SLIDES = 1.0
# Shuffled labels are scored in blocks of so many entries, which bounds the memory.
_BLOCK = 2**21

Value = str | float | None


@dataclass(frozen=True)
class Confounding:
    """How well a field predicts the label.

    `auc` is that of out-of-fold predictions (of more than two classes, the mean of one-against-rest), the mean over
    `REPEATS` cross-validations. `shuffled` are the 2.5th, 50th and 97.5th percentile of the same AUC under shuffled
    labels, `p_value` the share of these and of `auc` itself that reach `auc`. The field takes `values` different values
    in `slides` slides.
    """

    auc: float
    shuffled: tuple[float, float, float]
    p_value: float
    values: int
    slides: int


def confounding(
    values: Sequence[Value], labels: np.ndarray, cases: np.ndarray, seed: int = 0, permutations: int = PERMUTATIONS
) -> Confounding | None:
    """Measure how well `values (n,)`, one per slide, predict `labels (n,)` of other patients (`cases (n,)`).

    A slide is predicted by the smoothed class frequencies of its value among the other folds' patients; numbers are
    first divided at their quintiles. Slides without a value are left out. None if there is nothing to test: one value,
    one class or one patient. The same arguments give the same figures.

    Chance is below 0.5, because a fold that holds many slides of a class leaves few to the others; the shuffled labels
    go through the same folds and share this bias. Shuffling gives all labels of a patient to another patient, in any
    order of its slides.
    """
    has_value = np.array([value is not None for value in values], dtype=bool)
    codes = _categories([value for value in values if value is not None])
    classes, labels = np.unique(labels[has_value], return_inverse=True)
    patients, patient_of = np.unique(cases[has_value], return_inverse=True)
    if min(len(np.unique(codes)), len(classes), len(patients)) < 2:
        return None

    # Sorted, so that the result does not depend on the table's order; each patient's slides are together.
    order = np.lexsort((labels, codes, patient_of))
    codes, labels, patient_of = codes[order], labels[order], patient_of[order]
    groups = [_fold_groups(codes, patient_of, derive_seed(seed, "folds", repeat)) for repeat in range(REPEATS)]
    observed = float(_mean_auc(labels[None], groups, len(classes))[0])
    rng = np.random.default_rng(derive_seed(seed, "permutations"))
    shuffled = (_shuffled(labels, patient_of, rows, rng) for rows in _blocks(permutations, len(labels)))
    null = np.concatenate([_mean_auc(block, groups, len(classes)) for block in shuffled])
    # Equal AUCs may differ by rounding; an undefined one counts as reached.
    reached = int((~(null < observed - 1e-9)).sum())
    low, middle, high = np.nanpercentile(null, [2.5, 50, 97.5])
    return Confounding(
        observed,
        (float(low), float(middle), float(high)),
        (1 + reached) / (1 + permutations),
        len(np.unique(codes)),
        len(labels),
    )


def values_per_class(values: Sequence[Value], labels: np.ndarray, num_classes: int) -> list[int]:
    """Return how many different values the slides of each class have; grouped folds distribute these."""
    pairs = {(int(label), value) for label, value in zip(labels, values, strict=True) if value is not None}
    return [sum(label == index for label, _ in pairs) for index in range(num_classes)]


def _categories(values: list) -> np.ndarray:
    """Return the category `(n,)` int of each value; more than `_BINS` different numbers are divided at quintiles."""
    if not all(isinstance(value, int | float) for value in values):
        return np.unique([str(value) for value in values], return_inverse=True)[1]
    numbers = np.array(values, dtype=float)
    distinct, codes = np.unique(numbers, return_inverse=True)
    if len(distinct) <= _BINS:
        return codes
    edges = np.quantile(numbers, np.arange(1, _BINS) / _BINS)
    return np.unique(np.searchsorted(edges, numbers), return_inverse=True)[1]


@dataclass(frozen=True)
class _Groups:
    """Slides of one value in one fold share a prediction: each slide's group (n,), and each group's value (G,)."""

    of_slide: np.ndarray
    value: np.ndarray


def _fold_groups(codes: np.ndarray, patient_of: np.ndarray, seed: int) -> _Groups:
    # Stratified folds would fit the true labels better than the shuffled ones.
    patients = patient_of.max() + 1
    fold_of = np.random.default_rng(seed).permutation(patients) % min(FOLDS, patients)
    pairs, of_slide = np.unique(codes * FOLDS + fold_of[patient_of], return_inverse=True)
    return _Groups(of_slide, pairs // FOLDS)


def _blocks(permutations: int, slides: int) -> list[int]:
    rows = max(1, _BLOCK // slides)
    return [min(rows, permutations - start) for start in range(0, permutations, rows)]


def _shuffled(labels: np.ndarray, patient_of: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Return labels `(rows, n)`: each patient gets another's, cyclically from a random one on, in random order."""
    starts = np.flatnonzero(np.diff(patient_of, prepend=-1))
    sizes = np.diff(starts, append=len(labels))
    donor = rng.permuted(np.tile(np.arange(len(starts)), (rows, 1)), axis=1)[:, patient_of]
    first = rng.random((rows, len(starts)))[:, patient_of]
    rank = np.arange(len(labels)) - starts[patient_of]
    donated = labels[starts[donor] + (rank + (first * sizes[donor]).astype(int)) % sizes[donor]]
    order = np.argsort(patient_of + rng.random((rows, len(labels))), axis=1)
    shuffled = np.empty_like(donated)
    np.put_along_axis(shuffled, order, donated, axis=1)
    return shuffled


def _mean_auc(labels: np.ndarray, repeats: list[_Groups], num_classes: int) -> np.ndarray:
    """Return the AUC `(rows,)` of each row of `labels (rows, n)`, averaged over the repeated cross-validations."""
    return np.mean([_cross_validated_auc(labels, groups, num_classes) for groups in repeats], axis=0)


def _cross_validated_auc(labels: np.ndarray, groups: _Groups, num_classes: int) -> np.ndarray:
    """Return the AUC `(rows,)` of one cross-validation, from the counts (rows, G, C) of the groups' slides."""
    rows, size = len(labels), len(groups.value)
    cells = (np.arange(rows)[:, None] * size + groups.of_slide) * num_classes + labels
    counts = np.bincount(cells.ravel(), minlength=rows * size * num_classes).reshape(rows, size, num_classes)

    by_value = np.argsort(groups.value, kind="stable")
    starts = np.flatnonzero(np.diff(groups.value[by_value], prepend=-1))
    totals = np.add.reduceat(counts[:, by_value], starts, axis=1)  # (rows, V, C)
    training = totals[:, groups.value] - counts
    # One prior for all folds: those of the training slides would rank the folds by what their test slides lack.
    prior = counts.sum(axis=1, keepdims=True) / labels.shape[1]
    scores = (training + _PRIOR_SLIDES * prior) / (training.sum(axis=2, keepdims=True) + _PRIOR_SLIDES)

    positives = [1] if num_classes == 2 else range(num_classes)
    sizes = counts.sum(axis=2)
    aucs = [_grouped_auc(scores[..., c], counts[..., c], sizes - counts[..., c]) for c in positives]
    return np.mean(aucs, axis=0)


def _grouped_auc(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return the AUC `(rows,)`, ties counted half, of groups with these scores and numbers of positives and negatives,
    each `(rows, G)`; NaN if there are no positives or no negatives.
    """
    order = np.argsort(scores, axis=1)
    scores, positive, negative = (np.take_along_axis(array, order, axis=1) for array in (scores, positive, negative))
    differs = np.diff(scores, axis=1, prepend=-np.inf) > 1e-12
    tie_start = np.maximum.accumulate(np.where(differs, np.arange(scores.shape[1]), 0), axis=1)

    def below(counts: np.ndarray) -> np.ndarray:
        return np.take_along_axis(counts.cumsum(axis=1) - counts, tie_start, axis=1)

    wins, losses = (positive * below(negative)).sum(axis=1), (negative * below(positive)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return 0.5 + (wins - losses) / (2 * pairs)
