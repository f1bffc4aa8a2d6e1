"""Write the report page of one prediction: a zoomable slide with attention, the patches, and how it was made."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from utils.core.html_page import write_page
from utils.core.runtime import versions
from utils.core.text import NOTICE, multiple_text, percent_text
from utils.pictures.attention_map import ATTENTION, AttentionMap
from utils.pictures.evidence_map import CMAP, EvidenceOverlay
from utils.pictures.heatmap import reduced
from utils.pictures.overlay import GREY, Overlay, Picture
from utils.pictures.prediction_caption import Caption
from utils.pictures.top_patches import (
    PAGE_PATCHES,
    PAGE_SIDE,
    MapPatch,
    PatchGroup,
    patch_width_text,
    rank_text,
)

_TEMPLATE = Path(__file__).with_name("report_page.html")
_EQUAL, _TRANSPARENT = 254, 255  # indices in the overlay's palette of grey and of nothing; colours are the others
_MOST_LAYERS = 8  # maps of evidence, of as many classes
_SCALES = "percentile", "attention", "uniform"
_QUALITY = 88  # of JPEGs
# Limits that keep the page fast to open: sides of the galleries' patches in px, bytes of all their images.
_PATCH_SIDES, _GALLERY_BYTES = (PAGE_SIDE, 768, 512, 384, 256, 192), 8_000_000


def write_report(
    path: Path,
    slide: str,
    overlay: Overlay,
    caption: Caption,
    groups: Sequence[PatchGroup],
    evidence: Sequence[EvidenceOverlay] = (),
) -> None:
    """Write the page of a slide; it is self-contained.

    The first 24 patches of each group are shown, reduced if together they are too large. The page switches
    from attention to the evidence for each class, if there is any.
    """
    picture, attention, style = overlay.picture, overlay.attention, overlay.style
    h, w = picture.shape
    layers = _layers(overlay, evidence)
    values = {
        "slide": slide,
        "answer": caption.answer,
        "notice": NOTICE,
        "notes": [*caption.notes, *attention.notes],
        "width_px": w,
        "height_px": h,
        "opacity": round(100 * style.alpha),
        "slide_image": _jpeg(picture.thumbnail),
        "weights": attention.name,
        "heat_alt": f"{attention.name} by colour; {attention.half_count} of {len(attention)} patches hold half of it",
        "layers": layers,
        "galleries": _galleries(attention, groups),
        "patch_width": patch_width_text(attention.size_level0, picture.mpp),
        "evidence": caption.evidence,
        "quantity": caption.quantity,
        "probability_title": caption.probability_title.capitalize(),
        "probabilities": _bars(caption),
        "concentration": _concentration(attention),
        "facts": caption.facts,
        "data": _data(picture, attention, caption.quantity) | {"layers": [asdict(layer) for layer in layers]},
        "version": versions()["litemil"],
    }
    write_page(path, _TEMPLATE, values)


def _bars(caption: Caption) -> list[tuple[str, float, str, bool]]:
    """Return name, value, percentage of each probability, and whether it is the answer."""
    return [(name, value, percent_text(value), name in caption.marked) for name, value in caption.probabilities.items()]


def _data(picture: Picture, attention: AttentionMap, quantity: str) -> dict[str, Any]:
    """Return the data of the page's script."""
    h, w = picture.shape
    return {
        "quantity": quantity,
        "width": picture.width,
        "height": picture.height,
        "corner": picture.corner,
        "overview": [w, h],
        "mpp": picture.mpp,
        "size": attention.size_level0,
        "weights": attention.name,
        "is_uniform": attention.is_uniform,
        "coords": _base64(attention.coords.astype("<i4").tobytes()),
        "attention": _base64(attention.attention.astype("<f4").tobytes()),
        "compared": len(attention.compared),
        "percentiles": None if attention.of_case is None else _base64(attention.percentiles.astype("<f4").tobytes()),
    }


@dataclass(frozen=True)
class _Layer:
    """A map over the slide: its image, its scale from `low` to `high`, all empty if there are no colours to explain,
    what its colour says, and of evidence the value of each patch, as base64 of float32.
    """

    title: str
    image: str
    scale: str
    low: str
    high: str
    text: str
    values: str | None = None


def _layers(overlay: Overlay, evidence: Sequence[EvidenceOverlay]) -> list[_Layer]:
    """Return the attention by its own scale and by the others, then the evidence for each class."""
    style = overlay.style
    scales = dict.fromkeys((style.scale, *(() if overlay.attention.is_uniform else _SCALES)))
    overlays = [overlay, *(replace(overlay, style=replace(style, scale=scale)) for scale in list(scales)[1:])]
    return [*map(_attention_layer, overlays), *map(_evidence_layer, evidence[:_MOST_LAYERS])]


def _attention_layer(overlay: Overlay) -> _Layer:
    attention, style = overlay.attention, overlay.style
    palette, (lowest, highest) = _palette(style.cmap), style.limits(attention)
    image = _heat_png((overlay.heat - lowest) / (highest - lowest), palette, overlay.is_grey)
    scale = ("", "", "") if attention.is_uniform else (_colour_scale(palette), *style.end_texts(attention))
    return _Layer(style.title(attention), image, *scale, style.label(attention))


def _evidence_layer(overlay: EvidenceOverlay) -> _Layer:
    evidence, name = overlay.evidence, overlay.name
    limit, palette = evidence.limit(name), _palette(CMAP.name)
    image = _heat_png((np.clip(overlay.heat, -limit, limit) + limit) / (2 * limit), palette)
    values = _base64(evidence.of_class(name).astype("<f4").tobytes())
    return _Layer(
        f"evidence for {name}",
        image,
        _colour_scale(palette),
        f"{-limit:.2g}",
        f"+{limit:.2g}",
        evidence.label(name),
        values,
    )


def _heat_png(heat: NDArray[np.float64], palette: NDArray[np.uint8], is_grey: NDArray[np.bool_] | None = None) -> str:
    """Return a map `(h, w)` of 0..1 as a PNG with a palette, transparent where it is NaN."""
    steps = np.rint(np.nan_to_num(heat) * (_EQUAL - 1)).astype(np.uint8)
    if is_grey is not None:
        steps[is_grey] = _EQUAL
    image = Image.fromarray(np.where(np.isnan(heat), np.uint8(_TRANSPARENT), steps))
    image.putpalette([*palette.ravel().tolist(), *(round(255 * value) for value in GREY), 0, 0, 0])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=_TRANSPARENT, optimize=True)
    return f"data:image/png;base64,{_base64(file.getvalue())}"


def _palette(cmap: str) -> NDArray[np.uint8]:
    """Return the colours (254, 3) of a colour map, in order."""
    return np.rint(colormaps[cmap](np.linspace(0, 1, _EQUAL))[:, :3] * 255).astype(np.uint8)


def _colour_scale(palette: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(palette[None]).save(file, "PNG")
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
        encoded = [[(patch.index, _jpeg(reduced(patch.pixels, side))) for patch in patches] for patches in galleries]
        if sum(len(image) for gallery in encoded for _, image in gallery) <= _GALLERY_BYTES:
            break
    return encoded


@dataclass(frozen=True)
class _GalleryItem:
    """A patch in a gallery, by its index in the map; `image` is a JPEG as a data URL."""

    index: int
    image: str
    title: str
    lines: Sequence[str]


def _galleries(attention: AttentionMap, groups: Sequence[PatchGroup]) -> list[tuple[str, str, list[_GalleryItem]]]:
    """Return title, kind and items of each group that has patches."""
    images = _encoded(*(group.patches[:PAGE_PATCHES] for group in groups))
    return [
        (f"{group.title[0].upper()}{group.title[1:]}", group.kind, _gallery(attention, patches, group))
        for group, patches in zip(groups, images, strict=True)
        if patches
    ]


def _gallery(attention: AttentionMap, patches: Sequence[tuple[int, str]], group: PatchGroup) -> list[_GalleryItem]:
    items = []
    for (index, image), caption in zip(patches, group.captions, strict=False):
        (x, y), weight = attention.coords[index], attention.attention[index]
        rank, times = rank_text(attention, index), multiple_text(weight * len(attention.compared))
        position = f"level-0 px ({x}, {y})"
        title = f"Rank {rank} of {len(attention)}: {attention.name} {weight:.3g}, {times} times uniform, at {position}"
        lines = [caption] if group.is_evidence else [f"rank {rank}", f"{weight:.3g} ({times} x)"]
        lines.append(position.replace(", ", ",\N{NO-BREAK SPACE}"))  # a line breaks before the numbers
        title += f", evidence {caption.split(': ')[-1]}" if group.is_evidence else ""
        items.append(_GalleryItem(int(index), image, title, lines))
    return items


def _concentration(attention: AttentionMap) -> list[tuple[str, str]]:
    half, tenth = attention.half_count, attention.cumulative[max(1, len(attention) // 10) - 1]
    return [
        ("Patches", f"{len(attention):,}"),
        (f"Half of the {attention.name} is held by", f"{half:,} patches ({percent_text(half / len(attention))})"),
        (
            "The most attended tenth holds" if attention.name == ATTENTION else "The highest tenth holds",
            percent_text(tenth / attention.cumulative[-1]),
        ),
        ("Effective number of patches", f"{attention.effective_count:,.0f} (exp of the entropy)"),
        (f"Highest {attention.name}", f"{multiple_text(attention.peak)} times uniform"),
    ]
