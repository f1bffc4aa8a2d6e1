"""The content of a cross-validation's `outputs.json`, and its gallery table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.core.files import write_text
from utils.evaluation.intervals import Estimate
from utils.evaluation.predictions import Predictions
from utils.evaluation.reliability import reliability_figures
from utils.tasks.metrics import mean_and_std

if TYPE_CHECKING:
    import pandas as pd

GALLERY_SIZE = 10
# In outputs.json, if the table names no patients.
NO_PATIENTS = "nothing: each slide was taken as a patient of its own"


def gallery_table(predictions: Predictions) -> pd.DataFrame:
    """Return the slides to look at first, by the mean over repeats (see `Task.gallery`)."""
    import pandas as pd

    mean = predictions.mean_over_repeats()
    columns = {"wsi_id": mean.slides, "case_id": mean.cases}
    columns |= predictions.task.table_columns(mean.labels, mean.values)
    kinds = predictions.task.gallery(mean.labels, mean.values)
    return pd.DataFrame(
        [
            {"kind": kind, **{name: column[row] for name, column in columns.items()}}
            for kind, rows in kinds.items()
            for row in rows[:GALLERY_SIZE]
        ]
    )


def outputs_content(
    predictions: Predictions, fold_figures: Sequence[dict[str, Any]], patients_from: str | None
) -> dict[str, Any]:
    """Return the metrics of `outputs.json`; `fold_figures` are those of each outer fold, with its record."""
    summary: dict[str, Any] = {
        **predictions.task.cohort_record,
        "positive_class": predictions.task.positive_output,
        "n_slides": predictions.n_slides,
        "n_cases": predictions.n_cases,
        "n_groups": predictions.n_groups,
        "n_folds": len(fold_figures),
        "n_repeats": predictions.n_repeats,
        "primary_unit": predictions.primary_unit,
        "patients_from": patients_from or NO_PATIENTS,
    }
    for level in ("chunk", "slide", "thresholded"):
        summary |= _over_folds(level, [fold[level] or {} for fold in fold_figures])
    return summary | {
        **figures_of(predictions),
        **_ranking("mean_of_folds", predictions.mean_of_folds),
        **thresholded(predictions),
        "pooled_calibrated": predictions.calibrated_metrics,
        "calibration": reliability_figures(predictions),
        **predictions.further,
        "cases": case_figures(predictions),
        "fold_results": list(fold_figures),
    }


def case_figures(predictions: Predictions) -> dict[str, Any] | None:
    """Return the figures of patients, whose slides' answers are averaged; None if no patient has several slides.

    A patient with slides of several classes has an answer for each of them.
    """
    cases = predictions.by_case()
    if len(cases) == len(predictions):
        return None
    per_case = np.unique(predictions.cases[predictions.repeats == predictions.repeats.min()], return_counts=True)[1]
    return {
        "n_several_slides": int((per_case > 1).sum()),
        **figures_of(cases),
        **thresholded(cases),
        "pooled_calibrated": cases.calibrated_metrics,
    }


def figures_of(predictions: Predictions) -> dict[str, Any]:
    """Return every metric with its interval; those that rank slides within folds, too."""
    return {
        "pooled": predictions.metrics,
        "intervals_95": predictions.intervals,
        "interval_methods": methods(predictions.pooled),
        **_ranking("within_folds", predictions.within_folds),
    }


def methods(estimates: Mapping[str, Estimate]) -> dict[str, str]:
    """Return the method of each metric's interval, or why there is none."""
    return {name: estimate.method or f"none: {estimate.reason}" for name, estimate in estimates.items()}


def thresholded(predictions: Predictions) -> dict[str, Any]:
    """Return the entries of the decisions at a threshold, which are None without decisions."""
    intervals = {name: estimate.interval for name, estimate in predictions.decided.items()}
    return {
        "pooled_thresholded": predictions.decision_metrics,
        "pooled_thresholded_intervals_95": intervals or None,
    }


def _ranking(name: str, estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return the entries of metrics that rank slides, with their intervals."""
    return {
        name: {metric: estimate.value for metric, estimate in estimates.items()},
        f"{name}_intervals_95": {metric: estimate.interval for metric, estimate in estimates.items()},
    }


def write_table(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def _over_folds(level: str, folds: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    """Return mean and standard deviation of each metric over the folds where it is defined, and their number."""
    summary: dict[str, Any] = {}
    for name in max(folds, key=len, default={}):  # a fold without a threshold has no metrics at it
        values = [fold.get(name) for fold in folds]
        mean, std = mean_and_std(values)
        count = sum(value is not None for value in values)
        summary |= {f"{level}_{name}_mean": mean, f"{level}_{name}_std": std, f"{level}_{name}_folds": count}
    return summary
