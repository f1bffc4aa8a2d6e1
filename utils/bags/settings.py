"""The files of a cohort, and how a slide is fed to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.errors import ConfigError
from utils.core.settings import REQUIRED, Settings, option

if TYPE_CHECKING:
    from utils.tasks.task import Task

TaskKind = Literal["classification", "regression", "survival"]
BatchSize = int | Literal["auto"]
CHUNK_SIZE = 1000  # patches in a chunk at most, by default
# The flags that name the columns of a task.
_COLUMN_FLAGS = {"target_column": "regression", "time_column": "survival", "event_column": "survival"}
_DEFAULT_COLUMNS = {"time_column": "time", "event_column": "event"}


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
        "what is predicted: a class, a number (--target_column), or the time to an event (--time_column, "
        "--event_column)",
    )
    target_column: str | None = option(None, "column of the number that a regression predicts", metavar="COLUMN")
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
        "leave out rows without a feature file (missing), with a label that is no class (unknown), or with a repeated "
        "wsi_id (duplicate); treat patients whose names hardly differ as different (spelling)",
    )
    group_column: str | None = option(
        None,
        "column whose groups are never split, such as site (default: the patient; site is read from TCGA barcodes)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in _COLUMN_FLAGS.items():
            value = getattr(self, name)
            if value is not None and self.task != kind:
                raise ConfigError(f"--{name} {value}: goes with --task {kind}; give that, or leave it out")
            if value is None and self.task == kind and name not in _DEFAULT_COLUMNS:
                raise ConfigError(f"--task {kind}: give --{name}, a column of the label table")
        if self.class_names is not None and self.task != "classification":
            raise ConfigError(f"--class_names {' '.join(self.class_names)}: a {self.task} has no classes; leave it out")

    def other_task(self) -> Task | None:
        """Return the task, None for a classification, whose classes are known with the label table only."""
        names = [name for name, kind in _COLUMN_FLAGS.items() if kind == self.task]
        columns = {name: getattr(self, name) or _DEFAULT_COLUMNS[name] for name in names}
        if not columns:
            return None
        from utils.tasks.records import new_task

        return new_task(self.task, columns)


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
