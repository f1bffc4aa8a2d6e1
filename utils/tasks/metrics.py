"""Classification metrics from probabilities; an undefined one is None, never a guess.

They are not scikit-learn's, whose checks take milliseconds per call: the bootstrap needs a thousand values. Each metric
is computed for many weightings of the same slides at once; the ordinary metric gives every slide the weight 1.
"""

from collections.abc import Sequence

import numpy as np

from utils.tasks.bases import Basis, MeanLoss, MeanOfProportions, NoInterval, PairRanking, Precision, Proportion, Share
from utils.tasks.ranking_metrics import auc_and_precision, within_strata
from utils.tasks.task import single
from utils.tasks.weighted import group_sums, ratio

METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "auc", "average_precision", "brier", "ece")
BINS, _LEAST_IN_BIN = 10, 5


def metric_names(class_names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return `METRICS`, then sensitivity and specificity of each class."""
    return (*METRICS, *(f"{kind}_{name}" for name in class_names for kind in ("sensitivity", "specificity")))


def decision_metrics(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> dict[str, float | None]:
    """Return accuracy, balanced accuracy, macro F1, and each class's sensitivity and specificity, of `predicted (n,)`.

    A sensitivity is None if `labels (n,)` lack the class, a specificity if they hold no other class.
    """
    return single(_decisions(labels, predicted, np.ones((1, len(labels))), len(class_names), class_names))


def weighted_metrics(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, class_names: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Return the metrics `metric_names(class_names)` under each row of `weights (B, n)`, as `(B,)`; NaN if undefined.

    `labels (n,)` int, `probabilities (n, C)`; a weight of k counts as k copies of the slide. The most probable class is
    the predicted one. Balanced accuracy and macro F1 average over the classes that occur in `labels`. AUC and average
    precision need all classes; of two classes they are those of the last, of more the mean of one-against-rest. The
    Brier score of two classes is that of the last, of more the sum over the classes.
    """
    probabilities = probabilities.astype(np.float64)
    num_classes = probabilities.shape[1]
    predicted, total = probabilities.argmax(axis=1), weights.sum(axis=1)
    ranked = np.mean(
        [auc_and_precision(labels == c, probabilities[:, c], weights) for c in ranked_classes(num_classes)], axis=0
    )
    errors = (probabilities - (labels[:, None] == np.arange(num_classes))) ** 2
    confidence = probabilities[np.arange(len(labels)), predicted]
    gaps = group_sums(weights * ((predicted == labels) - confidence), probability_bins(confidence), BINS)
    figures = {
        **_decisions(labels, predicted, weights, num_classes, class_names),
        "auc": ranked[0],
        "average_precision": ranked[1],
        "brier": ratio(weights @ (errors[:, 1] if num_classes == 2 else errors.sum(axis=1)), total),
        "ece": ratio(np.abs(gaps).sum(axis=1), total),
    }
    return {name: figures[name] for name in metric_names(class_names)}


def metrics_within(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, strata: np.ndarray
) -> dict[str, np.ndarray]:
    """Return AUC and average precision under each row of `weights (B, n)`, as `(B,)`, of slides compared with those of
    the same stratum `(n,)` only (see `ranking_metrics.within_strata`). Of more than two classes both are means over the
    classes.
    """
    probabilities = probabilities.astype(np.float64)
    by_class = [
        within_strata(labels == index, probabilities[:, index], weights, strata)
        for index in ranked_classes(probabilities.shape[1])
    ]
    return dict(zip(("auc", "average_precision"), np.mean(by_class, axis=0), strict=True))


def basis(metric: str, labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Basis:
    """Return what a metric rests on; the calibration error has no interval."""
    kind, _, name = metric.partition("_")
    classes = np.arange(len(class_names))
    if metric == "accuracy":
        return Proportion(np.ones(len(labels), bool))
    if metric == "balanced_accuracy":
        return MeanOfProportions(tuple(f"sensitivity_{name}" for name in class_names))
    if kind in ("sensitivity", "specificity"):
        return Proportion((labels == class_names.index(name)) == (kind == "sensitivity"))
    if metric in ("auc", "average_precision"):
        positives = np.stack([labels == index for index in ranked_classes(len(class_names))])
        return (PairRanking if metric == "auc" else Precision)(positives, ~positives)
    if metric == "brier":
        errors = (probabilities - (labels[:, None] == classes)) ** 2
        return MeanLoss(errors[:, 1], 1) if len(class_names) == 2 else MeanLoss(errors.sum(axis=1), 2)
    return NoInterval("by chance alone it is above 0") if metric == "ece" else Share(classes[:, None] == labels)


def ranked_classes(num_classes: int) -> Sequence[int]:
    """Return the classes whose AUC and average precision are computed: of two the positive one, else all."""
    return [1] if num_classes == 2 else range(num_classes)


def probability_bins(probabilities: np.ndarray) -> np.ndarray:
    """Return which of `BINS` equally wide bins each probability is in; an edge belongs to the bin below."""
    return np.clip(np.ceil(probabilities * BINS).astype(int) - 1, 0, BINS - 1)


def equal_bins(probabilities: np.ndarray) -> list[np.ndarray]:
    """Return the rows of at most `BINS` bins of about equally many slides; equal probabilities share a bin."""
    count = max(1, min(BINS, len(probabilities) // _LEAST_IN_BIN))
    lower = np.searchsorted(np.sort(probabilities), probabilities)
    bins = lower * count // len(probabilities)
    return [np.flatnonzero(bins == number) for number in np.unique(bins)]


def log_loss(labels: np.ndarray, probabilities: np.ndarray, class_weights: np.ndarray) -> float:
    """Return the mean negative log-likelihood of the true classes, each slide weighted by its class."""
    likelihood = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, None)
    weights = class_weights[labels]
    return float((-np.log(likelihood) * weights).sum() / weights.sum())


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return weights `(C,)` that give each class that occurs the same total, counted in slides, not chunks."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.divide(len(labels), num_classes * counts, out=np.zeros(num_classes), where=counts > 0)


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation (n - 1) over the folds where the metric is defined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None, None
    return float(np.mean(defined)), float(np.std(defined, ddof=1)) if len(defined) > 1 else None


def auc_is_defined(labels: np.ndarray, num_classes: int) -> bool:
    return len(np.unique(labels)) == num_classes


def _decisions(
    labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray, num_classes: int, class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    pairs = group_sums(weights, labels * num_classes + predicted, num_classes**2)
    counts = pairs.reshape(-1, num_classes, num_classes)
    correct, true, assigned = counts.diagonal(axis1=1, axis2=2), counts.sum(axis=2), counts.sum(axis=1)
    total = true.sum(axis=1)
    sensitivity = ratio(correct, true)
    negatives = total[:, None] - true
    specificity = ratio(negatives - assigned + correct, negatives)
    present = true > 0
    figures = {
        "accuracy": ratio(correct.sum(axis=1), total),
        "balanced_accuracy": ratio(np.where(present, sensitivity, 0).sum(axis=1), present.sum(axis=1)),
        "f1_macro": ratio(ratio(2 * correct, true + assigned, empty=0).sum(axis=1), present.sum(axis=1)),
    }
    for index, name in enumerate(class_names):
        figures[f"sensitivity_{name}"], figures[f"specificity_{name}"] = sensitivity[:, index], specificity[:, index]
    return figures
