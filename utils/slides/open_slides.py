"""Open slides: whole-slide formats with OpenSlide, plain images with Pillow, both as a `Slide`.

Tiled TIFFs are read without OpenSlide if that gives the same pixels: see `utils.slides.tiles`.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from utils.core.errors import SlideError
from utils.core.runtime import derive_seed, log
from utils.slides.find import IMAGE_EXTENSIONS, SLIDE_EXTENSIONS, TIFF_EXTENSIONS
from utils.slides.levels import LevelFit, fit_levels, log_fits
from utils.slides.mirax import check_data_folder, is_mirax
from utils.slides.plain_image import open_image
from utils.slides.resolution import NOT_IN_FILE, PLAUSIBLE_MPP, Resolution, number
from utils.slides.resolution import file_resolution as resolution_of
from utils.slides.slide import WHITE, Slide, closed, damaged, opaque
from utils.slides.tiff import PageShown, TiffSlide, compare_by_structure, is_tiff, open_tiff
from utils.slides.tiles import MOST_TILE_PIXELS, PROBE, TileReader

# Formats whose levels are pages of adjacent tiles; in others tiles overlap, or have positions of their own.
_TILED_VENDORS = frozenset({"aperio", "generic-tiff"})
# px of a level: OpenSlide rounds a position this close to a whole px, and interpolates otherwise.
_WHOLE = 1 / 512


def open_slide(path: Path | str, mpp: float | None = None) -> "Slide":
    """Open a slide or a plain image for reading; use it as a context manager, or close it.

    `mpp` is the um per level-0 px given by the user, which overrides the value in the file.

    OpenSlide is tried first. Other TIFFs are read by tifffile (see `utils.slides.tiff`), and plain images (.png, .jpg,
    .bmp) by Pillow, as slides of one level.

    Raises:
        SlideError: missing, empty, a folder, damaged, or of a format that neither reads; or `mpp` is not plausible.
    """
    path = Path(path)
    low, high = PLAUSIBLE_MPP
    if mpp is not None and not low <= mpp <= high:
        raise SlideError(f"{path}: {mpp:g} um/px, given for it, is not plausible ({low:g} to {high:g}); correct it")
    _check_file(path)
    slide = _opened(path)
    slide.user_mpp, slide.opened_by = mpp, open_slide
    try:
        own = slide.file_resolution()
    except BaseException:
        slide.close()
        raise
    resolution = own if mpp is None else Resolution(mpp)
    slide.mpp, slide.mpp_problem, slide.file_mpp = resolution.mpp, resolution.problem, own.mpp
    if resolution.doubt or resolution.problem not in (None, NOT_IN_FILE):
        log.warning("%s: %s", path, resolution.doubt or f"{resolution.problem}; its um/px is taken as unknown")
    return slide


def _opened(path: Path) -> Slide:
    """Open the slide with the reader for its format. Raises SlideError."""
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        if is_tiff(path):
            return open_tiff(path)
        if not isinstance(error, openslide.OpenSlideUnsupportedFormatError):
            raise SlideError(damaged(path, "cannot be opened", error)) from error
        if path.suffix.lower() not in IMAGE_EXTENSIONS | TIFF_EXTENSIONS:
            endings = " ".join(sorted(SLIDE_EXTENSIONS | IMAGE_EXTENSIONS))
            raise SlideError(
                f"{path}: not a slide that OpenSlide knows; the file is damaged or incomplete, or not one of {endings}"
            ) from error
        return open_image(path)
    try:
        _check_tiles(path, handle)
        slide = _OpenSlideSlide(path, handle)
        if slide.vendor != "generic-tiff":
            return slide
        by_structure = compare_by_structure(path, (slide.width, slide.height), handle.level_count)
    except BaseException:
        handle.close()
        raise
    if isinstance(by_structure, TiffSlide):
        handle.close()
        return by_structure
    slide.page_shown = by_structure
    return slide


@contextmanager
def opened(wsi: "Path | str | Slide", mpp: float | None = None) -> Iterator[Slide]:
    """Open a slide as `open_slide` does, and close it at the end; one that is open already is used, and stays open."""
    if isinstance(wsi, Slide):
        yield wsi
        return
    with open_slide(wsi, mpp) as slide:
        yield slide


def slide_mpp(wsi: "Path | str | Slide") -> float | None:
    """Return a slide's level-0 um/px; None where it does not say. Raise SlideError."""
    with opened(wsi) as slide:
        return slide.mpp


class _LevelReader:
    """Reads a slide's levels by OpenSlide for comparisons, even after a damaged tile."""

    def __init__(self, path: Path, downsamples: Sequence[float], background: tuple[int, int, int]) -> None:
        self._path, self._downsamples, self._background = path, downsamples, background
        self._handle = openslide.OpenSlide(path)

    def close(self) -> None:
        self._handle.close()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read (height, width, 3) uint8 RGB at px (x, y) of a level. Raises SlideError for damage."""
        corner = round(x * self._downsamples[level]), round(y * self._downsamples[level])
        try:
            region = self._handle.read_region(corner, level, (width, height))
        except openslide.OpenSlideError as error:
            self._handle.close()  # it refuses all later reads
            self._handle = openslide.OpenSlide(self._path)
            raise SlideError(damaged(self._path, "its levels cannot be compared", error)) from error
        return opaque(np.asarray(region), self._background)


class _OpenSlideSlide(Slide):
    """A slide read through OpenSlide; its handle may be shared by threads."""

    def __init__(self, path: Path, handle: openslide.OpenSlide) -> None:
        self.path, self.name = path, path.stem
        self._handle: openslide.OpenSlide | None = handle
        properties = handle.properties
        self.width, self.height = handle.dimensions
        self._reader_dimensions = tuple((int(width), int(height)) for width, height in handle.level_dimensions)
        # OpenSlide positions regions by these, as if the rounding of a level's size were spread over the level.
        self._reader_downsamples = tuple(float(downsample) for downsample in handle.level_downsamples)
        self.objective = number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        self.bounds = _bounds(properties)
        self._background = background_colour(properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR))
        self._lock = threading.Lock()
        self._tiles: TileReader | None = None
        self._chosen = False
        self.page_shown = PageShown()

    @cached_property
    def _fits(self) -> list[LevelFit]:
        """How the levels fit level 0, by their sizes and, in formats with many writers, by their pixels."""
        look = self.vendor in _TILED_VENDORS
        with closing(_LevelReader(self.path, self._reader_downsamples, self._background)) as reader:
            fits = fit_levels(self._reader_dimensions, self._reader_downsamples, reader.read, look=look)
        log_fits(self.path, self._reader_dimensions, fits)
        return fits

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(fit.size for fit in self._fits)

    @property
    def level_downsamples(self) -> tuple[float, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(fit.downsample for fit in self._fits)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        if self._tiles is not None:
            self._tiles.close()
        self._handle = None

    def file_resolution(self) -> Resolution:
        assert self._handle is not None  # noqa: S101 - it was just opened
        own = self._handle.properties
        properties = {name: value for name in own if (value := own.get(name)) is not None}  # damaged names have none
        if self.page_shown.description:  # OpenSlide loses what is not in UTF-8
            properties["tiff.ImageDescription"] = self.page_shown.description
        return resolution_of(properties, self.width, self.height, ome_image=self.page_shown.ome_number)

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        downsample, reader_downsample = self.level_downsamples[level], self._reader_downsamples[level]
        column, row = round(x / downsample), round(y / downsample)
        if max(abs(x / downsample - column), abs(y / downsample - row)) < _WHOLE:
            return self._read_level(level, column, row, width, height)
        corner = round(x / downsample * reader_downsample), round(y / downsample * reader_downsample)
        return self._read_by_openslide(*corner, level, width, height)

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        tiles = self.tile_reader
        if tiles is not None:
            return tiles.read(level, x, y, width, height)
        level_width, level_height = self._reader_dimensions[level]
        downsample = self._reader_downsamples[level]
        corner = _level0(x, width, level_width, downsample), _level0(y, height, level_height, downsample)
        return self._read_by_openslide(*corner, level, width, height)

    @property
    def tile_reader(self) -> TileReader | None:
        """The fast reader, chosen at the first read; None if OpenSlide reads the slide. Raises SlideError if closed."""
        with self._lock:
            if self._handle is None:
                raise SlideError(closed(self.path))
            if not self._chosen:
                self._tiles = self._verified_tile_reader() if self.vendor in _TILED_VENDORS else None
                self._chosen = True
            return self._tiles

    def _verified_tile_reader(self) -> TileReader | None:
        tiles = TileReader.open(self.path, self._reader_dimensions, self._background)
        if tiles is None or self._reads_the_same(tiles):
            return tiles
        tiles.close()
        log.info("%s: read through OpenSlide: the fast reader does not give the same pixels", self.path)
        return None

    def _reads_the_same(self, tiles: TileReader) -> bool:
        """Return whether a few regions have OpenSlide's pixels, or are damaged for both readers."""
        with closing(_LevelReader(self.path, self._reader_downsamples, self._background)) as reader:
            for level, x, y in tiles.probes(derive_seed(self.path.name, self.width, self.height)):
                downsample = self._reader_downsamples[level]
                x, y = _whole_near(x, downsample), _whole_near(y, downsample)
                ours = theirs = None
                with suppress(SlideError):
                    ours = tiles.read(level, x, y, PROBE, PROBE)
                with suppress(SlideError):
                    theirs = reader.read(level, x, y, PROBE, PROBE)
                same = ours is theirs if ours is None or theirs is None else np.array_equal(ours, theirs)
                if not same:
                    return False
        return True

    def _read_by_openslide(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        handle = self._handle
        if handle is None:
            raise SlideError(closed(self.path))
        try:
            region = handle.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError:
            region = self._read_anew(handle, x, y, level, width, height)
        return opaque(np.asarray(region), self._background)

    def _read_anew(
        self, failed: openslide.OpenSlide, x: int, y: int, level: int, width: int, height: int
    ) -> Image.Image:
        """Read with a new handle: after one failure, in any thread, OpenSlide refuses every read of the old one."""
        with self._lock:
            if self._handle is failed:
                self._handle = openslide.OpenSlide(self.path)
        try:
            with openslide.OpenSlide(self.path) as handle:
                return handle.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            raise SlideError(damaged(self.path, f"level {level} cannot be read at ({x}, {y})", error)) from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise SlideError(f"{path}: a folder, where a slide file is expected; give the file itself")
    if not path.exists():
        raise SlideError(f"{path}: no such file; check the path")
    if not os.access(path, os.R_OK):
        raise SlideError(f"{path}: no permission to read it; check its permissions")
    # The .mrxs of a MIRAX slide is only a thumbnail: its pixels are in the folder beside it.
    if path.stat().st_size == 0 and not is_mirax(path):
        raise SlideError(f"{path}: the file is empty (0 bytes); copy or download it again")
    check_data_folder(path)


def _check_tiles(path: Path, handle: openslide.OpenSlide) -> None:
    """Raise SlideError for tiles too large for any memory: OpenSlide ends the process if an allocation fails."""
    for level in range(handle.level_count):
        width, height = (
            number(handle.properties.get(f"openslide.level[{level}].tile-{side}")) for side in ("width", "height")
        )
        if width and height and width * height > MOST_TILE_PIXELS:
            raise SlideError(
                f"{path}: damaged: says that a tile of level {level} has {width:.0f} x {height:.0f} px; copy or "
                "download it again"
            )


def _level0(start: int, size: int, extent: int, downsample: float) -> int:
    """Return the level-0 px nearest to px `start` of a level; rounded down if a region of `size` would otherwise cross
    the edge and blend the background into the level's last px.
    """
    nearest = round(start * downsample)
    return math.floor(start * downsample) if start + size <= extent < nearest / downsample + size else nearest


def _whole_near(start: int, downsample: float) -> int:
    """Return the last px of a level, up to `start`, that begins where a level-0 px does."""
    candidates = np.arange(max(start, 0), -1, -1)
    off = np.abs(np.rint(candidates * downsample) / downsample - candidates)
    return int(candidates[np.argmax(off < _WHOLE)])


def _bounds(properties) -> tuple[int, int, int, int] | None:
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return None
    return x, y, width, height


def background_colour(text: str | None) -> tuple[int, int, int]:
    """Parse OpenSlide's background colour, six hexadecimal digits; white if there is none."""
    try:
        red, green, blue = bytes.fromhex(text or "ffffff")
    except ValueError:
        return WHITE
    return red, green, blue
