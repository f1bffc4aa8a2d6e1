"""The models by name: which there are, which hyperparameters each takes, and how to build one.

    model = build_mil("LiteMIL", input_dim=1024, num_classes=2, num_queries=4)
    again = build_mil(**model.spec)

A model's hyperparameters are the keyword-only arguments of its class, with the defaults written there: the signature
is the only place that holds them.
"""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from MILS.pooling import BagModel

_MILS: dict[str, type[BagModel]] = {}
_ALIASES = {"MADMIL": "ABMIL_Multihead"}

ModelClass = TypeVar("ModelClass", bound="type[BagModel]")


class ModelError(ValueError):
    """A model, a hyperparameter or a bag that cannot be used; the message says what would do."""


def register_mil(cls: ModelClass) -> ModelClass:
    """Class decorator: make `cls` known under its own name."""
    _MILS[cls.__name__] = cls
    return cls


def list_mils() -> list[str]:
    """Names of the models, in order of registration."""
    return list(_MILS)


def mil_name(name: str) -> str:
    """The registered name behind `name`, which may be an alias. Raises ModelError if there is none."""
    name = _ALIASES.get(name, name)
    if name in _MILS:
        return name
    by_lower = {known.lower(): known for known in [*_MILS, *_ALIASES]}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f"; did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
    raise ModelError(f"unknown model {name!r}, expected one of {', '.join(_MILS)}{hint}")


def class_options(cls: type[BagModel]) -> dict[str, Any]:
    """Hyperparameters of a model class and their defaults."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def mil_options(name: str) -> dict[str, Any]:
    """Hyperparameters of the model `name` and their defaults. Raises ModelError for an unknown name."""
    return class_options(_MILS[mil_name(name)])


def build_mil(name: str, *, input_dim: int, num_classes: int, **hyperparameters: Any) -> BagModel:
    """A freshly initialised model.

    Arguments
        name: one of `list_mils()`, or an alias.
        input_dim: length D of an instance's feature vector.
        num_classes: number C of classes, at least 2.
        hyperparameters: any of `mil_options(name)`; those left out take the model's own defaults.

    Raises ModelError for an unknown name, an unknown hyperparameter, or a value that does not fit.
    """
    name = mil_name(name)
    known = class_options(_MILS[name])
    unknown = [key for key in hyperparameters if key not in known]
    if unknown:
        raise ModelError(f"{name} has no hyperparameter {', '.join(unknown)}; it takes {', '.join(known)}")
    return _MILS[name](input_dim, num_classes, **hyperparameters)


def check_options(cls: type[BagModel], values: dict[str, Any]) -> None:
    """Check hyperparameters against the kind of their defaults: whole numbers are sizes, floats are probabilities."""
    missing = [key for key in class_options(cls) if key not in values]
    if missing:
        raise ModelError(f"{cls.__name__}: hand {', '.join(missing)} to super().__init__, which remembers them")
    for key, default in class_options(cls).items():
        value = values[key]
        if isinstance(default, bool):
            fits, expected = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            fits, expected = is_whole(value) and value >= 1, "a whole number of at least 1"
        else:
            fits, expected = isinstance(value, (int, float)) and 0 <= value < 1, "in [0, 1)"
        if not fits:
            raise ModelError(f"{cls.__name__}: {key} must be {expected}, got {value!r}")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
