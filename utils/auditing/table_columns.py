"""Audit the other columns of the label table: which of them, such as age or stage, predict the label."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict

import numpy as np

from utils.auditing.findings import AuditedSlide, Finding
from utils.auditing.shortcuts import NEAR_PERFECT_AUC, ORIGIN_COLUMNS
from utils.bags.described_columns import Column
from utils.core.errors import first_few, plural
from utils.core.runtime import progress
from utils.evaluation.confounding import PERMUTATIONS, Confounding, Value, confounding
from utils.evaluation.paired_tests import holm

_LEVEL = 0.05  # of the p that are corrected for the number of columns
_PERMUTATIONS_EACH = 40  # for each column at least, so that a corrected p can be that small
_MOST_NAMED = 5
_OURS = {"case_id", "wsi_id", "label"}


def check_table_columns(slides: Sequence[AuditedSlide], targets: Collection[str]) -> list[Finding]:
    """Return one finding about all columns that are not the label or a target, nor looked at as an origin; one more
    about those that cannot be looked at; and a warning for each that gives the label away.
    """
    cases = np.array([slide.case_id for slide in slides])
    columns, faults = _columns(slides, cases, targets)
    labels = np.array([slide.label for slide in slides], dtype=int)
    permutations = max(PERMUTATIONS, _PERMUTATIONS_EACH * len(columns))
    measured = {}
    for column in progress(columns, "Predicting the label by the table", unit="column", leave=False):
        result = confounding(_values(column), labels, cases, permutations=permutations)
        if result is not None:
            measured[column.name] = result
    findings = _report(measured) if measured else []
    if faults:
        about = "; ".join(f"{name} {fault}" for name, fault in faults.items())
        message = f"not looked at, {plural(len(faults), 'column')} of the table: {about}"
        findings.append(Finding("info", "confounding", message, {"columns": faults}))
    return findings


def _columns(
    slides: Sequence[AuditedSlide], cases: np.ndarray, targets: Collection[str]
) -> tuple[list[Column], dict[str, str]]:
    """Return the columns to look at, and why others cannot be. One that is the label by another name is neither."""
    columns, faults = [], {}
    for name in slides[0].row if slides else ():
        cells = [slide.row[name] for slide in slides]
        if name in {*_OURS, *targets} or name.lower() in ORIGIN_COLUMNS:
            continue
        if any(cells == [slide.row[ours] for slide in slides] for ours in _OURS):
            continue
        column = Column.of(name, cells)
        if fault := column.fault(cases):
            faults[name] = fault
        else:
            columns.append(column)
    return columns, faults


def _values(column: Column) -> list[Value]:
    """Return the values with None where unknown."""
    known = column.is_known.tolist()
    return [value if is_known else None for value, is_known in zip(column.values.tolist(), known, strict=True)]


def _report(measured: dict[str, Confounding]) -> list[Finding]:
    adjusted = dict(zip(measured, holm([result.p_value for result in measured.values()]), strict=True))
    details = {name: asdict(result) | {"p_holm": adjusted[name]} for name, result in measured.items()}
    telling = {name: result for name, result in measured.items() if (adjusted[name] or 0) <= _LEVEL}
    by_auc = sorted(telling, key=lambda name: -telling[name].auc)
    texts = {name: f"{name} (AUC {telling[name].auc:.2f}, p {adjusted[name]:.3f})" for name in by_auc}
    looked_at = f"{plural(len(measured), 'other column')} of the table"
    corrected = "by patient-grouped cross-validation, with p corrected for their number"
    if not telling:
        message = f"no sign that {looked_at} predict the label ({corrected})"
        return [Finding("ok", "confounding", message, {"columns": details})]
    names = first_few(list(texts.values()), most=_MOST_NAMED)
    message = f"of {looked_at}, {len(telling)} alone predict the label {corrected}: {names}"
    # Not those of which it is doubtful below, nor names that the flag would take as two.
    usable = [name for name in by_auc if telling[name].auc < NEAR_PERFECT_AUC and "," not in name][:_MOST_NAMED]
    if usable:
        message += f"; --covariates {','.join(usable)} tells what slides add to those known before the label is"
    findings = [Finding("info", "confounding", message, {"columns": details})]
    for name in by_auc:
        if telling[name].auc >= NEAR_PERFECT_AUC:
            message = f"the column {texts[name]} alone gives the label away; is it known before the label is?"
            findings.append(Finding("warning", "confounding", message, details[name]))
    return findings
