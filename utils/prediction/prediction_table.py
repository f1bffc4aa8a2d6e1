"""Write the table of predicted slides and, with labels, the scores and their figures.

A single slide has neither, so pandas and the drawing code are imported where they are used.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.bags.described_columns import Column, of_all_slides
from utils.bags.labels import LabelRow
from utils.core.errors import ConfigError, LabelsError, plural
from utils.core.files import digest, read_record, set_aside, write_json
from utils.core.plots import FORMATS, figure_paths, write_figures
from utils.core.runtime import derive_seed, log
from utils.core.settings import FIGURE_FORMAT, SEED
from utils.evaluation import localization
from utils.evaluation.closing_table import (
    case_rows,
    case_words,
    figures_row,
    interval_words,
    intervals_row,
    primary_figures,
    text_table,
)
from utils.evaluation.outputs import NO_PATIENTS, case_figures, methods, thresholded, write_table
from utils.evaluation.predictions import Predictions
from utils.evaluation.reliability import reliability_figures, reliability_words
from utils.evaluation.subgroups import subgroup_figures, subgroups_text
from utils.prediction.existing_records import ENDING
from utils.prediction.trained_model import BY_NAME
from utils.tasks.records import FIGURE_NAMES, Answer, task_of
from utils.tasks.task import FittedFigures, Task

if TYPE_CHECKING:
    import pandas as pd

REPORT, TABLE, SCORES = "prediction_report.csv", "predictions.csv", "scores.json"
CASES = "predictions_cases.csv"


@dataclass(frozen=True)
class SlideInfo:
    """A slide's patient and label, and its cells in the columns of the target; empty if unknown."""

    case_id: str = ""
    label: str = ""
    cells: Mapping[str, str] = field(default_factory=dict)


def earlier_slides(folder: Path, columns: Sequence[str] = ()) -> dict[str, SlideInfo]:
    """Return the slides in the table of an earlier run, if there is one, with their cells in these `columns`. Any other
    file of its name is set aside.
    """
    path = folder / TABLE
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        if rows and "seen_in_training" not in rows[0]:
            raise ValueError("other columns")
        return {
            row["wsi_id"]: SlideInfo(
                row.get("case_id") or "", row.get("label") or "", {name: row[name] for name in columns if row.get(name)}
            )
            for row in rows
        }
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError):
        log.warning("%s: not a table of predictions that can be read; moved to %s", path, *set_aside(path))
        return {}


@dataclass(frozen=True)
class PredictedSlides:
    """The records of predicted slides, in their order; by slide, the label rows of those to be scored, and patients and
    labels as far as known. `patients_from` says where the label table has the patients from; None if from nowhere.
    `groups`, by slide, are those that intervals are computed over; none if they are computed over patients.
    `subgroups` are columns of the label table: each group of slides is scored, too.
    """

    records: Sequence[Mapping[str, Any]]
    rows: Mapping[str, LabelRow]
    task: Task
    infos: Mapping[str, SlideInfo] = field(default_factory=dict)
    patients_from: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    subgroups: Sequence[str] = ()

    def table(self) -> pd.DataFrame:
        """Return a row per slide, with the columns of a training's `predictions.csv` that apply."""
        import pandas as pd

        return pd.DataFrame([self._row(record) for record in self.records])

    def _row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        row = {"wsi_id": record["slide"]}
        if any(info.label or info.case_id for info in self.infos.values()):
            info = self.infos.get(record["slide"], SlideInfo())
            row |= {"case_id": info.case_id or None, "label": info.label or None, **info.cells}
        answer = Answer.of(record)
        columns = self.task.answer_columns(answer.predicted, answer.values, answer.calibrated)
        row |= {self.task.decided_key: record.get(self.task.decided_key)} if self.task.decided_key else {}
        row |= columns | {f"spread_{name}": value for name, value in (answer.spread or {}).items()}
        row |= {name: record[name] for name in ("num_instances", "seen_in_training")}
        row |= {"fold": record["fold"]} if "fold" in record else {}
        return row | ({"group": self.groups.get(record["slide"])} if self.groups else {})

    def predictions(self, fitted: FittedFigures | None = None) -> Predictions:
        """Return the predictions of the labelled slides, also decided by what was `fitted` with the model, if any; of
        slides that were answered together one, which stands for their patient.

        Raises ConfigError if no labelled slide was predicted, LabelsError for a patient of several labels.
        """
        scored = self._scored
        if not scored:
            raise ConfigError("--labels_csv: none of its slides could be predicted, so there is nothing to score")
        rows = [self.rows[record["slide"]] for record in scored]
        num_seen = sum(record["seen_in_training"] is True for record in scored)
        unit = "patient" if _is_of_cases(scored) else "slide"
        values = self._by_class([Answer.of(record).values for record in scored])
        scaled = [calibrated for record in scored if (calibrated := Answer.of(record).calibrated) is not None]
        return Predictions(
            slides=np.array([row.wsi_id for row in rows]),
            cases=np.array([row.case_id for row in rows]),
            labels=np.array([row.label for row in rows]),
            values=values,
            task=self.task,
            repeats=np.zeros(len(rows)),
            seed=_SEED,
            calibrated=self._by_class(scaled) if len(scaled) == len(scored) else None,
            decisions=None if fitted is None else self.task.decide_by(fitted, self._by_model(scored)),
            groups=np.array([self.groups[row.wsi_id] for row in rows]) if self.groups else None,
            title=f"{plural(len(rows), unit)}, predicted" + (f"; {num_seen} seen in training" if num_seen else ""),
            unit=unit,
        )

    @property
    def _scored(self) -> list[Mapping[str, Any]]:
        """Return the records of labelled slides; of slides that were answered together, that of the first."""
        records = [record for record in self.records if record["slide"] in self.rows]
        if not _is_of_cases(records):
            return records
        first: dict[str, Mapping[str, Any]] = {}
        for record in records:
            row = self.rows[record["slide"]]
            stands = self.rows[first.setdefault(row.case_id, record)["slide"]]
            if str(stands.label) != str(row.label):
                raise LabelsError(
                    f"--labels_csv: patient {row.case_id}, who has one answer, has slides of different labels "
                    f"({stands.wsi_id}, {row.wsi_id}); give all slides one label"
                )
        return list(first.values())

    def scores(self, fitted: FittedFigures | None) -> dict[str, Any]:
        """Return the figures of the labelled slides, named as a training's, with 95% intervals over patients.

        `fitted` is what was fitted with the model, if there is one. If a model was trained on some of the slides,
        `unseen` has the figures of the other slides.
        """
        predictions = self.predictions(fitted)
        scored = self._scored
        is_seen = np.array([record["seen_in_training"] is True for record in scored])
        is_unseen = np.array([record["seen_in_training"] is False for record in scored])
        _, num_renamed, num_by_name = self._seen_counts(scored)
        return {
            **self.task.cohort_record,
            "positive_class": self.task.positive_output,
            "unit": "case" if _is_of_cases(scored) else "slide",
            **_figures(predictions),
            "n_slides": sum(record["slide"] in self.rows for record in self.records),
            "primary_unit": predictions.primary_unit,
            **{name: fitted and fitted.get(name) for name in self.task.decision_figures},
            "patients_from": self.patients_from or NO_PATIENTS,
            "n_seen_in_training": int(is_seen.sum()),
            "n_seen_under_another_name": num_renamed,
            "n_unseen_by_name_alone": num_by_name,
            "localization": self.localization(),
            "subgroups": self._subgroups(predictions),
            "unseen": _figures(predictions.where(is_unseen)) if is_seen.any() and is_unseen.any() else None,
        }

    def _subgroups(self, predictions: Predictions) -> dict[str, Any] | None:
        """Return the figures of each group of labelled slides by column; None if no column is asked for.

        Raises LabelsError for a patient with two values who has one answer.
        """
        slides, rows = list(self.rows), list(self.rows.values())
        cases = np.array([row.case_id for row in rows])
        columns = [Column.of(name, [row.columns[name] for row in rows]) for name in self.subgroups]
        if predictions.unit == "patient":
            columns = of_all_slides(Path("--labels_csv"), columns, cases, "--subgroups")
        numbers = np.array([slides.index(slide) for slide in predictions.slides.tolist()])
        groups = {column.name: column.filled(cases).where(numbers).groups() for column in columns}
        return subgroup_figures(predictions, groups) or None

    def localization(self) -> dict[str, Any] | None:
        """Return the mean scores of the maps against annotations, by class; None if no slide's maps are scored.

        A slide of no known patient is taken as a patient of its own.
        """
        records = [record for record in self.records if record.get("localization")]
        infos = [self.infos.get(record["slide"], SlideInfo()) for record in records]
        cases = [info.case_id or record["slide"] for info, record in zip(infos, records, strict=True)]
        return localization.mean_scores([record["localization"] for record in records], cases, _SEED) or None

    @staticmethod
    def _seen_counts(records: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
        """Return how many slides were seen in training, how many of these are known by their content alone, and how
        many were not seen by a comparison of names alone.
        """
        by_content = [record["seen_as"] == "slide" and record.get("seen_compared") == "content" for record in records]
        by_name = [record["seen_as"] == "" and record.get("seen_compared") != "content" for record in records]
        return sum(record["seen_in_training"] is True for record in records), sum(by_content), sum(by_name)

    def draw(self, folder: Path, formats: Sequence[str], fitted: FittedFigures | None = None) -> None:
        """Draw the figures of the task, such as ROC and confusion matrix, of the labelled slides; `fitted` as in
        `scores`.
        """
        from utils.evaluation.prediction_figures import prediction_figures

        write_figures(folder, prediction_figures(self.predictions(fitted)), formats)

    def write(
        self,
        folder: Path,
        fitted: FittedFigures | None,
        settings: Mapping[str, Any],
        overwrite: bool,
        formats: Sequence[str] = FIGURE_FORMAT,
    ) -> str:
        """Write `predictions.csv` and, with labels, `scores.json` and figures in these `formats`. Return the closing
        words.

        An earlier table is set aside if this one lacks slides of it whose predictions still exist. Scores of other
        slides, labels or `settings` are set aside, too, or replaced with `overwrite`.
        """
        self._set_table_aside(folder)
        write_table(folder / TABLE, self.table())
        if not self.rows:
            if read_record(folder / SCORES).get("settings") != settings:
                _clear_scores(folder, overwrite)
            sentences = localization.means_text(self.localization() or {})
            return " ".join(filter(None, [*sentences, _seen_words(*self._seen_counts(self.records))]))
        scores = {"settings": dict(settings), "labels": self._labels_digest(), **self.scores(fitted)}
        earlier = read_record(folder / SCORES)
        if earlier and any(earlier.get(name) != scores[name] for name in ("settings", "labels")):
            _clear_scores(folder, overwrite)
        checkpoint = self.records[0]["checkpoint"]
        checkpoints = checkpoint if isinstance(checkpoint, list) else [checkpoint]
        write_json(folder / SCORES, {"checkpoint": checkpoint, "checkpoints": checkpoints, **scores})
        predictions = self.predictions(fitted)
        cases = predictions.by_case()
        if len(cases) < len(predictions):
            write_table(folder / CASES, cases.table().drop(columns=["wsi_id", "repeat"]))
        self.draw(folder, formats, fitted)
        return scores_text(scores)

    def _set_table_aside(self, folder: Path) -> None:
        absent = earlier_slides(folder).keys() - {record["slide"] for record in self.records}
        count = sum((folder / f"{slide}{ENDING}").exists() for slide in absent)
        if count:
            slides, aside = plural(count, "slide"), set_aside(folder / TABLE)
            log.warning("%s: holds %s by other settings; moved to %s", folder / TABLE, slides, *aside)

    def _labels_digest(self) -> str:
        """Return a digest of the slides that are scored, with their patients, labels and groups."""
        scored = [self.rows[record["slide"]] for record in self.records if record["slide"] in self.rows]
        texts = self.task.target_text(np.array([row.label for row in scored]))
        lines = [f"{row.wsi_id}\t{row.case_id}\t{text}" for row, text in zip(scored, texts, strict=True)]
        groups = [f"{row.wsi_id}\t{self.groups[row.wsi_id]}" for row in scored if self.groups]
        return digest(*sorted(lines), *sorted(groups))

    def _by_model(self, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the probabilities `(M, n, C)` of records by each of their M models."""
        answers = [Answer.of(record) for record in records]
        members = [answer.members or [answer.values] for answer in answers]
        return np.stack([self._by_class(values) for values in zip(*members, strict=True)])

    def _by_class(self, values: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Return values by class name as an array `(n, C)`."""
        return np.array([[by_name[name] for name in self.task.outputs] for by_name in values])


def _is_of_cases(records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the answers are for patients, each a bag of all slides."""
    return any(record.get("unit") == "case" for record in records)


def _figures(predictions: Predictions) -> dict[str, Any]:
    return {
        "n_slides": len(predictions),
        "n_cases": predictions.n_cases,
        "n_groups": predictions.n_groups,
        "pooled": predictions.metrics,
        "intervals_95": predictions.intervals,
        "interval_methods": methods(predictions.pooled),
        **thresholded(predictions),
        "pooled_calibrated": predictions.calibrated_metrics,
        "calibration": reliability_figures(predictions),
        **predictions.further,
        "cases": case_figures(predictions),
    }


def _clear_scores(folder: Path, overwrite: bool) -> None:
    """Set aside scores of other slides, labels or settings, and their figures, or delete them with `overwrite`."""
    figures = [path for name in FIGURE_NAMES for path in figure_paths(folder / name, FORMATS)]
    paths = [path for path in [folder / SCORES, *figures] if path.exists()]
    if overwrite:
        for path in paths:
            path.unlink()
    elif paths:
        aside = set_aside(*paths)
        log.warning("%s: holds scores of other slides, labels or settings; moved to %s", paths[0], aside[0])


_SEED = derive_seed(SEED, "bootstrap")


def scores_text(scores: Mapping[str, Any]) -> str:
    """Return the closing words about the scores of `scores.json`."""
    task = task_of(scores)
    metrics = task.main_metrics
    unit = "patients" if scores.get("unit") == "case" else "slides"
    blocks = [[figures_row(unit, scores["pooled"], metrics), intervals_row(scores["intervals_95"], metrics)]]
    counts = f"{plural(scores['n_slides'], 'slide')} of {plural(scores['n_cases'], 'patient')}."
    if scores.get("unit") == "case":
        counts = f"{plural(scores['n_cases'], 'patient')}, each a bag of all slides."
    if scores.get("cases"):
        blocks.append(case_rows(scores, metrics))
    words = [f"{counts} {interval_words(scores, metrics)}", case_words(scores)]
    if scores["patients_from"] == NO_PATIENTS:
        words.append("No patients are known: where some have several slides, the intervals are too narrow.")
    words += [
        *task.closing_sentences(primary_figures(scores)),
        reliability_words(scores["calibration"]),
        *localization.means_text(scores["localization"] or {}),
    ]
    counts = ("n_seen_in_training", "n_seen_under_another_name", "n_unseen_by_name_alone")
    words.append(_seen_words(*(scores[name] for name in counts), unit=unit.removesuffix("s")))
    if scores["unseen"] is not None:
        unseen = scores["unseen"]
        rows = [figures_row("unseen", unseen["pooled"], metrics), intervals_row(unseen["intervals_95"], metrics)]
        blocks.append([*rows, *case_rows(unseen, metrics, "unseen patients")])
        counts = f"other {plural(unseen['n_cases'], 'patient')}"
        if scores.get("unit") != "case":
            counts = f"{plural(unseen['n_slides'], 'slide')} of the {counts}"
        reason = interval_words(unseen, metrics)
        words.append(f"Unseen: the {counts}." + ("" if reason == interval_words(scores, metrics) else f" {reason}"))
    figures = primary_figures(scores)
    table = task.table(figures["pooled"], figures["intervals_95"])
    lines = [text_table(blocks, metrics), "", *([table, ""] if table else []), *filter(None, words)]
    return "\n".join([*lines, *[f"\n{text}" for text in (subgroups_text(scores),) if text]])


def _seen_words(num_seen: int, num_renamed: int, num_by_name: int, unit: str = "slide") -> str:
    """Return the sentences on slides that were seen in training, or that may have been under another name."""
    sentences = []
    if num_seen:
        renamed = f" ({num_renamed} under another name)" if num_renamed else ""
        of_patients = ", or of patients seen there" if unit == "slide" else ""
        sentences.append(
            f"{plural(num_seen, unit)} seen in training{of_patients}{renamed}: their predictions are not independent "
            "evidence."
        )
    if num_by_name:
        sentences.append(f"{plural(num_by_name, unit)} {BY_NAME}.")
    return " ".join(sentences)
