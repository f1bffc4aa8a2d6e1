"""What a careful reviewer would ask about a cohort before a model is trained on it.

uv run python -m utils.audit --dataset lung
uv run python -m utils.audit --labels_csv labels.csv --features_dir features/ --splits splits/ --json
"""

from dataclasses import dataclass
from pathlib import Path

from utils.bags.settings import CohortFiles
from utils.core import cli
from utils.core.errors import ConfigError
from utils.core.settings import option


@dataclass(frozen=True, kw_only=True)
class Audit(CohortFiles):
    """What `python -m utils.audit` looks at."""

    dataset: str | None = option(None, "name of the cohort, as for train.py (not needed with --labels_csv)")
    splits: Path | None = option(
        None,
        "splits to check: our splits.json, a splits_<k>.csv of CLAM or MAD-MIL, or a folder of those",
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
import math
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from utils.bags import labels
from utils.bags.feature_folder import FeatureFolder
from utils.bags.inventory import root_mean_square
from utils.bags.labels import is_plain
from utils.bags.settings import CohortFiles
from utils.bags.spelling import is_placeholder
from utils.bags.store import BagInfo, peek_bag, read_bag
from utils.bags.table import LabelTable, Row, read_table, several_names
from utils.core.cohorts import cohort_classes, tcga_case, tcga_site
from utils.core.errors import FeatureFileError, LabelsError, counted, named
from utils.core.files import digest
from utils.core.passport import Passport
from utils.core.recipe import COMPARED_FIELDS, MPP_TOLERANCE, Recipe
from utils.core.runtime import progress
from utils.evaluation.confounding import Confounding, Value, confounding, values_per_class
from utils.learning.scale import why_unusual
from utils.learning.settings import Protocol
from utils.learning.split_files import NamedSplit, read_splits, shared_cases, unused_split

Level = Literal["error", "warning", "info", "ok"]

# Columns of a label table that say where or how a slide was made.
ORIGIN_COLUMNS = ("site", "scanner", "center", "centre", "hospital", "institution", "batch")
SMALL_BAG = 10
# The features of all slides are read, or of as many as take so many bytes.
_MOST_READ = 4e9
# A field is a warning when so few shuffled cohorts reach its AUC, and it stands so far above their median.
_RARE, _NOTABLE = 0.01, 0.1
_GIVEN_AWAY = 0.9
# What is each slide's own tells slides apart, not how they were made.
_IDENTITY = ("name", "quick_hash")
# Damaged files beyond so many are counted in one line.
_MOST_LINES = 20


@dataclass(frozen=True)
class Finding:
    """One answer. An "error" makes training refuse or its results invalid, a "warning" wants a decision; `topic` is
    the question's, `details` (JSON-able) hold what the one line of `message` leaves out.
    """

    level: Level
    topic: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Slide:
    row: Row
    label: int

    @property
    def wsi_id(self) -> str:
        return self.row["wsi_id"]

    @property
    def case_id(self) -> str:
        return self.row["case_id"]


@dataclass(frozen=True)
class _Bag(_Slide):
    path: Path
    info: BagInfo


AnySlide = TypeVar("AnySlide", bound=_Slide)


@dataclass(frozen=True)
class _Field:
    """What may predict the label: a value for each slide; `column` is what `--group_column` takes, or would take if
    the table had it.
    """

    name: str
    values: list[Value]
    column: str | None = None
    in_table: bool = False


def main() -> None:
    (settings,) = cli.parse(str(__doc__), _FLAGS)
    findings = audit_cohort(settings)
    print(as_json(findings) if settings.json else f"{as_text(findings)}\n{closing_words(settings, findings)}")
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)


def closing_words(settings: Audit, findings: Sequence[Finding]) -> str:
    """Return how long the audit took and what to do next."""
    if any(finding.level == "error" for finding in findings):
        return f"Took {cli.took()}. Mend the errors, then audit again."
    flags = shlex.join(["--dataset", settings.dataset or "NAME", *cli.given_flags(settings, ("dataset", "json"))])
    return f"Took {cli.took()}. Next:\n\n  uv run train.py --mil LiteMIL {flags} --dry_run"


def audit_cohort(settings: Audit) -> list[Finding]:
    """`audit` for a command line; a known cohort brings its classes, any name its default folders."""
    classes = cohort_classes(settings.dataset, settings.class_names)
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
    no_patients: bool = False,
    allow: Collection[str] = (),
    group_column: str | None = None,
) -> list[Finding]:
    """Everything found about a cohort, in the order of the questions; the arguments are those of MILDataset.

    Without `features_dir` what needs feature files is left out. Raises LabelsError for a table that cannot be read at
    all, FeatureFileError for a missing folder, SplitError for unreadable splits, ConfigError for settings that cannot
    be.
    """
    asked = CohortFiles(
        labels_csv=labels_csv, features_dir=features_dir, class_names=class_names, feat_type=feat_type,  # type: ignore[arg-type]
        no_patients=no_patients, allow=allow, group_column=group_column,  # type: ignore[arg-type]
    )  # fmt: skip
    folder = None if features_dir is None else FeatureFolder(features_dir)
    table = read_table(labels_csv)
    classes = asked.class_names or labels.classes_in(table.rows, label_names=label_names, left_out=left_out)
    new_names = {old: new for old, new in (label_names or {}).items() if old not in classes}
    rows = [row | {"label": new_names.get(row["label"], row["label"])} for row in table.rows]

    findings = _check_columns(table, no_patients)
    more, rows = _check_ids(rows)
    findings += more
    more, groups = _check_groups(table.path, rows, group_column)
    findings += more
    if "spelling" not in allow:
        findings += _check_names(table, rows, groups, group_column)
    if not class_names and (doubts := labels.doubtful_classes(classes)):
        findings.append(Finding("error", "table", doubts))
    more, slides = _check_labels(rows, classes, left_out, _level("unknown", allow))
    findings += more
    case_of = {row["wsi_id"]: row["case_id"] for row in rows}
    if splits is not None:
        findings += _check_splits(read_splits(splits, case_of), case_of, [slide.wsi_id for slide in slides])
    elif note := unused_split([slide.row for slide in slides]):
        findings.append(Finding("info", "splits", note))
    bags: list[_Bag] = []
    if folder is None:
        findings.append(Finding("info", "files", "no features folder: what needs files is skipped (--features_dir)"))
    else:
        more, bags = _check_files(slides, folder, feat_type, case_of.keys(), _level("missing", allow))
        findings += more + _check_content(bags, feat_type, classes)
        findings += [finding for finding in _check_scale(bags, feat_type) if finding not in findings]
        findings += _check_bags(bags, classes) + _check_recipes(bags)
    return findings + _check_confounding(slides, bags, classes)


def _level(kind: str, allow: Collection[str]) -> Level:
    """How bad rows of a kind are that training leaves out where it may."""
    return "warning" if kind in allow else "error"


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, its level first, under its topic; then how many errors and warnings there are."""
    lines: list[str] = []
    for topic in dict.fromkeys(finding.topic for finding in findings):
        mine = [f"  {finding.level:8} {finding.message}" for finding in findings if finding.topic == topic]
        lines += [topic, *mine, ""]
    counts = Counter(finding.level for finding in findings)
    return "\n".join([*lines, f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}"])


def as_json(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.level for finding in findings)
    content = {
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": [vars(finding) for finding in findings],
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)


def _check_columns(table: LabelTable, no_patients: bool) -> list[Finding]:
    """How the table was read, and whether it names the patients."""
    findings = [Finding("info", "table", note) for note in table.notes]
    try:
        warning = labels.missing_patients(table, no_patients)
    except LabelsError as error:
        return [*findings, Finding("error", "table", str(error))]
    warnings = [text for text in (warning, labels.doubted_patients(table)) if text]
    return [*findings, *(Finding("warning", "table", text) for text in warnings)]


def _check_groups(path: Path, rows: Sequence[Row], group_column: str | None) -> tuple[list[Finding], list[str]]:
    """What no split divides, for each row: patients, where the column does not say."""
    try:
        return [], labels.group_rows(path, rows, group_column)
    except LabelsError as error:
        return [Finding("error", "table", str(error))], labels.group_rows(path, rows, None)


def _check_names(
    table: LabelTable, rows: Sequence[Row], groups: Sequence[str], group_column: str | None
) -> list[Finding]:
    """Slides and patients that seem to stand in the table under several names."""
    doubts = several_names(rows, groups, table.patient_columns, group_column)
    details = {"names": [asdict(doubt) for doubt in doubts]}
    return [Finding("error", "table", labels.doubtful_names(doubts), details)] if doubts else []


def _check_ids(rows: list[Row]) -> tuple[list[Finding], list[Row]]:
    """The findings, and the first row of each slide that has a usable id."""
    findings = []
    empty = [str(n) for n, row in enumerate(rows, start=1) if not row["wsi_id"] or is_placeholder(row["case_id"])]
    if empty:
        message = f"no patient (case_id) or no slide (wsi_id) in row {named(empty)} after the header; fill it in"
        findings.append(Finding("error", "table", message, {"rows": empty}))
    outside = [row["wsi_id"] for row in rows if not is_plain(row["wsi_id"])]
    if outside:
        message = f"wsi_id that would leave the features folder: {named(outside)}; give plain file stems"
        findings.append(Finding("error", "table", message, {"slides": outside}))

    rows_of: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["wsi_id"] and not is_placeholder(row["case_id"]) and is_plain(row["wsi_id"]):
            rows_of[row["wsi_id"]].append(row)
    repeated = {wsi_id: same for wsi_id, same in rows_of.items() if len(same) > 1}
    disagreements = {wsi_id: _disagreement(same) for wsi_id, same in repeated.items()}
    against = {wsi_id: what for wsi_id, what in disagreements.items() if what}
    if against:
        told = named([f"{wsi_id} ({what})" for wsi_id, what in against.items()])
        message = f"rows of one wsi_id that contradict each other: {told}; keep the right one"
        findings.append(Finding("error", "table", message, {"slides": against}))
    agreeing = [wsi_id for wsi_id, what in disagreements.items() if not what]
    if agreeing:
        message = f"wsi_id in several rows that agree: {named(agreeing)}; keep one, or train with --allow duplicate"
        findings.append(Finding("warning", "table", message, {"slides": agreeing}))
    return findings, [same[0] for same in rows_of.values()]


def _disagreement(rows: Sequence[Row]) -> str:
    """What rows of one slide say differently about its patient and its class; empty where they agree."""
    found = {name: list(dict.fromkeys(row[name] for row in rows)) for name in ("case_id", "label")}
    return "; ".join(f"{name} {' and '.join(values)}" for name, values in found.items() if len(values) > 1)


def _check_labels(
    rows: Sequence[Row], classes: Sequence[str], left_out: Collection[str], level: Level
) -> tuple[list[Finding], list[_Slide]]:
    """The findings, and the slides that belong to a class."""
    rare = Counter(row["label"] for row in rows if row["label"] in left_out)
    unknown = {row["wsi_id"]: row["label"] for row in rows if row["label"] not in {*classes, *left_out}}
    slides = [_Slide(row, classes.index(row["label"])) for row in rows if row["label"] in classes]
    findings = [_class_counts(slides, classes)]
    if len(set(classes)) < 2 or len(set(classes)) < len(classes):
        message = f"classes {', '.join(classes) or 'none'}; a classifier needs two different ones (--class_names)"
        findings.append(Finding("error", "table", message))
    if unknown:
        told = named([f"{wsi_id} ({label!r})" for wsi_id, label in unknown.items()])
        message = f"{counted(len(unknown), 'slide')} with a label that is none of {', '.join(classes)}: {told}"
        hint = labels.label_hint(unknown.values(), classes) or "mend the table, give --class_names"
        message += f"; {hint}, or train with --allow unknown"
        findings.append(Finding(level, "table", message, {"slides": unknown}))
    if rare:
        message = f"{counted(rare.total(), 'slide')} left out, of the labels {', '.join(sorted(rare))}"
        findings.append(Finding("info", "table", message, {"slides": dict(sorted(rare.items()))}))
    if not slides:
        return [*findings, Finding("error", "table", "no slide belongs to a class; check labels and classes")], slides
    return findings + _check_patients(slides, classes), slides


def _class_counts(slides: Sequence[_Slide], classes: Sequence[str]) -> Finding:
    counts = {
        name: {"slides": len(mine), "patients": len({slide.case_id for slide in mine})}
        for name, mine in _by_class(slides, classes).items()
    }
    words = labels.class_counts([(slide.label, slide.case_id) for slide in slides], classes)
    return Finding("info", "table", words, counts)


def _check_patients(slides: Sequence[_Slide], classes: Sequence[str]) -> list[Finding]:
    per_patient = Counter(slide.case_id for slide in slides)
    spread = _quartiles(per_patient.values())
    told = f"slides per patient: {spread['least']:g} to {spread['greatest']:g}, median {spread['median']:g}"
    findings = [Finding("info", "table", told, spread)]
    classes_of = defaultdict(set)
    for slide in slides:
        classes_of[slide.case_id].add(classes[slide.label])
    mixed = sorted(case_id for case_id, found in classes_of.items() if len(found) > 1)
    if mixed:
        message = f"{counted(len(mixed), 'patient')} with slides of several classes: {named(mixed)}; check the labels"
        findings.append(Finding("warning", "table", message, {"patients": mixed}))
    for name, mine in _by_class(slides, classes).items():
        patients = len({slide.case_id for slide in mine})
        if patients < Protocol.n_outer:
            message = f"{name} has {counted(patients, 'patient')}, fewer than the {Protocol.n_outer} outer folds"
            findings.append(Finding("warning", "table", f"{message}; add patients, or lower --n_outer"))
    return findings


def _check_files(
    slides: Sequence[_Slide], folder: FeatureFolder, feat_type: str, wsi_ids: Collection[str], level: Level
) -> tuple[list[Finding], list[_Bag]]:
    """The findings, and the slides whose files open, with what those say of themselves."""
    bags, missing, damaged = [], [], {}
    for slide in progress(slides, "Looking at feature files", unit="slide", leave=False):
        try:
            folder.check_unique([slide.wsi_id])
            path = folder.find(slide.wsi_id)
            if path is None:
                missing.append(slide.wsi_id)
            else:
                bags.append(_Bag(slide.row, slide.label, path, peek_bag(path, feat_type)))
        except (FeatureFileError, LabelsError) as error:
            damaged[slide.wsi_id] = str(error)
    findings = [
        Finding("error", "files", reason, {"slide": wsi_id}) for wsi_id, reason in list(damaged.items())[:_MOST_LINES]
    ]
    if len(damaged) > _MOST_LINES:
        message = f"{len(damaged) - _MOST_LINES} more files with such faults (--json names them)"
        findings.append(Finding("error", "files", message, {"slides": damaged}))
    if missing:
        near = labels.near_ids(missing, lambda: folder.files)
        names = named([labels.missed_id(wsi_id, near) for wsi_id in missing])
        message = f"{counted(len(missing), 'slide')} without a feature file in {folder.path}: {names}"
        message += f"; {labels.id_hint(near) or 'extract them'}"
        message += ", or train with --allow missing" if len(missing) < len(slides) else ""
        findings.append(Finding(level, "files", message, {"slides": missing}))
    if slides and not findings:
        findings = [Finding("ok", "files", f"{counted(len(slides), 'slide')}, each with a feature file that opens")]
    rowless = [file.name for wsi_id, files in folder.files.items() if wsi_id not in wsi_ids for file in files]
    if rowless:
        message = f"{counted(len(rowless), 'feature file')} without a row in the table: {named(rowless)}"
        findings.append(Finding("info", "files", message, {"files": rowless}))
    return findings, bags


def _check_content(bags: Sequence[_Bag], feat_type: str, classes: Sequence[str]) -> list[Finding]:
    """Slides whose features are the same numbers; only files alike in size are read."""
    alike = Counter((bag.info.num_instances, bag.info.dim) for bag in bags)
    suspects = [bag for bag in bags if alike[bag.info.num_instances, bag.info.dim] > 1]
    findings: list[Finding] = []
    same: dict[str, list[_Bag]] = defaultdict(list)
    for bag in progress(suspects, "Comparing bags of one size", unit="slide", leave=False):
        try:
            same[_content_digest(bag.path, feat_type)].append(bag)
        except FeatureFileError as error:
            findings.append(Finding("error", "files", str(error), {"slide": bag.wsi_id}))
    copies = [group for group in same.values() if len(group) > 1]
    for group in copies:
        across = len({bag.case_id for bag in group}) > 1 or len({bag.label for bag in group}) > 1
        what = "the same features under several patients or labels" if across else "the same features more than once"
        told = named([f"{bag.wsi_id} ({bag.case_id}, {classes[bag.label]})" for bag in group])
        details = {"slides": [bag.wsi_id for bag in group]}
        findings.append(Finding("error" if across else "warning", "content", f"{what}: {told}; keep one", details))
    if bags and not copies:
        findings.append(Finding("ok", "content", "no two slides have the same features", {"read": len(suspects)}))
    return findings


def _content_digest(path: Path, feat_type: str) -> str:
    features = read_bag(path, feat_type).features
    with np.errstate(over="ignore"):  # one precision for all, so that a copy stored in another is found
        half = features.astype(np.float16)
    told = half if np.isfinite(half).all() else features
    return digest(str(features.shape), told.tobytes())


def _check_scale(bags: Sequence[_Bag], feat_type: str) -> list[Finding]:
    """Whether features can be read, and are of the scale that models are initialised for."""
    findings, squares = [], []
    every = max(1, math.ceil(sum(bag.info.nbytes for bag in bags) / _MOST_READ))
    for bag in progress(bags[::every], "Reading features", unit="slide", leave=False):
        try:
            squares.append(root_mean_square(torch.from_numpy(read_bag(bag.path, feat_type).features)))
        except FeatureFileError as error:
            findings.append(Finding("error", "files", str(error), {"slide": bag.wsi_id}))
    if not squares:
        return findings
    median = float(np.median(squares))
    of = counted(len(squares), "slide") + (f"; of {len(bags)}, others were not read" if every > 1 else "")
    details = {"rms": median, "read": len(squares)}
    why = why_unusual(np.array(squares), bags[0].info.dim)
    if why is None:
        message = f"the features' root mean square is {median:.3g} (median of {of}), as models expect"
        return [*findings, Finding("ok", "scale", message, details)]
    message = f"{why} ({of}); train standardises them unless told --standardize off"
    return [*findings, Finding("warning", "scale", message, details)]


def _check_bags(bags: Sequence[_Bag], classes: Sequence[str]) -> list[Finding]:
    findings = []
    for name, mine in _by_class(bags, classes).items():
        if mine:
            spread = _quartiles(bag.info.num_instances for bag in mine)
            told = f"{spread['least']:.0f} to {spread['greatest']:.0f} patches a slide, median {spread['median']:.0f}"
            middle = f"the middle half {spread['lower_quartile']:.0f} to {spread['upper_quartile']:.0f}"
            findings.append(Finding("info", "bags", f"{name}: {told}, {middle}", {"class": name} | spread))
    small = {bag.wsi_id: bag.info.num_instances for bag in bags if bag.info.num_instances < SMALL_BAG}
    if small:
        told = named([f"{wsi_id} ({size})" for wsi_id, size in small.items()])
        message = (
            f"{counted(len(small), 'slide')} of fewer than {SMALL_BAG} patches: {told}; look at their tissue masks"
        )
        findings.append(Finding("warning", "bags", message, {"slides": small}))
    return findings


def _check_recipes(bags: Sequence[_Bag]) -> list[Finding]:
    findings = []
    widths = _differing({bag.wsi_id: bag.info.dim for bag in bags})
    if widths:
        message = f"features of different widths: {_told(widths)}; extract all slides with one backbone"
        findings.append(Finding("error", "recipe", message, {"slides": widths}))
    recorded = {bag.wsi_id: bag.info.passport for bag in bags if bag.info.passport}
    for name in _fields(passport.recipe.as_dict() for passport in recorded.values()):
        values = _differing({wsi_id: passport.recipe[name] for wsi_id, passport in recorded.items()})
        if values:
            encodes = name in COMPARED_FIELDS
            remedy = "extract all slides with one recipe" if encodes else "make sure that this is meant"
            message = f"{name} differs: {_told(values)}; {remedy}"
            findings.append(Finding("error" if encodes else "warning", "recipe", message, {"slides": values}))
    known = [passport.slide.get("mpp_delivered") for passport in recorded.values()]
    mpps = [mpp for mpp in known if mpp is not None]
    if mpps and max(mpps) > min(mpps) * (1 + MPP_TOLERANCE):
        message = f"patches were read at {min(mpps):.4g} to {max(mpps):.4g} um/px, more than {MPP_TOLERANCE:.0%} apart"
        findings.append(Finding("warning", "recipe", f"{message}; extract all slides at one resolution"))
    findings += _check_unknown_mpp(recorded)
    if recorded and not findings:
        findings.append(Finding("ok", "recipe", f"{counted(len(recorded), 'slide')} recorded as made in one way"))
    if len(recorded) < len(bags):
        message = f"{len(bags) - len(recorded)} of {counted(len(bags), 'slide')} without a record of how they were made"
        findings.append(Finding("info", "recipe", message))
    return findings


def _check_unknown_mpp(recorded: Mapping[str, Passport]) -> list[Finding]:
    """Slides of which nobody knows how large their patches are: at one pixel size they may show different scales."""
    unknown = [wsi_id for wsi_id, passport in recorded.items() if passport.slide.get("mpp_delivered") is None]
    if not unknown:
        return []
    message = (
        f"{counted(len(unknown), 'slide')} of {len(recorded)} whose um/px is not known: {named(unknown)}; their "
        "patches may show another magnification than the others', so extract them with --slides_csv, or with "
        "--slide_mpp if it is the same for all"
    )
    return [Finding("warning", "recipe", message, {"slides": unknown})]


def _check_splits(splits: Sequence[NamedSplit], case_of: Mapping[str, str], wsi_ids: Sequence[str]) -> list[Finding]:
    ids = {wsi_id for split in splits for part in split.parts.values() for wsi_id in part}
    strangers = sorted(ids - case_of.keys())
    # A slide that the table does not know may be a known patient's, and a barcode tells whose.
    case_of = dict(case_of) | {wsi_id: tcga_case(wsi_id) or wsi_id for wsi_id in strangers}
    crossing: dict[str, list[str]] = defaultdict(list)
    absent: dict[str, list[str]] = defaultdict(list)
    for split in splits:
        for case, names in shared_cases(split.parts, case_of).items():
            crossing[case].append(f"{' and '.join(names)} of {split.name}")
        held = {wsi_id for ids in split.parts.values() for wsi_id in ids}
        for wsi_id in wsi_ids:
            if wsi_id not in held:
                absent[wsi_id].append(split.name)
    findings = []
    if crossing:
        more = {case: f" and {len(places) - 1} more" if len(places) > 1 else "" for case, places in crossing.items()}
        told = [f"{case} ({places[0]}{more[case]})" for case, places in crossing.items()]
        message = f"{counted(len(crossing), 'patient')} on both sides of a split: {named(told)}; split by patient"
        findings.append(Finding("error", "splits", message, {"patients": crossing}))
    elif not strangers:
        findings.append(
            Finding("ok", "splits", f"no patient is on both sides of any of {counted(len(splits), 'split')}")
        )
    if strangers:
        none_known = len(strangers) == len(ids)
        message = f"{counted(len(strangers), 'slide')} of the splits not in the table: {named(strangers)}"
        message += "; none is, so that nothing was checked: write the ids as the table does" if none_known else ""
        findings.append(Finding("error" if none_known else "warning", "splits", message, {"slides": strangers}))
    if absent:
        message = f"{counted(len(absent), 'slide')} in no part of one or more splits: {named(list(absent))}"
        findings.append(Finding("warning", "splits", message, {"slides": absent}))
    return findings


def _check_confounding(slides: Sequence[_Slide], bags: Sequence[_Bag], classes: Sequence[str]) -> list[Finding]:
    labels = np.array([slide.label for slide in slides], dtype=int)
    cases = np.array([slide.case_id for slide in slides])
    findings = []
    for nuisance in progress(
        _nuisances(slides, bags), "Predicting the label without tissue", unit="field", leave=False
    ):
        result = confounding(nuisance.values, labels, cases)
        if result is None:
            message = f"{nuisance.name}: one value or one class only, nothing to test"
            findings.append(Finding("info", "confounding", message))
        else:
            findings.append(_judged(nuisance, result, slides, classes))
    if not findings:
        message = "no site, scanner or other origin is known, nor a bag's size: nothing to test"
        findings.append(Finding("info", "confounding", message))
    return findings


def _judged(nuisance: _Field, result: Confounding, slides: Sequence[_Slide], classes: Sequence[str]) -> Finding:
    low, middle, high = result.shuffled
    numbers = (
        f"AUC {result.auc:.2f} by patient-grouped cross-validation; "
        f"with shuffled labels {low:.2f} to {high:.2f}; p {result.p_value:.3f}"
    )
    labels = np.array([slide.label for slide in slides])
    counts = dict(zip(classes, values_per_class(nuisance.values, labels, len(classes)), strict=True))
    details: dict[str, Any] = {"field": nuisance.name} | asdict(result) | {"values_per_class": counts}
    if result.p_value > _RARE:
        below = "" if result.auc >= 0.5 else "; below 0.5 is usual by chance: values that one fold has, the others lack"
        return Finding(
            "ok", "confounding", f"no sign that {nuisance.name} predicts the label ({numbers}{below})", details
        )
    if result.auc - middle < _NOTABLE:
        return Finding("info", "confounding", f"{nuisance.name} alone predicts the label a little ({numbers})", details)
    verb = "gives the label away" if result.auc >= _GIVEN_AWAY else "predicts the label"
    message = f"{nuisance.name} alone {verb} ({numbers}); {_remedy(nuisance, counts, slides)}"
    return Finding("warning", "confounding", message, details)


def _remedy(nuisance: _Field, counts: Mapping[str, int], slides: Sequence[_Slide]) -> str:
    """What helps: folds that keep each value on one side, where they can be made."""
    if nuisance.column is None:
        return "a model that does not clearly beat this AUC may have learned no more"
    fewest = min(counts, key=lambda name: counts[name])
    if counts[fewest] < Protocol.n_outer:
        have = f"{fewest} comes with {counted(counts[fewest], 'value')} of it for {Protocol.n_outer} outer folds"
        return f"{have}, so that no split can separate the two: add slides of that class from elsewhere"
    values_of: dict[str, set[Value]] = defaultdict(set)
    for slide, value in zip(slides, nuisance.values, strict=True):
        values_of[slide.case_id].add(value)
    several = sorted(case_id for case_id, values in values_of.items() if len(values - {None}) > 1)
    if several:
        return f"folds cannot keep patients and its values whole: several values in {named(several)}"
    train = f"train with --group_column {nuisance.column}"
    if not nuisance.in_table:
        return f"add it to the table as a column {nuisance.column} and {train}"
    unknown = nuisance.values.count(None)
    return f"{train}, after filling it in for {counted(unknown, 'slide')}" if unknown else train


def _nuisances(slides: Sequence[_Slide], bags: Sequence[_Bag]) -> list[_Field]:
    """The fields of the table, of the files and of their passports that may predict the label."""
    columns = [name for name in (slides[0].row if slides else {}) if name.lower() in ORIGIN_COLUMNS]
    found = [
        _Field(f"the column {name}", [_known(slide.row[name]) for slide in slides], name, True) for name in columns
    ]
    sites = [tcga_site(slide.case_id) or tcga_site(slide.wsi_id) for slide in slides]
    has_sites = 2 * sum(site is not None for site in sites) >= len(slides) > 0
    if has_sites and "site" not in [name.lower() for name in columns]:
        found.append(_Field("the TCGA site code", [*sites], "site", True))
    info_of = {bag.wsi_id: bag.info for bag in bags}
    infos = [info_of.get(slide.wsi_id) for slide in slides]
    if bags:
        found.append(_Field("bag size (patches per slide)", [info.num_instances if info else None for info in infos]))
    passports = [(info and info.passport) or Passport(Recipe()) for info in infos]
    for part, records in (
        ("recipe", [passport.recipe.as_dict() for passport in passports]),
        ("slide", [passport.slide for passport in passports]),
    ):
        for name in _fields(records):
            values = [record.get(name) for record in records]
            is_scalar = all(isinstance(value, str | int | float | None) for value in values)
            if name not in _IDENTITY and is_scalar and len(set(values) - {None}) > 1:
                is_text = any(isinstance(value, str) for value in values)
                found.append(_Field(f"the {part}'s {name}", values, name if is_text else None))
    return found


def _known(text: str) -> str | None:
    return None if is_placeholder(text) else text


def _by_class(slides: Sequence[AnySlide], classes: Sequence[str]) -> dict[str, list[AnySlide]]:
    return {name: [slide for slide in slides if slide.label == index] for index, name in enumerate(classes)}


def _fields(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({name for record in records for name in record})


def _differing(value_of: Mapping[str, Any]) -> dict[str, list[str]]:
    """The slides of each value, the commonest first; empty where all known values agree."""
    slides_of: dict[str, list[str]] = defaultdict(list)
    for wsi_id, value in value_of.items():
        if value is not None:
            slides_of[value if isinstance(value, str) else json.dumps(value, sort_keys=True)].append(wsi_id)
    if len(slides_of) < 2:
        return {}
    return dict(sorted(slides_of.items(), key=lambda item: -len(item[1])))


def _told(slides_of: Mapping[str, list[str]]) -> str:
    """Each value with its slides; those of the commonest one are only counted."""
    first, *others = slides_of.items()
    told = [f"{_short(value)} in {counted(len(slides), 'slide')} ({named(slides)})" for value, slides in others]
    return f"{_short(first[0])} in {counted(len(first[1]), 'slide')}, {', '.join(told)}"


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:12]}..."


def _quartiles(values: Iterable[int]) -> dict[str, float]:
    names = ("least", "lower_quartile", "median", "upper_quartile", "greatest")
    return dict(zip(names, np.percentile(list(values), [0, 25, 50, 75, 100]).tolist(), strict=True))


if __name__ == "__main__":
    cli.run(main)
