"""Rank epochs, settings and models by their validation: the `val_loss`, `val_auc`, ... of `training.validate`."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from utils.core.errors import TrainingError
from utils.tasks.task import Task

Validation = Mapping[str, float | None]


def rank(task: Task, validation: Validation, monitor: str) -> tuple[float, ...]:
    """Return the rank of an epoch or a model; greater is better, the slide loss breaks ties."""
    loss = validation["val_loss"]
    assert loss is not None  # noqa: S101 - for the type checker: only the AUC can be undefined
    if monitor == "slide_loss":
        return (-loss,)
    metric = monitored_metric(monitor)
    score = validation[f"val_{metric}"]
    if score is None:
        raise TrainingError(f"{monitor} is undefined for the validation slides; choose by --monitor slide_loss")
    return (-score if metric in task.lower_is_better else score, -loss)


def monitored_metric(monitor: str) -> str:
    """Return the name of the metric that a `--monitor` names: "auc" for "slide_auc"."""
    return monitor.removeprefix("slide_")


def mean_rank(task: Task, validations: Sequence[Validation], monitor: str) -> tuple[float, ...]:
    """Return the rank of a setting: the mean of its models' ranks over the inner folds."""
    ranks = [rank(task, validation, monitor) for validation in validations]
    return tuple(math.fsum(values) / len(ranks) for values in zip(*ranks, strict=True))


def best_of(ranks: Sequence[tuple[float, ...]]) -> int:
    """Return the index of the greatest rank, the first of equal ones."""
    return max(range(len(ranks)), key=lambda index: ranks[index])


def refit_epochs(epochs: Sequence[int]) -> int:
    """Return the median of the inner models' best epochs, rounded up."""
    return math.ceil(float(np.median(epochs)))
