"""labels.csv: `case_id,wsi_id,label`, all text; every row is accounted for."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils.core.errors import LabelsError
from utils.core.runtime import log

Row = dict[str, str]

# How many offending rows a message names.
_NAMED = 5


@dataclass(frozen=True)
class LabelRow:
    """One slide: its patient (the case), its class as an index into the class names, its feature file."""

    wsi_id: str
    case_id: str
    label: int
    path: Path


def read_rows(csv_path: Path) -> list[Row]:
    """The table's rows as text, each with a `case_id`: without such a column each slide is its own case, said aloud."""
    try:
        table = pd.read_csv(csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise LabelsError(f"{csv_path}: no such file; expected a table with the columns case_id,wsi_id,label") from None
    except (OSError, ValueError) as failure:
        raise LabelsError(f"{csv_path}: not readable as a CSV table ({failure})") from failure
    columns = [str(name).strip() for name in table.columns]
    missing = [name for name in ("wsi_id", "label") if name not in columns]
    if missing:
        raise LabelsError(
            f"{csv_path}: no column {' and '.join(missing)}; found {', '.join(columns)}, expected case_id,wsi_id,label"
        )
    if table.empty:
        raise LabelsError(f"{csv_path}: no rows; expected one row per slide")
    values = table.fillna("").to_numpy().tolist()
    rows = [dict(zip(columns, (str(value).strip() for value in row), strict=True)) for row in values]
    if "case_id" not in columns:
        log.info("%s: no case_id column; each slide is taken as its own case", csv_path)
        rows = [row | {"case_id": row["wsi_id"]} for row in rows]
    return rows


def classes_in(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels that occur, sorted."""
    return tuple(sorted({row["label"] for row in rows} - {""}))


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
    """
    renamed = label_names or {}
    rows = [row | {"label": renamed.get(row["label"], row["label"])} for row in rows]
    _check_ids(csv_path, rows)

    rare = [row["wsi_id"] for row in rows if row["label"] in left_out]
    if rare:
        log.info("%s: %s left out, of the labels %s", csv_path, _count(len(rare)), ", ".join(sorted(left_out)))
    rows = [row for row in rows if row["label"] not in left_out]

    unknown = [f"{row['wsi_id']} ({row['label']!r})" for row in rows if row["label"] not in class_names]
    _report(csv_path, "unknown", f"label that is none of {', '.join(class_names)}", unknown, allow)
    rows = [row for row in rows if row["label"] in class_names]

    first: dict[str, Row] = {}
    repeated = [row["wsi_id"] for row in rows if first.setdefault(row["wsi_id"], row) is not row]
    _report(csv_path, "duplicate", "wsi_id that stands in an earlier row", repeated, allow)

    files = {wsi_id: find_file(wsi_id) for wsi_id in first}
    absent = [wsi_id for wsi_id, path in files.items() if path is None]
    _report(csv_path, "missing", "wsi_id without a feature file", absent, allow)
    usable = [
        LabelRow(wsi_id, row["case_id"], class_names.index(row["label"]), path)
        for wsi_id, row in first.items()
        if (path := files[wsi_id]) is not None
    ]
    if not usable:
        raise LabelsError(f"{csv_path}: no usable row is left; check the labels, --class_names and --features_dir")
    return usable


def _check_ids(csv_path: Path, rows: Sequence[Row]) -> None:
    for line, row in enumerate(rows, start=2):
        if not row["case_id"] or not row["wsi_id"]:
            raise LabelsError(f"{csv_path}: line {line} has an empty case_id or wsi_id; fill it in")
    outside = [row["wsi_id"] for row in rows if not _is_plain(row["wsi_id"])]
    if outside:
        raise LabelsError(
            f"{csv_path}: wsi_id {_named(outside)} would leave the features folder; give plain file stems"
        )


def _report(csv_path: Path, kind: str, what: str, names: list[str], allow: Collection[str]) -> None:
    if not names:
        return
    message = f"{csv_path}: {_count(len(names))} with a {what}: {_named(names)}"
    if kind not in allow:
        raise LabelsError(f"{message}; mend the table, or leave them out with --allow {kind}")
    log.warning("%s; left out", message)


def _is_plain(wsi_id: str) -> bool:
    return wsi_id not in (".", "..") and not any(separator in wsi_id for separator in "/\\\0")


def _count(rows: int) -> str:
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
