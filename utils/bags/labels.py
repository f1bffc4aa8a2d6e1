"""Resolve each row of a label table to its class, its patient and its feature file, or say why that is not possible."""

import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.bags.label_table import LabelTable, OneInSeveral, Row, doubtful_patients, several_names, unknown_patients
from utils.bags.spelling import (
    NearIds,
    classes_alike,
    plain_class,
    why_missed,
    without_ending,
    without_folder,
)
from utils.core.cli import is_flag
from utils.core.cohorts import tcga_site
from utils.core.errors import LabelsError, did_you_mean, first_few, plural
from utils.core.placeholders import is_placeholder
from utils.core.runtime import log
from utils.tasks.targets import Target
from utils.tasks.task import Task

FindFile = Callable[[str], Path | None]
ListIds = Callable[[], Iterable[str]]


@dataclass(frozen=True)
class LabelRow:
    """One slide: its patient (the case), its target (of a classification the index of its class), its feature file, and
    all columns of its row in the table.
    """

    wsi_id: str
    case_id: str
    label: Target
    path: Path
    columns: Row


def classes_in(
    rows: Sequence[Row], *, label_names: Mapping[str, str] | None = None, left_out: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the labels that occur, renamed as in `resolve_labels` and sorted, without those left out and without "NA",
    "unknown" and the like, which are classes only if the user names them.
    """
    labels = {row["label"] for row in _renamed(rows, label_names or {})} - set(left_out)
    return tuple(sorted(label for label in labels if not is_placeholder(label)))


def classes_of(table: LabelTable, **settings: Any) -> tuple[str, ...]:
    """Return `classes_in` of a table; of two, the rarer one is last, which makes it the positive one.

    Raises LabelsError if two of them look like one, or if too few are left without those that stand for no label.
    """
    classes = classes_in(table.rows, **settings)
    doubts = doubtful_classes(classes)
    if doubts:
        raise LabelsError(f"{table.path}: {doubts}")
    no_labels = sorted({row["label"] for row in table.rows if is_placeholder(row["label"])} - {""})
    if len(classes) < 2 and no_labels:
        raise LabelsError(
            f"{table.path}: {' and '.join(map(repr, no_labels))} is taken as no label, and too few classes are left; "
            f"if it is a class, name all of them: --class_names {shlex.join([*classes, *no_labels])}"
        )
    if len(classes) != 2:
        return classes
    label_names = settings.get("label_names") or {}
    counts = Counter(row["label"] for row in _renamed(table.rows, label_names))
    common, rare = sorted(classes, key=lambda name: -counts[name])
    if counts[rare] < counts[common]:
        text = "%s: positive is %s, the rarer class (%d of %d rows); --positive_class names another"
        log.info(text, table.path, rare, counts[rare], counts[rare] + counts[common])
    return common, rare


def with_positive_last(classes: tuple[str, ...], positive_class: str | None, path: Path) -> tuple[str, ...]:
    """Return the classes, of two with the positive one last if it is given. Raises LabelsError if that cannot be."""
    if positive_class is None:
        return classes
    if len(classes) != 2:
        raise LabelsError(
            f"{path}: --positive_class {positive_class}: there are {len(classes)} classes, each is compared with the "
            "rest; leave it out"
        )
    if positive_class not in classes:
        near = did_you_mean(positive_class, classes)
        raise LabelsError(f"{path}: --positive_class {positive_class}: the classes are {' and '.join(classes)}{near}")
    return tuple(sorted(classes, key=lambda name: name == positive_class))


def doubtful_classes(classes: Sequence[str]) -> str | None:
    """Return the error text if classes of a table look like one class spelled in two ways, else None."""
    pairs = [" and ".join(map(repr, pair)) for pair in classes_alike(classes)]
    if not pairs:
        return None
    return (
        f"labels that look like one class spelled in two ways: {first_few(pairs)}; write each class in one way, or "
        f"name the classes if they differ: --class_names {shlex.join(classes)}"
    )


def missing_patients(table: LabelTable, no_patients: bool) -> str | None:
    """Return the warning for a table without patients, whose slides are taken as patients; None if it names patients.

    Raises LabelsError for such a table without `no_patients`, and for `no_patients` with one that names its patients.
    """
    if table.patients_from is not None and no_patients:
        raise LabelsError(f"{table.path}: {table.patients_from} names the patients; leave --no_patients out")
    if table.patients_from is not None:
        return None
    message = f"{unknown_patients(table)}; slides of one patient on both sides of a split make every figure too good"
    if not no_patients:
        raise LabelsError(
            f"{message}; call the column of patients case_id (patient_id, patient and submitter_id are read, too), or "
            "say that every slide is a patient's only one with --no_patients"
        )
    return f"{message}; each slide is taken as a patient of its own"


def doubted_patients(table: LabelTable) -> str | None:
    """Return the warning for a table with one patient per slide, if slides look like one patient's, or None."""
    doubt = doubtful_patients(table.rows) if table.patients_from is not None else ""
    return f"{table.path}: {doubt}: on both sides of a split they make every figure too good" if doubt else None


def resolve_labels(
    table: LabelTable,
    task: Task,
    find_file: FindFile,
    *,
    ids: ListIds = tuple,
    label_names: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
    allow: Collection[str] = (),
) -> list[LabelRow]:
    """Return one LabelRow per usable row, in the table's order. Raises LabelsError, which names the rows not usable.

    `find_file` returns the feature file of a wsi_id, or None; `ids` returns all ids that have one, to name the nearest.
    Problems in `allow` ("missing", "unknown", "duplicate") only leave the row out, with a warning; an id that would
    leave the features folder is always an error. `label_names` renames labels that are not targets of the task
    themselves; the labels in `left_out` are not predicted.
    """
    renamed = {old: new for old, new in (label_names or {}).items() if old not in task.target_words}
    rows = _renamed(table.rows, renamed)
    _check_ids(table.path, rows)
    # First, so that a slide cannot have a label in one row and a label to leave out in another.
    rows = _without_duplicates(table.path, rows, task.columns, allow)
    rows = _with_target(table.path, rows, task, left_out, allow)
    usable = _with_file(table.path, rows, task, find_file, ids, allow)
    if not usable:
        sources = "the labels, --class_names and --features_dir" if is_flag("features_dir") else "its labels and wsi_id"
        raise LabelsError(f"{table.path}: no usable row is left; check {sources}")
    if task.target_words:
        _log_mixed_patients(table.path, usable, task.columns)
    return usable


def _without_duplicates(path: Path, rows: Sequence[Row], columns: Sequence[str], allow: Collection[str]) -> list[Row]:
    """Return the first row of each slide."""
    first: dict[str, Row] = {}
    repeated = [row for row in rows if first.setdefault(row["wsi_id"], row) is not row]
    contradictions = [_contradiction(first[row["wsi_id"]], row, ("case_id", *columns)) for row in repeated]
    _report(path, "duplicate", "wsi_id of an earlier row", contradictions, allow)
    return list(first.values())


def _has_target(task: Task, row: Row) -> bool:
    try:
        task.target(row)
    except ValueError:
        return False
    return True


def _with_target(
    path: Path, rows: Sequence[Row], task: Task, left_out: Collection[str], allow: Collection[str]
) -> list[Row]:
    """Return the rows with a target of the task."""
    count = sum(row.get("label") in left_out for row in rows)
    if count:
        log.info("%s: %s left out, of the labels %s", path, plural(count, "row"), ", ".join(sorted(left_out)))
    rows = [row for row in rows if row.get("label") not in left_out]
    unknown = {row["wsi_id"]: [row[name] for name in task.columns] for row in rows if not _has_target(task, row)}
    _report(
        path, "unknown", task.no_target,
        [f"{wsi_id} ({', '.join(map(repr, cells))})" for wsi_id, cells in unknown.items()], allow,
        label_hint([cell for cells in unknown.values() for cell in cells], task.target_words),
    )  # fmt: skip
    return [row for row in rows if row["wsi_id"] not in unknown]


def _with_file(
    path: Path, rows: Sequence[Row], task: Task, find_file: FindFile, ids: ListIds, allow: Collection[str]
) -> list[LabelRow]:
    """Return the rows that have a feature file, with that file."""
    files = {row["wsi_id"]: find_file(row["wsi_id"]) for row in rows}
    absent = [wsi_id for wsi_id, file in files.items() if file is None]
    near = near_ids(absent, ids) if absent else {}
    _report(
        path, "missing", "wsi_id without a feature file", [missed_id(wsi_id, near) for wsi_id in absent], allow,
        id_hint(near), may_leave_out=len(absent) < len(rows),
    )  # fmt: skip
    return [
        LabelRow(row["wsi_id"], row["case_id"], task.target(row), file, row)
        for row in rows
        if (file := files[row["wsi_id"]]) is not None
    ]


def label_hint(labels: Iterable[str], class_names: Sequence[str]) -> str:
    """Return a hint about labels that are not classes: a placeholder, another spelling or a near name; "" if none."""
    for label in dict.fromkeys(labels):
        if is_placeholder(label):
            instead = ", or name it in --class_names if it is a class" if class_names and is_flag("class_names") else ""
            return f"{label!r} stands for no label: fill it in{instead}"
        alike = [name for name in class_names if plain_class(name) == plain_class(label)]
        if alike:
            return f"{label!r} is {alike[0]!r} in another spelling: write the class in one way"
        near = did_you_mean(label, class_names)
        if near:
            return f"{label!r}: {near.removeprefix('; ')}"
    return ""


def near_ids(absent: Sequence[str], ids: ListIds) -> dict[str, str]:
    """Map ids without a feature file to the near ids with one, if there are any."""
    near = NearIds(ids())
    return {wsi_id: name for wsi_id in absent if (name := near.of(wsi_id)) is not None}


def id_hint(near: Mapping[str, str]) -> str:
    """Return what to do about ids that miss a near one: the remedy for the first; "" if there are none."""
    return why_missed(*next(iter(near.items()))) if near else ""


def missed_id(wsi_id: str, near: Mapping[str, str]) -> str:
    """Return the id, with the near id that has a file if there is one."""
    return f"{wsi_id} (there is {near[wsi_id]})" if wsi_id in near else wsi_id


def check_names(table: LabelTable, rows: Sequence[LabelRow], groups: Sequence[str], column: str | None) -> None:
    """Raise LabelsError if slides, patients or groups seem to be in the table under several names."""
    doubts = several_names([row.columns for row in rows], groups, table.patient_columns, column)
    if doubts:
        raise LabelsError(f"{table.path}: {doubtful_names(doubts)}")


def doubtful_names(doubts: Sequence[OneInSeveral]) -> str:
    """Return the error text for names that seem to mean the same slide, patient or group."""
    return (
        f"names that seem to mean the same: {first_few(list(map(str, doubts)), most=3)}; write each in one way, or say "
        "that they differ with --allow spelling"
    )


def warn_of_patients(table: LabelTable, rows: Sequence[LabelRow]) -> None:
    """Warn of patients that make intervals doubtful, where nothing is trained."""
    if table.patients_from is None:
        log.warning(
            "%s; each slide is taken as a patient of its own, called as the slide is, in the intervals and in what was "
            "seen in training; call the column of patients case_id",
            unknown_patients(table),
        )
    doubts = several_names([row.columns for row in rows], [row.case_id for row in rows], table.patient_columns)
    if doubts:
        names = first_few(list(map(str, doubts)), most=3)
        log.warning("%s: names that seem to mean the same: %s; the intervals take them as several", table.path, names)


def group_rows(csv_path: Path, rows: Sequence[Row], column: str | None) -> list[str]:
    """Return the group of each row, which splits keep together: its patient, or the value of a column.

    In a table without a column "site", the tissue source site is read from the TCGA barcodes. Raises LabelsError for a
    missing column, a row without a value in it ("NA" and the like), and a patient in two groups.
    """
    if column is None or not rows:
        return [row["case_id"] for row in rows]
    columns = rows[0].keys()
    if column != "site" and column not in columns:
        near = _near_column(column, columns)
        raise LabelsError(f"{csv_path}: no column {column} to group by; found {', '.join(columns)}{near}")
    groups = [_group(row, column) for row in rows]
    unknown = [row["wsi_id"] for row, group in zip(rows, groups, strict=True) if is_placeholder(group)]
    if unknown:
        near = _near_column(column, columns)
        why = "" if column in columns else f" (there is no column {column}, and these are no TCGA barcodes{near})"
        raise LabelsError(
            f"{csv_path}: {plural(len(unknown), 'row')} without a {column}{why}: {first_few(unknown)}; fill it in"
        )
    first: dict[str, str] = {}
    for row, group in zip(rows, groups, strict=True):
        if first.setdefault(row["case_id"], group) != group:
            raise LabelsError(
                f"{csv_path}: patient {row['case_id']} has slides of {column} {first[row['case_id']]} and {group}; "
                "a patient must stay together, so give it one"
            )
    return groups


def _near_column(column: str, columns: Iterable[str]) -> str:
    """Suggest a column of the same name in another case, or of a similar name; "" if there is none."""
    same = [name for name in columns if name.casefold() == column.casefold()]
    return f"; did you mean {same[0]}?" if same else did_you_mean(column, columns)


def _group(row: Row, column: str) -> str:
    if column in row:
        return row[column]
    return tcga_site(row["case_id"]) or tcga_site(row["wsi_id"]) or ""


def _renamed(rows: Sequence[Row], label_names: Mapping[str, str]) -> list[Row]:
    return [row | {"label": label_names.get(row["label"], row["label"])} for row in rows] if label_names else list(rows)


def _contradiction(earlier: Row, row: Row, columns: Sequence[str]) -> str:
    """Return the id of a slide that has two rows, and what the rows disagree about in these columns."""
    fields = [name for name in columns if row[name] != earlier[name]]
    changes = "; ".join(f"{name} {earlier[name]}, then {row[name]}" for name in fields)
    return f"{row['wsi_id']} ({changes})" if changes else row["wsi_id"]


def _log_mixed_patients(csv_path: Path, rows: Sequence[LabelRow], columns: Sequence[str]) -> None:
    classes_of: dict[str, set[Target]] = {}
    for row in rows:
        classes_of.setdefault(row.case_id, set()).add(row.label)
    mixed = [case_id for case_id, classes in classes_of.items() if len(classes) > 1]
    if mixed:
        log.info(
            "%s: patients whose slides differ in %s, which stay in one fold: %s",
            csv_path, ", ".join(columns), first_few(mixed),
        )  # fmt: skip


def _check_ids(csv_path: Path, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows, start=1):
        if not row["case_id"] or not row["wsi_id"]:
            raise LabelsError(f"{csv_path}: row {number} after the header has an empty case_id or wsi_id; fill it in")
        if is_placeholder(row["case_id"]):
            raise LabelsError(
                f"{csv_path}: row {number} after the header names no patient (case_id {row['case_id']!r}); fill it in"
            )
    outside = [row["wsi_id"] for row in rows if not is_plain(row["wsi_id"])]
    if outside:
        bare = without_ending(without_folder(outside[0]))
        cure = f"write {bare}" if is_plain(bare) and bare else "give the stems of feature files"
        raise LabelsError(
            f"{csv_path}: wsi_id {first_few(outside)} would leave the features folder; give names without folder and "
            f"ending: {cure}"
        )


def _report(
    path: Path,
    kind: str,
    problem: str,
    names: list[str],
    allow: Collection[str],
    hint: str = "",
    may_leave_out: bool = True,
) -> None:
    """Raise LabelsError for rows with a problem; if its `kind` is in `allow`, only warn."""
    if not names:
        return
    message = f"{path}: {plural(len(names), 'row')} with a {problem}: {first_few(names)}"
    if kind not in allow:
        instead = f", or leave them out with --allow {kind}" if may_leave_out else ""
        raise LabelsError(f"{message}; {hint or 'mend the table'}{instead}")
    log.warning("%s; left out%s", message, f" ({hint})" if hint else "")


def is_plain(wsi_id: str) -> bool:
    return wsi_id not in (".", "..") and not any(separator in wsi_id for separator in "/\\\0")
