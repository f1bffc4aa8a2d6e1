"""The files of a cohort, and how a slide is fed to a model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.errors import ConfigError
from utils.core.settings import REQUIRED, Settings, option

if TYPE_CHECKING:
    from utils.tasks.task import Task

Unit = Literal["slide", "case"]  # what a bag is: one slide, or all slides of a patient
TaskKind = Literal["classification", "regression", "survival", "ordinal", "multilabel"]
BatchSize = int | Literal["auto"]
CHUNK_SIZE = 1000  # patches in a chunk at most, by default
# The flags of each task but classification; the columns of those that may be left out; those that list names, separated
# by commas; what they take.
_TASK_FLAGS: Mapping[TaskKind, tuple[str, ...]] = {
    "regression": ("target_column",),
    "survival": ("time_column", "event_column"),
    "ordinal": ("target_column", "order"),
    "multilabel": ("target_columns",),
}
_DEFAULT_COLUMNS = {"time_column": "time", "event_column": "event"}
_LISTS = "order", "target_columns"
_ARE_TAKEN = {"order": "the grades, the lowest first", "target_columns": "columns of the label table"}


def batch_size_option() -> Any:
    """Return the field of a settings class for the chunks per training step."""
    return option("auto", "chunks (or whole slides) per step; auto: 128, or fewer for 8 steps per epoch", least=1)


@dataclass(frozen=True, kw_only=True)
class CohortFiles(Settings):
    """Where a cohort's slides and labels are."""

    features_dir: Path | None = option(None, "folder of feature files (default: datasets/<dataset>/features)")
    labels_csv: Path | None = option(None, "table case_id,wsi_id,label (default: datasets/<dataset>/labels.csv)")
    class_names: tuple[str, ...] | None = option(
        None,
        "classes in order, the positive one last (default: those of a public cohort, else the labels: sorted, of two "
        "the rarer one last)",
        metavar="NAME",
    )
    task: TaskKind = option(
        "classification",
        "what is predicted: a class, a number (--target_column), the time to an event (--time_column, "
        "--event_column), a grade (--target_column, --order), or several labels (--target_columns)",
    )
    target_column: str | None = option(None, "column of the number or the grade that is predicted", metavar="COLUMN")
    order: str | None = option(None, "grades from the lowest to the highest, such as low,mid,high", metavar="A,B,C")
    target_columns: str | None = option(
        None, "columns of labels, each 1 or 0, or empty where it is unknown, such as EGFR,KRAS", metavar="A,B,C"
    )
    time_column: str | None = option(
        None,
        "column of the time until the event or the end of follow-up, in any unit (default: time)",
        metavar="COLUMN",
    )
    event_column: str | None = option(
        None,
        "column that says whether the event occurred at that time (1) or not until then (0) (default: event)",
        metavar="COLUMN",
    )
    feat_type: str = option("features", "name of the features inside each file")
    no_patients: bool = option(False, "treat each slide as a patient of its own if the table names no patients")
    allow: tuple[Literal["missing", "unknown", "duplicate", "spelling"], ...] = option(
        (),
        "leave out rows without a feature file (missing), without a label or target that can be used (unknown), or "
        "with a repeated wsi_id (duplicate); treat patients whose names hardly differ as different (spelling)",
    )
    group_column: str | None = option(
        None,
        "column whose groups are never split, such as site (default: the patient; site is read from TCGA barcodes)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        own = _TASK_FLAGS.get(self.task, ())
        for name in dict.fromkeys(itertools.chain(*_TASK_FLAGS.values())):
            value = getattr(self, name)
            if value is not None and name not in own:
                kinds = " or ".join(kind for kind, flags in _TASK_FLAGS.items() if name in flags)
                raise ConfigError(f"--{name} {value}: goes with --task {kinds}; give that, or leave it out")
            if value is None and name in own and name not in _DEFAULT_COLUMNS:
                what = _ARE_TAKEN.get(name, "a column of the label table")
                raise ConfigError(f"--task {self.task}: give --{name}, {what}")
        if self.class_names is not None and self.task != "classification":
            raise ConfigError(f"--class_names {' '.join(self.class_names)}: a {self.task} has no classes; leave it out")

    def other_task(self) -> Task | None:
        """Return the task, None for a classification, whose classes are known with the label table only."""
        if self.task not in _TASK_FLAGS:
            return None
        given = {name: getattr(self, name) for name in _TASK_FLAGS[self.task]}
        flags = {name: _DEFAULT_COLUMNS[name] if value is None else value for name, value in given.items()}
        from utils.tasks.records import new_task

        lists = {name: names_in(name, text) for name, text in flags.items() if name in _LISTS}
        try:
            return new_task(self.task, flags | lists)
        except ValueError as error:
            raise ConfigError(f"--task {self.task}: {error}") from None


def names_in(flag: str, text: str) -> tuple[str, ...]:
    """Return the names in a flag, which commas separate. Raise ConfigError for an empty one."""
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise ConfigError(f"--{flag} {text}: a name is empty; separate the names by one comma each, as in A,B,C")
    return names


@dataclass(frozen=True, kw_only=True)
class Cohort(CohortFiles):
    """The slides, their labels, and how a slide is fed to a model."""

    dataset: str = option(
        REQUIRED, "name of the cohort; names the default folders datasets/<name> and outputs/<mil>/<name>"
    )
    positive_class: str | None = option(
        None,
        "of two classes the positive one, whose AUC, average precision and threshold are given (default: the last of "
        "--class_names or of a public cohort, else the rarer one)",
        metavar="NAME",
    )
    unit: Unit = option(
        "slide", "what has a label and an answer, and is a bag of patches: a slide, or all slides of a patient (case)"
    )
    mode: Literal["chunked", "full"] = option("chunked", "train on chunks of a slide, or on whole slides")
    chunk_size: int = option(CHUNK_SIZE, "most patches in a chunk", least=1)
    sequential: bool = option(False, "make chunks of consecutive patches in the file, not of random ones")
    cache: str | None = option(
        None,
        "off, ram, or a folder for one packed file that all runs share "
        "(default: ram if the cohort fits in a quarter of the free memory, else off)",
        metavar="off|ram|DIR",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_class is not None and self.task != "classification":
            raise ConfigError(f"--positive_class {self.positive_class}: a {self.task} has no classes; leave it out")
        if self.sequential and self.mode == "full":
            raise ConfigError("--sequential: whole slides are not cut; leave it out, or give --mode chunked")
