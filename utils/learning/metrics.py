"""Classification figures from probabilities; one that is undefined is None, never a guess.

Written out, since the bootstrap asks for them a thousand times and scikit-learn spends milliseconds on checks.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "auc")


def classification_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """`labels (n,)` int, `probabilities (n, C)`. Balanced accuracy and macro F1 average over the classes that occur in
    `labels`; AUC (binary; macro one-vs-rest beyond) needs all of them, else it is None.
    """
    num_classes = probabilities.shape[1]
    pairs = labels * num_classes + probabilities.argmax(axis=1)
    counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    present = counts.any(axis=1)
    hits, true, predicted = counts.diagonal()[present], counts.sum(axis=1)[present], counts.sum(axis=0)[present]
    return {
        "accuracy": float(hits.sum() / len(labels)),
        "balanced_accuracy": float((hits / true).mean()),
        "f1_macro": float((2 * hits / (true + predicted)).mean()),
        "auc": _auc(labels, probabilities),
    }


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


def _auc(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    num_classes = probabilities.shape[1]
    if not auc_is_defined(labels, num_classes):
        return None
    positives = [1] if num_classes == 2 else range(num_classes)
    return float(np.mean([_binary_auc(labels == index, probabilities[:, index]) for index in positives]))


def _binary_auc(positive: np.ndarray, scores: np.ndarray) -> float:
    """How often a positive outranks a negative, ties counted half."""
    count = positive.sum()
    wins = rankdata(scores)[positive].sum() - count * (count + 1) / 2
    return wins / (count * (len(positive) - count))
