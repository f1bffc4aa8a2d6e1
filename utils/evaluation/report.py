"""Tables and the printed summary of a nested cross-validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.core.files import write_text
from utils.core.text import aligned
from utils.evaluation.metrics import METRICS, mean_and_std
from utils.evaluation.predictions import CALIBRATION, Predictions

if TYPE_CHECKING:
    import pandas as pd

GALLERY_SIZE = 10
# The figures of predictions, drawn by `evaluation.figures`, as their files are called.
FIGURES = ("roc", "precision_recall", "confusion_matrix", "calibration")
# Beyond so many folds the closing table leaves them to outputs.json.
_MOST_FOLDS_SHOWN = 20
_SHOWN = METRICS
# What outputs.json says where the table names no patients.
NO_PATIENTS = "nothing: each slide was taken as a patient of its own"
# Between the mean over folds and the pooled figure, in what ranks slides: beyond this the difference is explained.
_NOTABLE_GAP = 0.01


def gallery_table(predictions: Predictions) -> pd.DataFrame:
    """Return the slides most worth a look: surest correct, surest wrong, most uncertain; by the repeats' mean."""
    import pandas as pd

    mean, names = predictions.mean_over_repeats(), predictions.class_names
    ordered = np.sort(mean.probabilities, axis=1)
    confidence, margin = ordered[:, -1], ordered[:, -1] - ordered[:, -2]
    right, sure = mean.predicted == mean.labels, np.argsort(-confidence, kind="stable")
    unsure = np.argsort(margin, kind="stable")
    kinds = {"surest correct": sure[right[sure]], "surest wrong": sure[~right[sure]], "most uncertain": unsure}
    return pd.DataFrame(
        [
            {
                "kind": kind,
                "wsi_id": mean.slides[row],
                "case_id": mean.cases[row],
                "label": mean.label_names[row],
                "predicted": names[int(mean.predicted[row])],
                **{f"prob_{name}": mean.probabilities[row, index] for index, name in enumerate(names)},
            }
            for kind, rows in kinds.items()
            for row in rows[:GALLERY_SIZE]
        ]
    )


def outputs_content(
    predictions: Predictions, fold_figures: Sequence[dict[str, Any]], patients_from: str | None
) -> dict[str, Any]:
    """Return the figures of `outputs.json`; `fold_figures` are those of each outer fold, with its record."""
    summary: dict[str, Any] = {
        "class_names": list(predictions.class_names),
        "n_slides": predictions.n_slides,
        "n_cases": predictions.n_cases,
        "n_folds": len(fold_figures),
        "n_repeats": predictions.n_repeats,
        "patients_from": patients_from or NO_PATIENTS,
    }
    for level in ("chunk", "slide", "thresholded"):
        summary |= _over_folds(level, [fold[level] or {} for fold in fold_figures])
    return summary | {
        "pooled": predictions.metrics,
        "intervals_95": predictions.intervals,
        "pooled_thresholded": predictions.decision_metrics,
        "pooled_calibrated": predictions.calibrated_metrics,
        "fold_results": list(fold_figures),
    }


def write_table(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def results_table(results: dict[str, Any]) -> str:
    """The closing table: per fold, their mean and standard deviation, and the pooled figures with their intervals."""
    folds = results["fold_results"] if len(results["fold_results"]) <= _MOST_FOLDS_SHOWN else []
    fold_rows = [figures_row(f"fold {fold['fold']}", fold["slide"]) for fold in folds]
    counts = [results[f"slide_{name}_folds"] for name in _SHOWN]
    summary = [
        ["mean", *[_figure(results[f"slide_{name}_mean"]) for name in _SHOWN]],
        ["std", *[_figure(results[f"slide_{name}_std"]) for name in _SHOWN]],
        figures_row("pooled", results["pooled"]),
        intervals_row(results["intervals_95"]),
    ]
    if min(counts) < results["n_folds"]:
        summary.insert(2, ["folds", *map(str, counts)])
    return text_table([fold_rows, summary])


def figures_row(name: str, figures: Mapping[str, float | None]) -> list[str]:
    return [name, *[_figure(figures[metric]) for metric in _SHOWN]]


def intervals_row(intervals: Mapping[str, Sequence[float] | None]) -> list[str]:
    return ["95% CI", *[_interval(intervals[metric]) for metric in _SHOWN]]


def text_table(blocks: Sequence[Sequence[Sequence[str]]]) -> str:
    """Rows of the closing figures under their names, a rule between the blocks."""
    return aligned([[["", *[name.replace("_", " ") for name in _SHOWN]]], *blocks])


def closing_words(results: dict[str, Any]) -> str:
    """The closing table, and what it does not say."""
    about = f"{results['n_slides']} slides of {results['n_cases']} patients, tested once"
    if results["n_repeats"] > 1:
        about += f" in each of {results['n_repeats']} repeats (pooled: the repeats' mean)"
    words = [f"{about}. The 95% intervals come from resampling patients and are conditional on the trained models."]
    if results.get("patients_from") == NO_PATIENTS:
        words.append("No patients are known: where some have several slides, every figure above is too good.")
    words += [*_pooling_words(results), *decision_words(results)]
    chosen = Counter(_told(fold["selection"]["setting"]) for fold in results["fold_results"])
    if len(results["fold_results"][0]["selection"]["settings"]) > 1:
        told = [f"{setting} in {count} of {results['n_folds']} folds" for setting, count in chosen.most_common()]
        words.append(f"Chosen in the inner loop: {'; '.join(told)}.")
    classes = class_table(results["class_names"], results["pooled"], results["intervals_95"])
    return "\n".join([results_table(results), "", classes, "", *words])


def class_table(
    class_names: Sequence[str],
    pooled: Mapping[str, float | None],
    intervals: Mapping[str, Sequence[float] | None],
) -> str:
    """Return the pooled sensitivity and specificity of each class, with their intervals, as a table."""
    kinds = ("sensitivity", "specificity")
    rows = [["pooled", *(head for kind in kinds for head in (kind, "95% CI"))]]
    for name in class_names:
        metrics = [f"{kind}_{name}" for kind in kinds]
        cells = [(_figure(pooled[metric]), _interval(intervals[metric])) for metric in metrics]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    return aligned([rows[:1], rows[1:]])


def _pooling_words(results: Mapping[str, Any]) -> list[str]:
    """Why the pooled AUC differs from the mean over folds, where it does."""
    mean, pooled = results["slide_auc_mean"], results["pooled"]["auc"]
    if mean is None or pooled is None or abs(mean - pooled) < _NOTABLE_GAP:
        return []
    return [
        f"The mean AUC {_figure(mean)} ranks each fold's slides by that fold's own model; the pooled {_figure(pooled)} "
        "ranks all slides together, though the folds' models may put their probabilities on different scales."
    ]


def decision_words(results: Mapping[str, Any]) -> list[str]:
    """What the threshold and the temperature fitted on inner validation change, of results or scores."""
    words, pooled = [], results["pooled"]
    at_threshold, scaled = results["pooled_thresholded"], results["pooled_calibrated"]
    if at_threshold is not None:
        told = [
            f"{name.replace('_', ' ')} {_figure(at_threshold[name])} ({_figure(pooled[name])} at 0.5)"
            for name in ("accuracy", "balanced_accuracy", "f1_macro")
        ]
        words.append(f"At the threshold fitted on inner validation, pooled: {', '.join(told)}.")
    if scaled is not None:
        told = [f"{name} {_figure(scaled[name])} ({_figure(pooled[name])} as it is)" for name in CALIBRATION]
        words.append(f"Temperature-scaled as fitted on inner validation, pooled: {', '.join(told)}.")
    return words


def _told(setting: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items())


def _over_folds(level: str, folds: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    """Mean and standard deviation of each figure, and over how many folds: those where it is defined."""
    summary: dict[str, Any] = {}
    for name in max(folds, key=len):  # a fold without a threshold has nothing at it
        values = [fold.get(name) for fold in folds]
        mean, std = mean_and_std(values)
        known = sum(value is not None for value in values)
        summary |= {f"{level}_{name}_mean": mean, f"{level}_{name}_std": std, f"{level}_{name}_folds": known}
    return summary


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(limits: Sequence[float] | None) -> str:
    return "-" if limits is None else f"{limits[0]:.3f}-{limits[1]:.3f}"
