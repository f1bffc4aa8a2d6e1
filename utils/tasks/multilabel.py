"""Several labels at once, each of which a slide has or not, such as mutations or growth patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.core.placeholders import is_placeholder
from utils.core.text import aligned, figure_text, interval_text
from utils.tasks.bases import Basis
from utils.tasks.counts import label_counts
from utils.tasks.label_strata import stratum_labels, stratum_of_labels
from utils.tasks.multilabel_loss import label_log_loss, label_loss, label_signals, label_weights
from utils.tasks.multilabel_metrics import (
    METRICS,
    UNKNOWN,
    basis,
    metric_names,
    multilabel_metrics,
    multilabel_metrics_within,
    names_of,
)
from utils.tasks.probabilities import Probabilities
from utils.tasks.targets import Row
from utils.tasks.task import Figures

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Multilabel(Probabilities):
    """Several labels in columns of their own: 1 if a slide has it, 0 if not, empty if that is unknown.

    Targets `(n, K)` are 1, 0 or -1 for unknown; a slide's values are the probabilities of the labels. What is unknown
    counts in neither loss nor metrics.

    Attributes
        target_columns: the columns of the labels.
        stratum_labels: the labels by which folds are balanced, the rarest first.

    Raises ValueError if there are fewer than two labels, or if two have the same name.
    """

    target_columns: tuple[str, ...]
    stratum_labels: tuple[str, ...] = ()

    kind, flags = "multilabel", "--task multilabel --target_columns"
    figure_names = ("roc", "precision_recall")
    main_metrics = compared_metrics = METRICS
    metric_titles = {"auc": "AUC"}  # noqa: RUF012 - a constant of the class
    output_word, side_word = "label", "with or without a label"

    def __post_init__(self) -> None:
        if len(self.target_columns) < 2 or len(set(self.target_columns)) < len(self.target_columns):
            raise ValueError(f"labels {', '.join(self.target_columns)}; several labels are two different ones or more")

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the labels."""
        return self.target_columns

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the labels."""
        return self.target_columns

    @property
    def quantity(self) -> str:
        """Return that signals are log-odds."""
        return "log-odds"

    @property
    def ranked_outputs(self) -> Sequence[int]:
        """Return all labels."""
        return range(len(self.target_columns))

    def sides(self, output: int, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which slides have the label, and which are known to lack it."""
        return targets[:, output] == 1, targets[:, output] == 0

    def ranking_metrics(self, output: int) -> tuple[str, str]:
        """Return the metrics of the label."""
        return names_of(self.target_columns[output])

    @property
    def default_monitor(self) -> str:
        """Return that of the mean AUC."""
        return "slide_auc"

    def of_cohort(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task with the strata of a cohort. Raise ValueError if no slide has, or lacks, a label."""
        for name, cell in _absent(self.target_columns, targets):
            raise ValueError(f"no row has a {cell} in {name}, so that it cannot be learned; leave it out")
        chosen = stratum_labels(targets == 1, np.array(cases))
        return replace(self, stratum_labels=tuple(self.target_columns[label] for label in chosen))

    @property
    def strata_names(self) -> tuple[str, ...]:
        """Return the labels that make a stratum, and that of the other slides."""
        names = self.stratum_labels
        return (*(f"with {name}" for name in names), f"with none of {', '.join(names)}") if names else ("all",)

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the stratum of each slide: the rarest of the stratum labels that it has, or the last."""
        return stratum_of_labels(targets == 1, tuple(map(self.target_columns.index, self.stratum_labels)))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return the means of AUC and average precision over the labels, then those of each label."""
        return metric_names(self.target_columns)

    def target(self, row: Row) -> tuple[int, ...]:
        """Return 1, 0 or -1 for each label. Raise ValueError for anything else, and if all are unknown."""
        cells = tuple(_cell(row[name]) for name in self.target_columns)
        if set(cells) == {UNKNOWN}:
            raise ValueError("no label is known")
        return cells

    @property
    def no_target(self) -> str:
        """Return what the columns must be."""
        names = ", ".join(self.target_columns)
        return f"target that cannot be used ({names} must be 1, 0 or empty, and not all of them empty)"

    def target_text(self, targets: np.ndarray) -> np.ndarray:
        """Return the labels of each slide, or "none", and those that are unknown."""
        texts = []
        for cells in targets:
            unknown = self._names(cells == UNKNOWN)
            texts.append((self._names(cells == 1) or "none") + (f" (unknown: {unknown})" if unknown else ""))
        return np.array(texts)

    def prediction_text(self, values: np.ndarray) -> np.ndarray:
        """Return the labels with a probability of at least one half, or "none"."""
        return np.array([self._names(row >= 0.5) or "none" for row in values])

    def _names(self, chosen: np.ndarray) -> str:
        return ", ".join(np.array(self.target_columns)[chosen])

    def label_columns(self, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns of the labels, empty where they are unknown."""
        texts = np.where(targets == UNKNOWN, "", targets.astype(str))
        return {name: texts[:, index] for index, name in enumerate(self.target_columns)}

    def table_columns(
        self, targets: np.ndarray, values: np.ndarray, calibrated: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return the columns of the labels, empty where they are unknown, then a column `prob_<label>` each."""
        return self.label_columns(targets) | self.probability_columns(values, calibrated)

    def headline(self, predicted: str) -> str:
        """Return the labels."""
        return f"labels: {predicted}"

    def decide(self, values: np.ndarray) -> np.ndarray:
        """Return the most probable label, which pictures show first."""
        return values.argmax(axis=-1)

    def marked(self, values: np.ndarray) -> tuple[str, ...]:
        """Return the labels with a probability of at least one half."""
        return tuple(np.array(self.target_columns)[values >= 0.5].tolist())

    def counts_text(self, targets: np.ndarray, cases: Sequence[str]) -> str:
        """Return in how many slides and patients each label is, and in how many slides it is unknown."""
        return label_counts(targets == 1, targets != UNKNOWN, cases, self.target_columns)

    def of_case(self, targets: np.ndarray) -> np.ndarray:
        """Return 1 for each label that a slide has, 0 for one that none has, NaN where all are unknown."""
        known = np.where(np.isnan(targets), -1, targets).max(axis=0)
        return np.where(known < 0, np.nan, known)

    def loss_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return weights `(K, 2)` that give the slides without and with a label the same total."""
        return label_weights(targets)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the binary cross-entropy `(B,)` of the known labels (see `multilabel_loss`)."""
        return label_loss(logits, targets, weights)

    @property
    def chance_loss(self) -> float:
        """Return the cross-entropy of equal probabilities."""
        return math.log(2)

    def activate(self, logits: Tensor) -> np.ndarray:
        """Return the sigmoid in float64."""
        return logits.cpu().double().sigmoid().numpy()

    def signals(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return each label's log-odds."""
        return label_signals(logits, shares)

    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric `(B,)` (see `multilabel_metrics`)."""
        return multilabel_metrics(targets, values, weights, self.target_columns)

    def metrics_within(
        self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray, strata: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return every metric (see `multilabel_metrics.multilabel_metrics_within`)."""
        return multilabel_metrics_within(targets, values, weights, strata, self.target_columns)

    def basis(self, metric: str, targets: np.ndarray, values: np.ndarray) -> Basis:
        """Return the slides with and without the labels that a metric is of."""
        return basis(metric, targets, self.target_columns)

    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the cross-entropy, as in training, and the mean metrics."""
        figures = self.unweighted_metrics(targets, values) | {"loss": label_log_loss(targets, values, weights)}
        return {name: figures[name] for name in ("loss", *self.main_metrics)}

    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return that the slides with or without a label are missing, unless `metric` is the loss."""
        absent = [f"{'with' if cell else 'without'} {name}" for name, cell in _absent(self.target_columns, targets)]
        return f"lacks slides {absent[0]}" if absent and metric != "loss" else ""

    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows whose known labels are surest and correct, surest and wrong, and most uncertain."""
        return _gallery(targets, values)

    def table(self, pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
        """Return the pooled AUC and average precision of each label, with their intervals."""
        return _label_table(self.target_columns, pooled, intervals)

    def closing_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """Return what the figures are the means of, and which ones to report."""
        has_folds = (results.get("within_folds") or {}).get("auc") is not None
        report = " Report those within folds: each fold's slides as its own model ranks them." if has_folds else ""
        return [f"AUC and average precision are means over the labels {', '.join(self.target_columns)}.{report}"]


def _absent(names: Sequence[str], targets: np.ndarray) -> list[tuple[str, int]]:
    """Return each label that no slide has, with 1, and each that none is known to lack, with 0."""
    columns = product(zip(names, targets.T, strict=True), (1, 0))
    return [(name, cell) for (name, column), cell in columns if not (column == cell).any()]


def _label_table(
    names: Sequence[str], pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]
) -> str:
    rows = []
    for name in names:
        cells = [(figure_text(pooled[metric]), interval_text(intervals[metric])) for metric in names_of(name)]
        rows.append([name, *cells[0], *cells[1]])
    return aligned([[["pooled", "AUC", "95% CI", "average precision", "95% CI"]], rows])


def _gallery(targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return rows by kind: a row counts by the known label whose probability is farthest from the truth, or, to be
    uncertain, nearest to one half.
    """
    known = targets != UNKNOWN
    errors = np.where(known, np.abs(values - targets), 0).max(axis=1)
    doubts = np.where(known, np.abs(values - 0.5), 1).min(axis=1)
    worst = np.argsort(-errors, kind="stable")
    return {
        "surest correct": worst[::-1][errors[worst[::-1]] < 0.5],
        "surest wrong": worst[errors[worst] >= 0.5],
        "most uncertain": np.argsort(doubts, kind="stable"),
    }


def _cell(text: str) -> int:
    """Return the label in a cell: 1, 0 or -1. Raise ValueError for anything else."""
    if is_placeholder(text):
        return UNKNOWN
    number = float(text)
    if number not in (0, 1):
        raise ValueError(text)
    return int(number)
