"""How well a nuisance alone predicts the label: a site, a scanner, a bag's size.

A model can learn whatever predicts the label. What predicts it without a look at the tissue is measured here: by
cross-validation over patients, against the same cohort with its labels shuffled among the patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.core.runtime import derive_seed

FOLDS = 5
REPEATS = 5
PERMUTATIONS = 999
_BINS = 5
# A value seen in few training slides is drawn this many slides' worth towards the cohort's class frequencies.
_PRIOR_SLIDES = 1.0
# Shuffled tables are scored so many entries at a time, which bounds the memory.
_BLOCK = 2**21

Value = str | float | None


@dataclass(frozen=True)
class Confounding:
    """What a field says about the label. `auc` is that of out-of-fold predictions (macro one-vs-rest beyond two
    classes), the mean over `REPEATS` cross-validations; `shuffled` are the 2.5th, 50th and 97.5th percentile of the
    same figure under shuffled labels, `p_value` the share that reach `auc`, itself counted in; `values` is how many
    different values the field takes in `slides` slides.
    """

    auc: float
    shuffled: tuple[float, float, float]
    p_value: float
    values: int
    slides: int


def confounding(
    values: Sequence[Value], labels: np.ndarray, cases: np.ndarray, seed: int = 0, permutations: int = PERMUTATIONS
) -> Confounding | None:
    """Measure how well `values (n,)`, one per slide, predict `labels (n,)` of patients (`cases (n,)`) not seen before.

    A slide is predicted by the smoothed class frequencies of its value among the other folds' patients; numbers are
    first cut at their quintiles. Slides whose value is None are left out. None when there is nothing to test: one
    value, one class or one patient. The same arguments give the same figures.

    Held-out frequencies run against the held-out labels (what one fold has, the others lack), so that chance is below
    0.5; the shuffled labels go through the same folds and are off by as much. Patients' labels move as one, and fall
    on the slides of the patient that gets them in any order: what is exchanged is a patient, not a slide.
    """
    known = np.array([value is not None for value in values], dtype=bool)
    codes = _categories([value for value in values if value is not None])
    classes, labels = np.unique(labels[known], return_inverse=True)
    patients, patient_of = np.unique(cases[known], return_inverse=True)
    if min(len(np.unique(codes)), len(classes), len(patients)) < 2:
        return None

    # In an order that does not depend on the table's, each patient's slides together.
    order = np.lexsort((labels, codes, patient_of))
    codes, labels, patient_of = codes[order], labels[order], patient_of[order]
    groups = [_fold_groups(codes, patient_of, derive_seed(seed, "folds", repeat)) for repeat in range(REPEATS)]
    observed = float(_mean_auc(labels[None], groups, len(classes))[0])
    rng = np.random.default_rng(derive_seed(seed, "permutations"))
    shuffled = (_shuffled(labels, patient_of, rows, rng) for rows in _blocks(permutations, len(labels)))
    null = np.concatenate([_mean_auc(block, groups, len(classes)) for block in shuffled])
    # Rounding must not set a figure apart from its equal; an undefined one counts against the field.
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
    """How many different values the slides of each class take: what grouped folds have to deal out."""
    pairs = {(int(label), value) for label, value in zip(labels, values, strict=True) if value is not None}
    return [sum(label == index for label, _ in pairs) for index in range(num_classes)]


def _categories(values: list) -> np.ndarray:
    """Each value's category `(n,)` int; numbers of more than a few values are cut at their quintiles."""
    if not all(isinstance(value, int | float) for value in values):
        return np.unique([str(value) for value in values], return_inverse=True)[1]
    numbers = np.array(values, dtype=float)
    different, codes = np.unique(numbers, return_inverse=True)
    if len(different) <= _BINS:
        return codes
    edges = np.quantile(numbers, np.arange(1, _BINS) / _BINS)
    return np.unique(np.searchsorted(edges, numbers), return_inverse=True)[1]


@dataclass(frozen=True)
class _Groups:
    """Slides that get one prediction: those of one value in one fold. `of_slide (n,)`, `value (G,)` of each group."""

    of_slide: np.ndarray
    value: np.ndarray


def _fold_groups(codes: np.ndarray, patient_of: np.ndarray, seed: int) -> _Groups:
    # Folds do not look at the labels: else they would suit the true labels better than the shuffled ones.
    patients = patient_of.max() + 1
    fold_of = np.random.default_rng(seed).permutation(patients) % min(FOLDS, patients)
    pairs, of_slide = np.unique(codes * FOLDS + fold_of[patient_of], return_inverse=True)
    return _Groups(of_slide, pairs // FOLDS)


def _blocks(permutations: int, slides: int) -> list[int]:
    rows = max(1, _BLOCK // slides)
    return [min(rows, permutations - start) for start in range(0, permutations, rows)]


def _shuffled(labels: np.ndarray, patient_of: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """`(rows, n)`: each patient gets another one's labels, from a random one on and around again, in random order."""
    starts = np.flatnonzero(np.diff(patient_of, prepend=-1))
    sizes = np.diff(starts, append=len(labels))
    donor = rng.permuted(np.tile(np.arange(len(starts)), (rows, 1)), axis=1)[:, patient_of]
    first = rng.random((rows, len(starts)))[:, patient_of]
    rank = np.arange(len(labels)) - starts[patient_of]
    given = labels[starts[donor] + (rank + (first * sizes[donor]).astype(int)) % sizes[donor]]
    places = np.argsort(patient_of + rng.random((rows, len(labels))), axis=1)
    shuffled = np.empty_like(given)
    np.put_along_axis(shuffled, places, given, axis=1)
    return shuffled


def _mean_auc(labels: np.ndarray, repeats: list[_Groups], num_classes: int) -> np.ndarray:
    """`(rows,)`: the AUC of each row of `labels (rows, n)`, averaged over the repeated cross-validations."""
    return np.mean([_cross_validated_auc(labels, groups, num_classes) for groups in repeats], axis=0)


def _cross_validated_auc(labels: np.ndarray, groups: _Groups, num_classes: int) -> np.ndarray:
    """Slides of a group share their prediction, so that counts (rows, G, C) are all it takes."""
    rows, size = len(labels), len(groups.value)
    cells = (np.arange(rows)[:, None] * size + groups.of_slide) * num_classes + labels
    counts = np.bincount(cells.ravel(), minlength=rows * size * num_classes).reshape(rows, size, num_classes)

    by_value = np.argsort(groups.value, kind="stable")
    starts = np.flatnonzero(np.diff(groups.value[by_value], prepend=-1))
    totals = np.add.reduceat(counts[:, by_value], starts, axis=1)  # (rows, V, C)
    training = totals[:, groups.value] - counts
    # One prior for all folds: the training part's own would rank the folds by what their test part lacks.
    prior = counts.sum(axis=1, keepdims=True) / labels.shape[1]
    scores = (training + _PRIOR_SLIDES * prior) / (training.sum(axis=2, keepdims=True) + _PRIOR_SLIDES)

    positives = [1] if num_classes == 2 else range(num_classes)
    totals_of = counts.sum(axis=2)
    aucs = [_grouped_auc(scores[..., c], counts[..., c], totals_of - counts[..., c]) for c in positives]
    return np.mean(aucs, axis=0)


def _grouped_auc(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """`(rows,)` AUC, ties counted half, of groups `(rows, G)` that hold so many positives and negatives each; NaN
    where there are none of one kind.
    """
    order = np.argsort(scores, axis=1)
    scores, positive, negative = (np.take_along_axis(part, order, axis=1) for part in (scores, positive, negative))
    differs = np.diff(scores, axis=1, prepend=-np.inf) > 1e-12
    tie_start = np.maximum.accumulate(np.where(differs, np.arange(scores.shape[1]), 0), axis=1)

    def below(counts: np.ndarray) -> np.ndarray:
        return np.take_along_axis(counts.cumsum(axis=1) - counts, tie_start, axis=1)

    won, lost = (positive * below(negative)).sum(axis=1), (negative * below(positive)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return 0.5 + (won - lost) / (2 * pairs)
