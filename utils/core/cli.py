"""Make command lines from the config classes, and turn errors into exit codes."""

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
from utils.core.errors import LiteMILError, did_you_mean
from utils.core.settings import flag_of

_started = time.monotonic()


_REQUIRED_TITLE = "required"
_TAKES = {
    "_dir": "DIR", "_csv": "FILE", "_column": "COLUMN", "device": "DEVICE", "mpp": "UM", "patch_size": "PX",
    "stride": "PX",
}  # fmt: skip
# The flags of the running command; none outside of `run`.
_running: list[set[str]] = []


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Prints each flag's default in the help, and keeps the description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_said_by_name = action.default is None or isinstance(action.default, bool)
        if is_said_by_name or action.default in ((), argparse.SUPPRESS) or "(default" in text:
            return text
        return text + " (default: %(default)s)"


class _PrintVersion(argparse.Action):
    """Looks the version up when asked for it: that imports much."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> typing.NoReturn:
        sys.stdout.write(f"LiteMIL {runtime.version_of('litemil')}\n")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; argparse would print the whole usage first."""

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Refuse an unknown flag, and suggest the nearest; before missing flags, as it may be one of them misspelt."""
        spellings = [spelling for action in self._actions for spelling in action.option_strings]
        flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        unknown = next((flag for flag in flags if flag not in spellings), None)
        if unknown is not None:
            self.error(f"unrecognized arguments: {unknown}{did_you_mean(unknown, spellings)}")

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def parse(
    description: str,
    groups: dict[str, type],
    argv: Sequence[str] | None = None,
    epilog: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Any]:
    """Parse a command line into one frozen config per group, in the groups' order.

    `groups` maps titles of the help text to config classes, which may not share a flag. `presets` holds, by its name,
    what `--preset` sets: the defaults of other fields. A wrong command line ends the
    process with one line on stderr and exit code 2.
    """
    parser = _Parser(
        _program(), description=description, epilog=epilog, formatter_class=_Formatter, allow_abbrev=False,
        add_help=False,
    )  # fmt: skip
    _add_flags(parser, groups)
    _add_common(parser)
    words = sys.argv[1:] if argv is None else list(argv)
    parser.refuse_unknown(words)
    if _running:
        _running[-1].update(field.name for config in groups.values() for field in options(config))
    values = vars(parser.parse_args(words))
    if preset := values.get("preset"):
        parser.set_defaults(**(presets or {})[preset])
        values = vars(parser.parse_args(words))
    if values["quiet"]:
        runtime.be_quiet()
    return [
        config(**{field.name: _frozen(values[field.name]) for field in options(config)}) for config in groups.values()
    ]


def is_flag(name: str) -> bool:
    """Return whether the running command has the flag `--<name>`, which a message may then advise; True if no command
    line was parsed.
    """
    return not any(_running) or name in _running[-1]


def _add_flags(parser: argparse.ArgumentParser, groups: dict[str, type]) -> None:
    """Add the flags of all groups, the required ones first and in the usage line."""
    sections = {title: parser.add_argument_group(title) for title in (_REQUIRED_TITLE, *groups)}
    required: dict[str, list[str]] = {}
    for title, config in groups.items():
        hints = typing.get_type_hints(config)
        for field in options(config):
            argument, one_of = _argument(field, hints[field.name]), field.metadata["one_of"]
            is_required = field.default is dataclasses.MISSING or one_of is not None
            if is_required:
                name = "" if field.metadata["positional"] else flag_of(field)
                words = f"{name} {argument['metavar']}{' ...' if 'nargs' in argument else ''}".strip()
                required.setdefault(one_of or field.name, []).append(words)
            sections[_REQUIRED_TITLE if is_required else title].add_argument(*_spellings(field), **argument)
    usage = [f"({' | '.join(words)})" if words[1:] else words[0] for words in required.values()]
    parser.usage = " ".join([parser.prog, *usage, "[options]"]).replace("%", "%%")


def _program() -> str:
    """Return how the command is called: `train.py`, or `python -m utils.audit`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("every command")
    group.add_argument("-q", "--quiet", action="store_true", help="only results, warnings and errors: no progress")
    group.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and stop")
    group.add_argument("-h", "--help", action="help", help="print this text and stop")


def begin(description: str, groups: dict[str, type]) -> None:
    """Answer `--help` and refuse a wrong command line, before a command's imports take seconds."""

    def check() -> None:
        parse(description, groups)

    run(check)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. The environment of PyTorch's threads is set before, so that `main` itself has to import
    PyTorch. A LiteMILError becomes one line on stderr and exit code 1, Ctrl-C exit code 130, and SIGTERM, which batch
    systems send, 143.
    """
    runtime.prepare_threads()
    runtime.start_logging()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    _running.append(set())
    try:
        main()
    except LiteMILError as error:
        runtime.log.log(logging.ERROR, "%s", " ".join(str(error).split()))
        sys.exit(1)
    except KeyboardInterrupt:
        runtime.log.log(logging.ERROR, "interrupted; what was finished is kept, the same command goes on from there")
        sys.exit(130)
    finally:
        _running.pop()


def given_flags(config: Any, leave_out: Sequence[str] = ()) -> list[str]:
    """Return the words of a command line that set a config's values other than defaults, without some fields."""
    words: list[str] = []
    for field in options(type(config)):
        value = getattr(config, field.name)
        if field.name in leave_out or value == field.default:
            continue
        values = [] if isinstance(value, bool) else value if isinstance(value, tuple) else [value]
        words += [flag_of(field), *map(str, values)]
    return words


def took() -> str:
    """Return how long the command has taken so far, in words, for its last lines."""
    return runtime.duration(time.monotonic() - _started)


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # upon which half-written files are removed


def options(config: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(config) if field.metadata]


def _spellings(field: dataclasses.Field) -> list[str]:
    if field.metadata["positional"]:
        return [field.name]
    alias = field.metadata["alias"]
    return [flag_of(field)] + ([alias] if alias else [])


def _argument(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for a field of this type."""
    settings: dict[str, Any] = {"help": argparse.SUPPRESS if field.metadata["hidden"] else field.metadata["help"]}
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
    kind, words = _kind_and_words(inner)
    metavar = field.metadata["metavar"] or "|".join((_takes(field.name, kind), *words))
    return settings | {"type": _number_or_word(kind, words) if words else kind, "metavar": metavar}


def _takes(name: str, kind: type) -> str:
    """Return the placeholder of a flag's value in the help text, by its name, else by its type."""
    by_name = (word for ending, word in _TAKES.items() if name.endswith(ending))
    return next(by_name, {int: "N", float: "X", str: "NAME", Path: "FILE"}[kind])


def _without_none(hint: Any) -> Any:
    """Return X for `X | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return typing.Union[tuple(kinds)]  # noqa: UP007 - it is computed
    return hint


def _kind_and_words(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """Return int and ("auto",) for `int | Literal["auto"]`."""
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
            raise argparse.ArgumentTypeError(
                f"invalid choice: {text!r} (choose from {listed}){did_you_mean(text, [*also, *words])}"
            )
        return text

    return read


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
