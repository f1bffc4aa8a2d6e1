"""The contact sheet of a folder: one page of all its slides, several in a row, to look at, filter and order.

It holds no picture itself: it links to those beside it, works from a disk, and loads only what is looked at.
"""

import html
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
        "count": str(len(rows)),
        "count_words": counted(len(rows), "slide"),
        "totals": html.escape(_totals(rows, statuses)),
        "recipe": html.escape(". ".join(about)),
        "legend": "".join(
            f'<span><i style="border-color:{colour}{f";background:{colour}73" if is_filled else ""}"></i>'
            f"{html.escape(name)}</span>"
            for name, colour, is_filled in SHOWN_COLOURS
        ),
        "statuses": "".join(f"<option>{html.escape(status)}</option>" for status in statuses),
        "cards": "\n".join(_card(row, Path(path).parent) for row in rows),
    }
    write_page(path, _TEMPLATE, values)


def _totals(rows: Sequence[SheetRow], statuses: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count:,} {status}" for status, count in statuses.items())
    patches = [row.patches for row in rows if row.patches is not None]
    if not patches:
        return counts
    return f"{counts}; {sum(patches):,} patches, median {median(patches):,.0f} per slide"


def _card(row: SheetRow, folder: Path) -> str:
    picture = "<div>no picture</div>"
    if row.preview is not None:
        link = quote(Path(os.path.relpath(row.preview, folder)).as_posix())
        picture = f'<a href="{link}"><img src="{link}" loading="lazy" alt=""></a>'
    slide, status, reason = (html.escape(text) for text in (row.slide, row.status, row.reason))
    facts = [status]
    if row.patches is not None:
        facts.append(f"{row.patches:,} {'patch' if row.patches == 1 else 'patches'}")
    if row.mpp is not None:
        facts.append(f"{row.mpp:.4g} µm/px")
    numbers = f'data-patches="{"" if row.patches is None else row.patches}" data-mpp="{row.mpp or ""}"'
    told = f"<small>{reason}</small>" if reason else ""
    return f'<li data-status="{status}" {numbers}>{picture}<b>{slide}</b><small>{", ".join(facts)}</small>{told}</li>'
