"""The errors LiteMIL raises on purpose: one line that names the file, the value found, the value expected, the remedy.

The scripts catch LiteMILError only, print that line to stderr and exit with 1; anything else is a bug and keeps its
traceback.
"""

import difflib
from collections.abc import Iterable, Sequence


class LiteMILError(Exception):
    """Something the user can mend; the message says how."""


class ConfigError(LiteMILError):
    """A setting, or a combination of settings, that cannot be used."""


class DiskFullError(LiteMILError):
    """No space, or no quota, left for a file: no fault of the one that was being made, and the next would fail too."""


class SlideError(LiteMILError):
    """A slide that cannot be opened or read, or not at the resolution asked for."""


class NoTissueError(SlideError):
    """A slide in which no patch holds enough tissue."""


class BackboneError(LiteMILError):
    """A feature backbone that is unknown, or whose weights cannot be had or do not fit."""


class FeatureFileError(LiteMILError):
    """A feature file that is damaged, ambiguous or not a bag of patches."""


class RecipeError(LiteMILError):
    """Features made in another way than the ones they are to be used with."""


class LabelsError(LiteMILError):
    """A label table that does not account for every slide."""


class SplitError(LiteMILError):
    """Folds that cannot be made, or that share a patient."""


class DownloadError(LiteMILError):
    """Something published that cannot be fetched, or that is not what was published."""


class TrainingError(LiteMILError):
    """A training that cannot go on, such as a loss that is not finite."""


class DivergedError(TrainingError):
    """A training whose loss or answers are no finite numbers any more."""


class EngineError(LiteMILError):
    """Work sent to other processes that did not come back."""


class CheckpointError(LiteMILError):
    """A checkpoint that cannot be read, or that contradicts what is asked of it."""


def meant(found: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the nearest of the known words, whatever their case; nothing where none is near."""
    plain = {word.casefold(): word for word in known}
    near = difflib.get_close_matches(found.casefold(), plain, n=1)
    return f"; did you mean {plain[near[0]]}?" if near else ""


def counted(number: int, what: str) -> str:
    """ "1 row", "2 rows": for messages."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def named(names: Sequence[str], most: int = 5) -> str:
    """The first of the names, and how many more there are: for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
