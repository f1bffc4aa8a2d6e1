"""Differences of training runs on the same slides and folds, pair by pair, with intervals and tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from utils.evaluation.paired_tests import holm, nadeau_bengio, paired_test, training_inflation
from utils.evaluation.predictions import Predictions
from utils.evaluation.resampling import left_out
from utils.tasks.bases import greatest_difference


@dataclass(frozen=True)
class Difference:
    """`first - second` in one metric; None if undefined.

    Attributes
        unit: what the metric is of, "patient" or "slide"; is_primary: whether its figures are the ones to report.
        difference: of all slides; of a metric that ranks slides, of the slides of each fold.
        low, high, p: its 95% interval and p for the algorithms, trained on cohorts like this one.
        p_holm: p adjusted for the pairs; of the metrics after the first, for all their pairs. Units are adjusted apart.
        models_low, models_high, p_models: the same for these trained models, as they are.
        fold_mean, folds, p_corrected_t: the mean over the folds in which both runs have the metric, their number, and
            the p of the corrected resampled t test (`paired_tests.nadeau_bengio`).
    """

    first: str
    second: str
    metric: str
    unit: str
    is_primary: bool
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    models_low: float | None
    models_high: float | None
    p_models: float | None
    fold_mean: float | None
    folds: int
    p_corrected_t: float | None
    p_holm: float | None = None

    @property
    def pair(self) -> str:
        return f"{self.first} - {self.second}"


def compare(
    runs: Mapping[str, Predictions],
    sizes: Sequence[tuple[int, int]],
    metrics: Sequence[str],
    unit: str = "slide",
    is_primary: bool = True,
) -> list[Difference]:
    """Compare every pair of runs in every metric, in the order of `metrics`.

    `runs` maps names to predictions for the same slides, or patients (see `PredictionRows.by_unit`), in the same folds;
    `sizes` are the numbers of them that each fold was trained and tested on. The result for a pair does not depend on
    the other runs, except for `p_holm`.
    """
    # A run of an earlier version does not name the groups that its splits kept together, as another does.
    groups = next((run.groups for run in runs.values() if run.groups is not None), None)
    names, predictions = list(runs), [replace(run, groups=groups) for run in runs.values()]
    figures = [run.reported for run in predictions]
    without = [_without_patients(run) for run in predictions]
    folds = [_fold_metrics(run) for run in predictions]
    n_train, n_test = zip(*sizes, strict=True)
    patients = _fewest_patients(predictions[0])
    all_patients = len(np.unique(predictions[0].scored.patients))
    inflation = training_inflation(n_train, n_test, predictions[0].n_repeats, all_patients)
    differences = []
    for metric in metrics:
        most = greatest_difference(predictions[0].task.basis(metric, predictions[0].labels, predictions[0].values))
        for a, b in combinations(range(len(runs)), 2):
            difference = _minus(figures[a][metric], figures[b][metric])
            changes = without[a][metric] - without[b][metric]
            algorithms = paired_test(difference, changes, patients, inflation, most=most)
            models = paired_test(difference, changes, patients, most=most)
            by_fold = _over_folds([fold[metric] for fold in folds[a]], [fold[metric] for fold in folds[b]], sizes)
            differences.append(
                Difference(
                    names[a], names[b], metric, unit, is_primary, difference,
                    *(algorithms.interval or (None, None)), algorithms.p,
                    *(models.interval or (None, None)), models.p, *by_fold,
                )
            )  # fmt: skip
    return _adjusted(differences, metrics[0])


def _without_patients(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return the compared metrics without each patient in turn, `(G,)` (see `resampling.left_out`)."""
    scored = predictions.scored
    ranking = left_out(scored.patients, scored.within_folds)
    return left_out(scored.patients, scored.pooled) | {name: ranking[name] for name in predictions.ranked_within}


def _fewest_patients(predictions: Predictions) -> int:
    """Return the number of patients of the rarest stratum (class)."""
    strata, patients = predictions.task.strata(predictions.labels), predictions.scored.patients
    return min(len(np.unique(patients[strata == stratum])) for stratum in np.unique(strata))


def _minus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _fold_metrics(predictions: Predictions) -> list[dict[str, float | None]]:
    folds = predictions.folds
    assert folds is not None  # noqa: S101 - for the type checker: a run's predictions have folds
    return [predictions.where(folds == fold).metrics for fold in np.unique(folds)]


def _over_folds(
    first: Sequence[float | None], second: Sequence[float | None], sizes: Sequence[tuple[int, int]]
) -> tuple[float | None, int, float | None]:
    """Return the mean difference over the folds where both are defined, their number, and the corrected t test's p."""
    pairs = [(a - b, *size) for a, b, size in zip(first, second, sizes, strict=True) if a is not None and b is not None]
    if not pairs:
        return None, 0, None
    differences, n_train, n_test = zip(*pairs, strict=True)
    t_and_p = nadeau_bengio(differences, n_train, n_test)
    return float(np.mean(differences)), len(pairs), t_and_p and t_and_p[1]


def _adjusted(differences: Sequence[Difference], primary: str) -> list[Difference]:
    """Return the differences with `p_holm`: the pairs of the primary metric are one family, all others another."""
    adjusted = {}
    for is_primary in (True, False):
        family = [index for index, pair in enumerate(differences) if (pair.metric == primary) is is_primary]
        adjusted |= dict(zip(family, holm([differences[index].p for index in family]), strict=True))
    return [replace(pair, p_holm=adjusted[index]) for index, pair in enumerate(differences)]
