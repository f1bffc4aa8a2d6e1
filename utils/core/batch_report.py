"""The report of a batch: a CSV table with a row per file, which later runs of the batch extend.

A row is kept as long as its file exists, even if a later run works on fewer or other slides, or with settings that
make every file fail.
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
        """The file that was made of it, relative to the report's folder; "" in reports that do not say."""
        ...

    @property
    def is_made(self) -> bool:
        """Whether that file was made, or existed already."""
        ...

    def after(self, earlier: Self, is_there: bool) -> Self:
        """Return this row, completed from an earlier row of the same file; `is_there` is whether the file exists."""
        ...


AnyRow = TypeVar("AnyRow", bound=Row)
_SECONDS_TO_WAIT = 60


def update_report(path: Path, rows: Mapping[Path, AnyRow], kind: type[AnyRow]) -> list[AnyRow]:
    """Write the rows, given by their output files, and those of an earlier report that still hold; return all of them,
    sorted by source. Processes do this one at a time.

    Another file under the report's name is moved aside first.
    """
    with claimed(path, _SECONDS_TO_WAIT):  # then write all the same: rather lose a row than all of them
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
    still_true = [row for row in (*by_output.values(), *by_source.values()) if _holds(row, folder)]
    all_rows = sorted([*merged.values(), *still_true], key=lambda row: row.source)
    if all_rows:
        write_records(path, all_rows)
    return all_rows


def _holds(row: Row, folder: Path) -> bool:
    """Return whether the output file of a row exists or, if none could be made, its source."""
    return (folder / row.output if row.is_made and row.output else row.source).exists()


def read_report(path: Path, kind: type[AnyRow], *, only_look: bool = False) -> list[AnyRow]:
    """Return the rows of an earlier report; none if there is none, or another file, which is moved aside unless
    `only_look` is set.
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
    """Return a cell as its field's type; an empty cell is None if the field allows it."""
    kinds = typing.get_args(hint) or (hint,)
    if text == "" and NoneType in kinds:
        return None
    return next(kind for kind in kinds if kind is not NoneType)(text)
