"""The tasks there are, and the task of a record: of an `outputs.json`, a `scores.json` or a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from utils.tasks.classification import Classification
from utils.tasks.multilabel import Multilabel
from utils.tasks.ordinal import Ordinal
from utils.tasks.regression import Regression
from utils.tasks.survival import Survival
from utils.tasks.task import Task

_TASKS: Mapping[str, type[Task]] = {
    task.kind: task for task in (Classification, Regression, Survival, Ordinal, Multilabel)
}
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


def new_task(kind: str, fields: Mapping[str, str | tuple[str, ...]]) -> Task:
    """Return a task of a kind with these `fields`. Raise ValueError for what cannot be predicted."""
    return _TASKS[kind](**fields)


@dataclass(frozen=True)
class Answer:
    """The answer in a slide's record, as `Task.answer` writes it: its text; the values by output, the calibrated ones,
    and those of each of several models with their standard deviation.
    """

    task: Task
    predicted: str
    values: Mapping[str, float]
    calibrated: Mapping[str, float] | None
    members: Sequence[Mapping[str, float]]
    spread: Mapping[str, float] | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Read a record. Raise KeyError, TypeError or ValueError if it has no answer."""
        task = task_of(record)
        return cls(
            task,
            record[task.predicted_key],
            record[task.values_key],
            record.get(f"calibrated_{task.values_key}"),
            record.get(f"member_{task.values_key}") or [],
            record.get("spread"),
        )

    @property
    def output(self) -> str:
        """The name of the output that the answer is about, such as the decided class."""
        return self.task.outputs[self._decided(self.values)]

    @property
    def signal(self) -> str:
        """The name of the signal that argues for that output."""
        return self.task.signal_names[self.task.signal_about(self._decided(self.values))]

    @property
    def agreeing(self) -> int:
        """How many of several models say by themselves what they say together."""
        return sum(self.task.outputs[self._decided(member)] == self.output for member in self.members)

    @property
    def marked(self) -> tuple[str, ...]:
        """The names of the values that are the answer, as bars mark them."""
        return self.task.marked(np.array([self.values[name] for name in self.task.outputs]))

    def _decided(self, values: Mapping[str, float]) -> int:
        return int(self.task.decide(np.array([values[name] for name in self.task.outputs])))


def target_record(task: Task) -> dict[str, Any] | None:
    """Return what a checkpoint records of a task besides the names of its outputs; None for a classification."""
    return None if isinstance(task, Classification) else task.record
