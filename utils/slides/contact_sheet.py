"""The contact sheet of a folder: one page of all its slides, several in a row, to look at, filter and order.

It holds no picture itself: it links to those beside it, works from a disk, and loads only what is looked at.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import quote

from utils.core.errors import counted
from utils.core.page import write_page
from utils.slides.preview import SHOWN_COLOURS

_TEMPLATE = Path(__file__).with_name("contact_sheet.html")


@dataclass(frozen=True)
class SheetRow:
    """A slide on the contact sheet: what became of it and why; `preview` is its picture, None where there is none.

    `patches` and their `mpp` are None where they are not known.
    """

    slide: str
    status: str
    reason: str = ""
    patches: int | None = None
    mpp: float | None = None
    preview: Path | None = None


def write_contact_sheet(path: Path, rows: Sequence[SheetRow], about: Sequence[str] = ()) -> None:
    """Write the page of these slides; `about`, such as the recipe, stands on top below the totals."""
    statuses = Counter(row.status for row in rows)
    values = {
        "title": counted(len(rows), "slide"),
        "totals": _totals(rows, statuses),
        "about": ". ".join(about),
        "colours": SHOWN_COLOURS,
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
    """Return the address of a slide's picture, seen from the page."""
    return None if row.preview is None else quote(Path(os.path.relpath(row.preview, folder)).as_posix())


def _facts(row: SheetRow) -> str:
    facts = [row.status]
    if row.patches is not None:
        facts.append(f"{row.patches:,} {'patch' if row.patches == 1 else 'patches'}")
    if row.mpp is not None:
        facts.append(f"{row.mpp:.4g} µm/px")
    return ", ".join(facts)
