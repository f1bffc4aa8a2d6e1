"""Classification figures from probabilities; one that is undefined is None, never a guess."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score

METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "auc")


def classification_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """`labels (n,)` int, `probabilities (n, C)`. Balanced accuracy and macro F1 average over the classes that occur in
    `labels`; AUC (binary; macro one-vs-rest beyond) needs all of them, else it is None.
    """
    predicted = probabilities.argmax(axis=1)
    present = np.unique(labels)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(recall_score(labels, predicted, labels=present, average="macro")),
        "f1_macro": float(f1_score(labels, predicted, labels=present, average="macro")),
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
    if num_classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    # Float32 softmax rows miss a sum of 1 by more than scikit-learn tolerates.
    rows = probabilities / probabilities.sum(axis=1, keepdims=True)
    return float(roc_auc_score(labels, rows, multi_class="ovr", average="macro"))
