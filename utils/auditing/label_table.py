"""Audit the label table of a cohort, its patients and its splits."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from utils.auditing.feature_files import quartiles
from utils.auditing.findings import AuditedSlide, Finding, Level, by_class
from utils.bags import labels
from utils.bags.label_table import LabelTable, Row, several_names
from utils.bags.labels import is_plain
from utils.core.cohorts import tcga_case
from utils.core.errors import LabelsError, first_few, plural
from utils.core.placeholders import is_placeholder
from utils.learning.settings import Protocol
from utils.learning.split_files import NamedSplit, shared_cases
from utils.tasks.counts import class_counts
from utils.tasks.task import Task


def check_columns(table: LabelTable, no_patients: bool) -> list[Finding]:
    """Report how the table was read, and check that it names the patients."""
    findings = [Finding("info", "table", note) for note in table.notes]
    try:
        warning = labels.missing_patients(table, no_patients)
    except LabelsError as error:
        return [*findings, Finding("error", "table", str(error))]
    warnings = [text for text in (warning, labels.doubted_patients(table)) if text]
    return [*findings, *(Finding("warning", "table", text) for text in warnings)]


def check_groups(path: Path, rows: Sequence[Row], group_column: str | None) -> tuple[list[Finding], list[str]]:
    """Return the findings, and each row's group, which no split divides: its patient if the column is unusable."""
    try:
        return [], labels.group_rows(path, rows, group_column)
    except LabelsError as error:
        return [Finding("error", "table", str(error))], labels.group_rows(path, rows, None)


def check_names(
    table: LabelTable, rows: Sequence[Row], groups: Sequence[str], group_column: str | None
) -> list[Finding]:
    """Check for slides and patients that seem to have several names in the table."""
    doubts = several_names(rows, groups, table.patient_columns, group_column)
    details = {"names": [asdict(doubt) for doubt in doubts]}
    return [Finding("error", "table", labels.doubtful_names(doubts), details)] if doubts else []


def check_ids(rows: list[Row]) -> tuple[list[Finding], list[Row]]:
    """Return the findings, and the first row of each slide with a usable id."""
    findings = []
    empty = [str(n) for n, row in enumerate(rows, start=1) if not row["wsi_id"] or is_placeholder(row["case_id"])]
    if empty:
        message = f"no patient (case_id) or no slide (wsi_id) in row {first_few(empty)} after the header; fill it in"
        findings.append(Finding("error", "table", message, {"rows": empty}))
    outside = [row["wsi_id"] for row in rows if not is_plain(row["wsi_id"])]
    if outside:
        message = f"wsi_id that would leave the features folder: {first_few(outside)}; give plain file stems"
        findings.append(Finding("error", "table", message, {"slides": outside}))

    rows_of: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["wsi_id"] and not is_placeholder(row["case_id"]) and is_plain(row["wsi_id"]):
            rows_of[row["wsi_id"]].append(row)
    conflicts = {wsi_id: _conflict(slide_rows) for wsi_id, slide_rows in rows_of.items() if len(slide_rows) > 1}
    contradicting = {wsi_id: conflict for wsi_id, conflict in conflicts.items() if conflict}
    if contradicting:
        names = first_few([f"{wsi_id} ({conflict})" for wsi_id, conflict in contradicting.items()])
        message = f"rows of one wsi_id that contradict each other: {names}; keep the right one"
        findings.append(Finding("error", "table", message, {"slides": contradicting}))
    agreeing = [wsi_id for wsi_id, conflict in conflicts.items() if not conflict]
    if agreeing:
        message = f"wsi_id in several rows that agree: {first_few(agreeing)}; keep one, or train with --allow duplicate"
        findings.append(Finding("warning", "table", message, {"slides": agreeing}))
    return findings, [slide_rows[0] for slide_rows in rows_of.values()]


def _conflict(rows: Sequence[Row]) -> str:
    """Return how rows of one slide differ in its patient and its class; "" if they agree."""
    values_of = {name: list(dict.fromkeys(row[name] for row in rows)) for name in ("case_id", "label")}
    return "; ".join(f"{name} {' and '.join(values)}" for name, values in values_of.items() if len(values) > 1)


def stratified(table: LabelTable, task: Task, level: Level) -> tuple[list[Finding], LabelTable, Sequence[str]]:
    """Return the findings about the targets of a task, the table with the rows that have one, labelled by its strata,
    and the names of the strata.
    """
    rows, unusable = [], {}
    targets = []
    for row in table.rows:
        try:
            targets.append(task.target(row))
            rows.append(row)
        except ValueError:
            unusable[row["wsi_id"]] = [row[name] for name in task.columns]
    findings = []
    if unusable:
        names = first_few([f"{wsi_id} ({', '.join(map(repr, cells))})" for wsi_id, cells in unusable.items()])
        message = f"{plural(len(unusable), 'slide')} with a {task.no_target}: {names}"
        message += "; mend the table, or train with --allow unknown"
        findings.append(Finding(level, "table", message, {"slides": unusable}))
    try:
        if not rows:
            raise ValueError("no row has a target that can be used")
        task = task.of_cohort(np.array(targets), [row["case_id"] for row in rows])
    except ValueError as error:
        unstratified = [row | {"label": "all"} for row in table.rows]
        return [*findings, Finding("error", "table", str(error))], replace(table, rows=unstratified), ("all",)
    findings.append(Finding("info", "table", task.counts_text(np.array(targets), [row["case_id"] for row in rows])))
    strata = [task.strata_names[stratum] for stratum in task.strata(np.array(targets))]
    labelled = [row | {"label": name} for row, name in zip(rows, strata, strict=True)]
    return findings, replace(table, rows=labelled), task.strata_names


def check_labels(
    rows: Sequence[Row], classes: Sequence[str], left_out: Collection[str], level: Level, words: tuple[str, str]
) -> tuple[list[Finding], list[AuditedSlide]]:
    """Return the findings, and the slides that belong to a class; `words` are what a class and several are called."""
    rare = Counter(row["label"] for row in rows if row["label"] in left_out)
    unknown = {row["wsi_id"]: row["label"] for row in rows if row["label"] not in {*classes, *left_out}}
    slides = [AuditedSlide(row, classes.index(row["label"])) for row in rows if row["label"] in classes]
    findings = [_class_counts(slides, classes)]
    if len(set(classes)) < 2 or len(set(classes)) < len(classes):
        message = f"classes {', '.join(classes) or 'none'}; a classifier needs two different ones (--class_names)"
        findings.append(Finding("error", "table", message))
    if unknown:
        names = first_few([f"{wsi_id} ({label!r})" for wsi_id, label in unknown.items()])
        message = f"{plural(len(unknown), 'slide')} with a label that is none of {', '.join(classes)}: {names}"
        hint = labels.label_hint(unknown.values(), classes) or "mend the table, give --class_names"
        message += f"; {hint}, or train with --allow unknown"
        findings.append(Finding(level, "table", message, {"slides": unknown}))
    if rare:
        message = f"{plural(rare.total(), 'slide')} left out, of the labels {', '.join(sorted(rare))}"
        findings.append(Finding("info", "table", message, {"slides": dict(sorted(rare.items()))}))
    if not slides:
        return [*findings, Finding("error", "table", "no slide belongs to a class; check labels and classes")], slides
    return findings + _check_patients(slides, classes, words[1]), slides


def _class_counts(slides: Sequence[AuditedSlide], classes: Sequence[str]) -> Finding:
    counts = {
        name: {"slides": len(class_slides), "patients": len({slide.case_id for slide in class_slides})}
        for name, class_slides in by_class(slides, classes).items()
    }
    message = class_counts([(slide.label, slide.case_id) for slide in slides], classes)
    return Finding("info", "table", message, counts)


def _check_patients(slides: Sequence[AuditedSlide], classes: Sequence[str], word: str) -> list[Finding]:
    per_patient = Counter(slide.case_id for slide in slides)
    spread = quartiles(per_patient.values())
    message = f"slides per patient: {spread['least']:g} to {spread['greatest']:g}, median {spread['median']:g}"
    findings = [Finding("info", "table", message, spread)]
    classes_of = defaultdict(set)
    for slide in slides:
        classes_of[slide.case_id].add(classes[slide.label])
    mixed = sorted(case_id for case_id, case_classes in classes_of.items() if len(case_classes) > 1)
    if mixed:
        message = f"{plural(len(mixed), 'patient')} with slides of several {word}: {first_few(mixed)}; check the labels"
        findings.append(Finding("warning", "table", message, {"patients": mixed}))
    for name, class_slides in by_class(slides, classes).items():
        patients = len({slide.case_id for slide in class_slides})
        if patients < Protocol.n_outer:
            message = f"{name} has {plural(patients, 'patient')}, fewer than the {Protocol.n_outer} outer folds"
            findings.append(Finding("warning", "table", f"{message}; add patients, or lower --n_outer"))
    return findings


def check_splits(splits: Sequence[NamedSplit], case_of: Mapping[str, str], wsi_ids: Sequence[str]) -> list[Finding]:
    ids_of = [{wsi_id for ids in split.slides.values() for wsi_id in ids} for split in splits]
    split_ids: set[str] = set().union(*ids_of)
    strangers = sorted(split_ids - case_of.keys())
    # The barcode of a slide that is not in the table gives its patient, who may be in the table.
    case_of = dict(case_of) | {wsi_id: tcga_case(wsi_id) or wsi_id for wsi_id in strangers}
    crossing: dict[str, list[str]] = defaultdict(list)
    absent: dict[str, list[str]] = defaultdict(list)
    for split, ids in zip(splits, ids_of, strict=True):
        for case, names in shared_cases(split.slides, case_of).items():
            crossing[case].append(f"{' and '.join(names)} of {split.name}")
        for wsi_id in wsi_ids:
            if wsi_id not in ids:
                absent[wsi_id].append(split.name)
    findings = []
    if crossing:
        cases = [
            f"{case} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
            for case, names in crossing.items()
        ]
        message = f"{plural(len(crossing), 'patient')} on both sides of a split: {first_few(cases)}; split by patient"
        findings.append(Finding("error", "splits", message, {"patients": crossing}))
    elif not strangers:
        findings.append(
            Finding("ok", "splits", f"no patient is on both sides of any of {plural(len(splits), 'split')}")
        )
    if strangers:
        all_unknown = len(strangers) == len(split_ids)
        message = f"{plural(len(strangers), 'slide')} of the splits not in the table: {first_few(strangers)}"
        message += "; none is, so that nothing was checked: write the ids as the table does" if all_unknown else ""
        findings.append(Finding("error" if all_unknown else "warning", "splits", message, {"slides": strangers}))
    if absent:
        message = f"{plural(len(absent), 'slide')} in no part of one or more splits: {first_few(list(absent))}"
        findings.append(Finding("warning", "splits", message, {"slides": absent}))
    return findings
