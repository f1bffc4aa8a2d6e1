"""Read a finished training run for prediction: the model chosen in it, and its out-of-fold predictions."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from utils.bags.feature_folder import FeatureFolder
from utils.core.errors import CheckpointError, ConfigError, FeatureFileError, did_you_mean_path, first_few, plural
from utils.core.files import read_json, read_record
from utils.core.runtime import log
from utils.evaluation.predictions import Predictions
from utils.tasks.records import Answer, task_of

RECORD, CHOSEN, PREDICTIONS = "run.json", "all_folds_best.pth", "predictions.csv"
# The largest difference of a probability that rounding on another device explains.
_ROUNDING = 1e-4


def chosen_checkpoint(path: Path) -> Path:
    """Return the path itself or, for a training run's folder, the checkpoint of the model chosen in it.

    Raises CheckpointError for a folder without a finished run.
    """
    if not path.is_dir():
        return path
    chosen = path / CHOSEN
    if (path / RECORD).exists() or not chosen.is_file():  # the first version's folders have no record
        run_record(path)
    log.info("%s: a training run; the model chosen in it is taken, %s", path, CHOSEN)
    return chosen


def run_record(folder: Path) -> dict[str, Any]:
    """Return the `run.json` of a finished run. Raises CheckpointError if there is none."""
    path = folder / RECORD
    if not path.is_file():
        if not folder.exists():
            near = did_you_mean_path(folder)
            raise CheckpointError(f"{folder}: no such folder; give the output folder of train.py{near}")
        raise CheckpointError(f"{folder}: no training run (it has no {RECORD}); {_instead(folder)}")
    record = read_json(path, CheckpointError)
    if not isinstance(record, dict) or "finished" not in record:
        raise CheckpointError(f"{path}: not the record of a training run; give the output folder of train.py")
    if not record["finished"]:
        raise CheckpointError(f"{folder}: its training is not finished; give its command again, which goes on there")
    return record


def _instead(folder: Path) -> str:
    """Return the advice for a folder that is not a run."""
    runs = sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))
    if runs:
        return f"give one of the runs in it: {first_few(runs)}"
    files = sorted(path.name for path in folder.glob("*.pth"))
    return f"give one of its files: {first_few(files)}" if files else "give the output folder of train.py"


@dataclass(frozen=True)
class TestedSlide:
    """A slide of a run: its patient and label, the fold that tested it, its `values` by output, and its cells in the
    columns of the target.
    """

    case_id: str
    label: str
    fold: int
    values: Mapping[str, float]
    cells: Mapping[str, str]


@dataclass(frozen=True)
class OutOfFold:
    """The slides of a finished run, each with the fold that tested it, in the first or the chosen one of `repeats`.
    `features_dir` is None if the run does not record it. `slides_of` has the slides of each patient, if the run
    predicted patients.
    """

    folder: Path
    slides: Mapping[str, TestedSlide]
    repeats: int
    features_dir: Path | None
    feat_type: str
    slides_of: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, repeat: int | None = None) -> Self:
        """Read a run's folder. Raises CheckpointError if the run is unfinished or damaged, ConfigError if it does not
        have the repeat.
        """
        record = run_record(folder)
        predictions = _read_predictions(folder)
        repeats = int(predictions.repeats.max())
        if repeat is not None and repeat > repeats:
            raise ConfigError(f"--repeat {repeat}: {folder} has {plural(repeats, 'repeat')}; give one of those")
        if repeat is not None:
            predictions = predictions.where(predictions.repeats == repeat)
        tested = _first_test_of_each(predictions)
        slides_of = read_record(folder / "splits.json").get("slides_of_cases", {})
        slides = {slide: each for name, each in tested.items() for slide in slides_of.get(name, [name])}
        feat_type = record.get("identity", {}).get("feat_type", "features")
        return cls(folder, slides, repeats, _features_dir(record), feat_type, slides_of)

    @property
    def folds(self) -> list[int]:
        """Return the folds that test the slides."""
        return sorted({slide.fold for slide in self.slides.values()})

    def checkpoint(self, fold: int) -> Path:
        return self.folder / f"fold_{fold}_best.pth"

    def sources(self, features_dir: Path | None, allow: Collection[str]) -> list[Path]:
        """Return the slides' feature files, by default from the run's own folder.

        Raises FeatureFileError for slides without one, unless `allow` has "missing"; LabelsError for slides with two;
        ConfigError if the folder is unknown.
        """
        path = features_dir or self.features_dir
        if path is None:
            raise ConfigError(f"{self.folder}: does not say where its features are; give their folder with --input_dir")
        if not path.is_dir():
            raise FeatureFileError(f"{path}: no such folder; give that of the features with --input_dir")
        folder = FeatureFolder(path)
        folder.check_unique(self.slides)
        files = [file for slide in sorted(self.slides) if (file := folder.find(slide)) is not None]
        missing = sorted(self.slides.keys() - folder.files.keys())
        if missing and ("missing" not in allow or not files):
            raise FeatureFileError(
                f"{path}: no feature file of {plural(len(missing), 'slide')} of {self.folder}: {first_few(missing)}; "
                "give their folder with --input_dir, or leave them out with --allow missing"
            )
        return files

    def agreement(self, records: Sequence[Mapping[str, Any]]) -> str:
        """Return whether the values of new predictions agree with the run's own; warn if they do not."""
        differences = {
            record["slide"]: max(
                abs(Answer.of(record).values.get(name, math.inf) - value)
                for name, value in self.slides[record["slide"]].values.items()
            )
            for record in records
        }
        word = Answer.of(records[0]).task.values_key
        largest, table = max(differences.values()), self.folder / PREDICTIONS
        unlike = [slide for slide, value in differences.items() if value > _ROUNDING]
        if not unlike:
            return f"The {word} are those of {table} (largest difference {largest:.1g})."
        unlike.sort(key=lambda slide: -differences[slide])
        log.warning(
            "%s: of %d of %d slides the values differ by up to %.2g (%s): perhaps their "
            "features have changed since, or the device or versions differ",
            table, len(unlike), len(differences), largest, first_few(unlike, 3),
        )  # fmt: skip
        return f"{len(unlike)} of {plural(len(differences), 'slide')} have other {word} than in {table}."


def _features_dir(record: Mapping[str, Any]) -> Path | None:
    """Return the run's features folder: the recorded one or, for a run of an earlier version, the cohort's default."""
    if record.get("features_dir"):
        return Path(record["features_dir"])
    default = Path("datasets") / str(record.get("dataset")) / "features"
    return default if default.is_dir() else None


def _read_predictions(folder: Path) -> Predictions:
    path, outputs = folder / PREDICTIONS, read_record(folder / "outputs.json")
    try:
        task = task_of(outputs) if "task" in outputs else None  # classes are those of the table's columns
        return Predictions.read(path, seed=0, task=task)
    except (OSError, KeyError, ValueError, TypeError) as failure:
        raise CheckpointError(f"{path}: not the table of a training run ({failure}); train again") from failure


def _first_test_of_each(predictions: Predictions) -> dict[str, TestedSlide]:
    folds, names = predictions.folds, predictions.task.outputs
    assert folds is not None  # noqa: S101 - for the type checker: a training's table has folds
    slides: dict[str, TestedSlide] = {}
    texts, cells = predictions.target_texts, predictions.task.label_cells(predictions.labels)
    for row in np.lexsort((folds, predictions.repeats)).tolist():
        values = dict(zip(names, predictions.values[row].tolist(), strict=True))
        tested = TestedSlide(str(predictions.cases[row]), str(texts[row]), int(folds[row]), values, cells[row])
        slides.setdefault(str(predictions.slides[row]), tested)
    return slides
