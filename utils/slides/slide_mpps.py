"""The um/px that the user gives for slides whose own is missing or wrong: in a table, or one value for all."""

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from utils.core.errors import ConfigError, SlideError, first_few, plural
from utils.core.files import check_distinct, write_records
from utils.core.repeated_log import log_repeats_once
from utils.core.runtime import log, progress
from utils.core.table_headers import DELIMITERS, SLIDE_NAMES, plain_header
from utils.slides.open_slides import open_slide
from utils.slides.resolution import PLAUSIBLE_MPP, number

# The columns of the table by their other names.
_COLUMNS = {"wsi": " ".join(SLIDE_NAMES), "mpp": "mpp"}
_NAMED = 4


@dataclass(frozen=True)
class SlideMpps:
    """um per level-0 px: the `rows` of the table by file name or stem, and the value `for_all` other slides."""

    rows: Mapping[str, float] = field(default_factory=dict)
    for_all: float | None = None
    path: Path | None = None

    @classmethod
    def read(cls, slides_csv: Path | None, slide_mpp: float | None) -> Self:
        """Read the values of `--slides_csv` and `--slide_mpp`. Raises SlideError as `read_slides_csv` does."""
        rows = read_slides_csv(slides_csv) if slides_csv else {}
        if rows and slide_mpp is not None:
            log.info("%s: its rows win; --slide_mpp %g holds for the slides without one", slides_csv, slide_mpp)
        return cls(rows, slide_mpp, slides_csv)

    def of(self, slide: Path) -> float | None:
        """Return the um/px given for a slide, or None."""
        return self.rows.get(slide.name, self.rows.get(slide.stem, self.for_all))

    def check(self, slides: Collection[Path], where: Path) -> None:
        """Warn of rows that match none of the slides in the folder `where`, or if a single slide has no row."""
        unused = self.rows.keys() - {name for slide in slides for name in (slide.name, slide.stem)}
        if not unused:
            return
        if where.is_dir():
            log.warning(
                "%s: %d of %s match no slide of %s by name: %s",
                self.path, len(unused), plural(len(self.rows), "row"), where, first_few(sorted(unused), _NAMED),
            )  # fmt: skip
        elif len(unused) == len(self.rows):
            log.warning("%s: no row for %s; there are %s", self.path, where.name, first_few(sorted(unused), _NAMED))


@dataclass(frozen=True)
class _Row:
    """A line of the table; `note` says why `mpp` is empty."""

    wsi: str
    mpp: str
    note: str


def write_slides_csv(path: Path, slides: Sequence[Path]) -> str:
    """Write a table for `--slides_csv` with the um/px in each slide's file, empty if unknown; return a summary.

    Raises ConfigError if the file exists, or two slides have the same name.
    """
    if path.exists():
        raise ConfigError(f"--write_slides_csv {path}: exists already and is not overwritten; give another name")
    by_name = {slide: Path(slide.name) for slide in slides}
    check_distinct(by_name, "a table knows slides by their names: rename one of them, or give --slide_mpp")
    with log_repeats_once():
        rows = [_row(slide) for slide in progress(slides, "Looking at slides", unit="slide", leave=False)]
    write_records(path, rows)
    empty = sum(not row.mpp for row in rows)
    summary = f"{path}: {plural(len(rows), 'slide')}, {len(rows) - empty} with their own um/px, {empty} without"
    fill = "fill those in, " if empty else "correct what is wrong, "
    return f"{summary}\nNext: {fill}and give it with --slides_csv {path}"


def _row(slide: Path) -> _Row:
    try:
        with open_slide(slide) as opened:
            mpp, problem = opened.mpp, opened.mpp_problem
    except SlideError as error:
        log.warning("%s", error)
        return _Row(slide.name, "", "cannot be opened")
    return _Row(slide.name, "" if mpp is None else f"{mpp:.6g}", problem or "")


def read_slides_csv(path: Path | str) -> dict[str, float]:
    """Read the um per level-0 px of slides, by file name or stem, from a table with the columns `wsi,mpp`.

    The slide's column may have another of its usual names, and semicolons or tabs may separate the fields. Other
    columns are ignored, and so are rows whose mpp is empty.

    Raises:
        SlideError: the table cannot be read, a slide is in it twice, or a value is not plausible.
    """
    path = Path(path)
    mpps: dict[str, float] = {}
    low, high = PLAUSIBLE_MPP
    for line, row in _read_rows(path):
        wsi, mpp = (row["wsi"] or "").strip(), number((row["mpp"] or "").replace(",", "."))
        if not wsi or Path(wsi).name != wsi:
            raise SlideError(f"{path}, line {line}: wsi {wsi!r}; expected the name of a slide's file, without folders")
        if row["mpp"] is not None and not row["mpp"].strip():
            continue
        if mpp is None or not low <= mpp <= high:
            raise SlideError(
                f"{path}, line {line}: mpp {row['mpp']!r} of {wsi}; um per level-0 px are expected, {low:g} to {high:g}"
            )
        if wsi in mpps:
            raise SlideError(f"{path}, line {line}: {wsi} is in the table twice; keep one of its lines")
        mpps[wsi] = mpp
    return mpps


def _read_rows(path: Path) -> list[tuple[int, dict[str, str | None]]]:
    """Read the line number and fields of each row, with the columns `wsi` and `mpp` under these names."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = _delimiter_of(file.readline())
            file.seek(0)
            table = csv.DictReader(file, strict=True, skipinitialspace=True, delimiter=delimiter)
            columns = [(column or "").strip() for column in table.fieldnames or ()]
            ours = {_column_of(path, name, columns): name for name in _COLUMNS}
            table.fieldnames = [ours.get(column, column) for column in columns]
            rows = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise SlideError(
            f"{path}: not readable as a table ({reason}); give a CSV file, UTF-8, with the columns wsi,mpp"
        ) from error
    notes = [f"the column {column} is taken as {name}" for column, name in ours.items() if column != name]
    notes += [] if delimiter == "," else [f"its fields are taken as separated by {DELIMITERS[delimiter]}"]
    if notes:
        log.info("%s: %s", path, "; ".join(notes))
    return rows


def _delimiter_of(header: str) -> str:
    """Return the delimiter: a comma, unless only another mark yields a column mpp."""
    names = {mark: [plain_header(name.strip().strip('"')) for name in header.split(mark)] for mark in DELIMITERS}
    return next((mark for mark in DELIMITERS if "mpp" in names[mark]), ",")


def _column_of(path: Path, name: str, columns: Sequence[str]) -> str:
    """Return the column that is our `name`. Raises SlideError if none is, or several could be."""
    candidates = [column for column in columns if plain_header(column) in _COLUMNS[name].split()]
    if name in columns:
        return name
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise SlideError(
            f"{path}: the columns {', '.join(candidates)} could each be {name}; rename the right one to it"
        )
    listed = ", ".join(columns) or "nothing"
    raise SlideError(f"{path}: no column {name}; found {listed}: name the slide's file wsi and its um/px mpp")
