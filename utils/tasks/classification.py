"""Classification: a slide is of one of two or more classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.core.text import aligned, figure_text, interval_text
from utils.tasks.calibration import fitted_temperature, scale_probabilities
from utils.tasks.metrics import (
    METRICS,
    auc_is_defined,
    balanced_class_weights,
    decision_metrics,
    fitted_threshold,
    log_loss,
    metric_names,
    ranked_classes,
    weighted_metrics,
)
from utils.tasks.task import Figures, Task

if TYPE_CHECKING:
    from torch import Tensor

# From this difference on it is said why the mean AUC over folds and the pooled one differ.
_NOTABLE_GAP = 0.01


@dataclass(frozen=True)
class Classification(Task):
    """One of two or more classes; the last of two is the positive one. Targets are their indices, values are
    probabilities.

    Raises ValueError unless there are two different names.
    """

    class_names: tuple[str, ...]

    drawings = ("roc", "precision_recall", "confusion_matrix", "calibration")
    shown_metrics = METRICS
    calibration_metrics = ("brier", "ece")
    lower_is_better = ("brier", "ece")

    def __post_init__(self) -> None:
        if len(self.class_names) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"classes {', '.join(self.class_names)}; a classifier needs two different ones")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return self.class_names

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return `metrics.METRICS`, then sensitivity and specificity of each class."""
        return metric_names(self.class_names)

    def target(self, text: str) -> int:
        """Return the index of a class. Raise ValueError for a name that is none."""
        return self.class_names.index(text)

    @property
    def strata_names(self) -> tuple[str, ...]:
        """Return the names of the classes: every fold gets its share of each."""
        return self.class_names

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the classes."""
        return targets

    def loss_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return `(C,)` weights that give each class the same total."""
        return balanced_class_weights(targets, len(self.class_names))

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the cross-entropy `(B,)`, weighted by class."""
        from torch.nn import functional

        return functional.cross_entropy(logits.float(), targets, weight=weights, reduction="none")

    def activate(self, logits: Tensor) -> np.ndarray:
        """Return the softmax in float64."""
        return logits.cpu().double().softmax(dim=-1).numpy()

    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric `(B,)` (see `metrics.weighted_metrics`)."""
        return weighted_metrics(targets, values, weights, self.class_names)

    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the log-loss, weighted by class, and the shown metrics."""
        every = self.plain_metrics(targets, values)
        shown = {name: every[name] for name in self.shown_metrics}
        return {"loss": log_loss(targets, values, weights)} | shown

    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return that a class is missing, which leaves the AUC undefined; empty else."""
        is_defined = metric != "auc" or auc_is_defined(targets, len(self.class_names))
        return "" if is_defined else "lacks a class"

    def fit_inner(self, targets: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
        """Return the `threshold` of the best balanced accuracy, of two classes, and the `temperature`."""
        is_binary = len(self.class_names) == 2
        return {
            "threshold": fitted_threshold(targets, values[:, 1]) if is_binary else None,
            "temperature": fitted_temperature(targets, values),
        }

    def decide(self, values: np.ndarray, threshold: float | None = None) -> np.ndarray:
        """Return `(n,)` int, the class of the largest probability; with a threshold, whether the positive one's
        reaches it.
        """
        return values.argmax(axis=-1) if threshold is None else (values[..., 1] >= threshold).astype(int)

    def decision_metrics(self, targets: np.ndarray, decisions: np.ndarray) -> Figures:
        """Return accuracy, balanced accuracy, macro F1, and each class's sensitivity and specificity."""
        return decision_metrics(targets, decisions, self.class_names)

    def calibrate(self, values: np.ndarray, temperature: float) -> np.ndarray:
        """Return the probabilities, temperature-scaled."""
        return scale_probabilities(values, temperature)

    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows that are surest and correct, surest and wrong, and most uncertain."""
        ordered = np.sort(values, axis=1)
        sure = np.argsort(-ordered[:, -1], kind="stable")
        unsure = np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")
        is_right = (self.decide(values) == targets)[sure]
        return {"surest correct": sure[is_right], "surest wrong": sure[~is_right], "most uncertain": unsure}

    def table(self, pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
        """Return the pooled sensitivity and specificity of each class, with their intervals."""
        kinds = ("sensitivity", "specificity")
        rows = [["pooled", *(head for kind in kinds for head in (kind, "95% CI"))]]
        for name in self.class_names:
            names = [f"{kind}_{name}" for kind in kinds]
            rows.append(
                [name, *(cell for one in names for cell in (figure_text(pooled[one]), interval_text(intervals[one])))]
            )
        return aligned([rows[:1], rows[1:]])

    def closing_words(self, results: Mapping[str, Any]) -> list[str]:
        """Return why the pooled AUC differs from the mean over folds, where it does, and what the threshold and the
        temperature change.
        """
        words, pooled = [], results["pooled"]
        mean, auc = results.get("slide_auc_mean"), pooled["auc"]
        if mean is not None and auc is not None and abs(mean - auc) >= _NOTABLE_GAP:
            words.append(
                f"The mean AUC {figure_text(mean)} ranks each fold's slides by that fold's own model; the pooled "
                f"{figure_text(auc)} ranks all slides together, though the folds' models may put their probabilities "
                "on different scales."
            )
        at_threshold, scaled = results["pooled_thresholded"], results["pooled_calibrated"]
        if at_threshold is not None:
            changes = [
                f"{name.replace('_', ' ')} {figure_text(at_threshold[name])} ({figure_text(pooled[name])} at 0.5)"
                for name in ("accuracy", "balanced_accuracy", "f1_macro")
            ]
            words.append(f"At the threshold fitted on inner validation, pooled: {', '.join(changes)}.")
        if scaled is not None:
            changes = [f"{name} {figure_text(scaled[name])} ({figure_text(pooled[name])} as it is)" for name in scaled]
            words.append(f"Temperature-scaled as fitted on inner validation, pooled: {', '.join(changes)}.")
        return words

    @property
    def ranked(self) -> Sequence[int]:
        """Return the classes that are ranked before the others: the positive one of two, each of more."""
        return ranked_classes(len(self.class_names))
