"""Plan a nested cross-validation: its folds, and the training jobs of the inner loop."""

import typing
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.bags.dataset import MILDataset
from utils.core.errors import ConfigError, plural
from utils.core.runtime import log
from utils.learning.grid import Setting
from utils.learning.jobs import TrainingJob
from utils.learning.ranking import monitored_metric
from utils.learning.settings import Keep, Monitor, Protocol, Training
from utils.learning.split_files import folds_from_file, is_of_cases, unused_split
from utils.learning.splits import OuterFold, few_patients, repeated_splits
from utils.tasks.operating_point import OperatingPoint
from utils.tasks.task import Task

# With fewer validation slides of a class, the best of many epochs is chance: the standard error of an AUC near 0.8 on
# 20 slides of each of two classes is 0.07.
MANY_VALIDATED = 20
# The settings of training that choose an epoch before the last.
_CHOOSING = "patience", "least_steps"


def outer_folds(data: MILDataset, protocol: Protocol) -> list[OuterFold]:
    """Return the outer folds of all repeats, drawn by the seed or read from the `splits` file."""
    strata, unit = data.task.strata(data.labels), data.group_column or "patient"
    if protocol.splits is None:
        if note := unused_split([row.columns for row in data.slide_rows]):
            log.warning(note)
        return repeated_splits(
            strata, data.groups, data.task.strata_names, protocol.n_outer, protocol.n_inner, protocol.repeats,
            protocol.seed, unit, data.task.stratum_words[0],
        )  # fmt: skip
    wsi_ids = [row.wsi_id for row in data.rows]
    folds = folds_from_file(
        protocol.splits, wsi_ids, strata, data.groups, data.task.strata_names, unit=unit,
        stratum=data.task.stratum_words[0], allow_missing="missing" in data.allow, names=_names(data, protocol.splits),
    )  # fmt: skip
    for name, count in (("n_outer", len(folds)), ("n_inner", len(folds[0].inner))):
        value = getattr(protocol, name)
        if value not in (count, getattr(Protocol, name)):
            raise ConfigError(f"--{name} {value}: {protocol.splits} holds {count}; leave it out")
    unused = len(data) - len(np.unique(np.concatenate([fold.test for fold in folds])))
    if unused:
        log.warning("%s: %d of %d slides are tested by no fold", protocol.splits, unused, len(data))
    return folds


def _names(data: MILDataset, splits: Path) -> dict[str, list[str]]:
    """Return the bags that names in splits stand for: that of a patient for all slides, that of a slide for its bag. A
    name of both is a slide's, unless the splits are of patients.
    """
    is_of_slides = not is_of_cases(splits)
    by_case: dict[str, list[str]] = {}
    by_slide: dict[str, list[str]] = {}
    for row in data.slide_rows:
        bag = row.wsi_id if data.unit == "slide" else row.case_id
        by_case.setdefault(row.case_id, [])
        by_case[row.case_id] += [] if bag in by_case[row.case_id] else [bag]
        by_slide[row.wsi_id] = [bag]
    return by_case | by_slide if is_of_slides else by_slide | by_case


def check_operating_point(data: MILDataset, operating_point: str, folds: Sequence[OuterFold]) -> None:
    """Raise ConfigError for a wanted sensitivity or specificity that inner validation cannot place a threshold for."""
    point, names = OperatingPoint.of(operating_point), data.task.outputs
    if point.label is None:
        return
    if data.task.positive_output is None:
        raise ConfigError(f"--operating_point {point}: needs two classes, not {data.task.about}; leave it out")
    for fold in folds:
        validated = data.labels[np.concatenate([inner.val for inner in fold.inner])]
        count = int((validated == point.label).sum())
        if count < point.least_slides:
            raise ConfigError(
                f"--operating_point {point}: takes {plural(point.least_slides, 'slide')} of {names[point.label]} in "
                f"inner validation, outer fold {fold.number} has {count}; give a lower rate, or leave it out"
            )


def with_monitor(protocol: Protocol, task: Task) -> Protocol:
    """Return the protocol with the task's own monitor instead of "auto". Raise ConfigError for one that it lacks."""
    if protocol.monitor == "auto":
        return replace(protocol, monitor=task.default_monitor)  # type: ignore[arg-type]
    words = typing.get_args(Monitor)
    names = [name for name in ("slide_loss", *(f"slide_{metric}" for metric in task.main_metrics)) if name in words]
    if protocol.monitor not in names:
        own = ", ".join(name.removeprefix("slide_") for name in names)
        raise ConfigError(f"--monitor {monitored_metric(protocol.monitor)}: a {task.kind} has {own}; give one of those")
    return protocol


def changed_monitors(data: MILDataset, monitor: str, folds: Sequence[OuterFold]) -> dict[int, str]:
    """Return why the loss chooses instead of the `monitor`, by the number of each outer fold with an inner fold where
    it is undefined.
    """
    metric = monitored_metric(monitor)
    title = data.task.metric_titles.get(metric, metric.replace("_", " "))
    changed = {}
    for fold in folds:
        reasons = [data.task.why_undefined(metric, data.labels[inner.val]) for inner in fold.inner]
        if reason := next(filter(None, reasons), ""):
            changed[fold.number] = f"an inner fold {reason}, so the slide loss chooses instead of the {title}"
    return changed


def operating_point_entry(task: Task, operating_point: str) -> dict[str, str]:
    """Return the entry of `outputs.json` that says what thresholds were fitted for, if the task has thresholds."""
    return {"operating_point": operating_point} if "operating_point" in task.decision_figures else {}


def warn_of_folds(data: MILDataset, monitor: str, folds: Sequence[OuterFold]) -> None:
    """Warn if inner folds validate on too few patients, or cannot be compared by the `monitor`."""
    task = data.task
    few = few_patients(folds, task.strata(data.labels), data.cases, task.strata_names, task.stratum_words[0])
    if few:
        log.warning(few)
    for fold, text in changed_monitors(data, monitor, folds).items():
        log.warning("outer fold %d: %s", fold, text)


def kept_epoch(data: MILDataset, keep: Keep, folds: Sequence[OuterFold]) -> Literal["last", "best"]:
    """Return which epoch of each training is kept; "auto" is resolved by the slides of the smallest stratum (class) in
    the inner folds' validation.
    """
    if keep != "auto":
        return keep
    return "best" if _fewest_validated(data, folds) >= MANY_VALIDATED else "last"


def log_kept_epoch(
    data: MILDataset, keep: Keep, folds: Sequence[OuterFold], training: Training, settings: Sequence[Setting] = ()
) -> None:
    """Log it if each training keeps its last epoch because few slides validate, and if settings of training that choose
    another one are given in vain, as flags or in the `settings` of a grid.
    """
    if kept_epoch(data, keep, folds) == "best":
        return
    idle = [f"--{name}" for name in _CHOOSING if getattr(training, name) != getattr(Training, name)]
    idle += [f"--grid {name}" for name in _CHOOSING if any(name in setting.training for setting in settings)]
    if idle:
        flags = " and ".join(idle)
        log.warning("%s: nothing depends on it, as each training keeps its last epoch; give --keep best", flags)
    if keep == "auto":
        text = "inner folds validate on as few as %s of a %s, so each training keeps its last epoch (--keep auto)"
        log.info(text, plural(_fewest_validated(data, folds), "slide"), data.task.stratum_words[0])


def _fewest_validated(data: MILDataset, folds: Sequence[OuterFold]) -> int:
    """Return the fewest slides of a stratum (a class) in an inner fold's validation."""
    strata, count = data.task.strata(data.labels), len(data.task.strata_names)
    return min(int(np.bincount(strata[inner.val], minlength=count).min()) for fold in folds for inner in fold.inner)


def inner_jobs(
    data: MILDataset,
    protocol: Protocol,
    training: Training,
    settings: Sequence[Setting],
    folds: Sequence[OuterFold],
    standardized: Collection[int] = (),
) -> list[TrainingJob]:
    """Return the inner trainings; in the folds numbered `standardized`, the models standardise features."""
    changed = changed_monitors(data, protocol.monitor, folds)
    monitors = {fold.number: "slide_loss" if fold.number in changed else protocol.monitor for fold in folds}
    keep = kept_epoch(data, protocol.keep, folds)
    epochs = [with_setting(training, setting).epochs for setting in settings]
    return [
        TrainingJob(fold, number, inner, max_epochs, monitors[fold.number], fold.number in standardized, keep)
        for fold in folds
        for number, max_epochs in enumerate(epochs, start=1)
        for inner in range(1, len(fold.inner) + 1)
    ]


def with_setting(training: Training, setting: Setting) -> Training:
    """Return the settings of training, with those of a setting of the grid."""
    return replace(training, **setting.training)


def splits_content(data: MILDataset, folds: Sequence[OuterFold], seed: int) -> dict[str, Any]:
    """Return the content of `splits.json`."""

    def ids(slides: np.ndarray) -> list[str]:
        return [data.rows[slide].wsi_id for slide in slides.tolist()]

    return {
        "seed": seed,
        **({} if data.unit == "slide" else {"slides_of_cases": _slides_of_cases(data)}),
        "folds": [
            {
                "fold": fold.number,
                "repeat": fold.repeat,
                "test": ids(fold.test),
                "inner": [{"train": ids(inner.train), "val": ids(inner.val)} for inner in fold.inner],
            }
            for fold in folds
        ],
    }


def _slides_of_cases(data: MILDataset) -> dict[str, list[str]]:
    bags = zip(data.rows, data.slides_of, strict=True)
    return {row.case_id: [data.slide_rows[slide].wsi_id for slide in slides] for row, slides in bags}
