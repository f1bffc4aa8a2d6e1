"""Tables and the printed summary of a nested cross-validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.core.files import write_text
from utils.core.text import aligned, figure_text, interval_text
from utils.evaluation.predictions import Predictions
from utils.tasks.classification import Classification
from utils.tasks.metrics import mean_and_std
from utils.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd

GALLERY_SIZE = 10
# Beyond so many folds the closing table leaves them to outputs.json.
_MOST_FOLDS_SHOWN = 20
# What outputs.json says where the table names no patients.
NO_PATIENTS = "nothing: each slide was taken as a patient of its own"


def gallery_table(predictions: Predictions) -> pd.DataFrame:
    """Return the slides most worth a look, by the repeats' mean (see `Task.gallery`)."""
    import pandas as pd

    mean, names = predictions.mean_over_repeats(), predictions.task.outputs
    kinds = predictions.task.gallery(mean.labels, mean.values)
    return pd.DataFrame(
        [
            {
                "kind": kind,
                "wsi_id": mean.slides[row],
                "case_id": mean.cases[row],
                "label": mean.label_names[row],
                "predicted": names[int(mean.predicted[row])],
                **{f"prob_{name}": mean.values[row, index] for index, name in enumerate(names)},
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
        "class_names": list(predictions.task.outputs),
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


def task_of(results: Mapping[str, Any]) -> Task:
    """Return the task of a run, given its `outputs.json` or `scores.json`."""
    return Classification(tuple(results["class_names"]))


def results_table(results: dict[str, Any]) -> str:
    """Return the closing table: each fold, their mean and standard deviation, and the pooled figures with intervals."""
    shown = task_of(results).shown_metrics
    folds = results["fold_results"] if len(results["fold_results"]) <= _MOST_FOLDS_SHOWN else []
    fold_rows = [figures_row(f"fold {fold['fold']}", fold["slide"], shown) for fold in folds]
    counts = [results[f"slide_{name}_folds"] for name in shown]
    summary = [
        ["mean", *[figure_text(results[f"slide_{name}_mean"]) for name in shown]],
        ["std", *[figure_text(results[f"slide_{name}_std"]) for name in shown]],
        figures_row("pooled", results["pooled"], shown),
        intervals_row(results["intervals_95"], shown),
    ]
    if min(counts) < results["n_folds"]:
        summary.insert(2, ["folds", *map(str, counts)])
    return text_table([fold_rows, summary], shown)


def figures_row(name: str, figures: Mapping[str, float | None], shown: Sequence[str]) -> list[str]:
    """Return a row of the closing table: the `shown` metrics under a name."""
    return [name, *[figure_text(figures[metric]) for metric in shown]]


def intervals_row(intervals: Mapping[str, Sequence[float] | None], shown: Sequence[str]) -> list[str]:
    """Return the row of the 95% intervals."""
    return ["95% CI", *[interval_text(intervals[metric]) for metric in shown]]


def text_table(blocks: Sequence[Sequence[Sequence[str]]], shown: Sequence[str]) -> str:
    """Return blocks of such rows under the metrics' names, with a rule between the blocks."""
    return aligned([[["", *[name.replace("_", " ") for name in shown]]], *blocks])


def closing_words(results: dict[str, Any]) -> str:
    """The closing table, and what it does not say."""
    about = f"{results['n_slides']} slides of {results['n_cases']} patients, tested once"
    if results["n_repeats"] > 1:
        about += f" in each of {results['n_repeats']} repeats (pooled: the repeats' mean)"
    words = [f"{about}. The 95% intervals come from resampling patients and are conditional on the trained models."]
    if results.get("patients_from") == NO_PATIENTS:
        words.append("No patients are known: where some have several slides, every figure above is too good.")
    task = task_of(results)
    words += task.closing_words(results)
    chosen = Counter(_told(fold["selection"]["setting"]) for fold in results["fold_results"])
    if len(results["fold_results"][0]["selection"]["settings"]) > 1:
        told = [f"{setting} in {count} of {results['n_folds']} folds" for setting, count in chosen.most_common()]
        words.append(f"Chosen in the inner loop: {'; '.join(told)}.")
    table = task.table(results["pooled"], results["intervals_95"])
    return "\n".join([results_table(results), "", table, "", *words])


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
