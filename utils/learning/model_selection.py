"""Choose the setting and the model of an outer fold by its inner validation; fit threshold and temperature there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.core.errors import TrainingError
from utils.core.runtime import log
from utils.learning.grid import Setting
from utils.learning.ranking import best_of, mean_rank, rank
from utils.learning.splits import OuterFold
from utils.learning.training import Diverged, Fitted
from utils.tasks.task import FittedFigures, Task


@dataclass(frozen=True)
class Choice:
    """What inner validation chose for an outer fold: the `setting` (from 1), its inner trainings, the index of the
    `best` one, what was fitted to their validation values (`Task.fit_on_validation`), and every setting's mean figures.
    """

    fold: OuterFold
    monitor: str
    setting: int
    fitted: list[Fitted]
    best: int
    fitted_to_values: FittedFigures
    scores: list[dict[str, Any]]
    history: list[dict[str, Any]]


def choose(
    task: Task,
    fold: OuterFold,
    monitor: str,
    settings: Sequence[Setting],
    trained: Sequence[Sequence[Fitted | Diverged]],
    history: list[dict[str, Any]],
    fit_on_validation: Callable[[Setting, np.ndarray, np.ndarray], FittedFigures],
) -> Choice:
    """Choose by `monitor` among the settings, given each one's inner trainings in the order of the inner folds; then
    `fit_on_validation` what the task fits to all slides of inner validation, given as indices, and their values.

    A setting with a training that diverged is not chosen, with a warning. Raises TrainingError if every setting has
    one.
    """
    finished = {index: fitted for index, inner in enumerate(trained) if len(fitted := _fitted(inner)) == len(inner)}
    diverged = {index: _first_reason(inner) for index, inner in enumerate(trained) if index not in finished}
    if not finished:
        raise TrainingError(f"{diverged[0]}; or leave this setting out of --grid")
    for reason in diverged.values():
        log.warning("%s; this setting is not chosen", reason)
    ranks = {
        index: mean_rank(task, [model.validation for model in fitted], monitor) for index, fitted in finished.items()
    }
    chosen = max(ranks, key=lambda index: ranks[index])
    models = finished[chosen]
    scores = []
    for index, setting in enumerate(settings):
        means = mean_validation(finished.get(index, models))
        if index in diverged:
            means = {"diverged": True, **dict.fromkeys(means)}
        scores.append({"setting": setting.values, **means})
    best = best_of([rank(task, model.validation, monitor) for model in models])
    # All inner validation slides, each predicted by the model that was not trained on it.
    slides = np.concatenate([inner.val for inner in fold.inner])
    values = np.concatenate([model.val_probabilities.numpy() for model in models])
    fitted = fit_on_validation(settings[chosen], slides, values)
    return Choice(fold, monitor, chosen + 1, models, best, fitted, scores, history)


def mean_validation(fitted: Sequence[Fitted]) -> dict[str, Any]:
    """Return the inner models' mean validation figures; None for one that is undefined for any of them."""
    means: dict[str, Any] = {}
    for name in fitted[0].validation:
        values = [value for model in fitted if (value := model.validation[name]) is not None]
        means[name] = float(np.mean(values)) if len(values) == len(fitted) else None
    return means


def _fitted(trainings: Sequence[Fitted | Diverged]) -> list[Fitted]:
    return [training for training in trainings if isinstance(training, Fitted)]


def _first_reason(trainings: Sequence[Fitted | Diverged]) -> str:
    return next(training.reason for training in trainings if isinstance(training, Diverged))
