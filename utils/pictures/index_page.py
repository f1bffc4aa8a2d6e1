"""Write the index page of a folder of predictions: a table of slides with their maps, to sort and filter."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from utils.core.errors import plural
from utils.core.files import set_aside
from utils.core.html_page import write_page
from utils.core.runtime import log, versions
from utils.core.text import NOTICE

INDEX = "index.html"
_TEMPLATE = Path(__file__).with_name("index_page.html")
_GENERATOR = "LiteMIL predictions"
MOST_EMBEDDED_BYTES = 20_000_000  # of all thumbnails that are embedded; larger ones stay files beside the page
_MOST_CLASSES = 6  # with a column of probabilities each


@dataclass(frozen=True)
class IndexRow:
    """A slide on the page. Its name links to `page`, relative to the index; `thumbnail` is a picture of its map;
    `label` and `case_id` are "" if unknown; `fold` is for out-of-fold predictions; `values` are probabilities if
    `is_classified`, and `calibrated` the calibrated ones, if there are some.
    """

    slide: str
    predicted: str
    values: Mapping[str, float]
    patches: int
    page: str
    label: str = ""
    case_id: str = ""
    seen_in_training: bool | None = None
    fold: int | None = None
    thumbnail: Path | None = None
    calibrated: Mapping[str, float] | None = None
    is_classified: bool = True

    @property
    def verdict(self) -> str:
        """ "right" or "wrong"; "" without a label, and where no class is predicted."""
        return "" if not (self.label and self.is_classified) else "right" if self.label == self.predicted else "wrong"


def write_index(path: Path, rows: Sequence[IndexRow], notes: Sequence[str]) -> None:
    """Write the page of at least one slide; `notes` say how the predictions were made.

    The page is self-contained, except for maps that are not JPEG, or take more than 20 MB. A file of the same name that
    is not such a page is renamed.
    """
    if path.exists() and f'content="{_GENERATOR}"' not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        log.warning("%s: not an index page of predictions; moved to %s", path, *set_aside(path))
    pictures = [row.thumbnail for row in rows if row.thumbnail is not None and row.thumbnail.suffix == ".jpg"]
    embed = sum(picture.stat().st_size for picture in pictures) <= MOST_EMBEDDED_BYTES
    columns = _columns(rows)
    values = {
        "generator": _GENERATOR,
        "title": f"{plural(len(rows), 'slide')} predicted",
        "summary": _summary(rows),
        "notes": notes,
        "notice": NOTICE,
        "classes": list(rows[0].values) if rows[0].is_classified else [],
        "has_labels": any(row.verdict for row in rows),
        "columns": columns,
        "rows": [_TableRow(row, _picture(row, path.parent, embed), _cells(row, columns)) for row in rows],
        "version": versions()["litemil"],
    }
    write_page(path, _TEMPLATE, values)


def _summary(rows: Sequence[IndexRow]) -> str:
    classes = Counter(row.predicted for row in rows if row.is_classified)
    counts = [", ".join(f"{classes[name]} {name}" for name in rows[0].values if classes[name])] if classes else []
    labelled = [row for row in rows if row.verdict]
    if labelled:
        correct = sum(row.label == row.predicted for row in labelled)
        counts.append(f"{correct} of {plural(len(labelled), 'labelled slide')} correct ({correct / len(labelled):.0%})")
    trained_on = sum(row.seen_in_training is True for row in rows)
    if trained_on:
        counts.append(f"{trained_on} seen in training, not independent evidence")
    return "; ".join(counts)


def _columns(rows: Sequence[IndexRow]) -> list[str]:
    """Return the names of the columns after the picture, without those that would be empty."""
    names, has_labels = list(rows[0].values), any(row.label for row in rows)
    value_columns = [] if len(names) > _MOST_CLASSES else names[-1:] if len(names) == 2 else names
    if not rows[0].is_classified:
        shown = names[:1] if len(names) > _MOST_CLASSES else names
        answers = ["slide", *shown, *(["label"] if has_labels else [])]
    else:
        answers = [
            "slide", "predicted", "probability", *(["calibrated"] if any(row.calibrated for row in rows) else []),
            *(f"p({name})" for name in value_columns), *(["label", "correct"] if has_labels else []),
        ]  # fmt: skip
    return [
        *answers,
        *(["patient"] if any(row.case_id for row in rows) else []),
        "patches",
        *(["fold"] if any(row.fold is not None for row in rows) else ["seen in training"]),
    ]  # fmt: skip


@dataclass(frozen=True)
class _TableRow:
    """A row of the table: `picture` is a path or a data URL; `cells` follow the slide's name."""

    row: IndexRow
    picture: str | None
    cells: Sequence[str]

    @property
    def page(self) -> str:
        return quote(self.row.page)


def _cells(row: IndexRow, columns: Sequence[str]) -> list[str]:
    texts = {name: f"{value:.4g}" for name, value in row.values.items()}
    if row.is_classified:
        texts = {f"p({name})": f"{value:.3f}" for name, value in row.values.items()}
        texts["probability"] = f"{row.values[row.predicted]:.3f}"
        texts["calibrated"] = f"{row.calibrated[row.predicted]:.3f}" if row.calibrated else ""
    texts |= {
        "predicted": row.predicted,
        "label": row.label,
        "correct": {"right": "yes", "wrong": "no", "": ""}[row.verdict],
        "patient": row.case_id,
        "patches": str(row.patches),
        "fold": "" if row.fold is None else str(row.fold),
        "seen in training": {True: "yes", False: "no", None: "unknown"}[row.seen_in_training],
    }
    return [texts[name] for name in columns[1:]]


def _picture(row: IndexRow, folder: Path, embed: bool) -> str | None:
    if row.thumbnail is None:
        return None
    if embed and row.thumbnail.suffix == ".jpg":
        return f"data:image/jpeg;base64,{base64.b64encode(row.thumbnail.read_bytes()).decode('ascii')}"
    return quote(row.thumbnail.relative_to(folder).as_posix())
