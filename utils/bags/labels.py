"""labels.csv: `case_id,wsi_id,label`, all text; every row is accounted for."""

import csv
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.bags.store import FEATURE_EXTENSIONS
from utils.core.cohorts import tcga_site
from utils.core.errors import LabelsError, counted, named
from utils.core.runtime import log

Row = dict[str, str]


@dataclass(frozen=True)
class LabelRow:
    """One slide: its patient (the case), its class as an index into the class names, its feature file, and all columns
    of its row in the table.
    """

    wsi_id: str
    case_id: str
    label: int
    path: Path
    columns: Row


def read_rows(csv_path: Path) -> list[Row]:
    """The table's rows as text, each with a `case_id`: without such a column each slide is its own case, said aloud."""
    columns, *values = _read_lines(csv_path) or [[]]
    missing = [name for name in ("wsi_id", "label") if name not in columns]
    if missing:
        found = ", ".join(columns) or "nothing"
        raise LabelsError(
            f"{csv_path}: no column {' and '.join(missing)}; found {found}, expected case_id,wsi_id,label"
        )
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise LabelsError(f"{csv_path}: two columns are called {' and '.join(twice)}; keep one of each")
    if not values:
        raise LabelsError(f"{csv_path}: no rows; expected one row per slide")
    uneven = [repr(",".join(row)) for row in values if len(row) != len(columns)]
    if uneven:
        raise LabelsError(
            f"{csv_path}: {counted(len(uneven), 'row')} with more or fewer fields than the header's {len(columns)}: "
            f"{named(uneven)}; quote a field that holds a comma"
        )
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    if "case_id" not in columns:
        log.info("%s: no case_id column; each slide is taken as its own case", csv_path)
        rows = [row | {"case_id": row["wsi_id"]} for row in rows]
    return rows


def _read_lines(csv_path: Path) -> list[list[str]]:
    """The fields of each line that holds any, without the spaces around them."""
    try:
        with Path(csv_path).open(encoding="utf-8-sig", newline="") as file:
            lines = [[field.strip() for field in line] for line in csv.reader(file, strict=True)]
    except FileNotFoundError:
        raise LabelsError(f"{csv_path}: no such file; expected a table with the columns case_id,wsi_id,label") from None
    except (OSError, UnicodeDecodeError, csv.Error) as failure:
        raise LabelsError(f"{csv_path}: not readable as a CSV table ({failure}); save it as CSV, UTF-8") from failure
    return [line for line in lines if any(line)]


def classes_in(
    rows: Sequence[Row], *, label_names: Mapping[str, str] | None = None, left_out: Collection[str] = ()
) -> tuple[str, ...]:
    """The labels that occur, renamed as `account` does, sorted; but for those left out."""
    found = {row["label"] for row in _renamed(rows, label_names or {})}
    return tuple(sorted(found - set(left_out) - {""}))


def account(
    csv_path: Path,
    rows: Sequence[Row],
    class_names: Sequence[str],
    find_file: Callable[[str], Path | None],
    *,
    label_names: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
    allow: Collection[str] = (),
) -> list[LabelRow]:
    """One LabelRow per usable row, in the table's order; LabelsError names the rows that are not usable.

    `find_file` gives the feature file of a wsi_id, or None. Of the problems, those in `allow` ("missing", "unknown",
    "duplicate") only leave the row out, said aloud; an id that leaves the features folder is always an error.
    `label_names` renames labels that are no class as they stand; the labels in `left_out` belong to no class.
    """
    rows = _renamed(rows, {old: new for old, new in (label_names or {}).items() if old not in class_names})
    _check_ids(csv_path, rows)

    # Looked for before any row is left out, so that a slide cannot have one label here and another, left out, there.
    first: dict[str, Row] = {}
    repeated = [row for row in rows if first.setdefault(row["wsi_id"], row) is not row]
    again = [_contradiction(first[row["wsi_id"]], row) for row in repeated]
    _report(csv_path, "duplicate", "wsi_id that stands in an earlier row", again, allow)
    rows = list(first.values())

    rare = [row["wsi_id"] for row in rows if row["label"] in left_out]
    if rare:
        log.info("%s: %s left out, of the labels %s", csv_path, counted(len(rare), "row"), ", ".join(sorted(left_out)))
    rows = [row for row in rows if row["label"] not in left_out]

    unknown = [f"{row['wsi_id']} ({row['label']!r})" for row in rows if row["label"] not in class_names]
    _report(csv_path, "unknown", f"label that is none of {', '.join(class_names)}", unknown, allow)
    rows = [row for row in rows if row["label"] in class_names]

    files = {row["wsi_id"]: find_file(row["wsi_id"]) for row in rows}
    absent = [wsi_id for wsi_id, path in files.items() if path is None]
    _report(csv_path, "missing", "wsi_id without a feature file", absent, allow)
    usable = [
        LabelRow(row["wsi_id"], row["case_id"], class_names.index(row["label"]), path, row)
        for row in rows
        if (path := files[row["wsi_id"]]) is not None
    ]
    if not usable:
        raise LabelsError(f"{csv_path}: no usable row is left; check the labels, --class_names and --features_dir")
    _tell_mixed_cases(csv_path, usable)
    return usable


def group_cases(csv_path: Path, rows: Sequence[LabelRow], column: str | None) -> list[str]:
    """What splits keep together, for each row: its case, or the value of a column.

    A table without a column "site" has the tissue source site in its TCGA barcodes. Raises LabelsError for a column
    that is not there or empty in a row, and for a case that stands in two groups.
    """
    if column is None:
        return [row.case_id for row in rows]
    if column != "site" and column not in rows[0].columns:
        raise LabelsError(f"{csv_path}: no column {column} to group by; found {', '.join(rows[0].columns)}")
    groups = [_group(row, column) for row in rows]
    unknown = [row.wsi_id for row, group in zip(rows, groups, strict=True) if not group]
    if unknown:
        found = "" if column in rows[0].columns else f" (there is no column {column}, and these are no TCGA barcodes)"
        raise LabelsError(
            f"{csv_path}: {counted(len(unknown), 'row')} without a {column}{found}: {named(unknown)}; fill it in"
        )
    first: dict[str, str] = {}
    for row, group in zip(rows, groups, strict=True):
        if first.setdefault(row.case_id, group) != group:
            raise LabelsError(
                f"{csv_path}: case {row.case_id} has slides of {column} {first[row.case_id]} and {group}; "
                "a case must stay together, so give it one"
            )
    return groups


def _group(row: LabelRow, column: str) -> str:
    if column in row.columns:
        return row.columns[column]
    return tcga_site(row.case_id) or tcga_site(row.wsi_id) or ""


def find_features(features_dir: Path, wsi_id: str) -> Path | None:
    """The slide's feature file, `<wsi_id>.h5`, `.hdf5`, `.pt` or `.pth`; LabelsError when there are two."""
    # The id may hold dots of its own, so the ending is appended, never replaced.
    found = [path for ending in FEATURE_EXTENSIONS if (path := features_dir / f"{wsi_id}{ending}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise LabelsError(f"{features_dir}: slide {wsi_id} has {names}; keep one of them")
    return found[0] if found else None


def _renamed(rows: Sequence[Row], label_names: Mapping[str, str]) -> list[Row]:
    return [row | {"label": label_names.get(row["label"], row["label"])} for row in rows]


def _contradiction(earlier: Row, row: Row) -> str:
    """The id of a row that stands twice, and what the two rows disagree about."""
    told = [f"{name} {earlier[name]}, then {row[name]}" for name in ("case_id", "label") if row[name] != earlier[name]]
    return f"{row['wsi_id']} ({'; '.join(told)})" if told else row["wsi_id"]


def _tell_mixed_cases(csv_path: Path, rows: Sequence[LabelRow]) -> None:
    classes_of: dict[str, set[int]] = {}
    for row in rows:
        classes_of.setdefault(row.case_id, set()).add(row.label)
    mixed = [case_id for case_id, found in classes_of.items() if len(found) > 1]
    if mixed:
        log.info("%s: cases with slides of several classes, which stay in one fold: %s", csv_path, named(mixed))


def _check_ids(csv_path: Path, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows, start=1):
        if not row["case_id"] or not row["wsi_id"]:
            raise LabelsError(f"{csv_path}: row {number} after the header has an empty case_id or wsi_id; fill it in")
    outside = [row["wsi_id"] for row in rows if not is_plain(row["wsi_id"])]
    if outside:
        raise LabelsError(f"{csv_path}: wsi_id {named(outside)} would leave the features folder; give plain file stems")


def _report(csv_path: Path, kind: str, what: str, names: list[str], allow: Collection[str]) -> None:
    if not names:
        return
    message = f"{csv_path}: {counted(len(names), 'row')} with a {what}: {named(names)}"
    if kind not in allow:
        raise LabelsError(f"{message}; mend the table, or leave them out with --allow {kind}")
    log.warning("%s; left out", message)


def is_plain(wsi_id: str) -> bool:
    return wsi_id not in (".", "..") and not any(separator in wsi_id for separator in "/\\\0")
