"""Write the contact sheet of a folder: one HTML page with all its slides, to look through, filter and sort.

The page links to the pictures beside it instead of containing them, works from a disk, and loads a picture only when it
is scrolled into view.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import quote

from utils.core.errors import plural
from utils.core.html_page import write_page
from utils.slides.preview import LEGEND_COLOURS

_TEMPLATE = Path(__file__).with_name("contact_sheet.html")


@dataclass(frozen=True)
class SheetRow:
    """A slide on the contact sheet: its status and the reason for it; `preview` is its picture, or None.

    `patches` and their `mpp` are None if they are unknown.
    """

    slide: str
    status: str
    reason: str = ""
    patches: int | None = None
    mpp: float | None = None
    preview: Path | None = None


def write_contact_sheet(path: Path, rows: Sequence[SheetRow], about: Sequence[str] = ()) -> None:
    """Write the page of these slides; the lines of `about`, such as the recipe, follow the totals at the top."""
    statuses = Counter(row.status for row in rows)
    values = {
        "title": plural(len(rows), "slide"),
        "totals": _totals(rows, statuses),
        "about": ". ".join(about),
        "colours": LEGEND_COLOURS,
        "statuses": statuses,
        "cards": [(row, _link(row, Path(path).parent), _facts(row)) for row in rows],
    }
    write_page(path, _TEMPLATE, values)


def _totals(rows: Sequence[SheetRow], statuses: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count:,} {status}" for status, count in statuses.items())
    patches = [row.patches for row in rows if row.patches is not None]
    if not patches:
        return counts
    return f"{counts}; {sum(patches):,} patches, median {median(patches):,.0f} per slide"


def _link(row: SheetRow, folder: Path) -> str | None:
    """Return the address of a slide's picture, relative to the page."""
    return None if row.preview is None else quote(Path(os.path.relpath(row.preview, folder)).as_posix())


def _facts(row: SheetRow) -> str:
    facts = [row.status]
    if row.patches is not None:
        facts.append(f"{row.patches:,} {'patch' if row.patches == 1 else 'patches'}")
    if row.mpp is not None:
        facts.append(f"{row.mpp:.4g} µm/px")
    return ", ".join(facts)
