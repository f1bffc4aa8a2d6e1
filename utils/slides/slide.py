"""`Slide`, the interface of every slide reader, and code that the readers share.

Positions are level-0 px of a top-left corner, or px of a level where stated; sizes are px of the level read. Any
problem with a file, at opening or later, is a SlideError of one line.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.core.errors import SlideError
from utils.core.runtime import progress
from utils.slides.mirax import data_files, is_mirax
from utils.slides.resolution import NOT_IN_FILE, Resolution

BAR_DELAY_SECONDS = 3  # after which a progress bar of an overview is shown
READ_BLOCK = 4096  # px of a level read at once for a thumbnail: 50 MB, whatever the slide's size
WHITE = (255, 255, 255)
Colour = tuple[int, int, int]
Area = tuple[int, int, int, int]  # x, y, width, height in level-0 px

_HASHED_BYTES = 2**20
_SMALL_PIECE = 64  # px, the side of a piece that is filled around damage


class Slide:
    """A slide open for reading; made by `utils.slides.open_slides.open_slide`.

    Attributes:
        path, name: the file, and its name without the extension.
        width, height: level-0 px.
        level_dimensions: (width, height) of each level, in its own px.
        level_downsamples: level-0 px per px of each level: a whole number if that explains the level's size, with its
            last column and row rounded, else the factor at which its pixels agree; inf for a level that does not show
            the same as level 0 (see `utils.slides.levels`).
        mpp: um per level-0 px, or None if the file has no plausible value.
        mpp_problem: why mpp is None, in a few words.
        user_mpp: mpp given by the user, or None.
        file_mpp: mpp in the file, or None.
        objective: nominal magnification of the objective, or None.
        vendor: OpenSlide's name for the scanner's format; "image" for a plain image.
        bounds: (x, y, width, height) of the scanned area in level-0 px, or None if the file does not say.
        opened_by: the function of path and user_mpp that opens it again.
        reads_past_damage: whether thumbnails show white where the slide cannot be read, instead of a SlideError.
    """

    path: Path
    name: str
    width: int
    height: int
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    mpp: float | None = None
    mpp_problem: str | None = NOT_IN_FILE
    user_mpp: float | None = None
    file_mpp: float | None = None
    objective: float | None = None
    vendor: str
    bounds: tuple[int, int, int, int] | None = None
    opened_by: Callable[..., "Slide"]
    reads_past_damage: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self):
        # A worker process gets the path and opens its own handle.
        return self.opened_by, (self.path, self.user_mpp)

    def close(self) -> None:
        """Close the file; reading afterwards is a SlideError."""
        raise NotImplementedError

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read (height, width, 3) uint8 RGB of a level.

        Args:
            x, y: top-left corner in level-0 px.
            level: pyramid level, 0 the finest.
            width, height: px of that level.

        Unscanned and transparent pixels, and those beyond the edge, have the slide's background colour.

        Raises:
            SlideError: the level does not exist, or the file cannot be read there.
        """
        self._check_region(level, width, height)
        return self._read(int(x), int(y), level, int(width), int(height))

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read (height, width, 3) uint8 RGB whose top-left corner is px (x, y) of a level; otherwise as `read_region`.

        Through OpenSlide the region begins at the nearest level-0 px, less than half a px of the level away.
        """
        self._check_region(level, width, height)
        return self._read_level(level, int(x), int(y), int(width), int(height))

    def check_level(self, level: int) -> None:
        """Raise a SlideError that lists the levels unless `level` is one of them."""
        exists = 0 <= level < len(self.level_dimensions)
        if exists and math.isfinite(self.level_downsamples[level]):
            return
        levels = ", ".join(
            f"{index} ({width} x {height}, downsample {downsample:.4g})"
            for index, ((width, height), downsample) in enumerate(
                zip(self.level_dimensions, self.level_downsamples, strict=True)
            )
            if math.isfinite(downsample)
        )
        problem = f"level {level} does not show what level 0 shows" if exists else f"there is no level {level}"
        raise SlideError(f"{self.path}: {problem}; choose one of {levels}")

    def coarsest_level(self, most: float) -> int:
        """Return the coarsest level of at most `most` level-0 px per px; level 0 if there is none."""
        levels = [level for level, factor in enumerate(self.level_downsamples) if factor <= most]
        return max(levels, key=lambda level: self.level_downsamples[level], default=0)

    @property
    def scanned(self) -> Area:
        """The area that the file says was scanned, as far as it is on the slide, or the whole slide."""
        whole = 0, 0, self.width, self.height
        x, y, width, height = self.bounds or whole
        left, top = max(0, x), max(0, y)
        right, bottom = min(self.width, x + width), min(self.height, y + height)
        return (left, top, right - left, bottom - top) if right > left and bottom > top else whole

    def thumbnail(
        self,
        *,
        downsample: float | None = None,
        max_side: int | None = None,
        area: Area | None = None,
        where_damaged: Colour = WHITE,
    ) -> NDArray[np.uint8]:
        """Return the whole slide, or an area of it, at a lower resolution: (h, w, 3) uint8 RGB.

        Args: `area`, (x, y, width, height) in level-0 px, and exactly one of
            downsample: level-0 px per thumbnail px, at least 1.
            max_side: px of the thumbnail's longer side; a smaller slide keeps its size.

        The nearest finer level is averaged (a box filter over every pixel) block by block, so that memory is bounded by
        the thumbnail and one block. If the slide `reads_past_damage`, unreadable pixels are `where_damaged`.
        """
        x, y, area_width, area_height = area or (0, 0, self.width, self.height)
        width, height = _thumbnail_size((area_width, area_height), downsample, max_side)
        level = self.coarsest_level(min(area_width / width, area_height / height) * (1 + 1e-6))
        level_width, level_height = self.level_dimensions[level]
        start_x, start_y = x / self.width * level_width, y / self.height * level_height
        scale_x = area_width / self.width * level_width / width
        scale_y = area_height / self.height * level_height / height
        step_x, step_y = max(1, int(READ_BLOCK / scale_x)), max(1, int(READ_BLOCK / scale_y))
        thumbnail = np.empty((height, width, 3), dtype=np.uint8)
        corners: Iterable[tuple[int, int]] = list(product(range(0, height, step_y), range(0, width, step_x)))
        if len(corners) > 1:  # of a large slide without coarse levels they take minutes
            text = f"{self.name}, overview"
            corners = progress(corners, text, unit="block", leave=False, delay=BAR_DELAY_SECONDS)
        for top, left in corners:
            bottom, right = min(top + step_y, height), min(left + step_x, width)
            box = (
                start_x + left * scale_x, start_y + top * scale_y,
                start_x + right * scale_x, start_y + bottom * scale_y,
            )  # fmt: skip
            thumbnail[top:bottom, left:right] = self._averaged(level, box, (right - left, bottom - top), where_damaged)
        return thumbnail

    def quick_hash(self) -> str:
        """Return a cheap digest of the content: sha256 of the file's size and its first and last MiB, in hexadecimal.

        Of a slide of several files (MIRAX, VMS, DICOM) only the one that was opened is read; see `data_hash`.
        """
        return quick_hash_of(self.path)

    def data_hash(self) -> str | None:
        """Return the same of the data files in a MIRAX slide's folder, which hold its pixels; None for other slides."""
        return data_hash_of(self.path)

    def _check_region(self, level: int, width: int, height: int) -> None:
        self.check_level(level)
        if width < 1 or height < 1:
            raise SlideError(f"{self.path}: a region of {width} x {height} px was requested; at least 1 x 1 is needed")

    def file_resolution(self) -> Resolution:
        return Resolution(None, NOT_IN_FILE)

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        raise NotImplementedError

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        raise NotImplementedError

    def _averaged(
        self, level: int, box: tuple[float, float, float, float], size: tuple[int, int], where_damaged: Colour
    ) -> NDArray[np.uint8]:
        """Average a box of a level, in its (fractional) px, down to `size` (width, height)."""
        left, top = math.floor(box[0]), math.floor(box[1])
        right = min(math.ceil(box[2] - 1e-9), self.level_dimensions[level][0])
        bottom = min(math.ceil(box[3] - 1e-9), self.level_dimensions[level][1])
        pixels = self._read_leniently(level, left, top, right - left, bottom - top, where_damaged)
        inside = (box[0] - left, box[1] - top, min(box[2], right) - left, min(box[3], bottom) - top)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, box=inside))

    def _read_leniently(
        self, level: int, x: int, y: int, width: int, height: int, where_damaged: Colour
    ) -> NDArray[np.uint8]:
        """Read a region of a level; around damage in ever smaller pieces, of which damaged small ones are filled."""
        try:
            return self._read_level(level, x, y, width, height)
        except SlideError:
            if not self.reads_past_damage:
                raise
        if max(width, height) <= _SMALL_PIECE:
            return np.full((height, width, 3), where_damaged, dtype=np.uint8)
        if width >= height:
            half = width // 2
            pieces = [(x, y, half, height), (x + half, y, width - half, height)]
        else:
            half = height // 2
            pieces = [(x, y, width, half), (x, y + half, width, height - half)]
        read = [self._read_leniently(level, *piece, where_damaged) for piece in pieces]
        return np.concatenate(read, axis=1 if width >= height else 0)


def quick_hash_of(path: Path) -> str:
    """Return `Slide.quick_hash` of a file without opening the slide. Raises SlideError if it cannot be read."""
    return _hash_of([path], path)


def data_hash_of(path: Path) -> str | None:
    """Return `Slide.data_hash` of a file without opening the slide. Raises SlideError if it cannot be read."""
    return _hash_of(data_files(path), path) if is_mirax(path) else None


def _hash_of(files: Sequence[Path], slide: Path) -> str:
    digest = hashlib.sha256()
    try:
        for path in files:
            size = path.stat().st_size
            digest.update(f"{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_HASHED_BYTES))
                file.seek(max(size - _HASHED_BYTES, 0))
                digest.update(file.read(_HASHED_BYTES))
    except OSError as error:
        raise SlideError(f"{slide}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _thumbnail_size(size: tuple[int, int], downsample: float | None, max_side: int | None) -> tuple[int, int]:
    if downsample is None and max_side is not None:
        downsample = max(size) / max_side
    elif downsample is None or max_side is not None:
        raise ValueError("thumbnail: give exactly one of downsample and max_side")
    downsample = max(downsample, 1.0)
    return max(1, round(size[0] / downsample)), max(1, round(size[1] / downsample))


def opaque(rgba: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Compose (H, W, 4) straight-alpha pixels on a colour: (H, W, 3) uint8."""
    alpha = rgba[..., 3]
    rgb = np.ascontiguousarray(rgba[..., :3])
    unclear = alpha != 255
    if unclear.any():
        weight = alpha[unclear][:, None].astype(np.float32) / 255
        mixed = rgb[unclear] * weight + np.asarray(background, dtype=np.float32) * (1 - weight)
        rgb[unclear] = np.rint(mixed).astype(np.uint8)
    return rgb


def damaged(path: Path, problem: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{path}: {problem} ({reason}); the file is damaged, incomplete or of an unsupported kind, get it again"


def closed(path: Path) -> str:
    return f"{path}: cannot be read, it was closed; open it again"
