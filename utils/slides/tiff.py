"""Read TIFFs that OpenSlide refuses or shows only in part by tifffile: OME-TIFF, pyramids in SubIFDs, untiled images.

`utils.slides.tiff_images` chooses the image that is the slide, `utils.slides.tiff_colours` checks and converts pixels.
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

from utils.core.errors import SlideError
from utils.core.runtime import log
from utils.slides.levels import Size, fit_levels, log_fits
from utils.slides.resolution import Resolution, file_resolution, number
from utils.slides.slide import WHITE, Slide, closed
from utils.slides.tiff_colours import (
    CONVERT,
    are_unnamed_channels,
    check_brightfield,
    check_colours,
    check_samples,
    codestream,
    name_of,
    openslide_shows_colours,
    to_rgb_of,
)
from utils.slides.tiff_images import TiffImage, choose_image, tiff_images
from utils.slides.tiles import (
    JPEG_2000,
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
_UNITS = {2: "inch", 3: "centimeter"}


def is_tiff(path: Path) -> bool:
    """Return whether the file begins as a TIFF does."""
    with path.open("rb") as file:
        return file.read(4) in _SIGNATURES


class TiffSlide(Slide):
    """The image of a TIFF that is the slide; made by `open_tiff`, may be shared by threads."""

    def __init__(self, path: Path, file: tifffile.TiffFile, image: TiffImage) -> None:
        self.path, self.name, self.vendor = path, path.stem, "tiff"
        self._properties = _properties(file, image)
        self._ome_number = image.ome_number
        self.objective = _objective(self._properties)
        self.width, self.height = image.sizes[0]
        self._is_closed = False
        self._tiles = _reader(path, image)
        try:
            self._check_channels(image)
            reader_downsamples = [(self.width / width + self.height / height) / 2 for width, height in image.sizes]
            fits = fit_levels(image.sizes, reader_downsamples, self._tiles.read, look=True)
        except BaseException:
            self.close()
            raise
        log_fits(path, image.sizes, fits)
        self.level_dimensions = tuple(fit.size for fit in fits)
        self.level_downsamples = tuple(fit.downsample for fit in fits)

    def close(self) -> None:
        self._tiles.close()
        self._is_closed = True

    def file_resolution(self) -> Resolution:
        return file_resolution(self._properties, self.width, self.height, ome_image=self._ome_number)

    def _check_channels(self, image: TiffImage) -> None:
        if are_unnamed_channels(image):
            check_brightfield(self.path, len(image.levels) - 1, image.sizes[-1], self._tiles.read)
            log.warning(
                "%s: its three channels have no names, and are taken as red, green and blue; look at its preview",
                self.path,
            )

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        downsample = self.level_downsamples[level]
        return self._read_level(level, round(x / downsample), round(y / downsample), width, height)

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        if self._is_closed:
            raise SlideError(closed(self.path))
        return self._tiles.read(level, x, y, width, height)


def open_tiff(path: Path) -> TiffSlide:
    """Open a TIFF that OpenSlide does not read.

    Raises SlideError, which says what cannot be read, or which of its images could be the slide.
    """
    try:
        with tifffile.TiffFile(path) as file:
            return TiffSlide(path, file, choose_image(path, tiff_images(path, file)))
    except TIFF_FAILURES as error:
        is_explained = isinstance(error, tifffile.TiffFileError | OSError)
        reason = " ".join(str(error).split()) if is_explained else "its tags contradict each other"
        raise SlideError(f"{path}: a TIFF that cannot be read ({reason}); copy it again, or {CONVERT}") from error


@dataclass(frozen=True)
class PageShown:
    """The metadata of a TIFF that OpenSlide shows correctly: its description, and which image of OME-XML it is."""

    description: str = ""
    ome_number: int | None = 0


def compare_by_structure(path: Path, size: Size, levels: int) -> TiffSlide | PageShown:
    """Return the slide if OpenSlide shows another image of the TIFF, wrong colours or fewer levels; else the metadata
    of the image OpenSlide shows, which has this many `levels` and level 0 of this `size`.

    Raises SlideError if the structure does not decide which image is the slide, or the pixels are of a kind that
    OpenSlide opens but shows wrongly.
    """
    try:
        with tifffile.TiffFile(path) as file:
            image = choose_image(path, tiff_images(path, file))
            check_samples(path, image)
            is_shown = image.sizes[0] == size and len(image.levels) <= levels and len(image.levels[0]) == 1
            if is_shown and openslide_shows_colours(image):
                return PageShown(_properties(file, image)["tiff.ImageDescription"], image.ome_number)
            return TiffSlide(path, file, image)
    except TIFF_FAILURES:  # odd to tifffile alone
        return PageShown()


def _properties(file: tifffile.TiffFile, image: TiffImage) -> dict[str, str]:
    """Return the image's metadata under OpenSlide's property names."""
    page, first = image.page, file.pages[0]
    description = page.description or (first.description if isinstance(first, tifffile.TiffPage) else "")
    if file.ome_metadata:
        description = file.ome_metadata
    properties = {"tiff.ImageDescription": description, "tiff.ResolutionUnit": _UNITS.get(page.resolutionunit, "none")}
    for name, value in zip(("XResolution", "YResolution"), page.resolution, strict=True):
        properties[f"tiff.{name}"] = str(value)
    if description.startswith("Aperio"):
        match = re.search(r"\bMPP\s*=\s*([\d.]+)", description)
        properties |= {"aperio.MPP": match[1]} if match else {}
    return properties


def _objective(properties: Mapping[str, str]) -> float | None:
    match = re.search(r"NominalMagnification\s*=\s*\"([\d.]+)\"", properties["tiff.ImageDescription"])
    match = match or re.search(r"\bAppMag\s*=\s*([\d.]+)", properties["tiff.ImageDescription"])
    return number(match[1]) if match else None


def _reader(path: Path, image: TiffImage) -> TileReader:
    """Return the reader of the levels. Raises SlideError if colours or storage are not supported."""
    check_colours(path, image)
    levels = []
    for index, pages in enumerate(image.levels):
        problem, remedy = _storage_problem(keyframe(pages[0]))
        if problem:
            raise SlideError(f"{path}: it holds {problem}; {remedy}")
        level = Level.of_pages(pages, _decoder_of(pages))
        if level is None:
            raise SlideError(
                f"{path}: the file does not list all tiles of level {index}; it is damaged or incomplete, get it again"
            )
        levels.append(level)
    return TileReader(path, levels, WHITE)


def _storage_problem(page: tifffile.TiffPage) -> tuple[str, str]:
    """Return the problem with decoding the tiles, and what to do; ("", "") if there is none."""
    compression = f"tiles in a compression ({name_of(page.compression)})"
    width, height = tile_size(page)
    if min(width, height) < 1:
        return f"tiles of {width} x {height} px", "the file is damaged or incomplete, get it again"
    if width * height > MOST_TILE_PIXELS:
        return f"{width} x {height} px in one piece, too large to decode at once", CONVERT
    if page.compression != 1 and not _is_known(page.compression):
        return f"{compression} that is not known", CONVERT
    try:
        page.decode(None, 0)  # fails at once where tifffile cannot decode such tiles at all
    except TIFF_FAILURES as error:
        reason = " ".join(str(error).split())
        is_known = str(int(page.compression)) not in reason
        return f"{compression} that is not " + (f"read in this form ({reason})" if is_known else "known"), CONVERT
    if page.compression in JPEG_2000 and codestream(page)[0]:
        return f"{compression} that is not read in this form (its colours are subsampled)", CONVERT
    return "", ""


def _is_known(compression: int) -> bool:
    try:
        return callable(tifffile.TIFF.DECOMPRESSORS[compression])
    except KeyError:
        return False


def _decoder_of(pages: Sequence[Page]) -> Decoder:
    page = keyframe(pages[0])
    fast = fast_decoder(page) if len(pages) == 1 and page.is_tiled else None
    return fast or partial(_decode, page.decode, to_rgb_of(page), page.jpegtables, tile_size(page))


def _decode(
    decode: Callable[..., Any],
    to_rgb: Callable[[NDArray], NDArray[np.uint8]],
    tables: bytes | None,
    size: Size,
    index: int,
    planes: Sequence[bytes],
) -> NDArray[np.uint8]:
    """Decode a tile by tifffile and join the colours of several planes; white beyond the image's edge."""
    try:
        decoded = [decode(data, index, jpegtables=tables)[0] for data in planes]
        pixels = to_rgb(np.concatenate([page[0] for page in decoded], axis=-1))
    except TIFF_FAILURES as error:
        raise ValueError(str(error) or type(error).__name__) from error
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    tile = np.full((height, width, 3), WHITE, dtype=np.uint8)
    tile[: pixels.shape[0], : pixels.shape[1]] = pixels[:height, :width]
    return tile
