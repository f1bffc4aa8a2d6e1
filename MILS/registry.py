"""The models by name: list them and their hyperparameters, and build one.

    model = build_mil("LiteMIL", input_dim=1024, num_classes=2, num_queries=4)
    again = build_mil(**model.spec)

A model's hyperparameters are the keyword-only arguments of its class, with the defaults written there: the signature
is the only place that holds them.
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from MILS.bag_model import BagModel, ModelError, class_options

MODELS: dict[str, type[BagModel]] = {}
_ALIASES = {"MADMIL": "ABMIL_Multihead"}

ModelClass = TypeVar("ModelClass", bound=type[BagModel])


def register_mil(cls: ModelClass) -> ModelClass:
    """Register the class `cls` under its own name; a class decorator."""
    MODELS[cls.__name__] = cls
    return cls


def list_mils() -> list[str]:
    """Return the names of the models, in order of registration."""
    return list(MODELS)


def mil_name(name: str) -> str:
    """Return the registered name for `name`, which may be an alias. Raises ModelError if there is none."""
    name = _ALIASES.get(name, name)
    if name in MODELS:
        return name
    by_lower = {registered.lower(): registered for registered in [*MODELS, *_ALIASES]}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f"; did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
    raise ModelError(f"unknown model {name!r}, expected one of {', '.join(MODELS)}{hint}")


def mil_options(name: str) -> dict[str, Any]:
    """Return the hyperparameters of the model `name` and their defaults. Raises ModelError for an unknown name."""
    return class_options(MODELS[mil_name(name)])


def build_mil(name: str, *, input_dim: int, num_classes: int, **hyperparameters: Any) -> BagModel:
    """Build a freshly initialised model.

    Arguments
        name: one of `list_mils()`, or an alias.
        input_dim: length D of an instance's feature vector.
        num_classes: number C of classes, or of other outputs.
        hyperparameters: any of `mil_options(name)`; the others have the model's defaults.

    Raises ModelError for an unknown name, an unknown hyperparameter, or a value that does not fit.
    """
    name = mil_name(name)
    options = class_options(MODELS[name])
    unknown = [key for key in hyperparameters if key not in options]
    if unknown:
        raise ModelError(f"{name} has no hyperparameter {', '.join(unknown)}; it takes {', '.join(options)}")
    return MODELS[name](input_dim, num_classes, **hyperparameters)
