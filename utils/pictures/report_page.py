"""Write the report page of one prediction: a zoomable slide with attention, the patches, and how it was made."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from utils.core.html_page import write_page
from utils.core.runtime import versions
from utils.core.text import NOTICE
from utils.pictures.attention_map import AttentionMap
from utils.pictures.overlay import MapStyle, Overlay, Picture
from utils.pictures.prediction_caption import Caption
from utils.pictures.top_patches import MapPatch

_TEMPLATE = Path(__file__).with_name("report_page.html")
_TRANSPARENT = 255  # index in the overlay's palette; colours are the others
_QUALITY = 88  # of JPEGs
# Limits that keep the page fast to open: patches of a gallery, their sides in px, bytes of all their images.
_PATCHES, _PATCH_SIDES, _GALLERY_BYTES = 24, (1024, 768, 512, 384, 256, 192), 8_000_000


def write_report(
    path: Path, slide: str, overlay: Overlay, caption: Caption, top: Sequence[MapPatch], least: Sequence[MapPatch]
) -> None:
    """Write the page of a slide; it is self-contained.

    The first 24 of the most attended patches `top` and of the `least` attended ones are shown, reduced if together they
    are too large.
    """
    picture, attention, style = overlay.picture, overlay.attention, overlay.style
    h, w = picture.shape
    galleries = _encoded(top[:_PATCHES], least[:_PATCHES])
    values = {
        "slide": slide,
        "answer": caption.answer,
        "notice": NOTICE,
        "notes": caption.notes,
        "width_px": w,
        "height_px": h,
        "opacity": round(100 * style.alpha),
        "slide_image": _jpeg(picture.thumbnail),
        "heat_image": _heat_png(overlay),
        "heat_alt": f"Attention by colour; {attention.half_count} of {len(attention)} patches hold half of it",
        "scale_image": _colour_scale(style),
        "scale_high": f"{style.highest(attention):.3g}",
        "scale_text": style.label(attention),
        "top": _gallery(attention, galleries[0]),
        "least": _gallery(attention, galleries[1]),
        "probabilities": caption.probabilities,
        "concentration": _concentration(attention),
        "facts": caption.facts,
        "data": _data(picture, attention),
        "version": versions()["litemil"],
    }
    write_page(path, _TEMPLATE, values)


def _data(picture: Picture, attention: AttentionMap) -> dict[str, Any]:
    """Return the data of the page's script."""
    h, w = picture.shape
    return {
        "width": picture.width,
        "height": picture.height,
        "overview": [w, h],
        "mpp": picture.mpp,
        "size": attention.size_level0,
        "coords": _base64(attention.coords.astype("<i4").tobytes()),
        "attention": _base64(attention.attention.astype("<f4").tobytes()),
    }


def _heat_png(overlay: Overlay) -> str:
    """Return the heatmap as a PNG with a palette, transparent where no patch is."""
    heat, style = overlay.heat, overlay.style
    steps = np.rint(np.nan_to_num(heat) / style.highest(overlay.attention) * (_TRANSPARENT - 1)).astype(np.uint8)
    image = Image.fromarray(np.where(np.isnan(heat), np.uint8(_TRANSPARENT), steps))
    image.putpalette([*_palette(style).ravel().tolist(), 0, 0, 0])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=_TRANSPARENT, optimize=True)
    return f"data:image/png;base64,{_base64(file.getvalue())}"


def _palette(style: MapStyle) -> NDArray[np.uint8]:
    """Return the colours (255, 3) of the colour map, in order."""
    return np.rint(colormaps[style.cmap](np.linspace(0, 1, _TRANSPARENT))[:, :3] * 255).astype(np.uint8)


def _colour_scale(style: MapStyle) -> str:
    file = io.BytesIO()
    Image.fromarray(_palette(style)[None]).save(file, "PNG")
    return f"data:image/png;base64,{_base64(file.getvalue())}"


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{_base64(file.getvalue())}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _encoded(*galleries: Sequence[MapPatch]) -> list[list[tuple[int, str]]]:
    """Return index and image of each patch, all of the largest side that keeps within `_GALLERY_BYTES`."""
    encoded = []
    for side in _PATCH_SIDES:
        encoded = [[(patch.index, _jpeg(_reduced(patch.pixels, side))) for patch in patches] for patches in galleries]
        if sum(len(image) for gallery in encoded for _, image in gallery) <= _GALLERY_BYTES:
            break
    return encoded


def _reduced(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


@dataclass(frozen=True)
class _GalleryItem:
    """A patch in a gallery, by its index in the map; `image` is a JPEG as a data URL."""

    index: int
    image: str
    title: str
    lines: Sequence[str]


def _gallery(attention: AttentionMap, patches: Sequence[tuple[int, str]]) -> list[_GalleryItem]:
    items = []
    for index, image in patches:
        (x, y), weight = attention.coords[index], attention.attention[index]
        rank, times = attention.ranks[index], weight * len(attention)
        title = f"Rank {rank} of {len(attention)}: attention {weight:.3g}, {times:.3g} times uniform, at ({x}, {y})"
        lines = [f"rank {rank}", f"{weight:.3g} ({times:.3g} x)", f"at ({x}, {y})"]
        items.append(_GalleryItem(int(index), image, title, lines))
    return items


def _concentration(attention: AttentionMap) -> list[tuple[str, str]]:
    half, tenth = attention.half_count, attention.cumulative[max(1, len(attention) // 10) - 1]
    return [
        ("Patches", f"{len(attention):,}"),
        ("Half of the attention is held by", f"{half:,} patches ({half / len(attention):.1%})"),
        ("The most attended tenth holds", f"{tenth / attention.cumulative[-1]:.1%}"),
        ("Highest attention", f"{attention.peak:.3g} times uniform"),
    ]
