"""TIFFs that OpenSlide refuses, or knows a part of, read by tifffile: OME-TIFF, pyramids in SubIFDs, untiled images.

A TIFF may hold several images: the slide, its label, a macro photograph, thumbnails. Which one is the slide is told by
structure: a tiled pyramid before a lone page, the largest before smaller ones, never what is called a label or a macro.
Where that leaves a doubt the file is refused, with what it holds.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from utils.core.errors import SlideError, named
from utils.core.runtime import log
from utils.slides.levels import Size, fit_levels, log_fits, whole_downsample
from utils.slides.resolution import Resolution, file_resolution, ome_images
from utils.slides.slide import WHITE, Slide, closed, opaque
from utils.slides.tiles import (
    MOST_TILE_PIXELS,
    TIFF_FAILURES,
    Decoder,
    Level,
    Page,
    TileReader,
    fast_decoder,
    keyframe,
    tile_size,
)

_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Images beside the slide, by their names and descriptions.
_BESIDE = re.compile(r"\b(label|macro|thumbnail|overview|slide ?preview|map ?image)\b", re.IGNORECASE)
# An image of more than this share of the largest one's area could be what is wanted as well.
_RIVAL = 0.25
_MOST_LISTED = 8
_MOST_DESCRIPTION = 300  # characters; longer ones (OME-XML) describe the whole file
_COLOURS = ({"", "r", "red"}, {"", "g", "green"}, {"", "b", "blue"})
_CONVERT = (
    "convert it to a tiled pyramid (vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg, or QuPath's export)"
)
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _SEPARATED, _YCBCR = 0, 1, 2, 3, 5, 6
_UNITS = {2: "inch", 3: "centimeter"}
# What decoders raise on damaged tiles, besides their own errors, which are ValueErrors.
_DECODING_FAILURES = (*TIFF_FAILURES, NotImplementedError, RuntimeError, MemoryError)


def is_tiff(path: Path) -> bool:
    """Whether the file begins as a TIFF does."""
    with path.open("rb") as file:
        return file.read(4) in _SIGNATURES


@dataclass(frozen=True, eq=False)
class TiffImage:
    """One image of a file: the pages of each of its levels (one, or one a colour), level 0 first."""

    number: int
    name: str
    axes: str
    levels: Sequence[Sequence[Page]]

    @property
    def page(self) -> tifffile.TiffPage:
        """The first page of level 0, which says how the image is stored."""
        return keyframe(self.levels[0][0])

    @property
    def sizes(self) -> list[Size]:
        first = [keyframe(pages[0]) for pages in self.levels]
        return [(page.imagewidth, page.imagelength) for page in first]

    @property
    def area(self) -> int:
        return self.sizes[0][0] * self.sizes[0][1]

    @property
    def is_beside(self) -> bool:
        """Whether it is called a label, a macro photograph or a thumbnail."""
        description = self.page.description
        words = f"{self.name} {description}" if len(description) <= _MOST_DESCRIPTION else self.name
        return _BESIDE.search(words) is not None

    @property
    def is_pyramid(self) -> bool:
        return self.page.is_tiled or len(self.levels) > 1

    @property
    def is_reduced(self) -> bool:
        """Whether it says that it is a smaller copy of another page."""
        return bool(self.page.subfiletype & 1)

    def __str__(self) -> str:
        width, height = self.sizes[0]
        kind = "tiled" if self.page.is_tiled else "not tiled"
        name = f" '{self.name}'" if self.name else ""
        return f"{self.number}{name} ({width} x {height}, {kind}, axes {self.axes})"


def tiff_images(file: tifffile.TiffFile) -> list[TiffImage]:
    """The images of a file, by what tifffile makes of its pages, SubIFDs and OME-XML."""
    images = []
    for number, series in enumerate(file.series):
        levels = [[page for page in level.pages if page is not None] for level in series.levels]
        if all(levels):
            name = series.name if series.kind == "ome" else ""
            images.append(TiffImage(number, name, series.get_axes(squeeze=True), levels))
    return images


def choose_image(path: Path, images: Sequence[TiffImage]) -> TiffImage:
    """The image that is the slide. Raises SlideError where there is none, or structure does not tell."""
    candidates = [image for image in images if not image.is_beside]
    for kind in (lambda image: image.is_pyramid, lambda image: not image.is_reduced):
        candidates = [image for image in candidates if kind(image)] or candidates
    if not images:
        raise SlideError(
            f"{path}: a TIFF without an image that can be read; the file is damaged or incomplete, get it again"
        )
    if not candidates:
        raise SlideError(f"{path}: holds no slide, but {_listed(images)}; give the slide's own file")
    chosen = max(candidates, key=lambda image: image.area)
    # Of lone pages any other may be what is wanted, but for smaller copies of the largest.
    least_area = _RIVAL * chosen.area if chosen.is_pyramid else 0
    rivals = [
        image
        for image in candidates
        if image is not chosen
        and image.area > least_area
        and whole_downsample(chosen.sizes[0], image.sizes[0]) in (None, 1.0)
    ]
    if rivals:
        raise SlideError(
            f"{path}: which of its images is the slide cannot be told: {_listed([chosen, *rivals])}; save the one that "
            "is wanted as a file of its own"
        )
    return chosen


def _listed(images: Sequence[TiffImage]) -> str:
    return named([str(image) for image in images], _MOST_LISTED)


class TiffSlide(Slide):
    """The image of a TIFF that is the slide; made by `open_tiff`, shared by threads."""

    def __init__(self, path: Path, file: tifffile.TiffFile, image: TiffImage) -> None:
        self.path, self.name, self.vendor = path, path.stem, "tiff"
        self._properties = _properties(file, image)
        self._image_number = image.number
        self.objective = _objective(self._properties)
        self._tiles = _reader(path, image)
        self._is_closed = False
        self.width, self.height = image.sizes[0]
        reader_downsamples = [(self.width / width + self.height / height) / 2 for width, height in image.sizes]
        fits = fit_levels(image.sizes, reader_downsamples, self._tiles.read)
        log_fits(path, image.sizes, fits)
        self.level_dimensions = tuple(fit.size for fit in fits)
        self.level_downsamples = tuple(fit.downsample for fit in fits)

    def close(self) -> None:
        self._tiles.close()
        self._is_closed = True

    def file_resolution(self) -> Resolution:
        return file_resolution(self._properties, self.width, self.height, ome_image=self._image_number)

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        downsample = self.level_downsamples[level]
        return self._read_level(level, round(x / downsample), round(y / downsample), width, height)

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        if self._is_closed:
            raise SlideError(closed(self.path))
        return self._tiles.read(level, x, y, width, height)


def open_tiff(path: Path) -> TiffSlide:
    """Open a TIFF that OpenSlide does not read.

    Raises SlideError, which says what of it cannot be read, or which of its images could be the slide.
    """
    try:
        with tifffile.TiffFile(path) as file:
            return TiffSlide(path, file, choose_image(path, tiff_images(file)))
    except TIFF_FAILURES as error:
        reason = " ".join(str(error).split())
        raise SlideError(f"{path}: a TIFF that cannot be read ({reason}); copy it again, or {_CONVERT}") from error


def read_better_by_structure(path: Path, size: Size, levels: int) -> TiffSlide | None:
    """The slide of a TIFF of which OpenSlide shows another image than the slide, or less of its levels; None where
    OpenSlide, with so many `levels` and level 0 of this `size`, shows it well.

    Raises SlideError where structure does not tell which of several images is the slide.
    """
    try:
        with tifffile.TiffFile(path) as file:
            image = choose_image(path, tiff_images(file))
            is_shown = image.sizes[0] == size and len(image.levels) <= levels and len(image.levels[0]) == 1
            return None if is_shown else TiffSlide(path, file, image)
    except TIFF_FAILURES:  # odd to tifffile alone
        return None


def _properties(file: tifffile.TiffFile, image: TiffImage) -> dict[str, str]:
    """What the file says of the image, under the names that OpenSlide has for it."""
    page, first = image.page, file.pages[0]
    description = page.description or (first.description if isinstance(first, tifffile.TiffPage) else "")
    if file.ome_metadata:
        description = file.ome_metadata
    properties = {"tiff.ImageDescription": description, "tiff.ResolutionUnit": _UNITS.get(page.resolutionunit, "none")}
    for name, value in zip(("XResolution", "YResolution"), page.resolution, strict=True):
        properties[f"tiff.{name}"] = str(value)
    if description.startswith("Aperio"):
        found = re.search(r"\bMPP\s*=\s*([\d.]+)", description)
        properties |= {"aperio.MPP": found[1]} if found else {}
    return properties


def _objective(properties: Mapping[str, str]) -> float | None:
    found = re.search(r"NominalMagnification\s*=\s*\"([\d.]+)\"", properties["tiff.ImageDescription"])
    found = found or re.search(r"\bAppMag\s*=\s*([\d.]+)", properties["tiff.ImageDescription"])
    return float(found[1]) if found else None


def _reader(path: Path, image: TiffImage) -> TileReader:
    """What reads the levels. Raises SlideError, which says what stands against that."""
    _check_kind(path, image)
    levels = []
    for number, pages in enumerate(image.levels):
        level = Level.of_pages(pages, _decoder_of(pages))
        if level is None:
            raise SlideError(f"{path}: the tiles of level {number} are not all told of; {_CONVERT}")
        levels.append(level)
    return TileReader(path, levels, WHITE)


def _check_kind(path: Path, image: TiffImage) -> None:
    """Raise SlideError unless the pixels are colours or grey of 8 bits, and can be decoded."""
    page, axes = image.page, image.axes
    planes = axes.translate(str.maketrans("", "", "YX"))
    problem, remedy = "", _CONVERT
    tile_width, tile_height = tile_size(page)
    if planes not in ("", "S", "C"):
        problem, remedy = f"a stack of images (axes {axes})", "save the one that is wanted as a file of its own"
    elif page.bitspersample not in (1, 8) or page.sampleformat != 1:
        problem = f"pixels of {page.bitspersample} bits, where 8 bits per colour are expected"
        remedy = f"scale them to 8 bits, and {_CONVERT}"
    elif page.photometric not in (_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _SEPARATED, _YCBCR):
        problem = f"colours of the kind {_name_of(page.photometric)}"
    elif planes == "C" and not _are_colours(image):
        problem = f"{len(image.levels[0])} channels that are not red, green and blue, as fluorescence has"
        remedy = "give a brightfield slide"
    elif page.compression != 1 and page.compression not in tifffile.TIFF.DECOMPRESSORS:
        problem = f"tiles in a compression ({_name_of(page.compression)}) that is not known"
    elif tile_width * tile_height > MOST_TILE_PIXELS:
        problem = f"{tile_width} x {tile_height} px in one piece, too large to decode at once"
    if problem:
        raise SlideError(f"{path}: it holds {problem}; {remedy}")


def _name_of(value: Any) -> str:
    return str(getattr(value, "name", value))


def _are_colours(image: TiffImage) -> bool:
    """Whether the pages of an image are its red, green and blue."""
    names = image_channels(image)
    is_named = all(name.lower() in known for name, known in zip(names, _COLOURS, strict=False))
    if len(image.levels[0]) == len(_COLOURS) and is_named:
        log.info("image %s: its three channels are taken as red, green and blue", image.number)
        return True
    return False


def image_channels(image: TiffImage) -> list[str]:
    """The names of an image's channels by OME-XML, "" for one that has none or a number."""
    root = image.page.parent
    images = ome_images(root.ome_metadata or "") if isinstance(root, tifffile.TiffFile) else []
    named = re.findall(r"<(?:\w+:)?Channel\b([^>]*)>", images[image.number]) if image.number < len(images) else []
    found = [re.search(r"\bName\s*=\s*\"([^\"]*)\"", attributes) for attributes in named]
    return [re.sub(r"(?i)^(channel)?\s*[\d: ]*$", "", name[1]) if name else "" for name in found]


def _decoder_of(pages: Sequence[Page]) -> Decoder:
    page = keyframe(pages[0])
    fast = fast_decoder(page) if len(pages) == 1 and page.is_tiled else None
    return fast or partial(_decode, page.decode, _to_rgb_of(page), page.jpegtables, tile_size(page))


def _decode(
    decode: Callable[..., Any],
    to_rgb: Callable[[NDArray], NDArray[np.uint8]],
    tables: bytes | None,
    size: Size,
    index: int,
    planes: Sequence[bytes],
) -> NDArray[np.uint8]:
    """A tile by tifffile's decoder, the colours of several planes side by side; white beyond the image's edge."""
    try:
        decoded = [decode(data, index, jpegtables=tables)[0] for data in planes]
    except _DECODING_FAILURES as error:
        raise ValueError(str(error) or type(error).__name__) from error
    pixels = to_rgb(np.concatenate([part[0] for part in decoded], axis=-1))
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    tile = np.full((height, width, 3), WHITE, dtype=np.uint8)
    tile[: pixels.shape[0], : pixels.shape[1]] = pixels[:height, :width]
    return tile


def _to_rgb_of(page: tifffile.TiffPage) -> Callable[[NDArray], NDArray[np.uint8]]:
    """What makes (h, w, 3) uint8 RGB of a page's decoded samples (h, w, s)."""
    if page.photometric == _PALETTE and page.colormap is not None:
        return partial(_by_palette, (np.asarray(page.colormap) >> 8).astype(np.uint8).T)
    if page.photometric == _SEPARATED:
        return lambda samples: np.asarray(Image.fromarray(samples[..., :4], "CMYK").convert("RGB"))
    if page.photometric in (_MINISWHITE, _MINISBLACK) and page.samplesperpixel < len(_COLOURS):
        return partial(_by_grey, page.bitspersample == 1, page.photometric == _MINISWHITE)
    return _by_colour


def _by_palette(colours: NDArray[np.uint8], samples: NDArray) -> NDArray[np.uint8]:
    return colours[samples[..., 0]]


def _by_grey(is_bilevel: bool, is_inverted: bool, samples: NDArray) -> NDArray[np.uint8]:
    """Grey, or red, green and blue that are stored as grey pages."""
    pixels = samples.astype(np.uint8)
    pixels = pixels * np.uint8(255) if is_bilevel else pixels
    pixels = 255 - pixels if is_inverted else pixels
    return np.ascontiguousarray(pixels[..., :3]) if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)


def _by_colour(samples: NDArray) -> NDArray[np.uint8]:
    """RGB, its alpha, if there is one, composed on white."""
    if samples.shape[-1] == 4:
        return opaque(samples.astype(np.uint8), WHITE)
    return np.ascontiguousarray(samples[..., :3], dtype=np.uint8)
