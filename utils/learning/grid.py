"""Parse a grid of hyperparameters and list its settings, of which the inner loop chooses one."""

import ast
import dataclasses
import itertools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from MILS import ModelError, mil_kinds
from utils.core.errors import ConfigError, did_you_mean
from utils.core.settings import checked, converted, kinds_of
from utils.learning.settings import Model, Training


@dataclass(frozen=True)
class Setting:
    """One point of the grid: the hyperparameters of training and of the model that override the flags."""

    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        return self.training | self.model

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items())


def read_grid(text: str, model: str) -> dict[str, tuple[Any, ...]]:
    """Return the names and values in a text such as "lr=1e-4,3e-4 hidden_dim=128,256"; the values are not checked yet.

    Raises ConfigError for names that are no hyperparameters of training or of `model`.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    kinds = _kinds(model)
    for item in text.split():
        name, equals, values = item.partition("=")
        if not equals or not name or name in grid:
            raise ConfigError(
                f'--grid {item}: not understood; write each name once, as in "lr=1e-4,3e-4 dropout=0,0.25"'
            )
        _check_name(name, kinds, model)
        grid[name] = tuple(_value(value, kinds[name]) for value in values.split(","))
    if not grid:
        raise ConfigError('--grid: empty; write names and values, as in "lr=1e-4,3e-4 dropout=0,0.25"')
    return grid


def model_arguments(texts: Sequence[str], model: str) -> dict[str, Any]:
    """Return the hyperparameters of `model` in texts such as "hidden=64". Raises ConfigError for a text without a name,
    and for a value of another type than the model's signature says; the model itself checks the names.
    """
    try:
        kinds = mil_kinds(model)
    except ModelError as error:
        raise ConfigError(f"--mil {model}: {error}") from error
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in arguments:
            raise ConfigError(f"--mil_args {text}: not understood; write each name once, as in hidden=64 dropout=0.25")
        kind = kinds.get(name, object)
        arguments[name] = _checked(name, _value(value, kind), kind, "--mil_args")
    return arguments


def grid_settings(grid: Mapping[str, Any], model: str) -> list[Setting]:
    """Return every combination of the grid's values, those of the last name varying fastest; one empty setting for no
    grid. Values are checked like those of flags.
    """
    if not isinstance(grid, Mapping):
        raise ConfigError(f'--grid {grid!r}: expected names and values, such as {{"lr": [1e-4, 3e-4]}}')
    if not grid:
        return [Setting()]
    kinds, valid = _kinds(model), {}
    for name, values in grid.items():
        _check_name(name, kinds, model)
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ConfigError(f"--grid {name}: give a list of values, at least one; found {values!r}")
        valid[name] = [_checked(name, value, kinds[name]) for value in values]
        if len(set(map(repr, valid[name]))) < len(values):
            raise ConfigError(f"--grid {name}: give each value once; found {list(values)}")
    training_kinds = _training_kinds()
    settings = []
    for combination in itertools.product(*valid.values()):
        values = dict(zip(valid, combination, strict=True))
        training = {name: value for name, value in values.items() if name in training_kinds}
        settings.append(Setting(training, {name: value for name, value in values.items() if name not in training}))
    return settings


def _training_kinds() -> dict[str, type]:
    """Return the type of each number among the settings of training."""
    # int | "auto" counts as int.
    kinds = {name: (typing.get_args(kind) or (kind,))[0] for name, kind in kinds_of(Training).items()}
    return {name: kind for name, kind in kinds.items() if kind in (int, float)}


def _kinds(model: str) -> dict[str, type]:
    """Return the type of each hyperparameter."""
    return _training_kinds() | mil_kinds(model)


def _check_name(name: str, kinds: Mapping[str, type], model: str) -> None:
    if name not in kinds:
        near = did_you_mean(name, kinds)
        raise ConfigError(
            f"--grid {name}: no hyperparameter of training or {model}; these are: {', '.join(kinds)}{near}"
        )


def _checked(name: str, value: Any, kind: Any, flag: str = "--grid") -> Any:
    """Return a value as its type, `object` for any; if a flag has the name, check it against the flag's limits."""
    if kind is object:
        return value
    try:
        value = converted(kind, value)
    except ValueError as error:
        raise ConfigError(f"{flag} {name}={value!r}: expected {error}") from None
    for config in (Training, Model):
        for setting in dataclasses.fields(config):
            if setting.name == name:
                checked(setting, kind, value, f"{flag} {name}=")
    return value


def _value(text: str, kind: Any) -> Any:
    """Return a grid's text as a value of its type, or as Python would read it if any type will do; other text as it is,
    which `_checked` refuses unless text is expected.
    """
    words = {"true": True, "false": False, "none": None}
    try:
        if kind is bool:
            return words[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        return words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, KeyError, SyntaxError):
        return text
