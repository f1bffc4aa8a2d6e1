"""The index page of a folder of predictions: a row per slide, with its map and a link, to sort and filter."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from utils.core.errors import plural
from utils.core.files import set_aside
from utils.core.page import write_page
from utils.core.runtime import log, versions
from utils.core.text import NOTICE

INDEX = "index.html"
_TEMPLATE = Path(__file__).with_name("index.html")
_GENERATOR = "LiteMIL predictions"
# Thumbnails of so many bytes together are part of the page; of more, they are files beside it.
_MOST_BYTES = 20_000_000
# With so many classes each has a column; with more, only the predicted one.
_MOST_CLASSES = 6


@dataclass(frozen=True)
class IndexRow:
    """A slide on the page. `page` is what its name links to, seen from the index; `thumbnail` a picture of its map;
    `label` and `case_id` are empty where they are not known, `fold` is None but for answers out of fold.
    """

    slide: str
    predicted: str
    probabilities: Mapping[str, float]
    patches: int
    page: str
    label: str = ""
    case_id: str = ""
    seen_in_training: bool | None = None
    fold: int | None = None
    thumbnail: Path | None = None


def write_index(path: Path, rows: Sequence[IndexRow], notes: Sequence[str]) -> None:
    """Write the page of at least one slide; `notes` say how the answers were made.

    It loads nothing from elsewhere, but for maps that are no JPEG, or more than 20 MB, which stay files beside it.

    Something else under the page's name is set aside.
    """
    if path.exists() and f'content="{_GENERATOR}"' not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        log.warning("%s: not an index page of predictions; moved to %s", path, *set_aside(path))
    pictures = [row.thumbnail for row in rows if row.thumbnail is not None and row.thumbnail.suffix == ".jpg"]
    embed = sum(picture.stat().st_size for picture in pictures) <= _MOST_BYTES
    columns = _columns(rows)
    values = {
        "generator": _GENERATOR,
        "title": f"{plural(len(rows), 'slide')} predicted",
        "summary": _summary(rows),
        "notes": notes,
        "notice": NOTICE,
        "classes": list(rows[0].probabilities),
        "has_labels": any(row.label for row in rows),
        "columns": columns,
        "lines": [_Line(row, _picture(row, path.parent, embed), _cells(row, columns)) for row in rows],
        "version": versions()["litemil"],
    }
    write_page(path, _TEMPLATE, values)


def _summary(rows: Sequence[IndexRow]) -> str:
    classes = Counter(row.predicted for row in rows)
    parts = [", ".join(f"{classes[name]} {name}" for name in rows[0].probabilities if classes[name])]
    labelled = [row for row in rows if row.label]
    if labelled:
        right = sum(row.label == row.predicted for row in labelled)
        parts.append(f"{right} of {len(labelled)} with a label as the label says ({right / len(labelled):.0%})")
    seen = sum(row.seen_in_training is True for row in rows)
    if seen:
        parts.append(f"{seen} seen in training, which prove nothing")
    return "; ".join(parts)


def _columns(rows: Sequence[IndexRow]) -> list[str]:
    """The names of the columns after the picture; those that no slide fills are left out."""
    classes = list(rows[0].probabilities)
    shown = [] if len(classes) > _MOST_CLASSES else classes[-1:] if len(classes) == 2 else classes
    return [
        "slide", "predicted", "probability", *(f"p({name})" for name in shown),
        *(["label", "correct"] if any(row.label for row in rows) else []),
        *(["patient"] if any(row.case_id for row in rows) else []),
        "patches",
        *(["fold"] if any(row.fold is not None for row in rows) else ["seen in training"]),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Line:
    """A row of the table: its `picture` is an address, or a whole JPEG as one; `cells` follow the slide's name."""

    row: IndexRow
    picture: str | None
    cells: Sequence[str]

    @property
    def page(self) -> str:
        return quote(self.row.page)

    @property
    def verdict(self) -> str:
        """ "right" or "wrong"; "" without a label."""
        return _verdict(self.row)


def _verdict(row: IndexRow) -> str:
    return "" if not row.label else "right" if row.label == row.predicted else "wrong"


def _cells(row: IndexRow, columns: Sequence[str]) -> list[str]:
    texts = {f"p({name})": f"{value:.3f}" for name, value in row.probabilities.items()} | {
        "predicted": row.predicted,
        "probability": f"{row.probabilities[row.predicted]:.3f}",
        "label": row.label,
        "correct": {"right": "yes", "wrong": "no", "": ""}[_verdict(row)],
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
