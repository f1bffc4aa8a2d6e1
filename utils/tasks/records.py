"""The tasks there are, and the task of a record: of an `outputs.json`, a `scores.json` or a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from utils.tasks.classification import Classification
from utils.tasks.regression import Regression
from utils.tasks.survival import Survival
from utils.tasks.task import Task

_TASKS: Mapping[str, type[Task]] = {task.kind: task for task in (Classification, Regression, Survival)}
# Of all tasks, in the folders of runs and of scored predictions.
FIGURE_NAMES = tuple(dict.fromkeys(name for task in _TASKS.values() for name in task.figure_names))


def task_of(record: Mapping[str, Any]) -> Task:
    """Return the task that a record names (see `Task.record`), a slide's record too (see `Task.answer`).

    Raise KeyError, TypeError or ValueError for one that cannot be.
    """
    about = record.get("task")
    if isinstance(about, Mapping):
        return task_of(about)
    if about is None:
        return Classification(tuple(record["class_names"] if "class_names" in record else record["probabilities"]))
    return _TASKS[about].of_record(record)


def new_task(kind: str, columns: Mapping[str, str]) -> Task:
    """Return a task of a kind whose target is in these columns, by the names of its fields."""
    return _TASKS[kind](**columns)


@dataclass(frozen=True)
class Answer:
    """The answer in a slide's record, as `Task.answer` writes it: its text; the values by output, the calibrated ones,
    and those of each of several models with their standard deviation; and the name of the signal it is about.
    """

    task: Task
    predicted: str
    values: Mapping[str, float]
    calibrated: Mapping[str, float] | None
    members: Sequence[Mapping[str, float]]
    spread: Mapping[str, float] | None
    signal: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Read a record. Raise KeyError, TypeError or ValueError if it has no answer."""
        task = task_of(record)
        is_classified = "probabilities" in record
        predicted = record["predicted_class" if is_classified else "predicted"]
        return cls(
            task,
            predicted,
            record["probabilities" if is_classified else "values"],
            record.get("calibrated_probabilities"),
            record.get("member_probabilities" if is_classified else "member_values") or [],
            record.get("spread"),
            predicted if is_classified else task.signal_names[0],
        )


def target_record(task: Task) -> dict[str, Any] | None:
    """Return what a checkpoint records of a task besides the names of its outputs; None for a classification."""
    return None if isinstance(task, Classification) else task.record
