"""What the inner trainings of an outer fold decide: setting, model, decision threshold and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.core.errors import TrainingError
from utils.core.runtime import log
from utils.learning.grid import Setting
from utils.learning.ranking import best_of, mean_rank, rank
from utils.learning.splits import OuterFold
from utils.learning.training import Diverged, Fitted
from utils.tasks.task import Task


@dataclass(frozen=True)
class Choice:
    """What inner validation chose for an outer fold: the setting (from 1), its inner models, the best of them, what was
    fitted to their values (see `Task.fit_inner`), and every setting's scores.
    """

    fold: OuterFold
    monitor: str
    setting: int
    fitted: list[Fitted]
    best: int
    fitted_to_values: dict[str, float | None]
    scores: list[dict[str, Any]]
    history: list[dict[str, Any]]


def choose(
    task: Task,
    fold: OuterFold,
    monitor: str,
    settings: Sequence[Setting],
    trained: Sequence[Sequence[Fitted | Diverged]],
    labels: np.ndarray,
    history: list[dict[str, Any]],
) -> Choice:
    """Choose by `monitor` among the settings, each with its inner trainings in the order of the inner folds; `labels`
    are the cohort's. A setting of which a training diverged is not chosen, which is said. Raises TrainingError where
    that is every setting.
    """
    finished = {index: fitted for index, inner in enumerate(trained) if (fitted := _all_fitted(inner))}
    lost = {index: _first_diverged(inner) for index, inner in enumerate(trained) if index not in finished}
    if not finished:
        raise TrainingError(f"{lost[0]}; or leave this setting out of --grid")
    for reason in lost.values():
        log.warning("%s; this setting is not chosen", reason)
    setting = max(finished, key=lambda index: mean_rank([one.validation for one in finished[index]], monitor))
    chosen = finished[setting]
    scores = []
    for index, one in enumerate(settings):
        means = mean_validation(finished.get(index, chosen))
        if index in lost:
            means = {"diverged": True, **dict.fromkeys(means)}
        scores.append({"setting": one.values, **means})
    best = best_of([rank(one.validation, monitor) for one in chosen])
    # All inner validation slides, each as the model that left it out saw it.
    held_back = labels[np.concatenate([inner.val for inner in fold.inner])]
    values = np.concatenate([one.val_probabilities.numpy() for one in chosen])
    return Choice(fold, monitor, setting + 1, chosen, best, task.fit_inner(held_back, values), scores, history)


def mean_validation(fitted: Sequence[Fitted]) -> dict[str, Any]:
    """The inner models' mean validation figures; None where one of them is undefined."""
    means: dict[str, Any] = {}
    for name in fitted[0].validation:
        values = [value for one in fitted if (value := one.validation[name]) is not None]
        means[name] = float(np.mean(values)) if len(values) == len(fitted) else None
    return means


def _all_fitted(inner: Sequence[Fitted | Diverged]) -> list[Fitted]:
    """Return the trainings of a setting; none where one of them diverged."""
    fitted = [one for one in inner if isinstance(one, Fitted)]
    return fitted if len(fitted) == len(inner) else []


def _first_diverged(inner: Sequence[Fitted | Diverged]) -> str:
    return next(one.reason for one in inner if isinstance(one, Diverged))
