"""The building blocks of settings classes. Each command's classes stand beside what they configure.

`core/cli.py` makes the command line from them, and they hold every default once. A field made with `option` is also a
flag; its help, limits and other spellings stand beside its default. Values of a wrong type, unknown words and numbers
out of range raise ConfigError with the flag, the value and what is expected, on the command line as in Python.
"""

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

from utils.core.errors import ConfigError, did_you_mean

REQUIRED: Any = dataclasses.MISSING


class FlagDetails(TypedDict, total=False):
    """What a flag may have besides its default and help.

    Attributes
        least, most: the limits of a number.
        flag, alias: its name if it is not that of the field, and a second one; metavar: its value in the help text.
        positional: it is given by position, not by name.
        one_of: one of the flags that share this name has to be given.
        also: maps other words for a choice to the choice.
        hidden: it works, but is not in the help text.
    """

    least: float
    most: float
    flag: str | None
    alias: str | None
    metavar: str | None
    positional: bool
    one_of: str | None
    also: Mapping[str, str]
    hidden: bool


_PLAIN_FLAG: FlagDetails = {
    "least": -math.inf, "most": math.inf, "flag": None, "alias": None, "metavar": None, "positional": False,
    "one_of": None, "also": {}, "hidden": False,
}  # fmt: skip


def option(
    default: Any,
    help: str,  # noqa: A002 - argparse's own word
    **details: Unpack[FlagDetails],
) -> Any:
    """Return a dataclass field that is also a flag. `default=REQUIRED` makes the flag mandatory."""
    metadata = {"help": help} | _PLAIN_FLAG | details
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field) -> str:
    """Return the name by which users know the field."""
    if field.metadata.get("positional"):
        return field.metadata["metavar"] or field.name
    return field.metadata.get("flag") or f"--{field.name}"


_EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_EXPECTED_LISTS = {str: "a list of text", Path: "a list of paths"}


def converted(kind: Any, value: Any, also: Iterable[str] = ()) -> Any:
    """Return `value` as the type `kind` of a setting: NumPy's numbers become Python's, text becomes a path, a list a
    tuple. Raises ValueError, which says what is expected, for a value that does not fit; its message also suggests
    words in `also`.
    """
    if getattr(value, "shape", None) == ():  # a number of NumPy or PyTorch
        value = value.item()
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _converted_to_one_of(args, value)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise ValueError(f"one of {', '.join(args)}{did_you_mean(str(value), [*also, *args])}")
    if origin is tuple:
        if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
            raise ValueError(_EXPECTED_LISTS.get(args[0], "a list of words"))
        if isinstance(value, set | frozenset) and args[0] in _EXPECTED_LISTS:
            raise ValueError(f"{_EXPECTED_LISTS[args[0]]}, whose order counts: a set has none")
        try:
            return tuple(converted(args[0], item) for item in value)
        except ValueError as error:
            raise ValueError(_EXPECTED_LISTS.get(args[0], str(error))) from None
    fitting: tuple[type, ...] = {float: (int, float), Path: (str, os.PathLike)}.get(kind, (kind,))
    if not isinstance(value, fitting) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(_EXPECTED[kind])
    return value if kind is float else kind(value)


def _converted_to_one_of(kinds: Iterable[Any], value: Any) -> Any:
    expected = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return converted(kind, value)
            except ValueError as error:
                expected.append(str(error))
        elif value is None:
            return None
    raise ValueError(" or ".join(expected))


def checked(field: dataclasses.Field, kind: Any, value: Any, name: str) -> Any:
    """Return the value of a setting in its type, after checking its words or limits. Raises ConfigError, whose message
    begins with `name` and the value.
    """
    also = field.metadata["also"]
    try:
        value = converted(kind, also.get(value, value) if isinstance(value, str) else value, also)
    except ValueError as error:
        raise ConfigError(f"{name}{value!r}: expected {error}") from None
    if value == () and field.default not in ((), REQUIRED):
        raise ConfigError(f"{name}is empty; give at least one, or leave it out")
    least, most = field.metadata["least"], field.metadata["most"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not (math.isfinite(value) and least <= value <= most):
        limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ConfigError(f"{name}{value}: out of range; give a number {limits}")
    return value


def check_names(owner: str, names: Iterable[str], settings: Collection[str]) -> None:
    """Raise ConfigError, with the nearest name, if one of the names is not among the settings."""
    unknown = sorted(set(names) - set(settings))
    if unknown:
        raise ConfigError(f"{owner}: no setting {', '.join(unknown)}{did_you_mean(unknown[0], settings)}")


@functools.cache
def kinds_of(config: type) -> dict[str, Any]:
    """Return the type of each setting of a config class."""
    return typing.get_type_hints(config)


def check_setting(config: type, name: str, value: Any) -> Any:
    """Return `value` in the type of the setting `name` of a config class. Raises ConfigError if it does not fit."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return checked(field, kinds_of(config)[name], value, f"{flag_of(field)} ")


class Settings:
    """Checks names, types, words and limits of the settings when the dataclass is made."""

    def __new__(cls, **settings: Any) -> Self:
        check_names(cls.__name__, settings, [field.name for field in dataclasses.fields(cls)])  # type: ignore[arg-type]
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.metadata:
                value = check_setting(type(self), field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)


FigureFormat = Literal["png", "pdf", "svg"]
# Defaults that several commands share.
FIGURE_FORMAT: tuple[FigureFormat, ...] = ("png",)
SEED = 42


def figure_format_option() -> Any:
    """Return the field of a settings class for the file formats of its figures."""
    return option(FIGURE_FORMAT, "file format of the figures, one or several of png, pdf and svg (default: png)")
