"""Read finished training runs from their folders, to compare them or to draw their figures again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.core.errors import ConfigError, first_few, plural
from utils.core.files import read_json
from utils.core.plots import figure_paths
from utils.core.runtime import derive_seed, log
from utils.evaluation.predictions import Predictions
from utils.learning.run_figures import draw_figures, figure_names
from utils.learning.settings import Protocol
from utils.learning.split_files import SUBSETS, NamedSplit, read_splits
from utils.tasks.records import task_of
from utils.tasks.task import Task

_FILES = ("run.json", "outputs.json", "predictions.csv", "splits.json")


@dataclass(frozen=True)
class Run:
    """A finished training run: the content of its `outputs.json`, its out-of-fold predictions, sorted by repeat and
    slide, and its splits. `name` is the end of its path that distinguishes it from the other runs.
    """

    path: Path
    name: str
    outputs: dict[str, Any]
    predictions: Predictions
    splits: list[NamedSplit]

    def pooled_figure(self, metric: str) -> tuple[float | None, Sequence[float] | None]:
        """Return the pooled figure and its 95% interval from `outputs.json`. Raise ConfigError if it lacks them."""
        try:
            return self.outputs["pooled"][metric], self.outputs["intervals_95"][metric]
        except (KeyError, TypeError) as failure:
            raise ConfigError(
                f"{self.path / 'outputs.json'}: no pooled {metric} with its interval; train the run again, or leave it "
                "out of --metrics"
            ) from failure

    @property
    def is_of_cases(self) -> bool:
        """Whether it predicted patients, each a bag of all slides."""
        return self.outputs.get("unit") == "case"

    def of_patients(self) -> "Run":
        """Return the run with an answer for each patient, as it has where patients are its bags."""
        if self.is_of_cases:
            return self
        case_of = dict(zip(self.predictions.slides.tolist(), self.predictions.cases.tolist(), strict=True))
        cases = self.predictions.by_case()
        splits = [
            replace(split, slides={part: list(dict.fromkeys(map(case_of.__getitem__, ids))) for part, ids in
                                   split.slides.items()})
            for split in self.splits
        ]  # fmt: skip
        rows = cases.where(np.lexsort((cases.slides, cases.repeats)))
        return replace(self, outputs=self.outputs | (self.outputs.get("cases") or {}), predictions=rows, splits=splits)

    @property
    def monitors(self) -> dict[int, str]:
        """Return the monitor of each outer fold."""
        return {fold["fold"]: fold["selection"]["monitor"] for fold in self.outputs["fold_results"]}


def draw_missing(folder: Path, formats: Sequence[str]) -> None:
    """Draw the figures of a finished run that are missing in these formats; log a warning if its tables, of an earlier
    version, do not allow it.
    """
    try:
        names = figure_names(task_of(read_json(folder / "outputs.json", ConfigError)))
        if all(path.exists() for name in names for path in figure_paths(folder / name, formats)):
            return
        run = read_run(folder, folder.name)
        history, monitors = pd.read_csv(folder / "history.csv"), run.monitors
    except (ConfigError, OSError, TypeError, ValueError, KeyError) as failure:
        log.warning("%s: its figures cannot be drawn anew (%s)", folder, failure)
        return
    paths = draw_figures(folder, run.predictions, history, monitors, formats, missing_only=True)
    log.info("%s: drawn from its tables: %s", folder, ", ".join(path.name for path in paths))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the finished runs in the folders `paths`, at least two, on the same slides and splits. Beside a run that
    predicted patients, all are those of patients.

    Raises ConfigError for a folder that holds no finished run, one given twice, and runs that differ in classes,
    slides, patients, labels or splits.
    """
    folders = [path.resolve() for path in paths]
    twice = [str(path) for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: given twice; name each run once")
    runs = [read_run(path, name) for path, name in zip(paths, _short_names(folders), strict=True)]
    if any(run.is_of_cases for run in runs):
        runs = [run.of_patients() for run in runs]
    for run in runs[1:]:
        check_same_slides(runs[0], run)
        _check_same_splits(runs[0], run)
    return runs


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ValueError("equal paths")


def read_run(path: Path, name: str) -> Run:
    """Return the finished run in a folder. Raise ConfigError if there is none, or its files are of different runs."""
    for file in _FILES:
        if not (path / file).is_file():
            raise ConfigError(f"{path}: no finished training run ({file} is missing); give a folder that train.py made")
    record = read_json(path / "run.json", ConfigError)
    if not isinstance(record, dict) or record.get("finished") is not True:
        raise ConfigError(f"{path}: this run is not finished; give its train.py command again to finish it")
    outputs = read_json(path / "outputs.json", ConfigError)
    try:
        task = task_of(outputs)
    except (KeyError, TypeError, ValueError) as failure:
        raise ConfigError(
            f"{path / 'outputs.json'}: no class_names or task, as train.py writes them; train the run again"
        ) from failure
    identity = record.get("identity")
    seed = identity.get("seed", Protocol.seed) if isinstance(identity, dict) else Protocol.seed
    predictions = _read_predictions(path / "predictions.csv", task, derive_seed(seed, "bootstrap"))
    if outputs.get("unit") == "case":
        predictions = replace(predictions, unit="patient")
    splits = read_splits(path / "splits.json", set(predictions.slides.tolist()))
    tested = {(split.fold, wsi_id) for split in splits for wsi_id in split.slides["test"]}
    unmatched = sorted(tested ^ set(zip(_folds(predictions).tolist(), predictions.slides.tolist(), strict=True)))
    if unmatched:
        slides = first_few([f"{wsi_id} of fold {fold}" for fold, wsi_id in unmatched])
        raise ConfigError(f"{path}: predictions.csv and splits.json are not of one run ({slides}); train it again")
    return Run(path, name, outputs, predictions, splits)


def _read_predictions(path: Path, task: Task, seed: int) -> Predictions:
    """Read the table, sorted by repeat and slide."""
    try:
        predictions = Predictions.read(path, seed, task)
    except (OSError, ValueError) as failure:
        raise ConfigError(
            f"{path}: no predictions as train.py writes them ({failure}); train the run again"
        ) from failure
    slides = predictions.slides.tolist()
    tested = set(zip(predictions.repeats.tolist(), slides, strict=True))
    faults = {
        "a slide twice in one repeat": len(tested) < len(slides),
        "a slide with two labels or patients": len(set(_slide_rows(predictions))) > predictions.n_slides,
    }
    for fault, occurs in faults.items():
        if occurs:
            raise ConfigError(f"{path}: {fault}; train the run again")
    return predictions.where(np.lexsort((predictions.slides, predictions.repeats)))


def _slide_rows(predictions: Predictions) -> list[tuple[str, str, str]]:
    """Return each row's slide, label and patient."""
    return list(
        zip(predictions.slides.tolist(), predictions.target_texts.tolist(), predictions.cases.tolist(), strict=True)
    )


def _slides(predictions: Predictions) -> dict[str, dict[str, str]]:
    """Return each slide's label, patient and group, "" if the table names no groups."""
    groups = dict.fromkeys(predictions.slides.tolist(), "")
    if predictions.groups is not None:
        groups = dict(zip(predictions.slides.tolist(), predictions.groups.tolist(), strict=True))
    return {
        wsi_id: {"label": label, "case_id": case_id, "group": groups[wsi_id]}
        for wsi_id, label, case_id in _slide_rows(predictions)
    }


def _folds(predictions: Predictions) -> np.ndarray:
    assert predictions.folds is not None  # noqa: S101 - for the type checker: a training's table has folds
    return predictions.folds


def check_same_slides(first: Run, second: Run) -> None:
    """Raise ConfigError if two runs differ in slides, patients, targets or what they predict."""
    if not set(first.predictions.slides) & set(second.predictions.slides):
        raise ConfigError(f"{second.path}: not one slide of {first.path}; give runs of one cohort")
    task, other = first.predictions.task, second.predictions.task
    if (task.kind, task.about) != (other.kind, other.about):
        raise ConfigError(
            f"{second.path}: {other.about}, those of {first.path} are {task.about}; train both with the same "
            f"{task.flags}"
        )
    both = f"{first.path} and {second.path}"
    slides, second_slides = _slides(first.predictions), _slides(second.predictions)
    for only_here, run in ((slides.keys() - second_slides, first), (second_slides.keys() - slides, second)):
        if only_here:
            raise ConfigError(
                f"{both}: {plural(len(only_here), 'slide')} in {run.path} alone: {first_few(sorted(only_here))}; train "
                "both on the same labels.csv and splits"
            )
    for column, name in (("label", " or ".join(task.columns)), ("case_id", "patient"), ("group", "group")):
        pairs = {wsi_id: (slides[wsi_id][column], second_slides[wsi_id][column]) for wsi_id in sorted(slides)}
        unlike = [f"{wsi_id} ({', '.join(pair)})" for wsi_id, pair in pairs.items() if pair[0] != pair[1] and all(pair)]
        if unlike:
            raise ConfigError(
                f"{both}: {plural(len(unlike), 'slide')} with another {name}: {first_few(unlike)}; train both on the "
                "same labels.csv"
            )
    if task.outputs != other.outputs:
        raise ConfigError(
            f"{second.path}: it predicts {', '.join(other.outputs)}, {first.path} predicts {', '.join(task.outputs)}; "
            "train both with the same settings of the task"
        )


def _check_same_splits(first: Run, second: Run) -> None:
    remedy = f"train it with --splits {first.path / 'splits.json'}"
    for expected, split in zip(first.splits, second.splits, strict=False):
        for subset in SUBSETS:
            unlike = sorted(set(expected.slides[subset]) ^ set(split.slides[subset]))
            if unlike:
                raise ConfigError(
                    f"{second.path}: not the splits of {first.path}: the {subset} part of {split.name} differs in "
                    f"{plural(len(unlike), 'slide')}: {first_few(unlike)}; {remedy}"
                )
        if (expected.fold, expected.repeat) != (split.fold, split.repeat):
            raise ConfigError(
                f"{second.path}: not the splits of {first.path}: {split.name} is of repeat {split.repeat}, where "
                f"{expected.name} is of repeat {expected.repeat}; {remedy}"
            )
    if len(first.splits) != len(second.splits):
        raise ConfigError(
            f"{second.path}: not the splits of {first.path}: {len(second.splits)} inner folds in all, there "
            f"{len(first.splits)}; {remedy}"
        )
