"""Command lines made from the config classes, and the one place where an error becomes an exit code."""

import argparse
import dataclasses
import logging
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.core import runtime
from utils.core.config import flag_of
from utils.core.errors import LiteMILError, meant

_started = time.monotonic()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with each flag's default, and the description's line breaks kept."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_said_by_name = action.default is None or isinstance(action.default, bool)
        if is_said_by_name or action.default in ((), argparse.SUPPRESS) or "(default" in text:
            return text
        return text + " (default: %(default)s)"


def parse(description: str, groups: dict[str, type], argv: Sequence[str] | None = None, epilog: str = "") -> list[Any]:
    """Parse a command line into one frozen config per group, in the groups' order.

    `groups` maps a title of the help text to a config class; no two classes may share a flag.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"LiteMIL {runtime.versions()['litemil']}")
    parser.add_argument("-q", "--quiet", action="store_true", help="only results, warnings and errors: no progress")
    known = ["--help", "--version", "--quiet"]
    for title, config in groups.items():
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(config)
        for field in _options(config):
            group.add_argument(*_spellings(field), **_argument(field, hints[field.name]))
            known += _spellings(field)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((one for one in unknown if one.startswith("-")), unknown[0])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant(flag.partition('=')[0], known)}")
    values = vars(found)
    if values["quiet"]:
        runtime.be_quiet()
    return [
        config(**{field.name: _frozen(values[field.name]) for field in _options(config)}) for config in groups.values()
    ]


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a LiteMILError becomes one line on stderr and exit code 1, Ctrl-C becomes 130, and the
    end that a batch system asks for (SIGTERM) 143.
    """
    global _started
    _started = time.monotonic()
    runtime.start_logging()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        main()
    except LiteMILError as error:
        runtime.log.log(logging.ERROR, "%s", " ".join(str(error).split()))
        sys.exit(1)
    except KeyboardInterrupt:
        runtime.log.log(logging.ERROR, "interrupted; what was finished is kept, the same command goes on from there")
        sys.exit(130)


def took() -> str:
    """Return how long the command has taken so far, in words; it goes into the last lines of each."""
    return runtime.duration(time.monotonic() - _started)


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # on the way out, what is half-written is removed


def _options(config: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(config) if field.metadata]


def _spellings(field: dataclasses.Field) -> list[str]:
    if field.metadata["positional"]:
        return [field.name]
    alias = field.metadata["alias"]
    return [flag_of(field)] + ([alias] if alias else [])


def _argument(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for a field of this type."""
    settings: dict[str, Any] = {"help": field.metadata["help"]}
    if not field.metadata["positional"]:
        settings["dest"] = field.name
        settings |= {"required": True} if field.default is dataclasses.MISSING else {"default": field.default}
    if hint is bool:
        return settings | {"action": "store_false" if field.default else "store_true"}
    inner = _without_none(hint)
    if inner is bool:
        return settings | {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(inner) is tuple:
        settings["nargs"] = "+"
        inner = typing.get_args(inner)[0]
    if typing.get_origin(inner) is typing.Literal:
        words = typing.get_args(inner)
        return settings | {"type": _one_of(words, field.metadata["also"]), "metavar": f"{{{','.join(words)}}}"}
    names = {int: "N", float: "X", str: "NAME", Path: "PATH"}
    kind, words = _kind_and_words(inner)
    metavar = field.metadata["metavar"] or "|".join((names[kind], *words))
    return settings | {"type": _number_or_word(kind, words) if words else kind, "metavar": metavar}


def _without_none(hint: Any) -> Any:
    """Of `X | None`, X."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [part for part in typing.get_args(hint) if part is not type(None)]
        return typing.Union[tuple(kinds)]  # noqa: UP007 - made of what there is
    return hint


def _kind_and_words(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """Of `int | Literal["auto"]`, int and ("auto",)."""
    if typing.get_origin(hint) is typing.Union:
        kind, literal = typing.get_args(hint)
        return kind, typing.get_args(literal)
    return hint, ()


def _number_or_word(kind: Callable[[str], Any], words: tuple[str, ...]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return text if text in words else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {', '.join(words)}") from None

    return read


def _one_of(words: Sequence[str], also: Mapping[str, str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words and text not in also:
            listed = ", ".join(map(repr, words))
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {listed}){meant(text, words)}")
        return text

    return read


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
