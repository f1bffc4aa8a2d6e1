"""The tasks there are, and the task of a record: of an `outputs.json`, a `scores.json` or a checkpoint."""

from collections.abc import Mapping
from typing import Any

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


def target_record(task: Task) -> dict[str, Any] | None:
    """Return what a checkpoint records of a task besides the names of its outputs; None for a classification."""
    return None if isinstance(task, Classification) else task.record
