"""Many slides predicted: the table of their answers and, with labels, the scores and their figures.

A single slide has neither table nor figure, so pandas and what draws are imported where they are used.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.bags.labels import LabelRow
from utils.core.config import Prediction, Protocol
from utils.core.errors import ConfigError, counted
from utils.core.files import digest, read_record, set_aside, write_json
from utils.core.plots import FORMATS, figure_paths, write_figures
from utils.core.runtime import derive_seed, log
from utils.learning.kept_answers import ENDING
from utils.learning.metrics import decision_metrics
from utils.learning.predictions import Predictions
from utils.learning.results import (
    calibration_figures,
    class_table,
    decision_words,
    figures_row,
    intervals_row,
    text_table,
    write_table,
)
from utils.learning.statistics import bootstrap_intervals, pooled_metrics

if TYPE_CHECKING:
    import pandas as pd

REPORT, TABLE, SCORES = "prediction_report.csv", "predictions.csv", "scores.json"
_FIGURES = ("roc", "precision_recall", "confusion_matrix", "calibration")


@dataclass(frozen=True)
class Known:
    """What is known of a slide besides its answer; empty where it is not."""

    case_id: str = ""
    label: str = ""


def known_slides(folder: Path) -> dict[str, Known]:
    """Return what the table of an earlier run says of its slides; nothing where there is no such table.

    Something else under the table's name is set aside.
    """
    path = folder / TABLE
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        if rows and "seen_in_training" not in rows[0]:
            raise ValueError("other columns")
        return {row["wsi_id"]: Known(row.get("case_id") or "", row.get("label") or "") for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError):
        log.warning("%s: not a table of predictions that can be read; moved to %s", path, *set_aside(path))
        return {}


@dataclass(frozen=True)
class Answers:
    """The records of predicted slides, in their order, the rows of a label table for those that are to be scored, and
    what is known of the slides, those of earlier runs among them.
    """

    records: Sequence[Mapping[str, Any]]
    rows: Mapping[str, LabelRow]
    class_names: Sequence[str]
    known: Mapping[str, Known] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """A row per slide, with the columns of a training's `predictions.csv` as far as they apply."""
        import pandas as pd

        return pd.DataFrame([self._line(record) for record in self.records])

    def _line(self, record: Mapping[str, Any]) -> dict[str, Any]:
        line = {"wsi_id": record["slide"]}
        if any(known.label or known.case_id for known in self.known.values()):
            known = self.known.get(record["slide"], Known())
            line |= {"case_id": known.case_id or None, "label": known.label or None}
        line["predicted"] = record["predicted_class"]
        for prefix, key in (
            ("prob", "probabilities"),
            ("calibrated", "calibrated_probabilities"),
            ("spread", "spread"),
        ):
            line |= {f"{prefix}_{name}": value for name, value in (record.get(key) or {}).items()}
        line |= {name: record[name] for name in ("num_instances", "seen_in_training")}
        return line | ({"fold": record["fold"]} if "fold" in record else {})

    def scores(self, threshold: float | None) -> dict[str, Any]:
        """The figures of a training, of the labelled slides: under the same names, with 95% intervals over patients.

        `threshold`, of two classes, is the model's own. Where a model was trained on some of the slides, `unseen` has
        the figures of the others.
        """
        scored = [record for record in self.records if record["slide"] in self.rows]
        if not scored:
            raise ConfigError("--labels_csv: none of its slides could be predicted, so there is nothing to score")
        seen = np.array([record["seen_in_training"] is True for record in scored])
        content = self._figures(scored)
        if threshold is not None:
            probabilities, truth = self._probabilities(scored), self._labels(scored)
            predicted = (probabilities[:, 1] >= threshold).astype(int)
            content["pooled_thresholded"] = decision_metrics(truth, predicted, self.class_names)
        unseen = [record for record in scored if record["seen_in_training"] is False]
        return {
            "class_names": list(self.class_names),
            **content,
            "threshold": threshold,
            "n_seen_in_training": int(seen.sum()),
            "unseen": self._figures(unseen) if seen.any() and unseen else None,
        }

    def _figures(self, scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        truth, probabilities, cases = self._labels(scored), self._probabilities(scored), self._cases(scored)
        once, names, calibrated = np.zeros(len(scored)), self.class_names, self._calibrated(scored)
        return {
            "n_slides": len(scored),
            "n_cases": len(np.unique(cases)),
            "pooled": pooled_metrics(truth, probabilities, once, names),
            "intervals_95": bootstrap_intervals(truth, probabilities, cases, _SEED, class_names=names),
            "pooled_thresholded": None,
            "pooled_calibrated": None if calibrated is None else calibration_figures(truth, calibrated, once),
        }

    def draw(self, folder: Path, formats: Sequence[str]) -> None:
        """ROC, precision and recall, confusion matrix and calibration of the labelled slides."""
        from utils.learning import figures

        scored = [record for record in self.records if record["slide"] in self.rows]
        seen = sum(record["seen_in_training"] is True for record in scored)
        title = f"{counted(len(scored), 'slide')}, predicted" + (f"; {seen} seen in training" if seen else "")
        predictions = Predictions(
            self._labels(scored), self._probabilities(scored), self.class_names, self._cases(scored),
            np.zeros(len(scored)), _SEED, calibrated=self._calibrated(scored), title=title,
        )  # fmt: skip
        drawn = [
            figures.roc_figure(predictions),
            figures.precision_recall_figure(predictions),
            figures.confusion_figure(predictions),
            figures.calibration_figure(predictions),
        ]
        write_figures(folder, dict(zip(_FIGURES, drawn, strict=True)), formats)

    def write(
        self,
        folder: Path,
        threshold: float | None,
        settings: Mapping[str, Any],
        overwrite: bool,
        formats: Sequence[str] = Prediction.figure_format,
    ) -> str:
        """Write `predictions.csv` and, with labels, `scores.json` and figures in these `formats`; return the closing
        words.

        A table with rows of slides that this one lacks, though their answers are there, is set aside, and so are
        scores that are not those of the same slides, labels and `settings`, which `overwrite` replaces.
        """
        self._set_table_aside(folder)
        write_table(folder / TABLE, self.table())
        if not self.rows:
            if read_record(folder / SCORES).get("settings") != settings:
                _clear_scores(folder, overwrite)
            seen = sum(record["seen_in_training"] is True for record in self.records)
            return _seen_words(seen) if seen else ""
        scores = {"settings": dict(settings), "labels": self._labels_digest(), **self.scores(threshold)}
        earlier = read_record(folder / SCORES)
        if earlier and any(earlier.get(name) != scores[name] for name in ("settings", "labels")):
            _clear_scores(folder, overwrite)
        write_json(folder / SCORES, {"checkpoint": self.records[0]["checkpoint"], **scores})
        self.draw(folder, formats)
        return scores_text(scores)

    def _set_table_aside(self, folder: Path) -> None:
        ours = {record["slide"] for record in self.records}
        lost = [slide for slide in known_slides(folder) if slide not in ours and (folder / f"{slide}{ENDING}").exists()]
        if lost:
            log.warning(
                "%s: holds %s by other settings; moved to %s",
                folder / TABLE, counted(len(lost), "slide"), *set_aside(folder / TABLE),
            )  # fmt: skip

    def _labels_digest(self) -> str:
        """Return a digest of the slides that are scored, with their patients and labels."""
        scored = [self.rows[record["slide"]] for record in self.records if record["slide"] in self.rows]
        lines = sorted(f"{row.wsi_id}\t{row.case_id}\t{self.class_names[row.label]}" for row in scored)
        return digest(*lines)

    def _labels(self, scored: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([self.rows[record["slide"]].label for record in scored])

    def _cases(self, scored: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([self.rows[record["slide"]].case_id for record in scored])

    def _probabilities(self, scored: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([[record["probabilities"][name] for name in self.class_names] for record in scored])

    def _calibrated(self, scored: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        each = [record["calibrated_probabilities"] for record in scored]
        if None in each:
            return None
        return np.array([[one[name] for name in self.class_names] for one in each])


def _clear_scores(folder: Path, overwrite: bool) -> None:
    """Take scores of other slides, labels or settings, and their figures, out of the way, or away."""
    there = [path for path in [folder / SCORES, *_figure_files(folder)] if path.exists()]
    if overwrite:
        for path in there:
            path.unlink()
    elif there:
        aside = set_aside(*there)
        log.warning("%s: holds scores of other slides, labels or settings; moved to %s", there[0], aside[0])


def _figure_files(folder: Path) -> list[Path]:
    return [path for name in _FIGURES for path in figure_paths(folder / name, FORMATS)]


_SEED = derive_seed(Protocol.seed, "bootstrap")


def scores_text(scores: Mapping[str, Any]) -> str:
    blocks = [[figures_row("slides", scores["pooled"]), intervals_row(scores["intervals_95"])]]
    about = f"{scores['n_slides']} slides of {scores['n_cases']} patients."
    words = [f"{about} The 95% intervals come from resampling patients and are conditional on the trained models."]
    words += decision_words(scores)
    if scores["n_seen_in_training"]:
        words.append(_seen_words(scores["n_seen_in_training"]))
    if scores["unseen"] is not None:
        unseen = scores["unseen"]
        blocks.append([figures_row("unseen", unseen["pooled"]), intervals_row(unseen["intervals_95"])])
        words.append(f"Unseen: the {unseen['n_slides']} slides of the other {unseen['n_cases']} patients.")
    classes = class_table(scores["class_names"], scores["pooled"], scores["intervals_95"])
    return "\n".join([text_table(blocks), "", classes, "", *words])


def _seen_words(seen: int) -> str:
    return f"{counted(seen, 'slide')} seen in training, or of patients seen there: their predictions prove nothing."
