"""Draw one small picture per slide that shows which patches of an extraction were kept and which were dropped.

The colours are Okabe and Ito's, which people with the common kinds of colour blindness can tell apart.
"""

import io
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from utils.core.files import write_bytes
from utils.core.fonts import font_file

LITTLE_TISSUE = "little tissue"

MAX_SIDE = 1200  # px of the whole picture
_MIN_SIDE = 480  # px to which a smaller slide is enlarged, so that its legend is readable
_MAX_BYTES = 300_000
_QUALITIES = (85, 75, 60, 45, 30, 15)

_PATCH, _CONTOUR = "#0072B2", "#009E73"
_COLOURS = {LITTLE_TISSUE: "#999999", "blurred": "#E69F00", "white": "#F0E442", "pen": "#000000"}
_OTHER_COLOUR = "#CC79A7"
# The items of a picture: name, colour, and whether it is shaded.
LEGEND_COLOURS = (
    ("patch kept", _PATCH, False),
    ("tissue", _CONTOUR, False),
    *((f"dropped: {reason}", colour, True) for reason, colour in _COLOURS.items()),
    ("dropped: another reason", _OTHER_COLOUR, True),
)
_OUTLINED = 6  # px on the picture from which patches are outlined one by one; smaller ones are drawn as their union
_LINE, _FILL, _FAINT = 0.8, 0.45, 0.25  # opacities: of outlines, of dropped patches, and of those with little tissue
_CONTOUR_WIDTH = 2
_MARGIN, _STRIP, _FONT = 10, 24, 13  # px; a strip is a line of text

Pixels = NDArray[np.uint8]
Corners = NDArray[np.integer]
Scale = NDArray[np.float64]
Box = tuple[NDArray[np.int64], NDArray[np.int64]]


def draw_preview(
    thumbnail: Pixels,
    size: tuple[int, int],
    *,
    kept: Corners,
    dropped: Mapping[str, Corners],
    size_level0: int,
    mask: NDArray[np.bool_] | None = None,
    mpp: float | None = None,
    title: str = "",
) -> Image.Image:
    """Draw the patches of an extraction over the slide, with the tissue's outline, a legend and a scale bar.

    Args:
        thumbnail: (h, w, 3) uint8 over the whole slide.
        size: the slide's width and height in level-0 px.
        kept: (N, 2) top-left corners (x, y) in level-0 px.
        dropped: corners of dropped patches by reason; they are shaded, those for `LITTLE_TISSUE` faintly.
        size_level0: side of a patch in level-0 px.
        mask: tissue over the whole slide, of any resolution.
        mpp: um per level-0 px; None leaves the scale bar out.
        title: text above the picture, shortened if it is too long.

    Returns:
        An RGB image of at most `MAX_SIDE` px; the time is proportional to the numbers of patches and pixels.
    """
    groups = {reason: corners for reason, corners in dropped.items() if len(corners)}
    legend = [(_PATCH, f"{len(kept):,} kept")]
    legend += [(_colour(reason), f"{len(corners):,} {reason}") for reason, corners in groups.items()]
    if mask is not None:
        legend.append((_CONTOUR, "tissue"))

    pixels = np.array(_fitted(thumbnail, MAX_SIDE - _STRIP * (2 + len(legend))))
    scale = np.array([pixels.shape[1] / size[0], pixels.shape[0] / size[1]])
    _draw_groups(pixels, kept, groups, size_level0, scale)
    if mask is not None:
        _blend(pixels, _outline_of(mask, pixels.shape[:2]), _CONTOUR, 1.0)
    return _framed(Image.fromarray(pixels), title, legend, mpp / scale[0] if mpp else None)


def _draw_groups(pixels: Pixels, kept: Corners, groups: Mapping[str, Corners], size_level0: int, scale: Scale) -> None:
    """Draw the dropped patches by their reason, then the kept ones."""
    if LITTLE_TISSUE in groups:
        plain = pixels.copy()
        _draw_patches(pixels, groups[LITTLE_TISSUE], size_level0, scale, _colour(LITTLE_TISSUE), _FAINT)
        if len(kept):  # where patches overlap, those kept are not shaded
            covered = _union([_box(kept, size_level0, scale)], pixels.shape[:2])
            pixels[covered] = plain[covered]
    for reason, corners in groups.items():
        if reason != LITTLE_TISSUE:
            _draw_patches(pixels, corners, size_level0, scale, _colour(reason), _FILL)
    _draw_patches(pixels, kept, size_level0, scale, _PATCH)


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


def _fitted(thumbnail: Pixels, most: int) -> Image.Image:
    """Resize the thumbnail so that its longer side is between `_MIN_SIDE` and `most` px."""
    image = Image.fromarray(thumbnail)
    longer = max(image.size)
    target = min(max(longer, _MIN_SIDE), most)
    if target == longer:
        return image
    width, height = (max(1, round(side * target / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)


def _draw_patches(
    pixels: Pixels, corners: Corners, size_level0: int, scale: Scale, colour: str, fill: float = 0
) -> None:
    """Outline the patches, or tint the area of those too small for that; shade them with the opacity `fill`."""
    if not len(corners):
        return
    low, high = _box(corners, size_level0, scale)
    outlined = size_level0 * scale.min() >= _OUTLINED
    if fill or not outlined:
        _blend(pixels, _union([(low, high)], pixels.shape[:2]), colour, fill or _FAINT)
    if outlined:
        _blend(pixels, _union(_sides(low, high), pixels.shape[:2]), colour, _LINE)


def _box(corners: Corners, size_level0: int, scale: Scale) -> Box:
    """Return patches in px of the picture: rounded so that neighbours share an edge, and at least one pixel wide."""
    low = np.rint(corners * scale).astype(np.int64)
    return low, np.maximum(np.rint((corners + size_level0) * scale).astype(np.int64), low + 1)


def _sides(low: NDArray[np.int64], high: NDArray[np.int64]) -> list[Box]:
    """Return the four sides of rectangles, as rectangles one pixel wide."""
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
    """Return (h, w) bool: the pixels in any of the rectangles, from low to high corners (N, 2), x before y.

    Each rectangle adds its four corners with signs; cumulative sums along both axes fill it.
    """
    height, width = shape[0], shape[1]
    limit = np.array([width, height])
    # A line on the far edge is drawn just inside it.
    lows = np.concatenate([np.clip(low, 0, limit - 1) for low, _ in boxes])
    highs = np.concatenate([np.clip(high, 0, limit) for _, high in boxes])
    steps = np.zeros((height + 1) * (width + 1), dtype=np.int64)
    for xs, ys, sign in ((lows, lows, 1), (highs, lows, -1), (lows, highs, -1), (highs, highs, 1)):
        steps += sign * np.bincount(ys[:, 1] * (width + 1) + xs[:, 0], minlength=steps.size)
    return steps.reshape(height + 1, width + 1).cumsum(0).cumsum(1)[:height, :width] > 0


def _outline_of(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return (h, w) bool: the inner rim of the tissue and of its holes, at the picture's resolution."""
    scaled = np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
    inside = scaled
    for _ in range(_CONTOUR_WIDTH):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return scaled & ~inside


def _blend(pixels: Pixels, where: NDArray[np.bool_], colour: str, opacity: float) -> None:
    mixed = pixels[where] * (1 - opacity) + np.array(ImageColor.getrgb(colour)) * opacity
    pixels[where] = np.rint(mixed).astype(np.uint8)


def _colour(reason: str) -> str:
    return _COLOURS.get(reason, _OTHER_COLOUR)


def _framed(
    picture: Image.Image, title: str, legend: Sequence[tuple[str, str]], um_per_pixel: float | None
) -> Image.Image:
    """Add the title above the picture, and below it the legend and a scale bar."""
    font = _font(font_file(title))
    width = max(picture.width, _MIN_SIDE)
    lines: list[list[tuple[str, str]]] = [[]]
    x = _MARGIN
    for colour, text in legend:
        entry_width = _entry_width(text, font)
        if lines[-1] and x + entry_width > width:
            lines.append([])
            x = _MARGIN
        lines[-1].append((colour, text))
        x += entry_width
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


@cache
def _font(path: Path | None = None) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path or font_file(""), _FONT)


def _entry_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return round(font.getlength(text)) + 18 + 2 * _MARGIN


def _draw_scale_bar(
    draw: ImageDraw.ImageDraw, middle: int, um_per_pixel: float, width: int, font: ImageFont.FreeTypeFont
) -> None:
    """Draw a bar of 1, 2 or 5 times a power of ten um, at most a quarter of the picture's width."""
    most = width / 4 * um_per_pixel
    power = 10.0 ** np.floor(np.log10(most))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= most)
    right = _MARGIN + round(length / um_per_pixel)
    draw.rectangle((_MARGIN, middle - 2, right, middle + 2), "black")
    name = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    draw.text((right + 8, middle), name, "black", font, anchor="lm")


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "..."))
    return text[: max(0, fitting - 1)] + "..."
