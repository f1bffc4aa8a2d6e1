"""The report of a batch: a CSV table with a row per file, which a later run of the batch never makes poorer.

A row is kept as long as the file that it tells of is there, whatever a later run looks at: fewer slides, others, or
with settings that every file refuses.
"""

import csv
import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, Self, TypeVar

from utils.core.files import claimed, set_aside, write_records
from utils.core.runtime import log


class Row(Protocol):
    """A row of a report, a dataclass of plain values; its fields are the table's columns."""

    @property
    def source(self) -> Path:
        """The file that was worked on."""
        ...

    @property
    def output(self) -> str:
        """The file that was made of it, seen from the report's folder; "" in reports that do not say."""
        ...

    @property
    def is_made(self) -> bool:
        """Whether there was such a file in the end."""
        ...

    def after(self, earlier: Self, is_there: bool) -> Self:
        """Return this row with what an earlier one of the same file knew better; `is_there`: that file."""
        ...


AnyRow = TypeVar("AnyRow", bound=Row)
_SECONDS_TO_WAIT = 60


def update_report(path: Path, rows: Mapping[Path, AnyRow], kind: type[AnyRow]) -> list[AnyRow]:
    """Write the rows, by the files they tell of, and those of an earlier report that still hold; return all of them,
    in the order of their sources. Of several processes one at a time does so.

    Something else under the report's name is set aside first.
    """
    with claimed(path, _SECONDS_TO_WAIT):  # after that, better a row too few than none at all
        return _updated(path, rows, kind)


def _updated(path: Path, rows: Mapping[Path, AnyRow], kind: type[AnyRow]) -> list[AnyRow]:
    folder = path.parent
    earlier = read_report(path, kind)
    by_output = {row.output: row for row in earlier if row.output}
    by_source = {row.source: row for row in earlier if not row.output}
    merged = {}
    for file, row in rows.items():
        output = Path(os.path.relpath(file, folder)).as_posix()
        row = dataclasses.replace(row, output=output)  # type: ignore[type-var]
        before = by_output.pop(output, None) or by_source.pop(row.source, None)
        merged[output] = row if before is None else row.after(before, file.exists())
    others = [row for row in (*by_output.values(), *by_source.values()) if _holds(row, folder)]
    everything = sorted([*merged.values(), *others], key=lambda row: row.source)
    if everything:
        write_records(path, everything)
    return everything


def _holds(row: Row, folder: Path) -> bool:
    """Whether the file that a row tells of is there or, where none could be made, its source."""
    return (folder / row.output if row.is_made and row.output else row.source).exists()


def read_report(path: Path, kind: type[AnyRow], *, only_look: bool = False) -> list[AnyRow]:
    """Return the rows of an earlier report; none where there is none, or something else, which is set aside unless
    this should `only_look`.
    """
    if not path.exists():
        return []
    hints = typing.get_type_hints(kind)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, strict=True)
            lines = list(table)
        if not table.fieldnames or not hints.keys() >= set(table.fieldnames):
            raise KeyError(table.fieldnames)
        return [kind(**{name: _value(text, hints[name]) for name, text in line.items()}) for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError):
        if not only_look:
            log.warning("%s: not a report of this kind that can be read; moved to %s", path, *set_aside(path))
        return []


def _value(text: str, hint: Any) -> Any:
    """Return a cell as its field's type; an empty one is None where the field may be."""
    kinds = typing.get_args(hint) or (hint,)
    if text == "" and NoneType in kinds:
        return None
    return next(kind for kind in kinds if kind is not NoneType)(text)
