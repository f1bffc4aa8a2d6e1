"""The tasks there are, and the task of a record: of an `outputs.json`, a `scores.json` or a checkpoint."""

from collections.abc import Mapping
from typing import Any

from utils.tasks.classification import Classification
from utils.tasks.task import Task

FIGURE_NAMES = Classification.figure_names  # of all tasks, in the folders of runs and of scored predictions


def task_of(record: Mapping[str, Any]) -> Task:
    """Return the task that a record names (see `Task.record`). Raise ValueError for one that cannot be."""
    return Classification(tuple(record["class_names"]))
