"""A look at an extraction: one small picture per slide, and one page for a folder of them.

Colours are Okabe and Ito's, told apart in the common kinds of colour blindness. The page holds no picture itself: it
links to those beside it, works from a disk, and loads only what is looked at.
"""

import html
import io
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from utils.core.files import write_bytes, write_text

LITTLE_TISSUE = "little tissue"

MAX_SIDE = 1200  # px of the whole picture
_MIN_SIDE = 480  # px to which a smaller slide is enlarged, so that its legend is readable
_MAX_BYTES = 300_000
_QUALITIES = (85, 75, 60, 45, 30, 15)

_KEPT, _CONTOUR = "#0072B2", "#009E73"
_COLOURS = {LITTLE_TISSUE: "#999999", "blurred": "#E69F00", "white": "#F0E442", "pen": "#000000"}
_OTHER_COLOUR = "#CC79A7"
_OUTLINED = 6  # px on the picture from which patches are outlined one by one; smaller ones are drawn as their union
_LINE, _FILL, _FAINT = 0.8, 0.45, 0.25  # opacities
_CONTOUR_WIDTH = 2
_MARGIN, _STRIP, _FONT = 10, 24, 14  # px; a strip is a line of text

Box = tuple[NDArray[np.int64], NDArray[np.int64]]


def draw_preview(
    thumbnail: NDArray[np.uint8],
    size: tuple[int, int],
    *,
    kept: NDArray[np.integer],
    dropped: Mapping[str, NDArray[np.integer]],
    size_level0: int,
    mask: NDArray[np.bool_] | None = None,
    mpp: float | None = None,
    title: str = "",
) -> Image.Image:
    """Draw what was made of a slide: its patches over the slide, the tissue's outline, a legend, a scale bar.

    Args:
        thumbnail: (h, w, 3) uint8 over the whole slide.
        size: the slide's width and height in level-0 px.
        kept: (N, 2) top-left corners (x, y) in level-0 px.
        dropped: such corners by the reason why; those for `LITTLE_TISSUE` are shown as the bare grid.
        size_level0: side of a patch in level-0 px.
        mask: tissue over the whole slide, of any resolution.
        mpp: um per level-0 px; None leaves the scale bar out.
        title: stands above; shortened where it is too long.

    Returns:
        An RGB image of at most `MAX_SIDE` px; the work is in proportion to the patches and the picture.
    """
    groups = {reason: corners for reason, corners in dropped.items() if len(corners)}
    legend = [(_KEPT, f"{len(kept):,} kept")]
    legend += [(_colour(reason), f"{len(corners):,} {reason}") for reason, corners in groups.items()]
    if mask is not None:
        legend.append((_CONTOUR, "tissue"))

    picture = _fitted(thumbnail, MAX_SIDE - _STRIP * (2 + len(legend)))
    pixels = np.array(picture)
    scale = np.array([picture.width / size[0], picture.height / size[1]])
    for reason in sorted(groups, key=lambda reason: reason != LITTLE_TISSUE):
        _draw_patches(pixels, groups[reason], size_level0, scale, _colour(reason), filled=reason != LITTLE_TISSUE)
    _draw_patches(pixels, kept, size_level0, scale, _KEPT, filled=False)
    if mask is not None:
        _blend(pixels, _outline_of(mask, pixels.shape[:2]), _CONTOUR, 1.0)
    return _framed(Image.fromarray(pixels), title, legend, mpp / scale[0] if mpp else None)


def write_preview(path: Path, preview: Image.Image) -> None:
    """Write the picture as a JPEG of less than 300 kB, as good as that allows."""
    content = b""
    for quality in _QUALITIES:
        file = io.BytesIO()
        preview.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) < _MAX_BYTES:
            break
    write_bytes(path, content)


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


def write_contact_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Write a page of all slides of a folder, with links to their pictures: to be sorted, filtered, and looked at."""
    lines = "\n".join(_sheet_line(row, Path(path).parent) for row in rows)
    write_text(path, Template(_SHEET).substitute(rows=lines, count=len(rows)))


def _fitted(thumbnail: NDArray[np.uint8], most: int) -> Image.Image:
    """The thumbnail at a size to look at: its longer side between `_MIN_SIDE` and `most` px."""
    image = Image.fromarray(thumbnail)
    longer = max(image.size)
    wanted = min(max(longer, _MIN_SIDE), most)
    if wanted == longer:
        return image
    width, height = (max(1, round(side * wanted / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)


def _draw_patches(
    pixels: NDArray[np.uint8],
    corners: NDArray[np.integer],
    size_level0: int,
    scale: NDArray[np.float64],
    colour: str,
    *,
    filled: bool,
) -> None:
    if not len(corners):
        return
    # Rounded once each, so that neighbours share an edge; what is smaller than a pixel still shows.
    low = np.rint(corners * scale).astype(np.int64)
    high = np.maximum(np.rint((corners + size_level0) * scale).astype(np.int64), low + 1)
    outlined = size_level0 * scale.min() >= _OUTLINED
    if filled or not outlined:
        _blend(pixels, _union([(low, high)], pixels.shape[:2]), colour, _FILL if filled else _FAINT)
    if outlined:
        _blend(pixels, _union(_sides(low, high), pixels.shape[:2]), colour, _LINE)


def _sides(low: NDArray[np.int64], high: NDArray[np.int64]) -> list[Box]:
    """The four sides of rectangles, as rectangles one pixel wide."""
    left, top = low.T
    right, bottom = high.T
    sides = [
        (left, top, right + 1, top + 1),
        (left, bottom, right + 1, bottom + 1),
        (left, top, left + 1, bottom + 1),
        (right, top, right + 1, bottom + 1),
    ]
    return [(np.stack(side[:2], axis=1), np.stack(side[2:], axis=1)) for side in sides]


def _union(boxes: Sequence[Box], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """(h, w) bool: what any of the rectangles covers, from their low to their high corners (N, 2), x before y.

    Each adds its four corners, and sums along both axes spread them.
    """
    height, width = shape[0], shape[1]
    limit = np.array([width, height])
    # A line on the far edge is drawn just inside it.
    lows = np.concatenate([np.minimum(low, limit - 1) for low, _ in boxes])
    highs = np.concatenate([np.minimum(high, limit) for _, high in boxes])
    steps = np.zeros((height + 1) * (width + 1), dtype=np.int64)
    for xs, ys, sign in ((lows, lows, 1), (highs, lows, -1), (lows, highs, -1), (highs, highs, 1)):
        steps += sign * np.bincount(ys[:, 1] * (width + 1) + xs[:, 0], minlength=steps.size)
    return steps.reshape(height + 1, width + 1).cumsum(0).cumsum(1)[:height, :width] > 0


def _outline_of(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """(h, w) bool: the inner rim of the tissue and of its holes, at the picture's resolution."""
    scaled = np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
    inside = scaled
    for _ in range(_CONTOUR_WIDTH):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return scaled & ~inside


def _blend(pixels: NDArray[np.uint8], where: NDArray[np.bool_], colour: str, opacity: float) -> None:
    mixed = pixels[where] * (1 - opacity) + np.array(ImageColor.getrgb(colour)) * opacity
    pixels[where] = np.rint(mixed).astype(np.uint8)


def _colour(reason: str) -> str:
    return _COLOURS.get(reason, _OTHER_COLOUR)


def _framed(
    picture: Image.Image, title: str, legend: Sequence[tuple[str, str]], um_per_pixel: float | None
) -> Image.Image:
    """The picture with its title above, its legend below, and a scale bar."""
    font = ImageFont.load_default(size=_FONT)
    width = max(picture.width, _MIN_SIDE)
    lines: list[list[tuple[str, str]]] = [[]]
    x = _MARGIN
    for colour, text in legend:
        taken = _entry_width(text, font)
        if lines[-1] and x + taken > width:
            lines.append([])
            x = _MARGIN
        lines[-1].append((colour, text))
        x += taken
    bar = int(um_per_pixel is not None)
    framed = Image.new("RGB", (width, picture.height + _STRIP * (1 + len(lines) + bar)), "white")
    framed.paste(picture, (0, _STRIP))
    draw = ImageDraw.Draw(framed)
    draw.text((_MARGIN, _STRIP / 2), _shortened(title, width - 2 * _MARGIN, font), "black", font, anchor="lm")
    middle = _STRIP + picture.height + _STRIP // 2
    if um_per_pixel is not None:
        _draw_scale_bar(draw, middle, um_per_pixel, picture.width, font)
        middle += _STRIP
    for line in lines:
        x = _MARGIN
        for colour, text in line:
            draw.rectangle((x, middle - 6, x + 12, middle + 6), colour, "black")
            draw.text((x + 18, middle), text, "black", font, anchor="lm")
            x += _entry_width(text, font)
        middle += _STRIP
    return framed


def _entry_width(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    return round(font.getlength(text)) + 18 + 2 * _MARGIN


def _draw_scale_bar(
    draw: ImageDraw.ImageDraw,
    middle: int,
    um_per_pixel: float,
    width: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """A bar of 1, 2 or 5 times a power of ten um, at most a quarter of the picture's width."""
    most = width / 4 * um_per_pixel
    power = 10.0 ** np.floor(np.log10(most))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= most)
    right = _MARGIN + round(length / um_per_pixel)
    draw.rectangle((_MARGIN, middle - 2, right, middle + 2), "black")
    name = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    draw.text((right + 8, middle), name, "black", font, anchor="lm")


def _shortened(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "..."))
    return text[: max(0, fitting - 1)] + "..."


def _sheet_line(row: SheetRow, folder: Path) -> str:
    picture = "no picture"
    if row.preview is not None:
        link = quote(Path(os.path.relpath(row.preview, folder)).as_posix())
        picture = f'<a href="{link}"><img src="{link}" loading="lazy" alt=""></a>'
    patches = "" if row.patches is None else str(row.patches)
    mpp = "" if row.mpp is None else f"{row.mpp:.4g}"
    slide, status, reason = (html.escape(text) for text in (row.slide, row.status, row.reason))
    return (
        f"<tr><td>{picture}</td><td>{slide}</td><td>{status}</td><td>{patches}</td><td>{mpp}</td><td>{reason}</td></tr>"
    )


_SHEET = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$count slides</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 1em; color: #222; }
input { font: inherit; width: 24em; max-width: 60%; padding: 0.3em; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; margin-top: 1em; }
th, td { text-align: left; vertical-align: top; padding: 0.4em; border-bottom: 1px solid #ddd; }
td { overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #222; }
th button { all: unset; cursor: pointer; font-weight: bold; }
th button:focus-visible { outline: 2px solid #0072b2; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
img { width: 100%; height: 180px; object-fit: contain; }
</style>
</head>
<body>
<input id="filter" type="search" placeholder="Filter: part of a name, a status, a reason" aria-label="Filter">
<span id="shown">$count of $count slides</span>
<table>
<colgroup><col style="width: 260px"><col style="width: 26%"><col style="width: 7em"><col style="width: 6em">
<col style="width: 6em"><col></colgroup>
<thead><tr><th>picture</th><th><button>slide</button></th><th><button>status</button></th>
<th><button>patches</button></th><th><button>um/px</button></th><th><button>reason</button></th></tr></thead>
<tbody>
$rows
</tbody>
</table>
<script>
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
const rows = [...body.rows].map(line => ({line, cells: [...line.cells].map(cell => cell.textContent)}));
for (const row of rows) row.text = row.cells.slice(1).join(" ").toLowerCase();
const order = new Intl.Collator(undefined, {numeric: true}), numeric = new Set([3, 4]);
function compare(a, b, column) {
  return numeric.has(column) ? a - b : order.compare(a, b);
}
heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
  const falling = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  rows.sort((a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]];
    if (x === "" || y === "") return (x === "") - (y === "");
    return falling ? compare(y, x, column) : compare(x, y, column);
  });
  body.append(...rows.map(row => row.line));
}));
document.getElementById("filter").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  let shown = 0;
  for (const row of rows) {
    row.line.hidden = !words.every(word => row.text.includes(word));
    shown += !row.line.hidden;
  }
  document.getElementById("shown").textContent = `$${shown} of $${rows.length} slides`;
});
</script>
</body>
</html>
"""
