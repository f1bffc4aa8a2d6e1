"""A label table as people write it: which column names the slide, the patient and the class."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.bags.spelling import spelled_alike
from utils.core.cli import is_flag
from utils.core.cohorts import tcga_case
from utils.core.errors import LabelsError, did_you_mean, first_few, plural
from utils.core.placeholders import is_placeholder
from utils.core.table_headers import DELIMITERS, SLIDE_NAMES, plain_header

Row = dict[str, str]

EXPECTED = "expected case_id,wsi_id,label"
# Other names of our columns, without case, blanks and separators.
_PATIENT = (
    "caseid case cases caseno casenumber casename casesubmitterid submitterid patientid patient patients patientname "
    "patientno patientnumber patientcode patientbarcode patientuid bcrpatientbarcode patid pat pid ptid ptno mrn "
    "subjectid subject subjectno participantid participant donorid donor individual individualid person personid",
)
_LABEL = ("label labels class classlabel slidelabel target groundtruth diagnosis subtype category oncotreecode y",)
_ALIASES = {"case_id": _PATIENT, "wsi_id": SLIDE_NAMES, "label": _LABEL}
# Columns with such names, and slides with a common beginning, may mean patients of at most this many slides each.
_MAY_NAME_PATIENTS = re.compile(r"pat|case|subj|person|donor|indiv|mrn|(^|[\W_])(id|no|nr|number)$|id$", re.IGNORECASE)
_MOST_SLIDES_EACH = 8
# Columns of predictions.csv, where a target of the same name would be lost.
_OF_PREDICTIONS = {"wsi_id", "case_id", "predicted", "fold", "repeat", "group", "risk", "high_risk"}


@dataclass(frozen=True)
class LabelTable:
    """The rows of a label table, as text, each with `wsi_id`, `case_id` and, if labels are predicted, `label`, whatever
    its columns are called.

    `patients_from` says where the patients are from; None if each slide is taken as a patient. `patient_columns` are
    further columns that name patients; `notes` say how ambiguous columns and separators were read.
    """

    path: Path
    rows: list[Row]
    patients_from: str | None
    patient_columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OneInSeveral:
    """Names in a table that seem to mean the same: their `kind` ("patient"), the `names`, and why."""

    kind: str
    names: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"{self.kind} {' and '.join(map(repr, self.names))} ({self.why})"


def read_table(csv_path: Path | str, targets: Sequence[str] = ("label",)) -> LabelTable:
    """Read a table of labels, whose columns `targets` hold what is predicted. A column of labels may be called
    otherwise, see `_LABEL`. Raises LabelsError if it cannot be read, lacks one, or its columns are ambiguous.

    Without a column of patients, these are taken from the TCGA barcodes, if all slides have one.
    """
    path = Path(csv_path)
    lines, notes = _read_lines(path, targets)
    columns, *values = lines or [[]]
    _check_columns(path, columns, targets)
    _check_rows(path, columns, values)
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    ours: dict[str, str] = {}
    for name in _ALIASES:
        if name == "label" and name not in targets:
            continue
        column, note = _column_of(path, name, columns, rows)
        notes += [note] if note else []
        if column:
            ours[name] = column
    rows = [row | {name: row[column] for name, column in ours.items()} for row in rows]
    if "case_id" in ours:
        further = [name for name in _alias_columns("case_id", columns) if name not in ("case_id", ours["case_id"])]
        return LabelTable(path, rows, f"the column {ours['case_id']}", tuple(further), tuple(notes))
    barcodes = [tcga_case(row["wsi_id"]) for row in rows]
    if all(barcodes):
        rows = [row | {"case_id": case or ""} for row, case in zip(rows, barcodes, strict=True)]
        notes.append(f"no column of patients; the TCGA barcodes give {plural(len(set(barcodes)), 'patient')}")
        return LabelTable(path, rows, "the TCGA barcodes of the slides", (), tuple(notes))
    return LabelTable(path, [row | {"case_id": row["wsi_id"]} for row in rows], None, (), tuple(notes))


def unknown_patients(table: LabelTable) -> str:
    """Return the warning for a table without patients, with an example of slides that look like one patient's."""
    return f"{table.path}: no column says which slides are one patient's{_look_shared(table.rows)}"


def doubtful_patients(rows: Sequence[Row]) -> str:
    """Return the warning if every slide has a `case_id` of its own although some look like one patient's, else ""."""
    patients = {row["case_id"] for row in rows}
    looks = _look_shared(rows)
    if not looks or len(patients) < len({row["wsi_id"] for row in rows}):
        return ""
    return f"every slide has a patient of its own{looks}"


def _look_shared(rows: Sequence[Row]) -> str:
    """Say which slides look like one patient's, by a column or the beginning of their names; "" if none do."""
    slides = {row["wsi_id"] for row in rows}
    columns = {name: {row[name] for row in rows} for name in rows[0] if _MAY_NAME_PATIENTS.search(name)}
    columns = {name: values for name, values in columns.items() if name not in _ALIASES}
    grouping = [name for name, values in columns.items() if _are_patients(len(values), len(slides))]
    if grouping:
        return f" (perhaps the column {grouping[0]} does)"
    families: dict[str, list[str]] = {}
    for slide in slides:
        families.setdefault(re.sub(r"[\s_.\-]*[^\s_.\-]*$", "", slide), []).append(slide)
    shared = [sorted(ids) for family, ids in sorted(families.items()) if family and len(ids) > 1]
    if shared and _are_patients(len(families), len(slides)):
        return f" ({' and '.join(shared[0][:2])} look like one patient's)"
    return ""


def _are_patients(groups: int, slides: int) -> bool:
    """Return whether the groups may be patients by their number: a few slides each."""
    return 1 < groups < slides <= groups * _MOST_SLIDES_EACH


def names_slide_or_patient(column: str) -> bool:
    """Return whether a column is called as one of slides or of patients is."""
    kinds = [*_ALIASES["wsi_id"], *_ALIASES["case_id"]]
    return any(plain_header(column) in aliases.split() for aliases in kinds)


def several_names(
    rows: Sequence[Row], groups: Sequence[str], patient_columns: Sequence[str] = (), group_column: str | None = None
) -> list[OneInSeveral]:
    """Return the slides, patients and groups that seem to be in `rows` under several names.

    `groups` is the group of each row, which no split divides: several names of one patient do no harm within a group.
    """
    doubts = [
        OneInSeveral("slide", names, "differ in spelling only") for names in spelled_alike(_column(rows, "wsi_id"))
    ]
    groups_of: dict[str, set[str]] = {}
    for row, group in zip(rows, groups, strict=True):
        groups_of.setdefault(row["case_id"], set()).add(group)
    patients = [OneInSeveral("patient", names, "differ in spelling only") for names in spelled_alike(groups_of)]
    barcodes = [tcga_case(row["wsi_id"]) or tcga_case(row["case_id"]) or "" for row in rows]
    patients += _joined(rows, barcodes, "are of the barcode")
    for column in patient_columns:
        patients += _joined(
            rows, _column(rows, column), f"share the {column}",
            f": --group_column {column} keeps them together" if is_flag("group_column") else "",
        )  # fmt: skip
    for doubt in patients:
        is_divided = len(set().union(*(groups_of[name] for name in doubt.names))) > 1
        if is_divided and doubt.names not in [earlier.names for earlier in doubts]:
            doubts.append(doubt)
    if group_column is not None:
        doubts += [OneInSeveral(group_column, names, "differ in spelling only") for names in spelled_alike(groups)]
    return doubts


def _joined(rows: Sequence[Row], keys: Sequence[str], why: str, cure: str = "") -> list[OneInSeveral]:
    """Return the patients of different names whose rows share a key, such as a barcode."""
    names_of: dict[str, dict[str, None]] = {}
    for row, key in zip(rows, keys, strict=True):
        if not is_placeholder(key):
            names_of.setdefault(key, {})[row["case_id"]] = None
    return [
        OneInSeveral("patient", tuple(names), f"{why} {key}{cure}") for key, names in names_of.items() if len(names) > 1
    ]


def _column(rows: Sequence[Mapping[str, str]], name: str) -> list[str]:
    return [row[name] for row in rows]


def _alias_columns(name: str, columns: Sequence[str]) -> list[str]:
    """Return the columns whose headers are aliases of `name`, of the first set of aliases that occurs."""
    for aliases in _ALIASES[name]:
        candidates = [column for column in columns if plain_header(column) in aliases.split()]
        if candidates:
            return candidates
    return []


def _column_of(path: Path, name: str, columns: Sequence[str], rows: Sequence[Row]) -> tuple[str | None, str | None]:
    """Return the column that is our `name`, with a note if it is called something else; None if there is none."""
    if name in columns:
        return name, None
    candidates = _alias_columns(name, columns)
    if not candidates:
        return None, None
    first = candidates[0]
    if any(not _are_equivalent(rows, first, column) for column in candidates[1:]):
        raise LabelsError(
            f"{path}: the columns {first_few(candidates)} could each be {name}; rename the right one to {name}"
        )
    return first, f"the column {first} is taken as {name}"


def _are_equivalent(rows: Sequence[Row], first: str, second: str) -> bool:
    """Return whether the values of two columns map one to one."""
    pairs = {(row[first], row[second]) for row in rows}
    return len(pairs) == len({pair[0] for pair in pairs}) == len({pair[1] for pair in pairs})


def _check_columns(path: Path, columns: Sequence[str], targets: Sequence[str]) -> None:
    needed = ("wsi_id", "label") if "label" in targets else ("wsi_id",)
    missing = [name for name in needed if not _alias_columns(name, columns)]
    if missing:
        listed = ", ".join(columns) or "nothing"
        holds = {"wsi_id": "the slides' names", "label": "the classes"}
        cure = " and ".join(f"the column that holds {holds[name]} to {name}" for name in missing)
        expected = EXPECTED if "label" in targets else f"expected case_id,wsi_id,{','.join(targets)}"
        raise LabelsError(f"{path}: no column {' and '.join(missing)}; found {listed}, {expected}; rename {cure}")
    taken = [name for name in targets if name in _OF_PREDICTIONS]
    if taken:
        raise LabelsError(
            f"{path}: {taken[0]} is also a column of predictions.csv; give the column to predict another name"
        )
    absent = [name for name in targets if name != "label" and name not in columns]
    if absent:
        near = did_you_mean(absent[0], columns)
        raise LabelsError(f"{path}: no column {' and '.join(absent)} to predict; found {', '.join(columns)}{near}")
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise LabelsError(f"{path}: two columns are called {' and '.join(twice)}; keep one of each")


def _check_rows(path: Path, columns: Sequence[str], values: Sequence[Sequence[str]]) -> None:
    if not values:
        raise LabelsError(f"{path}: no rows; expected one row per slide")
    uneven = [repr(",".join(row)) for row in values if len(row) != len(columns)]
    if uneven:
        raise LabelsError(
            f"{path}: {plural(len(uneven), 'row')} with more or fewer fields than the header's {len(columns)}: "
            f"{first_few(uneven)}; quote a field that holds a comma"
        )


def _read_lines(path: Path, targets: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return the stripped fields of each line that is not blank, and a note if they are not separated by commas."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        declared = re.match(r"sep=(.)\r?\n", text)  # a spreadsheet's own first line
        text = text[declared.end() :] if declared else text
        delimiter = declared[1] if declared else _delimiter_of(text, targets)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [[value.strip() for value in line] for line in reader]
    except FileNotFoundError:
        raise LabelsError(
            f"{path}: no such file; expected a table with the columns case_id,wsi_id,{','.join(targets)}"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as failure:
        raise LabelsError(f"{path}: not readable as a CSV table ({failure}); save it as CSV, UTF-8") from failure
    notes = [] if delimiter == "," else [f"its fields are taken as separated by {DELIMITERS.get(delimiter, delimiter)}"]
    return [line for line in lines if any(line)], notes


def _delimiter_of(text: str, targets: Sequence[str]) -> str:
    """Return the delimiter: a comma, unless only another mark splits the header into the columns we need."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    for delimiter in DELIMITERS:
        columns = [name.strip().strip('"') for name in header.split(delimiter)]
        found = [name in columns or (name == "label" and _alias_columns(name, columns)) for name in targets]
        if _alias_columns("wsi_id", columns) and all(found):
            return delimiter
    return ","
