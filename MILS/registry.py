"""The models by name: list them and their hyperparameters, and build one.

    model = build_mil("LiteMIL", input_dim=1024, num_classes=2, num_queries=4)
    again = build_mil(**model.spec)

A model's hyperparameters are the keyword-only arguments of its class, with the defaults written there: the signature
is the only place that holds them.

Other people's models are named by `use_mil`: `use_mil("my_model.py:Net")` runs that file, and returns the name by which
the functions here then know the model.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from MILS import own_code
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
    if name in MODELS or own_code.by_name(name) is not None:
        return name
    by_lower = {registered.lower(): registered for registered in [*MODELS, *_ALIASES]}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f"; did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
    raise ModelError(f"unknown model {name!r}, expected one of {', '.join(MODELS)}{hint}")


def mil_options(name: str) -> dict[str, Any]:
    """Return the hyperparameters of the model `name` and their defaults. Raises ModelError for an unknown name."""
    name = mil_name(name)
    return class_options(MODELS[name]) if name in MODELS else _own(name).options


def mil_kinds(name: str) -> dict[str, Any]:
    """Return the types of the hyperparameters of the model `name`, `object` for any. Raises ModelError."""
    name = mil_name(name)
    if name in MODELS:
        return {option: type(default) for option, default in class_options(MODELS[name]).items()}
    return {option: _own(name).kind(option) for option in _own(name).options}


def use_mil(mil: str | Callable[..., nn.Module]) -> str:
    """Return the name of the model that `mil` names, for `build_mil`.

    `mil` is a name or an alias, `path/to/file.py:Class` or `package.module:Class`, whose code is run, or a class of any
    `nn.Module` or a function that makes one. Raises ModelError.
    """
    if isinstance(mil, str):
        return own_code.load(mil).name if ":" in mil else mil_name(mil)
    maker = _bound(mil).func
    return maker.__name__ if isinstance(maker, type) and _is_ours(maker) else own_code.of_maker(maker).name


def mil_factory(
    mil: str | Callable[..., nn.Module], *, input_dim: int, num_classes: int, **hyperparameters: Any
) -> Callable[[], BagModel]:
    """Return a function that makes a fresh model at every call, as `build_mil`. It can be sent to other processes,
    which then know other people's code as well. `mil` is as for `use_mil`.
    """
    name = use_mil(mil)
    own = None if name in MODELS else _own(name)
    if own is not None:
        return functools.partial(own, input_dim, num_classes, **hyperparameters)
    return functools.partial(build_mil, name, input_dim=input_dim, num_classes=num_classes, **hyperparameters)


def factory_of(make: Callable[..., Any], input_dim: int, num_classes: int) -> Callable[[], Any]:
    """Return a factory of bag models for a class or a function of other people's modules; a function that makes bag
    models as it is. The class may be in a `functools.partial` that gives its hyperparameters. Raises ModelError.
    """
    if not makes_others(make):
        return make
    bound = _bound(make)
    own = own_code.of_maker(bound.func)
    given = inspect.signature(bound.func).bind_partial(*bound.args, **bound.keywords).arguments
    return functools.partial(own, input_dim, num_classes, **own.without_filled(given, input_dim, num_classes))


def makes_others(make: Callable[..., Any]) -> bool:
    """Return whether a class or function makes models by other people's code, not one that is registered."""
    maker = _bound(make).func
    if isinstance(maker, own_code.OwnCode):
        return False
    if isinstance(maker, type):
        return issubclass(maker, nn.Module) and not _is_ours(maker)
    try:
        inspect.signature(make).bind()
    except TypeError:
        return True  # it takes the width, which our factories know
    made = make()
    return isinstance(made, nn.Module) and not isinstance(made, BagModel)


def _bound(make: Callable[..., Any]) -> functools.partial[Any]:
    return make if isinstance(make, functools.partial) else functools.partial(make)


def _is_ours(cls: type) -> bool:
    return MODELS.get(cls.__name__) is cls


def _own(name: str) -> own_code.OwnCode:
    own = own_code.by_name(name)
    assert own is not None  # noqa: S101 - for the type checker: `mil_name` knows it
    return own


def build_mil(
    name: str, *, input_dim: int, num_classes: int, code: str = "", digest: str = "", **hyperparameters: Any
) -> BagModel:
    """Build a freshly initialised model.

    Arguments
        name: one of `list_mils()`, or an alias.
        input_dim: length D of an instance's feature vector.
        num_classes: number C of classes, or of other outputs.
        code, digest: in the spec of other people's model, which code made it. It is not run because a spec names it:
            the user has to have named it by `use_mil`.
        hyperparameters: any of `mil_options(name)`; the others have the model's defaults.

    Raises ModelError for an unknown name, an unknown hyperparameter, or a value that does not fit; CodeError for code
    that was not named, or has changed.
    """
    if code:
        return own_code.trusted(code, digest)(input_dim, num_classes, **hyperparameters)
    name = mil_name(name)
    if name not in MODELS:
        return _own(name)(input_dim, num_classes, **hyperparameters)
    options = class_options(MODELS[name])
    unknown = [key for key in hyperparameters if key not in options]
    if unknown:
        raise ModelError(f"{name} has no hyperparameter {', '.join(unknown)}; it takes {', '.join(options)}")
    return MODELS[name](input_dim, num_classes, **hyperparameters)
