"""The index page of a folder of predictions: a row per slide, with its map and a link, to sort and filter."""

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from utils.core.errors import counted
from utils.core.files import set_aside
from utils.core.page import write_page
from utils.core.runtime import log, versions
from utils.core.text import NOTICE

INDEX = "index.html"
_TEMPLATE = Path(__file__).with_name("index.html")
_MARK = '<meta name="generator" content="LiteMIL predictions">'
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
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        log.warning("%s: not an index page of predictions; moved to %s", path, *set_aside(path))
    pictures = [row.thumbnail for row in rows if row.thumbnail is not None and row.thumbnail.suffix == ".jpg"]
    embed = sum(picture.stat().st_size for picture in pictures) <= _MOST_BYTES
    columns = _columns(rows)
    values = {
        "mark": _MARK,
        "title": html.escape(f"{counted(len(rows), 'slide')} predicted"),
        "summary": html.escape(_summary(rows)),
        "notes": "".join(f"<p>{html.escape(note)}</p>" for note in notes),
        "notice": html.escape(NOTICE),
        "classes": "".join(f"<option>{html.escape(name)}</option>" for name in rows[0].probabilities),
        "no_labels": "" if any(row.label for row in rows) else " hidden",
        "heads": "".join(f"<th><button>{html.escape(name)}</button></th>" for name in columns),
        "rows": "\n".join(_line(row, columns, path.parent, embed) for row in rows),
        "count": str(len(rows)),
        "footer": html.escape(f"Written by LiteMIL {versions()['litemil']}."),
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


def _line(row: IndexRow, columns: Sequence[str], folder: Path, embed: bool) -> str:
    correct = "" if not row.label else "yes" if row.label == row.predicted else "no"
    seen = {True: "yes", False: "no", None: "unknown"}[row.seen_in_training]
    texts = {f"p({name})": f"{value:.3f}" for name, value in row.probabilities.items()} | {
        "predicted": row.predicted,
        "probability": f"{row.probabilities[row.predicted]:.3f}",
        "label": row.label,
        "correct": correct,
        "patient": row.case_id,
        "patches": str(row.patches),
        "fold": "" if row.fold is None else str(row.fold),
        "seen in training": seen,
    }
    link = f'<a href="{quote(row.page)}">{html.escape(row.slide)}</a>'
    cells = [link, *(html.escape(texts[name]) for name in columns[1:])]
    kind = {"no": ' class="wrong"', "yes": ' class="right"', "": ""}[correct]
    return f"<tr{kind}><td>{_picture(row, folder, embed)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _picture(row: IndexRow, folder: Path, embed: bool) -> str:
    if row.thumbnail is None:
        return ""
    link = quote(row.thumbnail.relative_to(folder).as_posix())
    if embed and row.thumbnail.suffix == ".jpg":
        link = f"data:image/jpeg;base64,{base64.b64encode(row.thumbnail.read_bytes()).decode('ascii')}"
    return f'<a href="{quote(row.page)}"><img src="{link}" loading="lazy" alt="Map of {html.escape(row.slide)}"></a>'
