"""Classification figures from probabilities; one that is undefined is None, never a guess.

Written out, since the bootstrap asks for them a thousand times and scikit-learn spends milliseconds on checks. Each is
computed for many weightings of the same slides at once; a plain figure gives every slide the weight 1.
"""

from collections.abc import Sequence

import numpy as np

from utils.tasks.task import plain

METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "auc", "average_precision", "brier", "ece")
BINS = 10


def metric_names(class_names: Sequence[str] = ()) -> tuple[str, ...]:
    """`METRICS`, then sensitivity and specificity of each class."""
    return (*METRICS, *(f"{kind}_{name}" for name in class_names for kind in ("sensitivity", "specificity")))


def decision_metrics(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> dict[str, float | None]:
    """Accuracy, balanced accuracy, macro F1, and each class's sensitivity and specificity, of `predicted (n,)` int.

    A sensitivity is None where `labels (n,)` lack the class, a specificity where they hold nothing else.
    """
    return plain(_decisions(labels, predicted, np.ones((1, len(labels))), len(class_names), class_names))


def weighted_metrics(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, class_names: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Every one of `metric_names(class_names)` under each row of `weights (B, n)`, as `(B,)`; NaN where undefined.

    `labels (n,)` int, `probabilities (n, C)`; a whole weight is so many copies of the slide. The class of the largest
    probability is the one predicted. Balanced accuracy and macro F1 average over the classes that occur in `labels`;
    AUC and average precision (of the last of two classes; macro one-vs-rest beyond) need all of them. The Brier score
    of two classes looks at the last, beyond two it sums over the classes.
    """
    probabilities = probabilities.astype(np.float64)
    num_classes = probabilities.shape[1]
    predicted, total = probabilities.argmax(axis=1), weights.sum(axis=1)
    ranked = np.mean(
        [_ranking(labels == index, probabilities[:, index], weights) for index in ranked_classes(num_classes)], 0
    )
    errors = (probabilities - (labels[:, None] == np.arange(num_classes))) ** 2
    confidence = probabilities[np.arange(len(labels)), predicted]
    gaps = _group_sums(weights * ((predicted == labels) - confidence), probability_bins(confidence), BINS)
    figures = {
        **_decisions(labels, predicted, weights, num_classes, class_names),
        "auc": ranked[0],
        "average_precision": ranked[1],
        "brier": _ratio(weights @ (errors[:, 1] if num_classes == 2 else errors.sum(axis=1)), total),
        "ece": _ratio(np.abs(gaps).sum(axis=1), total),
    }
    return {name: figures[name] for name in metric_names(class_names)}


def ranked_classes(num_classes: int) -> Sequence[int]:
    """Return the classes that are ranked before the others: the positive one of two, each of more."""
    return [1] if num_classes == 2 else range(num_classes)


def _ranking(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and average precision, each `(B,)`, of `scores (n,)` for `positive (n,)` bool under `weights (B, n)`.

    AUC is how often a positive outranks a negative, ties counted half; average precision is the mean, over the
    positives, of the precision among all that score at least as high. NaN unless both kinds have weight.
    """
    order = np.argsort(-scores, kind="stable")
    descending, positive = -scores[order], positive[order]
    weights = np.take(weights, order, axis=1)
    own = weights[:, positive]
    # Of each positive: the weight of all (of all positives) that score higher, and that score at least as high.
    above, reached = (np.searchsorted(descending, descending[positive], side) for side in ("left", "right"))
    positives_until = np.concatenate([[0], positive.cumsum()])
    cumulative, own_cumulative = _from_zero(weights), _from_zero(own)
    all_above, all_reached = cumulative[:, above], cumulative[:, reached]
    own_above, own_reached = own_cumulative[:, positives_until[above]], own_cumulative[:, positives_until[reached]]
    count = own_cumulative[:, -1]
    others = cumulative[:, -1] - count
    losses = (own * (all_above - own_above + all_reached - own_reached)).sum(axis=1) / 2
    precision = _ratio(own_reached, all_reached, empty=0)
    defined = np.where(others > 0, count, 0)
    return 1 - _ratio(losses, defined * others), _ratio((own * precision).sum(axis=1), defined)


def probability_bins(probabilities: np.ndarray) -> np.ndarray:
    """The bin, of `BINS` equally wide ones, each probability falls into; an edge belongs to the bin below."""
    return np.clip(np.ceil(probabilities * BINS).astype(int) - 1, 0, BINS - 1)


def fitted_threshold(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Of two classes, the threshold on `scores (n,)`, the last one's probability, of the best balanced accuracy.

    It lies midway between neighbouring scores (0 and 1 among them), of several as good ones nearest to 0.5; None where
    a class is missing. A slide is called positive at `score >= threshold`.
    """
    if not auc_is_defined(labels, 2):
        return None
    edges = np.unique(np.concatenate([[0.0, 1.0], scores]))
    thresholds = (edges[:-1] + edges[1:]) / 2
    negatives, positives = (np.sort(scores[labels == label].astype(np.float64)) for label in (0, 1))
    missed, spared = (np.searchsorted(group, thresholds, "left") for group in (positives, negatives))
    # Twice the balanced accuracy, times both counts: whole numbers, so that equals compare equal.
    quality = (len(positives) - missed) * len(negatives) + spared * len(positives)
    best = thresholds[quality == quality.max()]
    return float(best[np.abs(best - 0.5).argmin()])


def log_loss(labels: np.ndarray, probabilities: np.ndarray, class_weights: np.ndarray) -> float:
    """Mean negative log-likelihood of the true classes, each slide weighted by its class."""
    likelihood = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, None)
    weights = class_weights[labels]
    return float((-np.log(likelihood) * weights).sum() / weights.sum())


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """`(C,)` weights that give each class that occurs the same total; counted on slides, not on chunks."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.divide(len(labels), num_classes * counts, out=np.zeros(num_classes), where=counts > 0)


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Over the folds where the figure is defined; the standard deviation is the sample's (n - 1)."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def auc_is_defined(labels: np.ndarray, num_classes: int) -> bool:
    return len(np.unique(labels)) == num_classes


def _decisions(
    labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray, num_classes: int, class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    pairs = _group_sums(weights, labels * num_classes + predicted, num_classes**2)
    counts = pairs.reshape(-1, num_classes, num_classes)
    hits, true, called = counts.diagonal(axis1=1, axis2=2), counts.sum(axis=2), counts.sum(axis=1)
    total = true.sum(axis=1)
    sensitivity = _ratio(hits, true)
    others = total[:, None] - true
    specificity = _ratio(others - called + hits, others)
    present = true > 0
    figures = {
        "accuracy": _ratio(hits.sum(axis=1), total),
        "balanced_accuracy": _ratio(np.where(present, sensitivity, 0).sum(axis=1), present.sum(axis=1)),
        "f1_macro": _ratio(_ratio(2 * hits, true + called, empty=0).sum(axis=1), present.sum(axis=1)),
    }
    for index, name in enumerate(class_names):
        figures[f"sensitivity_{name}"], figures[f"specificity_{name}"] = sensitivity[:, index], specificity[:, index]
    return figures


def _group_sums(values: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """`values (B, n)` summed over each of the `groups (n,)`: `(B, num_groups)`."""
    return values @ (groups[:, None] == np.arange(num_groups))


def _from_zero(values: np.ndarray) -> np.ndarray:
    sums = np.zeros((len(values), values.shape[1] + 1))
    values.cumsum(axis=1, out=sums[:, 1:])
    return sums


def _ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float = np.nan) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(denominator.shape, empty, float), where=denominator > 0)
