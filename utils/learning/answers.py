"""Many slides predicted: which inputs, where each answer goes and whether it is there, the table and the scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.bags import labels
from utils.bags.labels import LabelRow
from utils.bags.rows import Fingerprint
from utils.bags.store import is_feature_file
from utils.bags.table import read_table
from utils.core.cohorts import cohort_classes
from utils.core.config import Prediction, Protocol
from utils.core.errors import ConfigError, FeatureFileError, LiteMILError, counted
from utils.core.files import check_distinct, read_json, write_json
from utils.core.passport import first_differences, recipe_differences
from utils.core.runtime import derive_seed, log
from utils.learning import figures
from utils.learning.metrics import decision_metrics
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
from utils.slides.batch import PREVIEWS
from utils.slides.wsi import find_slides, is_slide_file, one_per_series

REPORT, TABLE, SCORES = "prediction_report.csv", "predictions.csv", "scores.json"
FAITHFULNESS = "{}_faithfulness.png"
_FIGURES = ("roc.png", "confusion_matrix.png", "calibration.png")
_ENDING = "_prediction.json"


class PredictionFiles:
    """What `predict.py` was told about files: the inputs, in their order, and the file of each one's answer.

    The feature files of a folder and its subfolders or, where there are none, its slides. Raises ConfigError for a
    folder with neither, and for inputs that would share an answer; FeatureFileError for a file that is neither.
    """

    def __init__(self, asked: Prediction) -> None:
        self.asked = asked
        sources = [asked.input] if asked.input is not None else _inputs_of(asked)
        for source in sources:
            check_input(source)
        self.targets = {source: asked.output_dir / f"{source.stem}{_ENDING}" for source in sources}
        check_distinct(self.targets)
        self.are_raw = not is_feature_file(sources[0])

    def label_rows(self, class_names: Sequence[str], dataset: str | None) -> dict[str, LabelRow]:
        """The rows of `labels_csv` by slide, every one accounted for as in training; none without a table."""
        asked = self.asked
        if asked.labels_csv is None:
            return {}
        classes = cohort_classes(dataset)
        sources = {source.stem: source for source in self.targets}
        table = read_table(asked.labels_csv)
        found = labels.account(
            table, class_names, sources.get, ids=sources.keys, allow=asked.allow,
            label_names=classes.label_names, left_out=classes.left_out,
        )  # fmt: skip
        for note in table.notes:
            log.info("%s: %s", table.path, note)
        labels.warn_of_patients(table, found)
        if len(found) < len(sources):
            log.info(
                "%s of %s have no label, and are not scored", counted(len(sources) - len(found), "slide"), len(sources)
            )
        return {row.wsi_id: row for row in found}


def check_input(path: Path) -> None:
    """Raise FeatureFileError unless `path` is a file that, by its ending, can be predicted."""
    if not path.is_file():
        raise FeatureFileError(f"{path}: no such file; give a feature file (.h5, .pt, .pth) or a slide")
    if not is_feature_file(path) and not is_slide_file(path):
        raise FeatureFileError(
            f"{path}: neither a feature file (.h5, .pt, .pth) nor a slide, by its ending {path.suffix!r}"
        )


def _inputs_of(asked: Prediction) -> list[Path]:
    folder, ours = asked.input_dir, asked.output_dir.resolve()
    assert folder is not None  # noqa: S101 - for the type checker: there is an input or a folder
    if not folder.is_dir():
        raise ConfigError(f"--input_dir {folder}: no such folder; give a folder of feature files or of slides")
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and is_feature_file(path) and not path.name.startswith(".")
    )
    slides = one_per_series(find_slides(folder, asked.extensions))
    if asked.extensions is not None or not files:
        files = slides
    elif slides := [one for one in slides if PREVIEWS not in one.parts and not one.resolve().is_relative_to(ours)]:
        named = " ".join(sorted({slide.suffix for slide in slides}))
        log.warning(
            "%s: holds feature files; left out: %s. For those give --extensions %s",
            folder, counted(len(slides), "slide"), named,
        )  # fmt: skip
    if ours != folder.resolve():  # a folder may be its own output folder
        files = [path for path in files if not path.resolve().is_relative_to(ours)]
    if not files:
        raise ConfigError(f"--input_dir {folder}: neither a feature file (.h5, .pt, .pth) nor a slide in it")
    return files


def request_of(source: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes an answer the one that was asked for: the settings, and the input as it is now."""
    now = Fingerprint.at(source)
    return {**settings, "input_bytes": now and now.size, "input_mtime_ns": now and now.mtime_ns}


def kept_answer(target: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier run that was asked for the same; None where there is none.

    Raises ConfigError where the file holds another answer, as far as the request goes.
    """
    if not target.exists():
        return None
    record = _record_at(target)
    known = record.get("request")
    if not isinstance(known, dict):
        raise ConfigError(f"{target}: is in the way, and no prediction that can be read; move it, or give --overwrite")
    _check_request(target, request, known, {**request, **known})
    return record


def check_first(targets: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where the first answer that is there and can be read was made with other settings."""
    for target in targets:
        known = _record_at(target).get("request")
        if known is not None:
            _check_request(target, settings, known, settings)
            return


def _check_request(target: Path, request: Mapping[str, Any], known: Mapping[str, Any], fields: Iterable[str]) -> None:
    differences = recipe_differences(request, known, fields, strict=True)
    if differences:
        unlike = first_differences(differences)
        raise ConfigError(f"{target}: is another prediction ({unlike}); give another --output_dir, or --overwrite")


def clear_pictures(target: Path, record: Mapping[str, Any]) -> None:
    """Remove the pictures of the answer at `target` that the `record`, which takes its place, does not keep."""
    earlier, folder = _record_at(target), target.parent.resolve()
    stale = [FAITHFULNESS.format(record["slide"])] if "faithfulness" in earlier and "faithfulness" not in record else []
    if "pictures" in earlier and "pictures" not in record:
        stale += earlier["pictures"]["files"]
    for name in stale:
        path = folder / name
        if path.resolve().is_relative_to(folder):  # nothing that a record names elsewhere
            path.unlink(missing_ok=True)


def _record_at(target: Path) -> dict[str, Any]:
    """The record at `target`; an empty one where there is none that can be read."""
    try:
        record = read_json(target) if target.exists() else {}
    except LiteMILError:
        return {}
    return record if isinstance(record, dict) else {}


@dataclass(frozen=True)
class Answers:
    """The records of predicted slides, in their order, and the rows of a label table for those that have one."""

    records: Sequence[Mapping[str, Any]]
    rows: Mapping[str, LabelRow]
    class_names: Sequence[str]

    def table(self) -> pd.DataFrame:
        """A row per slide, with the columns of a training's `predictions.csv` as far as they apply."""
        return pd.DataFrame([self._line(record) for record in self.records])

    def _line(self, record: Mapping[str, Any]) -> dict[str, Any]:
        row = self.rows.get(record["slide"])
        line = {"wsi_id": record["slide"]}
        if self.rows:
            line |= {"case_id": row and row.case_id, "label": row and self.class_names[row.label]}
        line["predicted"] = record["predicted_class"]
        for prefix, key in (
            ("prob", "probabilities"),
            ("calibrated", "calibrated_probabilities"),
            ("spread", "spread"),
        ):
            line |= {f"{prefix}_{name}": value for name, value in (record.get(key) or {}).items()}
        return line | {name: record[name] for name in ("num_instances", "seen_in_training")}

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

    def draw(self, folder: Path) -> None:
        """ROC, confusion matrix and calibration of the labelled slides."""
        scored = [record for record in self.records if record["slide"] in self.rows]
        answers = self._labels(scored), self._probabilities(scored), self.class_names
        seen = sum(record["seen_in_training"] is True for record in scored)
        title = f"{counted(len(scored), 'slide')}, predicted" + (f"; {seen} seen in training" if seen else "")
        once = np.zeros(len(scored))
        drawn = [
            figures.roc_figure(*answers, None, self._cases(scored), once, _SEED, title),
            figures.confusion_figure(*answers, once, title),
            figures.calibration_figure(*answers, once, self._calibrated(scored), title),
        ]
        for name, figure in zip(_FIGURES, drawn, strict=True):
            figures.save_figure(figure, folder / name)

    def write(self, folder: Path, threshold: float | None, settings: Mapping[str, Any]) -> str:
        """Write `predictions.csv` and, with labels, `scores.json` and the figures; the closing words.

        Without labels, scores that are there are removed, with their figures, if they were made with other `settings`.
        """
        write_table(folder / TABLE, self.table())
        if not self.rows:
            if _record_at(folder / SCORES).get("settings") != settings:
                for name in (SCORES, *_FIGURES):
                    (folder / name).unlink(missing_ok=True)
            seen = sum(record["seen_in_training"] is True for record in self.records)
            return _seen_words(seen) if seen else ""
        scores = self.scores(threshold)
        checkpoint = self.records[0]["checkpoint"]
        write_json(folder / SCORES, {"checkpoint": checkpoint, "settings": dict(settings), **scores})
        self.draw(folder)
        return scores_text(scores)

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
