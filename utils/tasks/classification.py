"""Classification of a slide into one of two or more classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.core.text import aligned, figure_text, interval_text
from utils.tasks.bases import Basis
from utils.tasks.calibration import Scaling, fitted_scaling
from utils.tasks.metrics import (
    METRICS,
    auc_is_defined,
    basis,
    decision_metrics,
    log_loss,
    metric_names,
    metrics_within,
    ranked_classes,
    weighted_metrics,
)
from utils.tasks.named_classes import NamedClasses
from utils.tasks.operating_point import BALANCED, OperatingPoint
from utils.tasks.task import Figures, FittedFigures

if TYPE_CHECKING:
    from torch import Tensor

# From this difference on, the closing text explains why the mean AUC over folds and the pooled AUC differ.
_NOTABLE_GAP = 0.01


@dataclass(frozen=True)
class Classification(NamedClasses):
    """Two or more classes without an order; of two, the last is positive.

    Raises ValueError if there are fewer than two classes, or if two have the same name.
    """

    class_names: tuple[str, ...]

    kind, flags = "classification", "--class_names"
    stratum_words = ("class", "classes")
    figure_names = ("roc", "precision_recall", "confusion_matrix", "calibration")
    decision_figures = ("threshold", "operating_point")
    main_metrics = METRICS
    compared_metrics = ("auc", "balanced_accuracy", "f1_macro")
    calibration_metrics = ("brier", "ece")
    lower_is_better = ("brier", "ece")
    metric_titles = {"auc": "AUC", "f1_macro": "macro F1", "brier": "Brier", "ece": "ECE"}  # noqa: RUF012 - a constant of the class, as the others

    def __post_init__(self) -> None:
        if len(self.class_names) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"classes {', '.join(self.class_names)}; a classifier needs two different ones")

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column `label`."""
        return ("label",)

    @property
    def default_monitor(self) -> str:
        """Return that of the AUC."""
        return "slide_auc"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return self.class_names

    @property
    def about(self) -> str:
        """Return the names of the classes."""
        return f"classes {', '.join(self.class_names)}"

    @property
    def record(self) -> dict[str, Any]:
        """Return the `class_names`."""
        return {"class_names": list(self.class_names)}

    @property
    def quantity(self) -> str:
        """Return that signals are log-odds."""
        return "log-odds"

    @property
    def ranked_outputs(self) -> Sequence[int]:
        """Return the classes with an AUC (see `metrics.ranked_classes`)."""
        return ranked_classes(len(self.class_names))

    @property
    def positive_output(self) -> str | None:
        """Return the last of two classes; None for more."""
        return self.class_names[1] if len(self.class_names) == 2 else None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return `METRICS`, then sensitivity and specificity of each class."""
        return metric_names(self.class_names)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the cross-entropy `(B,)`, weighted by class."""
        from torch.nn import functional

        return functional.cross_entropy(logits.float(), targets, weight=weights, reduction="none")

    @property
    def chance_loss(self) -> float:
        """Return the cross-entropy of equal probabilities."""
        return math.log(len(self.class_names))

    def activate(self, logits: Tensor) -> np.ndarray:
        """Return the softmax in float64."""
        return logits.cpu().double().softmax(dim=-1).numpy()

    def signals(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return each class's log-odds against all others; of two classes, the margin of their logits."""
        import torch

        logs = logits.log_softmax(dim=-1) + shares.log().to(logits).unsqueeze(-1)
        logs = logs.logsumexp(dim=0)
        others = [torch.cat([logs[:index], logs[index + 1 :]]).logsumexp(dim=0) for index in range(len(logs))]
        return logs - torch.stack(others)

    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric `(B,)` (see `metrics.weighted_metrics`)."""
        return weighted_metrics(targets, values, weights, self.class_names)

    def metrics_within(
        self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray, strata: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return AUC and average precision (see `metrics.metrics_within`)."""
        return metrics_within(targets, values, weights, strata)

    def basis(self, metric: str, targets: np.ndarray, values: np.ndarray) -> Basis:
        """Return what a metric rests on (see `metrics.basis`)."""
        return basis(metric, targets, values, self.class_names)

    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the log-loss, weighted by class, and the main metrics."""
        metrics = self.unweighted_metrics(targets, values)
        return {"loss": log_loss(targets, values, weights)} | {name: metrics[name] for name in self.main_metrics}

    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return that a class is missing if `metric` is the AUC and its targets lack one; else ""."""
        is_defined = metric != "auc" or auc_is_defined(targets, len(self.class_names))
        return "" if is_defined else "lacks a class"

    def fit_on_validation(
        self, targets: np.ndarray, values: np.ndarray, cases: Sequence[str], operating_point: str, is_balanced: bool
    ) -> FittedFigures:
        """Return the scaling and, of two classes, the `threshold` for the `operating_point`."""
        is_binary = len(self.class_names) == 2
        return {
            "threshold": OperatingPoint.of(operating_point).threshold(targets, values[:, 1]) if is_binary else None,
            "operating_point": operating_point,
            **_record_of(fitted_scaling(targets, values, is_balanced)),
        }

    def fitted_figures(self, fitted: FittedFigures, targets: np.ndarray, values: np.ndarray) -> dict[str, Any]:
        """Return the `threshold`, the metrics at it (`thresholded`) and the scaling."""
        decisions = self.decide_by(fitted, values)
        return {
            "threshold": fitted["threshold"],
            "thresholded": None if decisions is None else self.decision_metrics(targets, decisions),
            **_record_of(_scaling(fitted)),
        }

    def decide(self, values: np.ndarray) -> np.ndarray:
        """Return the most probable class."""
        return values.argmax(axis=-1)

    def decide_by(self, fitted: FittedFigures, values: np.ndarray) -> np.ndarray | None:
        """Return 1 where the positive class's probability reaches the `threshold` in most models, else 0; None without
        a threshold.

        Where half of the models say so, the class is decided whose rate is not the wanted one, because a vote has the
        wanted rate more often than a single model; for the balanced accuracy, the most probable class.
        """
        threshold, point = fitted["threshold"], OperatingPoint.of(fitted.get("operating_point", BALANCED))
        if threshold is None:
            return None
        share = (values[..., 1] >= threshold).mean(axis=0)
        undecided = self.decide(values.mean(axis=0)) if point.label is None else 1 - point.label
        return np.where(share == 0.5, undecided, share > 0.5).astype(int)

    def decision_metrics(self, targets: np.ndarray, decisions: np.ndarray) -> Figures:
        """Return accuracy, balanced accuracy, macro F1, and each class's sensitivity and specificity."""
        return decision_metrics(targets, decisions, self.class_names)

    def calibrate(self, fitted: FittedFigures, values: np.ndarray) -> np.ndarray | None:
        """Return the probabilities scaled by what was fitted; None without a `temperature`."""
        scaling = _scaling(fitted)
        return None if scaling is None else scaling.apply(values)

    def at_prevalence(self, fitted: FittedFigures, prevalence: float) -> FittedFigures:
        """Return the scaling for slides of which the share `prevalence` is of the positive one of two classes."""
        scaling = _scaling(fitted)
        if self.positive_output is None:
            raise ValueError(f"a share of positive slides needs two classes, not {len(self.class_names)}")
        if scaling is None:
            raise ValueError("its probabilities are not calibrated")
        return {**fitted, **_record_of(scaling.at((1 - prevalence, prevalence)))}

    @property
    def reliability_titles(self) -> tuple[str, str]:
        """Return the titles for the positive class, or for the predicted class if there are more than two."""
        positive = self.positive_output
        if positive is None:
            return "Probability of the predicted class", "Accuracy"
        return f"Predicted probability of {positive}", f"Observed share of {positive}"

    def reliability(self, targets: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positive class's probability, or the predicted class's if there are more than two."""
        if self.positive_output is not None:
            return values[:, 1], targets == 1
        return values.max(axis=1), targets == self.decide(values)

    def table(self, pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
        """Return the pooled sensitivity and specificity of each class, with their intervals."""
        return aligned(_class_rows(self.class_names, pooled, intervals))

    def closing_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """Return which class is positive, which AUC to report, and what threshold and calibration change."""
        pooled = results["pooled"]
        sentences = [] if self.positive_output is None else [f"Positive is {self.positive_output}."]
        unit = results.get("primary_unit", "slide")
        sentences += _auc_sentences((results.get("within_folds") or {}).get("auc"), pooled["auc"], unit)
        calibrated = _changes_sentence(
            "Calibrated on inner validation", results["pooled_calibrated"], pooled, "as it is", self.calibration_metrics
        )
        return sentences + list(filter(None, [_threshold_sentence(self, results), calibrated]))


def _class_rows(
    class_names: Sequence[str], pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]
) -> list[list[list[str]]]:
    """Return the head and the rows of the table of sensitivity and specificity."""
    rows = []
    for name in class_names:
        metrics = f"sensitivity_{name}", f"specificity_{name}"
        cells = [(figure_text(pooled[metric]), interval_text(intervals[metric])) for metric in metrics]
        rows.append([name, *cells[0], *cells[1]])
    return [[["pooled", "sensitivity", "95% CI", "specificity", "95% CI"]], rows]


def _scaling(fitted: FittedFigures) -> Scaling | None:
    temperature = fitted["temperature"]
    return None if temperature is None else Scaling(temperature, fitted.get("intercepts"), fitted.get("prior"))


def _record_of(scaling: Scaling | None) -> dict[str, Any]:
    return dict.fromkeys(("temperature", "intercepts", "prior")) if scaling is None else vars(scaling)


def _auc_sentences(within: float | None, pooled: float | None, unit: str) -> list[str]:
    """Return which AUC to report, and why the pooled one differs, if it does."""
    if within is None:
        return []
    sentences = [f"The AUC to report is {figure_text(within)}: it ranks each fold's {unit}s by that fold's own model."]
    if pooled is not None and abs(within - pooled) >= _NOTABLE_GAP:
        sentences.append(
            f"The pooled {figure_text(pooled)} ranks all {unit}s together, though the folds' models may put their "
            "probabilities on different scales."
        )
    return sentences


def _threshold_sentence(task: Classification, results: Mapping[str, Any]) -> str:
    """Return what the fitted threshold changes in the metrics that its operating point is about."""
    point, names = results.get("operating_point") or BALANCED, ["accuracy", "balanced_accuracy", "f1_macro"]
    if point != BALANCED:
        names = [f"{rate}_{task.positive_output}" for rate in ("sensitivity", "specificity")]
    what = "At the threshold fitted on inner validation" + ("" if point == BALANCED else f" for {point}")
    intervals = results.get("pooled_thresholded_intervals_95") or {}
    return _changes_sentence(what, results["pooled_thresholded"], results["pooled"], "at 0.5", names, intervals)


def _changes_sentence(
    what: str,
    changed: Mapping[str, Any] | None,
    pooled: Mapping[str, Any],
    before: str,
    names: Sequence[str],
    intervals: Mapping[str, Sequence[float] | None] | None = None,
) -> str:
    """Return what something changes in these metrics, or "" if it was not done; `intervals` are those afterwards."""
    if changed is None:
        return ""
    texts = []
    for name in names:
        interval = (intervals or {}).get(name)
        limits = f"{interval_text(interval)}; " if interval else ""
        kind, _, of = name.partition("_") if name.startswith(("sensitivity_", "specificity_")) else (name, "", "")
        title = f"{kind} of {of}" if of else kind.replace("_", " ")
        texts.append(f"{title} {figure_text(changed[name])} ({limits}{figure_text(pooled[name])} {before})")
    return f"{what}, pooled: {', '.join(texts)}."
