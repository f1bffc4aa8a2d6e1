"""The errors LiteMIL raises on purpose: one line with the file, the value found, the value expected and the remedy.

The scripts catch LiteMILError only, print that line to stderr and exit with 1; anything else is a bug and keeps its
traceback.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class LiteMILError(Exception):
    """A problem that the user can solve; the message says how."""


class ConfigError(LiteMILError):
    """A setting, or a combination of settings, that cannot be used."""


class DiskFullError(LiteMILError):
    """No space or quota is left for a file; the next one would fail as well."""


class SlideError(LiteMILError):
    """A slide that cannot be opened or read, or not at the resolution asked for."""


class NoTissueError(SlideError):
    """A slide in which no patch holds enough tissue."""


class BackboneError(LiteMILError):
    """A feature backbone that is unknown, or whose weights cannot be fetched or do not fit."""


class FeatureFileError(LiteMILError):
    """A feature file that is damaged, ambiguous or not a bag of patches."""


class RecipeError(LiteMILError):
    """Features made with another recipe than those they are used with."""


class LabelsError(LiteMILError):
    """A label table that does not account for every slide."""


class SplitError(LiteMILError):
    """Folds that cannot be made, or that share a patient."""


class DownloadError(LiteMILError):
    """A published file that cannot be fetched, or that differs from what was published."""


class TrainingError(LiteMILError):
    """A training that cannot go on, such as a loss that is not finite."""


class DivergedError(TrainingError):
    """A training whose loss or predictions are no longer finite."""


class EngineError(LiteMILError):
    """Work that other processes could not do."""


class CheckpointError(LiteMILError):
    """A checkpoint that cannot be read, or that contradicts the settings."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the nearest of the choices, ignoring case; "" if none is near."""
    near = _nearest(word, choices)
    return "" if near is None else f"; did you mean {near}?"


def did_you_mean_path(path: Path) -> str:
    """Return "; did you mean ...?" with the existing path nearest to one that does not exist; "" if none is near."""
    missing = path
    if path.exists():
        return ""
    while not missing.parent.is_dir() and missing != missing.parent:
        missing = missing.parent
    try:
        names = [entry.name for entry in missing.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    near = _nearest(missing.name, names)
    if near is None:
        return ""
    whole = missing.with_name(near) / path.relative_to(missing)
    return f"; did you mean {whole if whole.exists() else missing.with_name(near)}?"


def _nearest(word: str, choices: Iterable[str]) -> str | None:
    by_folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1)
    return by_folded[near[0]] if near else None


def plural(number: int, noun: str) -> str:
    """Return "1 row" or "2 rows", for messages."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first few names, and how many more there are, for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
