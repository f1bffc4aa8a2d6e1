"""One self-contained page of a prediction: slide and attention to zoom into, patches to open, and how it was made."""

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

from utils.core.page import write_page
from utils.core.runtime import versions
from utils.core.text import NOTICE
from utils.pictures.attention_map import AttentionMap
from utils.pictures.caption import Caption
from utils.pictures.overlay import Look, Overlay, Picture
from utils.pictures.patches import ShownPatch

_TEMPLATE = Path(__file__).with_name("report.html")
_TRANSPARENT = 255  # of the overlay's palette; the colours take the others
_QUALITY = 88
# What keeps the page one that opens at once: patches in a gallery, their px, and what both galleries' images may take.
_PATCHES, _PATCH_SIDES, _GALLERY_BYTES = 24, (1024, 768, 512, 384, 256, 192), 8_000_000


def write_report(
    path: Path, slide: str, overlay: Overlay, caption: Caption, top: Sequence[ShownPatch], least: Sequence[ShownPatch]
) -> None:
    """Write the page of a slide; it loads nothing from elsewhere.

    Of the most attended patches `top` and the `least` attended ones the first 24 are shown, the larger and the more
    they are the smaller.
    """
    picture, attention, look = overlay.picture, overlay.attention, overlay.look
    h, w = picture.shape
    galleries = _encoded(top[:_PATCHES], least[:_PATCHES])
    values = {
        "slide": slide,
        "answer": caption.answer,
        "notice": NOTICE,
        "notes": caption.notes,
        "width_px": w,
        "height_px": h,
        "opacity": round(100 * look.alpha),
        "slide_image": _jpeg(picture.thumbnail),
        "heat_image": _heat_png(overlay),
        "heat_alt": f"Attention by colour; {attention.half} of {len(attention)} patches hold half of it",
        "scale_image": _colour_scale(look),
        "scale_high": f"{attention.attention.max():.3g}" if look.scale == "attention" else "100",
        "scale_text": look.label(attention),
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
    """Return what the page's script needs."""
    h, w = picture.shape
    return {
        "width": picture.width,
        "height": picture.height,
        "shown": [w, h],
        "mpp": picture.mpp,
        "size": attention.size_level0,
        "coords": _base64(attention.coords.astype("<i4").tobytes()),
        "attention": _base64(attention.attention.astype("<f4").tobytes()),
    }


def _heat_png(overlay: Overlay) -> str:
    """Return the heatmap as a PNG of a palette, transparent where no patch is."""
    heat, look = overlay.heat, overlay.look
    most = 100 if look.scale == "percentile" else float(overlay.attention.attention.max())
    steps = np.rint(np.nan_to_num(heat) / most * (_TRANSPARENT - 1)).astype(np.uint8)
    image = Image.fromarray(np.where(np.isnan(heat), np.uint8(_TRANSPARENT), steps))
    image.putpalette([*_palette(look).ravel().tolist(), 0, 0, 0])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=_TRANSPARENT, optimize=True)
    return f"data:image/png;base64,{_base64(file.getvalue())}"


def _palette(look: Look) -> NDArray[np.uint8]:
    """(255, 3), the colour map from its lowest to its highest."""
    return np.rint(colormaps[look.cmap](np.linspace(0, 1, _TRANSPARENT))[:, :3] * 255).astype(np.uint8)


def _colour_scale(look: Look) -> str:
    file = io.BytesIO()
    Image.fromarray(_palette(look)[None]).save(file, "PNG")
    return f"data:image/png;base64,{_base64(file.getvalue())}"


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{_base64(file.getvalue())}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _encoded(*galleries: Sequence[ShownPatch]) -> list[list[tuple[int, str]]]:
    """Of each patch its index and its image, all as large as together they may be."""
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
    """A patch in a gallery, by its index in the map; `image` is a whole JPEG as an address."""

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
    held = np.cumsum(attention.attention[attention.order], dtype=np.float64)
    tenth = held[max(1, len(attention) // 10) - 1] / held[-1]
    return [
        ("Patches", f"{len(attention):,}"),
        ("Half of the attention is held by", f"{attention.half:,} patches ({attention.half / len(attention):.1%})"),
        ("The most attended tenth holds", f"{tenth:.1%}"),
        ("Highest attention", f"{attention.peak:.3g} times what it were if all were equal"),
    ]
