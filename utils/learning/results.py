"""What a nested cross-validation comes to: tables, figures and the closing words, from the folds' answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from utils.bags.labels import LabelRow
from utils.core.files import write_text
from utils.core.plots import write_figures
from utils.core.runtime import derive_seed
from utils.core.text import aligned
from utils.learning.aggregation import SlideOutput
from utils.learning.calibration import mean_calibrated
from utils.learning.metrics import METRICS, classification_metrics, decision_metrics, mean_and_std
from utils.learning.predictions import Predictions
from utils.learning.splits import OuterFold
from utils.learning.statistics import bootstrap_intervals, pooled_metrics

if TYPE_CHECKING:
    import pandas as pd

GALLERY_SIZE = 10
FIGURES = ("roc", "precision_recall", "confusion_matrix", "calibration", "learning_curves")
# Beyond so many folds the closing table leaves them to outputs.json.
_MOST_FOLDS_SHOWN = 20
_SHOWN = METRICS
# What outputs.json says where the table names no patients.
NO_PATIENTS = "nothing: each slide was taken as a patient of its own"
# Between the mean over folds and the pooled figure, in what ranks slides: beyond this the difference is explained.
_NOTABLE_GAP = 0.01
# What temperature scaling is there to mend.
CALIBRATION = ("brier", "ece")


class Slides(Protocol):
    """What the results need of a dataset; `utils.mil_dataset.MILDataset` is one."""

    rows: list[LabelRow]
    labels: np.ndarray
    cases: np.ndarray
    class_names: tuple[str, ...]
    patients_from: str | None


@dataclass(frozen=True)
class FoldResult:
    """An outer fold: what the tested model says of its test slides, the decision `threshold` that inner validation
    gave (two classes only), the `temperature` that it gave, the record of the selection, and the epochs of all
    trainings.
    """

    fold: OuterFold
    outputs: list[SlideOutput]
    threshold: float | None
    temperature: float | None
    selection: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def probabilities(self) -> np.ndarray:
        """`(n, C)` of the test slides."""
        return np.stack([output.probabilities for output in self.outputs])

    @property
    def calibrated(self) -> np.ndarray | None:
        """The same, temperature-scaled, where there is a temperature."""
        answers = [mean_calibrated([output], [self.temperature]) for output in self.outputs]
        scaled = [answer for answer in answers if answer is not None]
        return np.stack(scaled) if scaled else None


@dataclass(frozen=True)
class Pooled:
    """The out-of-fold answers of all folds, one row per tested slide and repeat: the repeats' one after the other, each
    in the label table's order. `calibrated` is None unless every fold has a temperature.
    """

    slides: np.ndarray
    labels: np.ndarray
    cases: np.ndarray
    probabilities: np.ndarray
    calibrated: np.ndarray | None
    predicted_at_threshold: np.ndarray
    folds: np.ndarray
    repeats: np.ndarray

    @classmethod
    def of(cls, results: Sequence[FoldResult], data: Slides) -> Pooled:
        slides = np.concatenate([result.fold.test for result in results])
        repeats = np.repeat([result.fold.repeat for result in results], [len(result.fold.test) for result in results])
        order = np.lexsort((slides, repeats))
        slides = slides[order]
        scaled = [one for result in results if (one := result.calibrated) is not None]
        return cls(
            slides,
            data.labels[slides],
            data.cases[slides],
            np.concatenate([result.probabilities for result in results])[order],
            np.concatenate(scaled)[order] if len(scaled) == len(results) else None,
            np.concatenate([_at_threshold(result) for result in results])[order],
            np.repeat([result.fold.number for result in results], [len(result.fold.test) for result in results])[order],
            repeats[order],
        )

    def predictions(self, class_names: Sequence[str], seed: int) -> Predictions:
        """The same as figures take it; the run's `seed` draws the patients of their intervals."""
        return Predictions(
            self.labels, self.probabilities, class_names, self.cases, self.repeats, derive_seed(seed, "bootstrap"),
            self.folds, self.calibrated,
        )  # fmt: skip


def predictions_table(pooled: Pooled, data: Slides) -> pd.DataFrame:
    """Return a row per slide and repeat: its label, its out-of-fold answer, and the fold whose model gave it."""
    import pandas as pd

    names, rows = np.array(data.class_names), [data.rows[slide] for slide in pooled.slides]
    columns: dict[str, Any] = {
        "wsi_id": [row.wsi_id for row in rows],
        "case_id": [row.case_id for row in rows],
        "label": names[pooled.labels],
        "predicted": names[pooled.probabilities.argmax(axis=1)],
    }
    columns |= {f"prob_{name}": pooled.probabilities[:, index] for index, name in enumerate(names)}
    if pooled.calibrated is not None:
        columns |= {f"calibrated_{name}": pooled.calibrated[:, index] for index, name in enumerate(names)}
    return pd.DataFrame(columns | {"fold": pooled.folds, "repeat": pooled.repeats})


def gallery_table(pooled: Pooled, data: Slides) -> pd.DataFrame:
    """The slides most worth a look: surest correct, surest wrong, most uncertain; by the mean answer of the repeats."""
    import pandas as pd

    slides, row_of = np.unique(pooled.slides, return_inverse=True)
    probabilities = np.zeros((len(slides), len(data.class_names)))
    np.add.at(probabilities, row_of, pooled.probabilities)
    probabilities /= np.bincount(row_of)[:, None]
    labels, predicted = data.labels[slides], probabilities.argmax(axis=1)
    ordered = np.sort(probabilities, axis=1)
    confidence, margin = ordered[:, -1], ordered[:, -1] - ordered[:, -2]
    right, sure, unsure = predicted == labels, np.argsort(-confidence, kind="stable"), np.argsort(margin, kind="stable")
    kinds = {"surest correct": sure[right[sure]], "surest wrong": sure[~right[sure]], "most uncertain": unsure}
    names = data.class_names
    return pd.DataFrame(
        [
            {
                "kind": kind,
                "wsi_id": data.rows[slides[row]].wsi_id,
                "case_id": data.rows[slides[row]].case_id,
                "label": names[labels[row]],
                "predicted": names[predicted[row]],
                **{f"prob_{name}": probabilities[row, index] for index, name in enumerate(names)},
            }
            for kind, rows in kinds.items()
            for row in rows[:GALLERY_SIZE]
        ]
    )


def outputs_content(results: Sequence[FoldResult], pooled: Pooled, data: Slides, seed: int) -> dict[str, Any]:
    """The figures of `outputs.json`."""
    names = data.class_names
    fold_results = [_fold_figures(result, data) for result in results]
    summary: dict[str, Any] = {
        "class_names": list(names),
        "n_slides": len(np.unique(pooled.slides)),
        "n_cases": len(np.unique(pooled.cases)),
        "n_folds": len(results),
        "n_repeats": len(np.unique(pooled.repeats)),
        "patients_from": data.patients_from or NO_PATIENTS,
    }
    for level in ("chunk", "slide", "thresholded"):
        summary |= _over_folds(level, [fold[level] or {} for fold in fold_results])
    summary["pooled"] = pooled_metrics(pooled.labels, pooled.probabilities, pooled.repeats, names)
    summary["intervals_95"] = bootstrap_intervals(
        pooled.labels,
        pooled.probabilities,
        pooled.cases,
        derive_seed(seed, "bootstrap"),
        repeats=pooled.repeats,
        class_names=names,
    )
    has_thresholds = all(result.threshold is not None for result in results)
    at_threshold = _pooled_at_threshold(pooled, names) if has_thresholds else None
    scaled = None
    if pooled.calibrated is not None:
        scaled = calibration_figures(pooled.labels, pooled.calibrated, pooled.repeats)
    return summary | {"pooled_thresholded": at_threshold, "pooled_calibrated": scaled, "fold_results": fold_results}


def draw_figures(
    folder: Path,
    predictions: Predictions,
    history: pd.DataFrame,
    monitors: Mapping[int, str],
    formats: Sequence[str],
    *,
    missing_only: bool = False,
) -> list[Path]:
    """Write the figures of a run in each of the formats, or those alone that are not there; return what was written.

    `monitors` says by outer fold what chose its epochs.
    """
    from utils.learning import figures
    from utils.learning.learning_curves import learning_figure

    drawn = [
        figures.roc_figure(predictions),
        figures.precision_recall_figure(predictions),
        figures.confusion_figure(predictions),
        figures.calibration_figure(predictions),
        learning_figure(history, monitors),
    ]
    return write_figures(folder, dict(zip(FIGURES, drawn, strict=True)), formats, missing_only=missing_only)


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


def calibration_figures(labels: np.ndarray, calibrated: np.ndarray, repeats: np.ndarray) -> dict[str, float | None]:
    figures_scaled = pooled_metrics(labels, calibrated, repeats)
    return {name: figures_scaled[name] for name in CALIBRATION}


def _told(setting: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items())


def _at_threshold(result: FoldResult) -> np.ndarray:
    """The predicted classes, at the fold's threshold where it has one."""
    if result.threshold is None:
        return result.probabilities.argmax(axis=1)
    return (result.probabilities[:, 1] >= result.threshold).astype(int)


def _pooled_at_threshold(pooled: Pooled, names: Sequence[str]) -> dict[str, float | None]:
    """The mean over the repeats."""
    parts = [pooled.repeats == repeat for repeat in np.unique(pooled.repeats)]
    each = [decision_metrics(pooled.labels[part], pooled.predicted_at_threshold[part], names) for part in parts]
    return {name: mean_and_std([one[name] for one in each])[0] for name in each[0]}


def _fold_figures(result: FoldResult, data: Slides) -> dict[str, Any]:
    labels, names = data.labels[result.fold.test], data.class_names
    chunk_labels = np.repeat(labels, [len(output.chunk_sizes) for output in result.outputs])
    chunks = np.concatenate([output.chunk_probabilities for output in result.outputs])
    at_threshold = None if result.threshold is None else decision_metrics(labels, _at_threshold(result), names)
    return {
        "fold": result.fold.number,
        "repeat": result.fold.repeat,
        "n_slides": len(labels),
        "n_cases": len(set(data.cases[result.fold.test])),
        "n_train": len(result.fold.train),
        "chunk": classification_metrics(chunk_labels, chunks, names),
        "slide": classification_metrics(labels, result.probabilities, names),
        "threshold": result.threshold,
        "thresholded": at_threshold,
        "temperature": result.temperature,
        "selection": result.selection,
    }


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
