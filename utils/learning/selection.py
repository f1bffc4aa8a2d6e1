"""What the inner loop chooses: the setting of a grid, by its mean inner validation, and a decision threshold.

A validation is the dict that `training.validate` gives: `val_loss`, `val_auc` and so on.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from MILS import mil_options
from utils.core.config import Training
from utils.core.errors import ConfigError, TrainingError

_EXPECTED = {int: "a whole number", bool: "true or false"}
Validation = Mapping[str, float | None]
Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Setting:
    """One point of the grid: the hyperparameters of training and of the model that take the place of the given ones."""

    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        return self.training | self.model

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items())


def read_grid(text: str, model: str) -> dict[str, tuple[Any, ...]]:
    """ "lr=1e-4,3e-4 hidden_dim=128,256" as names and values. Raises ConfigError for what `model` has no grid of."""
    grid: dict[str, tuple[Any, ...]] = {}
    kinds = _kinds(model)
    for part in text.split():
        name, equals, listed = part.partition("=")
        if not equals or not name or name in grid:
            raise ConfigError(
                f'--grid {part}: not understood; write each name once, as in "lr=1e-4,3e-4 dropout=0,0.25"'
            )
        _check_name(name, kinds, model)
        grid[name] = tuple(_value(name, value, kinds[name]) for value in listed.split(","))
    if not grid:
        raise ConfigError('--grid: empty; write names and values, as in "lr=1e-4,3e-4 dropout=0,0.25"')
    return grid


def grid_settings(grid: Grid, model: str) -> list[Setting]:
    """Every combination of the grid's values, the last name's moving fastest; one empty setting without a grid."""
    if not grid:
        return [Setting()]
    kinds = _kinds(model)
    for name, values in grid.items():
        _check_name(name, kinds, model)
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ConfigError(f"--grid {name}: give a list of values, at least one; found {values!r}")
        for value in values:
            _check_kind(name, value, kinds[name])
        if len(set(values)) < len(values):
            raise ConfigError(f"--grid {name}: give each value once; found {list(values)}")
    of_training = _training_names()
    settings = []
    for combination in itertools.product(*grid.values()):
        chosen = dict(zip(grid, combination, strict=True))
        training = {name: value for name, value in chosen.items() if name in of_training}
        settings.append(Setting(training, {name: value for name, value in chosen.items() if name not in of_training}))
    return settings


def rank(validation: Validation, monitor: str) -> tuple[float, ...]:
    """What epochs and models are compared by; greater is better, ties are decided by the slide loss."""
    loss = validation["val_loss"]
    assert loss is not None  # noqa: S101 - for the type checker: only the AUC can be undefined
    if monitor == "slide_loss":
        return (-loss,)
    score = validation[monitor.replace("slide_", "val_")]
    if score is None:
        raise TrainingError(f"{monitor} is undefined for the validation slides; choose by --monitor slide_loss")
    return (score, -loss)


def mean_rank(validations: Sequence[Validation], monitor: str) -> tuple[float, ...]:
    """What settings are compared by: the mean over the inner folds of what their models are compared by."""
    return tuple(
        math.fsum(part) / len(validations) for part in zip(*[rank(one, monitor) for one in validations], strict=True)
    )


def best_of(ranks: Sequence[tuple[float, ...]]) -> int:
    """The index of the greatest, the first among equals."""
    return max(range(len(ranks)), key=lambda index: ranks[index])


def refit_epochs(epochs: Sequence[int]) -> int:
    """The median of the inner models' best epochs, rounded up where it falls between two."""
    return math.ceil(float(np.median(epochs)))


def _training_names() -> dict[str, type]:
    hints = typing.get_type_hints(Training)
    fields = [part.name for part in dataclasses.fields(Training)]
    kinds = {name: (typing.get_args(hints[name]) or (hints[name],))[0] for name in fields}  # of int | "auto", int
    return {name: kind for name, kind in kinds.items() if kind in (int, float)}


def _kinds(model: str) -> dict[str, type]:
    """Each hyperparameter's type."""
    return _training_names() | {name: type(default) for name, default in mil_options(model).items()}


def _check_name(name: str, kinds: Mapping[str, type], model: str) -> None:
    if name not in kinds:
        raise ConfigError(f"--grid {name}: no hyperparameter of training or {model}; these are: {', '.join(kinds)}")


def _check_kind(name: str, value: Any, kind: type) -> None:
    fits = (int, float) if kind is float else kind
    if not isinstance(value, fits) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"--grid {name}={value!r}: not {_EXPECTED.get(kind, 'a number')}")


def _value(name: str, text: str, kind: type) -> Any:
    truths = {"true": True, "false": False}
    try:
        return truths[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as failure:
        raise ConfigError(f"--grid {name}={text}: not {_EXPECTED.get(kind, 'a number')}") from failure
