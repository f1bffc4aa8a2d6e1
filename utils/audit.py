"""Check a cohort before training on it: its label table, feature files, splits and possible shortcuts.

uv run python -m utils.audit --dataset lung
uv run python -m utils.audit --labels_csv labels.csv --features_dir features/ --splits splits/ --json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.bags.settings import CohortFiles
from utils.core import cli
from utils.core.errors import ConfigError
from utils.core.settings import option


@dataclass(frozen=True, kw_only=True)
class Audit(CohortFiles):
    """The cohort that `python -m utils.audit` checks."""

    dataset: str | None = option(None, "name of the cohort, as for train.py (not needed with --labels_csv)")
    splits: Path | None = option(
        None,
        "splits to check: a splits.json of train.py, a splits_<k>.csv of CLAM or MAD-MIL, or a folder of those",
        metavar="FILE|DIR",
    )
    json: bool = option(False, "print one JSON object instead of text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is None and self.labels_csv is None:
            raise ConfigError("give --dataset (a cohort's name) or --labels_csv (its table)")


_FLAGS = {"cohort": Audit}
if __name__ == "__main__":
    cli.begin(str(__doc__), _FLAGS)

import json
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils.auditing.feature_files import check_bags, check_content, check_files, check_recipes, check_scale
from utils.auditing.findings import AuditedBag, AuditedSlide, Finding, Level
from utils.auditing.label_table import (
    check_columns,
    check_groups,
    check_ids,
    check_labels,
    check_names,
    check_splits,
    stratified,
)
from utils.auditing.shortcuts import check_confounding
from utils.auditing.table_columns import check_table_columns
from utils.bags import labels
from utils.bags.feature_folder import FeatureFolder
from utils.bags.label_table import LabelTable, Row, read_table
from utils.bags.settings import CohortFiles
from utils.core.cohorts import cohort_classes
from utils.core.errors import plural
from utils.learning.split_files import read_splits, unused_split
from utils.tasks.task import Task


def main() -> None:
    (settings,) = cli.parse(str(__doc__), _FLAGS)
    findings = audit_cohort(settings)
    print(as_json(findings) if settings.json else f"{as_text(findings)}\n{closing_text(settings, findings)}")
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)


def closing_text(settings: Audit, findings: Sequence[Finding]) -> str:
    """Return how long the audit took and what to do next."""
    if any(finding.level == "error" for finding in findings):
        return f"Took {cli.took()}. Mend the errors, then audit again."
    flags = shlex.join(["--dataset", settings.dataset or "NAME", *cli.given_flags(settings, ("dataset", "json"))])
    return f"Took {cli.took()}. Next:\n\n  uv run train.py --mil LiteMIL {flags} --dry_run"


def audit_cohort(settings: Audit) -> list[Finding]:
    """Audit the cohort of a command line, with the classes of a known cohort and the default folders of any name."""
    task = settings.other_task()
    classes = cohort_classes(settings.dataset if task is None else None, settings.class_names)
    home = Path("datasets") / (settings.dataset or "")
    has_default = settings.dataset is not None and (home / "features").is_dir()
    return audit(
        settings.labels_csv or home / "labels.csv",
        settings.features_dir or (home / "features" if has_default else None),
        classes.class_names or None,
        settings.feat_type,
        label_names=classes.label_names,
        left_out=classes.left_out,
        splits=settings.splits,
        no_patients=settings.no_patients,
        allow=settings.allow,
        group_column=settings.group_column,
        task=task,
    )


def audit(
    labels_csv: Path,
    features_dir: Path | None = None,
    class_names: Sequence[str] | None = None,
    feat_type: str = "features",
    *,
    label_names: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
    splits: Path | None = None,
    task: Task | None = None,
    **settings: Any,
) -> list[Finding]:
    """Return all findings about a cohort, by topic. The arguments are those of MILDataset, `settings` those of
    `CohortFiles`. The strata of another `task` than classification are audited as classes are.

    Without `features_dir`, checks of feature files are skipped. Raises LabelsError for an unreadable table,
    FeatureFileError for a missing folder, SplitError for unreadable splits, ConfigError for invalid settings.
    """
    paths_and_classes: Any = {"labels_csv": labels_csv, "features_dir": features_dir, "class_names": class_names}
    files = CohortFiles(**paths_and_classes, feat_type=feat_type, **settings)
    folder = None if features_dir is None else FeatureFolder(features_dir)
    table = read_table(labels_csv, ("label",) if task is None else task.columns)
    words = ("class", "classes") if task is None else task.stratum_words
    target_findings: list[Finding] = []
    if task is not None:
        target_findings, table, class_names = stratified(table, task, _level("unknown", files.allow))
        files = replace(files, class_names=tuple(class_names))
    classes = files.class_names or labels.classes_in(table.rows, label_names=label_names, left_out=left_out)
    new_names = {old: new for old, new in (label_names or {}).items() if old not in classes}
    rows = [row | {"label": new_names.get(row["label"], row["label"])} for row in table.rows]
    table_findings, slides = _table_findings(files, table, rows, classes, left_out, words)
    findings = target_findings + table_findings
    case_of = {row["wsi_id"]: row["case_id"] for row in rows}
    if splits is not None:
        findings += check_splits(read_splits(splits, case_of), case_of, [slide.wsi_id for slide in slides])
    elif note := unused_split([slide.row for slide in slides]):
        findings.append(Finding("info", "splits", note))
    file_findings, bags = _file_findings(files, folder, slides, classes, case_of)
    columns = check_table_columns(slides, ("label",) if task is None else task.columns)
    return findings + file_findings + check_confounding(slides, bags, classes, words[0]) + columns


def _file_findings(
    files: CohortFiles,
    folder: FeatureFolder | None,
    slides: Sequence[AuditedSlide],
    classes: Sequence[str],
    case_of: Mapping[str, str],
) -> tuple[list[Finding], list[AuditedBag]]:
    """Return the findings about the feature files, and what is in them; nothing is, without a folder."""
    if folder is None:
        why = "no features folder: what needs files is skipped (--features_dir)"
        return [Finding("info", "files", why)], []
    feat_type = files.feat_type
    findings, bags = check_files(slides, folder, feat_type, case_of.keys(), _level("missing", files.allow))
    findings += check_content(bags, feat_type, classes)
    findings += [finding for finding in check_scale(bags, feat_type) if finding not in findings]
    return findings + check_bags(bags, classes) + check_recipes(bags), bags


def _table_findings(
    files: CohortFiles,
    table: LabelTable,
    rows: list[Row],
    classes: Sequence[str],
    left_out: Collection[str],
    words: tuple[str, str],
) -> tuple[list[Finding], list[AuditedSlide]]:
    """Return the findings about the label table, and its slides that can be used."""
    id_findings, rows = check_ids(rows)
    group_findings, groups = check_groups(table.path, rows, files.group_column)
    findings = [*check_columns(table, files.no_patients), *id_findings, *group_findings]
    if "spelling" not in files.allow:
        findings += check_names(table, rows, groups, files.group_column)
    if not files.class_names and (doubts := labels.doubtful_classes(classes)):
        findings.append(Finding("error", "table", doubts))
    label_findings, slides = check_labels(rows, classes, left_out, _level("unknown", files.allow), words)
    return findings + label_findings, slides


def _level(kind: str, allow: Collection[str]) -> Level:
    """Return "warning" for rows that training may leave out (`--allow`), else "error"."""
    return "warning" if kind in allow else "error"


def as_text(findings: Sequence[Finding]) -> str:
    """Return one line per finding, grouped by topic, then the number of errors and warnings."""
    lines: list[str] = []
    for topic in dict.fromkeys(finding.topic for finding in findings):
        messages = [f"  {finding.level:8} {finding.message}" for finding in findings if finding.topic == topic]
        lines += [topic, *messages, ""]
    counts = Counter(finding.level for finding in findings)
    return "\n".join([*lines, f"{plural(counts['error'], 'error')}, {plural(counts['warning'], 'warning')}"])


def as_json(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.level for finding in findings)
    content = {
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": [vars(finding) for finding in findings],
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)


if __name__ == "__main__":
    cli.run(main)
