"""Whether intervals hold the truth and tests keep their level, in simulated cohorts of known truth.

    uv run benchmarks/intervals_and_tests.py
    uv run benchmarks/intervals_and_tests.py --full --part coverage

Coverage: cohorts of synthetic scores with a known AUC; patients of one slide, or of one to seven whose scores correlate
by 0.5. Half of the cells have normal scores, for which the formulas were made; the others exponential ones, for which
they were not. The AUC within folds is that of five models, each of which tests a fold with a shift of its own. Level
and power: two algorithms (linear discriminants) are cross-validated on synthetic features, once as good as each other,
once with a stronger first one. They see 10, 40 or 3 features each, or choose two of ten; or they differ in their seeds
alone. Fitted: what a threshold for a sensitivity of 0.9 and a calibration, both fitted to inner validation, do on other
slides, for one inner model and for the mean of all. Endpoints: coverage as above, of numbers, grades, several labels
and survival, whose answers correlate with what a patient's target depends on. By default few cohorts a cell, in
minutes; --full takes 1000.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from report import processor, table, versions
from scipy.special import expit, logit
from scipy.stats import norm

from utils.core.runtime import derive_seed
from utils.evaluation.comparison import compare
from utils.evaluation.intervals import ScoredRows
from utils.evaluation.predictions import Predictions
from utils.tasks.calibration import calibration_lines, fitted_scaling
from utils.tasks.classification import Classification
from utils.tasks.multilabel import Multilabel
from utils.tasks.operating_point import OperatingPoint
from utils.tasks.ordinal import Ordinal
from utils.tasks.regression import Regression
from utils.tasks.survival import Survival
from utils.tasks.task import Task

TASK = Classification(("negative", "positive"))
LIKENESS = 0.5  # intraclass correlation of the slides of a patient
METRICS = (
    "auc", "average_precision", "accuracy", "balanced_accuracy", "f1_macro", "brier",
    "sensitivity_positive", "specificity_positive",
)  # fmt: skip
WITHIN = "auc_within_folds"
FEATURES, FOLDS = 20, 5
FOLD_SHIFT = 0.5  # standard deviation of what the model of a fold adds to all its log-odds
# How far apart the classes are in a feature; the first algorithm's advantage where there is one.
DISTANCE, GAIN = 0.42, 1.6
LARGE_COHORTS = 50  # of 2000 patients, whose mean figures are the truth of endpoints
INNER, TESTED, WANTED = 4, 4000, OperatingPoint("sensitivity", 0.9)


@dataclass(frozen=True)
class Cell:
    """Cohorts of so many patients, a share of them positive, with this true AUC."""

    patients: int
    prevalence: float
    auc: float
    has_several_slides: bool
    scores: str

    @property
    def name(self) -> str:
        slides = "1 to 7 slides" if self.has_several_slides else "1 slide"
        return f"{self.patients} patients, {self.prevalence:.0%} positive, AUC {self.auc}, {slides}, {self.scores}"


def cells(patients: tuple[int, ...]) -> Iterator[Cell]:
    for count, prevalence, auc, several, scores in product(
        patients, (0.1, 0.2, 0.5), (0.7, 0.9, 0.95, 0.99), (False, True), ("normal", "exponential")
    ):
        yield Cell(count, prevalence, auc, several, scores)


def draw(cell: Cell, rng: np.random.Generator) -> ScoredRows:
    """Return a cohort: probabilities that are true for equally frequent classes."""
    slides = rng.integers(1, 8, cell.patients) if cell.has_several_slides else np.ones(cell.patients, int)
    patient = np.repeat(np.arange(cell.patients), slides)
    labels = (rng.random(cell.patients) < cell.prevalence).astype(int)[patient]
    noise = np.sqrt(LIKENESS) * rng.normal(size=cell.patients)[patient]
    noise += np.sqrt(1 - LIKENESS) * rng.normal(size=len(patient))
    positive = probability(cell, labels, noise)
    return ScoredRows(TASK, labels, np.stack([1 - positive, positive], axis=1), patient, np.ones(len(labels)))


def in_folds(rows: ScoredRows, rng: np.random.Generator) -> ScoredRows:
    """Return the cohort as several models tested it, each those patients of a fold: their probabilities are shifted."""
    first = np.unique(rows.patients, return_index=True)[1]
    fold_of = np.zeros(len(first), int)
    for label in (0, 1):
        patients = rng.permutation(np.flatnonzero(rows.labels[first] == label))
        fold_of[patients] = (np.arange(len(patients)) + 2 * label) % FOLDS
    folds = fold_of[rows.patients]
    positive = expit(logit(rows.values[:, 1].clip(1e-9, 1 - 1e-9)) + FOLD_SHIFT * rng.normal(size=FOLDS)[folds])
    return replace(rows, values=np.stack([1 - positive, positive], axis=1), folds=folds)


def probability(cell: Cell, labels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return the positive class's probability for standard normal noise `(n,)`."""
    if cell.scores == "normal":
        distance = np.sqrt(2) * norm.ppf(cell.auc)
        return expit(distance * (distance * labels + noise) - distance**2 / 2)
    ratio = cell.auc / (1 - cell.auc)  # of the means of two exponential distributions
    score = -norm.logsf(noise) * np.where(labels == 1, ratio, 1)
    return expit(score * (1 - 1 / ratio) - np.log(ratio))


def truth(cell: Cell, size: int = 400_000) -> dict[str, float]:
    """Return the metrics of a very large cohort; the AUC is the one that was asked for."""
    rng = np.random.default_rng(1)
    labels = (np.arange(size) < cell.prevalence * size).astype(int)
    positive = probability(cell, labels, rng.normal(size=size))
    figures = TASK.metrics(labels, np.stack([1 - positive, positive], axis=1), np.ones((1, size)))
    return {name: float(value[0]) for name, value in figures.items()} | {"auc": cell.auc, WITHIN: cell.auc}


def coverage(cell: Cell, cohorts: int, seed: int) -> dict[str, float]:
    """Return the share of the intervals of each metric that hold the truth; of those that are defined."""
    rng, true = np.random.default_rng(derive_seed(seed, cell.name)), truth(cell)
    held: dict[str, list[bool]] = defaultdict(list)
    for number in range(cohorts):
        rows = draw(cell, rng)
        if len(np.unique(rows.labels)) < 2:
            continue
        estimates = rows.estimates(rows.pooled, number)
        tested = in_folds(rows, rng)
        estimates[WITHIN] = tested.estimates(tested.within_folds, number)["auc"]
        for name in (*METRICS, WITHIN):
            limits = estimates[name].interval
            if limits is not None:
                held[name].append(limits[0] <= true[name] <= limits[1])
    return {name: float(np.mean(held[name])) for name in (*METRICS, WITHIN)}


Fit = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def discriminant(features: np.ndarray, labels: np.ndarray, ridge: float) -> np.ndarray:
    """Return the weights of a regularised linear discriminant."""
    means = np.stack([features[labels == label].mean(axis=0) for label in (0, 1)])
    centred = features - means[labels]
    covariance = centred.T @ centred / len(labels) + ridge * np.eye(features.shape[1])
    return np.linalg.solve(covariance, means[1] - means[0])


def of_features(rows: slice) -> Fit:
    def fit(features: np.ndarray, labels: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
        weights = np.zeros(features.shape[1])
        weights[rows] = discriminant(features[:, rows], labels, 0.3)
        return weights

    return fit


def of_chosen_features(rows: slice) -> Fit:
    """Return an algorithm that uses the two features by which the classes differ most."""

    def fit(features: np.ndarray, labels: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
        differences = np.zeros(features.shape[1])
        differences[rows] = np.subtract(*(features[labels == label][:, rows].mean(axis=0) for label in (1, 0)))
        chosen = np.argsort(np.abs(differences))[-2:]
        weights = np.zeros_like(differences)
        weights[chosen] = differences[chosen]
        return weights

    return fit


def with_noise(share: float) -> Fit:
    def fit(features: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        weights = discriminant(features, labels, 0.5)
        return weights + rng.normal(size=FEATURES) * np.linalg.norm(weights) * share / np.sqrt(FEATURES)

    return fit


class Kind(NamedTuple):
    """Two algorithms that see other features: how far apart the classes are in those of each, and how it learns."""

    distances: tuple[float, ...]
    algorithm: Callable[[slice], Fit]


KINDS = {
    "other features": Kind((DISTANCE,) * 10, of_features),
    "40 features": Kind((0.25,) * 40, of_features),
    "3 features": Kind((0.6,) * 3, of_features),
    "2 features of 10": Kind((1.0, 0.8, 0.6, *(0.0,) * 7), of_chosen_features),
}
OTHER_SEEDS = "other seeds"


def two_algorithms(kind: str, is_stronger: bool) -> tuple[np.ndarray, dict[str, Fit]]:
    """Return how far apart the classes are in each feature `(D,)`, and the algorithms; the first may be stronger."""
    if kind == OTHER_SEEDS:
        return np.full(FEATURES, DISTANCE * 0.7), {"a": with_noise(0.2 if is_stronger else 1), "b": with_noise(1)}
    distances, algorithm = np.asarray(KINDS[kind].distances), KINDS[kind].algorithm
    half = len(distances)
    fits = {"a": algorithm(slice(0, half)), "b": algorithm(slice(half, None))}
    return np.concatenate([distances * (GAIN if is_stronger else 1), distances]), fits


def cross_validate(
    features: np.ndarray, labels: np.ndarray, fits: dict[str, Fit], repeats: int, rng: np.random.Generator
) -> dict[str, Predictions]:
    """Return each algorithm's out-of-fold predictions in the same folds."""
    count = len(labels)
    scores = {name: np.zeros((repeats, count)) for name in fits}
    folds = np.zeros((repeats, count), int)
    for repeat in range(repeats):
        for label in (0, 1):
            rows = rng.permutation(np.flatnonzero(labels == label))
            folds[repeat, rows] = (np.arange(len(rows)) + 2 * label) % FOLDS
        for fold in range(FOLDS):
            test = folds[repeat] == fold
            for name, fit in fits.items():
                scores[name][repeat, test] = features[test] @ fit(features[~test], labels[~test], rng)
    names = np.tile(np.arange(count).astype(str), repeats)
    predictions = {}
    for name, values in scores.items():
        positive = expit(values.ravel())
        predictions[name] = Predictions(
            names, names, np.tile(labels, repeats), np.stack([1 - positive, positive], axis=1), TASK,
            np.repeat(np.arange(repeats), count), 0, (folds + FOLDS * np.arange(repeats)[:, None]).ravel(),
        )  # fmt: skip
    return predictions


def rejections(
    kind: str, patients: int, prevalence: float, repeats: int, is_stronger: bool, cohorts: int, seed: int
) -> tuple[float, float, float]:
    """Return how often p of algorithms, p of these models and p of the corrected t test are below 0.05."""
    rng = np.random.default_rng(derive_seed(seed, kind, patients, str(prevalence), repeats, is_stronger))
    labels = (np.arange(patients) < round(prevalence * patients)).astype(int)
    found = []
    distances, fits = two_algorithms(kind, is_stronger)
    for _ in range(cohorts):
        features = rng.normal(size=(patients, len(distances))) + labels[:, None] * distances
        runs = cross_validate(features, labels, fits, repeats, rng)
        size = patients // FOLDS
        (test,) = compare(runs, [(patients - size, size)] * (FOLDS * repeats), ["auc"])
        found.append([p is not None and p < 0.05 for p in (test.p, test.p_models, test.p_corrected_t)])
    first, second, third = np.mean(found, axis=0)
    return float(first), float(second), float(third)


def fitted(patients: int, prevalence: float, cohorts: int, seed: int) -> list[float]:
    """Return sensitivity and specificity of other slides at the threshold `WANTED`, and their calibration slope.

    First those of one inner model, then those of the mean of all. Rates are means over cohorts, slopes medians.
    """
    rng, fit = np.random.default_rng(derive_seed(seed, "fitted", patients, str(prevalence))), with_noise(0.7)
    labels, true = ((np.arange(count) < round(prevalence * count)).astype(int) for count in (patients, TESTED))
    found = []
    for _ in range(cohorts):
        features, tested = (rng.normal(size=(len(of), FEATURES)) + of[:, None] * DISTANCE for of in (labels, true))
        folds, validated, answers = np.zeros(patients, int), np.zeros((patients, 2)), []
        for label in (0, 1):
            rows = rng.permutation(np.flatnonzero(labels == label))
            folds[rows] = np.arange(len(rows)) % INNER
        for fold in range(INNER):
            train = folds != fold
            weights = fit(features[train], labels[train], rng)
            middle = np.mean([features[train & (labels == label)].mean(axis=0) for label in (0, 1)], axis=0)
            of_validation, of_tested = (expit((rows - middle) @ weights) for rows in (features[~train], tested))
            validated[~train] = np.stack([1 - of_validation, of_validation], axis=1)
            answers.append(np.stack([1 - of_tested, of_tested], axis=1))
        threshold, scaling = WANTED.threshold(labels, validated[:, 1]), fitted_scaling(labels, validated)
        figures: list[float] = []
        for models in (answers[:1], answers):
            is_called = TASK.decide_by({"threshold": threshold, "operating_point": str(WANTED)}, np.stack(models)) == 1
            calibrated = np.mean([scaling.apply(values) for values in models], axis=0)[:, 1]
            (slope,), _ = calibration_lines(calibrated, true == 1, np.ones((1, TESTED)))
            figures += [is_called[true == 1].mean(), 1 - is_called[true == 0].mean(), slope]
        found.append(figures)
    return np.where(np.arange(6) % 3 == 2, np.nanmedian(found, axis=0), np.mean(found, axis=0)).tolist()


class Endpoint(NamedTuple):
    """A task, and the targets and values of slides by what their patients' targets depend on `(n, 2)` and by the
    answers `(n, 2)` to it, all standard normal.
    """

    task: Task
    targets: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    values: Callable[[np.ndarray], np.ndarray]
    may_have_several_slides: bool = True


CUTS, TIMES, EFFECT = np.array([-0.5, 0.7]), (0.3, 0.6, 1.2), 1.0


def grade_probabilities(answers: np.ndarray) -> np.ndarray:
    above = expit(3 * (answers[:, :1] - CUTS))
    return -np.diff(above, axis=1, prepend=1, append=0)


def survival_targets(latent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    times = rng.exponential(np.exp(-EFFECT * latent[:, 0]))
    followed = rng.uniform(0.2, 3, len(times))
    return np.stack([np.minimum(times, followed), (times <= followed).astype(float)], axis=1)


def survival_values(answers: np.ndarray) -> np.ndarray:
    curves = np.exp(-np.exp(EFFECT * answers[:, :1]) * np.array(TIMES))
    return np.concatenate([-curves.mean(axis=1, keepdims=True), curves], axis=1)


ENDPOINTS = {
    "number": Endpoint(Regression("number"), lambda latent, _: latent[:, 0], lambda answers: answers[:, :1]),
    "three grades": Endpoint(
        Ordinal("grade", ("low", "mid", "high")), lambda latent, _: np.searchsorted(CUTS, latent[:, 0]),
        grade_probabilities,
    ),
    "two labels": Endpoint(
        Multilabel(("A", "B")), lambda latent, _: (latent > CUTS[1]).astype(float), lambda answers: expit(3 * answers)
    ),
    "survival": Endpoint(Survival("time", "event", times=TIMES), survival_targets, survival_values, False),
}  # fmt: skip


def draw_endpoint(
    endpoint: Endpoint, patients: int, correlation: float, has_several_slides: bool, rng: np.random.Generator
) -> ScoredRows:
    """Return a cohort whose answers have this correlation with what the targets depend on."""
    slides = rng.integers(1, 8, patients) if has_several_slides else np.ones(patients, int)
    patient = np.repeat(np.arange(patients), slides)
    latent = rng.normal(size=(patients, 2))
    noise = np.sqrt(LIKENESS) * rng.normal(size=(patients, 2))[patient]
    noise += np.sqrt(1 - LIKENESS) * rng.normal(size=(len(patient), 2))
    answers = correlation * latent[patient] + np.sqrt(1 - correlation**2) * noise
    targets = endpoint.targets(latent, rng)[patient]
    task = endpoint.task.of_cohort(targets, patient.astype(str).tolist())
    return ScoredRows(task, targets, endpoint.values(answers), patient, np.ones(len(patient)))


def endpoint_coverage(
    name: str, patients: int, correlation: float, has_several_slides: bool, cohorts: int, seed: int
) -> str:
    """Return the share of the intervals of each metric that hold the truth, the mean of large cohorts."""
    endpoint, rng = ENDPOINTS[name], np.random.default_rng(derive_seed(seed, name, patients, str(correlation)))
    large = [draw_endpoint(endpoint, 2000, correlation, False, rng) for _ in range(LARGE_COHORTS)]
    found = [rows.pooled(np.ones((1, len(rows.labels)))) for rows in large]
    true = {metric: float(np.mean([figures[metric][0] for figures in found])) for metric in endpoint.task.metric_names}
    held: dict[str, list[bool]] = defaultdict(list)
    for number in range(cohorts):
        rows = draw_endpoint(endpoint, patients, correlation, has_several_slides, rng)
        for metric, estimate in rows.estimates(rows.pooled, number).items():
            if estimate.interval is not None:
                held[metric].append(estimate.interval[0] <= true[metric] <= estimate.interval[1])
    return ", ".join(f"{metric} {np.mean(held[metric]):.3f}" for metric in endpoint.task.metric_names if held[metric])


def endpoint_rows(patients: tuple[int, ...], cohorts: int, seed: int) -> Iterator[list[str]]:
    for name, count, correlation, several in product(ENDPOINTS, patients, (0.3, 0.6, 0.9), (False, True)):
        if several and not ENDPOINTS[name].may_have_several_slides:
            continue
        slides = "1 to 7 slides" if several else "1 slide"
        shares = endpoint_coverage(name, count, correlation, several, cohorts, seed)
        yield [f"{name}, {count} patients, correlation {correlation}, {slides}", shares]


def coverage_rows(patients: tuple[int, ...], cohorts: int, seed: int) -> Iterator[list[str]]:
    for cell in cells(patients):
        shares = coverage(cell, cohorts, seed)
        yield [cell.name, *(f"{share:.3f}" for share in shares.values())]


def rejection_rows(patients: tuple[int, ...], cohorts: int, seed: int) -> Iterator[list[str]]:
    for kind, count, prevalence, repeats in product((*KINDS, OTHER_SEEDS), patients, (0.5, 0.2), (1, 3, 5)):
        name = f"{kind}, {count} patients, {prevalence:.0%} positive, {repeats} repeat{'s' if repeats > 1 else ''}"
        shares = [
            share
            for is_stronger in (False, True)
            for share in rejections(kind, count, prevalence, repeats, is_stronger, cohorts, seed)
        ]
        yield [name, *(f"{share:.3f}" for share in shares)]


def fitted_rows(patients: tuple[int, ...], cohorts: int, seed: int) -> Iterator[list[str]]:
    for count, prevalence in product(patients, (0.5, 0.2)):
        if round(prevalence * count) >= WANTED.least_slides:
            figures = fitted(count, prevalence, cohorts, seed)
            yield [f"{count} patients, {prevalence:.0%} positive", *(f"{figure:.3f}" for figure in figures)]


PARTS = {
    "coverage": ("cohorts | " + " | ".join((*METRICS, WITHIN)), coverage_rows),
    "level": (
        "two algorithms | level: p | p, these models | corrected t | power: p | p, these models | corrected t",
        rejection_rows,
    ),
    "endpoints": ("cohorts | share of the intervals that hold the truth", endpoint_rows),
    "fitted": (
        "cohorts | one model: sensitivity | specificity | slope | mean of four: sensitivity | specificity | slope",
        fitted_rows,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--patients", type=int, nargs="+", default=[60, 100, 200])
    parser.add_argument("--cohorts", type=int, help="cohorts a cell (default: 20, with --full 1000)")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cohorts = arguments.cohorts or (1000 if arguments.full else 20)
    print(f"{cohorts} cohorts a cell, seed {arguments.seed}; {processor()}; {', '.join(versions())}\n")
    for part in arguments.part:
        heading, rows_of = PARTS[part]
        rows = []
        for row in rows_of(tuple(arguments.patients), cohorts, arguments.seed):
            print(" ".join(row), flush=True)
            rows.append(row)
        print(f"\n{table(heading, rows)}\n")


if __name__ == "__main__":
    main()
