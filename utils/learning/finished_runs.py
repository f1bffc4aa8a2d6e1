"""A finished training run, read back from its folder: to be compared with others, or drawn anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.core.errors import ConfigError, first_few, plural
from utils.core.files import read_json
from utils.core.plots import figure_paths
from utils.core.runtime import derive_seed, log
from utils.evaluation.predictions import Predictions
from utils.learning.run_figures import FIGURES, draw_figures
from utils.learning.settings import Protocol
from utils.learning.split_files import PARTS, NamedSplit, read_splits
from utils.tasks.classification import Classification

_FILES = ("run.json", "outputs.json", "predictions.csv", "splits.json")


@dataclass(frozen=True)
class Run:
    """A finished training run: the content of its `outputs.json`, its out-of-fold predictions by repeat and slide, its
    splits. `name` is what tells it apart from the other runs.
    """

    path: Path
    name: str
    outputs: dict[str, Any]
    predictions: Predictions
    splits: list[NamedSplit]

    @property
    def class_names(self) -> list[str]:
        return self.outputs["class_names"]

    def reported(self, metric: str) -> tuple[float | None, Sequence[float] | None]:
        """The pooled figure and its 95% interval as `outputs.json` has them; ConfigError where it lacks them."""
        try:
            return self.outputs["pooled"][metric], self.outputs["intervals_95"][metric]
        except (KeyError, TypeError) as failure:
            raise ConfigError(
                f"{self.path / 'outputs.json'}: no pooled {metric} with its interval; train the run again, or leave it "
                "out of --metrics"
            ) from failure

    @property
    def monitors(self) -> dict[int, str]:
        """By outer fold, what chose its epochs."""
        return {fold["fold"]: fold["selection"]["monitor"] for fold in self.outputs["fold_results"]}


def draw_missing(folder: Path, formats: Sequence[str]) -> None:
    """Draw those figures of a finished run that are not there in these formats; log where its tables, of an earlier
    version, do not allow that.
    """
    if all(path.exists() for name in FIGURES for path in figure_paths(folder / name, formats)):
        return
    try:
        run = read_run(folder, folder.name)
        history, monitors = pd.read_csv(folder / "history.csv"), run.monitors
    except (ConfigError, OSError, ValueError, KeyError) as failure:
        log.warning("%s: its figures cannot be drawn anew (%s)", folder, failure)
        return
    written = draw_figures(folder, run.predictions, history, monitors, formats, missing_only=True)
    log.info("%s: drawn from its tables: %s", folder, ", ".join(path.name for path in written))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The finished runs in the folders `paths`, at least two, on the same slides and splits.

    Raises ConfigError for a folder that holds no finished run, one given twice, and runs that differ in classes,
    slides, patients, labels or splits.
    """
    places = [path.resolve() for path in paths]
    twice = [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: given twice; name each run once")
    names = _distinguishing(places)
    first, *others = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    for other in others:
        _check_same_slides(first, other)
        _check_same_splits(first, other)
    return [first, *others]


def _distinguishing(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    for length in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise ValueError("equal paths")


def read_run(path: Path, name: str) -> Run:
    """Return the finished run in a folder. Raises ConfigError where there is none, or its files do not go together."""
    for file in _FILES:
        if not (path / file).is_file():
            raise ConfigError(f"{path}: no finished training run ({file} is missing); give a folder that train.py made")
    record = read_json(path / "run.json", ConfigError)
    if not isinstance(record, dict) or record.get("finished") is not True:
        raise ConfigError(f"{path}: this run is not finished; give its train.py command again to finish it")
    outputs = read_json(path / "outputs.json", ConfigError)
    classes = outputs.get("class_names") if isinstance(outputs, dict) else None
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(one, str) for one in classes):
        raise ConfigError(f"{path / 'outputs.json'}: no class_names, as train.py writes them; train the run again")
    identity = record.get("identity")
    seed = identity.get("seed", Protocol.seed) if isinstance(identity, dict) else Protocol.seed
    predictions = _read_predictions(path / "predictions.csv", classes, derive_seed(seed, "bootstrap"))
    splits = read_splits(path / "splits.json", set(predictions.slides.tolist()))
    tested = {(split.fold, wsi_id) for split in splits for wsi_id in split.parts["test"]}
    strangers = sorted(tested ^ set(zip(_folds(predictions).tolist(), predictions.slides.tolist(), strict=True)))
    if strangers:
        slides = first_few([f"{wsi_id} of fold {fold}" for fold, wsi_id in strangers])
        raise ConfigError(f"{path}: predictions.csv and splits.json are not of one run ({slides}); train it again")
    return Run(path, name, outputs, predictions, splits)


def _read_predictions(path: Path, classes: Sequence[str], seed: int) -> Predictions:
    """Read the table, in an order that does not depend on the run's."""
    try:
        predictions = Predictions.read(path, seed, Classification(tuple(classes)))
    except (OSError, ValueError) as failure:
        raise ConfigError(
            f"{path}: no predictions as train.py writes them ({failure}); train the run again"
        ) from failure
    values, slides = predictions.values, predictions.slides.tolist()
    tested = set(zip(predictions.repeats.tolist(), slides, strict=True))
    faults = {
        "a probability that is no number from 0 to 1": not ((values >= 0) & (values <= 1)).all(),
        "a slide twice in one repeat": len(tested) < len(slides),
        "a slide with two labels or patients": len(set(_known(predictions))) > predictions.n_slides,
    }
    for fault, is_there in faults.items():
        if is_there:
            raise ConfigError(f"{path}: {fault}; train the run again")
    return predictions.where(np.lexsort((predictions.slides, predictions.repeats)))


def _known(predictions: Predictions) -> list[tuple[str, str, str]]:
    """Return each row's slide, label and patient."""
    return list(
        zip(predictions.slides.tolist(), predictions.label_names.tolist(), predictions.cases.tolist(), strict=True)
    )


def _slides(predictions: Predictions) -> dict[str, dict[str, str]]:
    """Return each slide's label and patient."""
    return {wsi_id: {"label": label, "case_id": case_id} for wsi_id, label, case_id in _known(predictions)}


def _folds(predictions: Predictions) -> np.ndarray:
    assert predictions.folds is not None  # noqa: S101 - for the type checker: a training's table has folds
    return predictions.folds


def _check_same_slides(first: Run, other: Run) -> None:
    if not set(first.predictions.slides) & set(other.predictions.slides):
        raise ConfigError(f"{other.path}: not one slide of {first.path}; give runs of one cohort")
    if first.class_names != other.class_names:
        raise ConfigError(
            f"{other.path}: classes {', '.join(other.class_names)}, those of {first.path} are "
            f"{', '.join(first.class_names)}; train both with the same --class_names"
        )
    both = f"{first.path} and {other.path}"
    mine, theirs = _slides(first.predictions), _slides(other.predictions)
    for alone, run in ((mine.keys() - theirs, first), (theirs.keys() - mine, other)):
        if alone:
            raise ConfigError(
                f"{both}: {plural(len(alone), 'slide')} in {run.path} alone: {first_few(sorted(alone))}; train both on "
                "the same labels.csv and splits"
            )
    for column, what in (("label", "label"), ("case_id", "patient")):
        differing = [wsi_id for wsi_id in sorted(mine) if mine[wsi_id][column] != theirs[wsi_id][column]]
        if differing:
            told = [f"{wsi_id} ({mine[wsi_id][column]}, {theirs[wsi_id][column]})" for wsi_id in differing]
            raise ConfigError(
                f"{both}: {plural(len(differing), 'slide')} with another {what}: {first_few(told)}; train both on the "
                "same labels.csv"
            )


def _check_same_splits(first: Run, other: Run) -> None:
    remedy = f"train it with --splits {first.path / 'splits.json'}"
    for mine, theirs in zip(first.splits, other.splits, strict=False):
        for part in PARTS:
            moved = sorted(set(mine.parts[part]) ^ set(theirs.parts[part]))
            if moved:
                raise ConfigError(
                    f"{other.path}: not the splits of {first.path}: the {part} part of {theirs.name} differs in "
                    f"{plural(len(moved), 'slide')}: {first_few(moved)}; {remedy}"
                )
        if (mine.fold, mine.repeat) != (theirs.fold, theirs.repeat):
            raise ConfigError(
                f"{other.path}: not the splits of {first.path}: {theirs.name} is of repeat {theirs.repeat}, where "
                f"{mine.name} is of repeat {mine.repeat}; {remedy}"
            )
    if len(first.splits) != len(other.splits):
        raise ConfigError(
            f"{other.path}: not the splits of {first.path}: {len(other.splits)} inner folds in all, there "
            f"{len(first.splits)}; {remedy}"
        )
