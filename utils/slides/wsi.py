"""Opening slides: OpenSlide for whole-slide formats, Pillow for plain images, one `Slide` for both.

Positions are level-0 px of a top-left corner, or px of a level where that is said; sizes are px of the level read.
Whatever goes wrong with a file, at opening or later, is a SlideError of one line. Tiled TIFFs are read past OpenSlide
where that gives its very pixels: see `utils.slides.tiles`.
"""

import csv
import hashlib
import math
import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from utils.core.errors import SlideError
from utils.core.headers import DELIMITERS, SLIDE_NAMES, plain_header
from utils.core.runtime import derive_seed, log
from utils.slides.resolution import NOT_IN_FILE, PLAUSIBLE_MPP, Resolution, file_resolution, number
from utils.slides.tiles import PROBE, TileReader

# The columns of a table of um/px by their other names.
_COLUMNS = {"wsi": " ".join(SLIDE_NAMES), "mpp": "mpp"}
SLIDE_EXTENSIONS = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi", ".dcm"}
)
IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp"})

READ_BLOCK = 4096  # px of a level read at once for a thumbnail: 50 MB, whatever the slide's size

_WHITE = (255, 255, 255)
_HASHED_BYTES = 2**20
_MOST_TILE_PIXELS = 2**28  # 1 GB; a level that is a single strip stays below
# Formats whose levels are pages of tiles side by side; elsewhere tiles overlap, or are placed one by one.
_TILED_VENDORS = frozenset({"aperio", "generic-tiff"})
# px of a level: OpenSlide takes a position so near to a whole px for it, and blends neighbours further off.
_WHOLE = 1 / 512
# Pillow's other formats (EPS calls an interpreter) have no business here.
_PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_PILLOW_EXTENSIONS = IMAGE_EXTENSIONS | {".tif", ".tiff"}
_PILLOW_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
# Damaged files make Pillow's decoders raise all of these.
_PILLOW_FAILURES = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError
)  # fmt: skip


def is_slide_file(path: Path | str) -> bool:
    """Whether the name is that of a slide or an image we can read; the file itself is not looked at."""
    return Path(path).suffix.lower() in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS


def find_slides(folder: Path | str, extensions: Iterable[str] | None = None) -> list[Path]:
    """All slide files under a folder, subfolders included, sorted by path; hidden files and folders are left out.

    Extensions may be written in any case, with or without the dot; None means every known one. The `.jpg` tiles that
    lie beside a Hamamatsu `.vms` or `.vmu` are parts of that slide and left out unless asked for.

    Raises:
        SlideError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SlideError(f"{folder}: not a folder; give the folder that holds the slides")
    wanted = (
        SLIDE_EXTENSIONS | IMAGE_EXTENSIONS
        if extensions is None
        else {"." + extension.strip().lower().lstrip(".") for extension in extensions}
    )
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in wanted
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if extensions is None:
        tiled = {path.parent for path in found if path.suffix.lower() in {".vms", ".vmu"}}
        found = [path for path in found if path.parent not in tiled or path.suffix.lower() not in IMAGE_EXTENSIONS]
    return sorted(found)


def one_per_series(slides: Sequence[Path]) -> list[Path]:
    """The slides without those DICOM files whose slide is there already: each of a series' files opens all of it."""
    kept, known = [], set()
    for slide in slides:
        series = (slide.parent, _series(slide)) if slide.suffix.lower() == ".dcm" else None
        if series is None or series[1] is None or series not in known:
            kept.append(slide)
        known.add(series)
    return kept


def slide_bytes(slide: Path) -> int:
    """The size of a slide's file, of a MIRAX slide with what its folder holds; 0 where that cannot be asked."""
    data = slide.with_suffix("")
    try:
        files = [slide, *(data.iterdir() if slide.suffix.lower() == ".mrxs" and data.is_dir() else ())]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _series(path: Path) -> str | None:
    """What names the series of a DICOM file, or None where OpenSlide does not open it."""
    try:
        with openslide.OpenSlide(path) as handle:
            return handle.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None


def open_slide(path: Path | str, mpp: float | None = None) -> "Slide":
    """Open a slide or a plain image for reading; use it as a context manager, or close it.

    `mpp` is the um per level-0 px as the user tells it, which wins over what the file says.

    OpenSlide is asked first. Plain images that it does not know (.png, .jpg, .bmp, untiled .tif) become slides of one
    level, read through Pillow.

    Raises:
        SlideError: missing, empty, a folder, damaged, or of a format that neither reads; or `mpp` is not plausible.
    """
    path = Path(path)
    low, high = PLAUSIBLE_MPP
    if mpp is not None and not low <= mpp <= high:
        raise SlideError(f"{path}: {mpp:g} um/px, given for it, is not plausible ({low:g} to {high:g}); correct it")
    _check_file(path)
    try:
        handle = openslide.OpenSlide(path)
        _check_tiles(path, handle)
        slide = _OpenSlideSlide(path, handle)
    except openslide.OpenSlideUnsupportedFormatError:
        slide = _open_image(path)
    except openslide.OpenSlideError as error:
        raise SlideError(_damaged(path, "cannot be opened", error)) from error
    slide.told_mpp = mpp
    own = slide._file_resolution()
    found = own if mpp is None else Resolution(mpp)
    slide.mpp, slide.mpp_problem, slide.own_mpp = found.mpp, found.problem, own.mpp
    if found.doubt or found.problem not in (None, NOT_IN_FILE):
        log.warning("%s: %s", path, found.doubt or f"{found.problem}; its um/px is taken as unknown")
    return slide


def read_slides_csv(path: Path | str) -> dict[str, float]:
    """The um per level-0 px of slides, by file name or stem: a table with the columns `wsi,mpp`.

    The slide's column may have another of its usual names, and semicolons or tabs may separate the fields. Other
    columns are ignored, and so are rows whose mpp is empty.

    Raises:
        SlideError: the table cannot be read, a slide stands there twice, or a value is not plausible.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = _delimiter_of(file.readline())
            file.seek(0)
            table = csv.DictReader(file, strict=True, skipinitialspace=True, delimiter=delimiter)
            columns = [(column or "").strip() for column in table.fieldnames or ()]
            ours = {_column_of(path, name, columns): name for name in _COLUMNS}
            table.fieldnames = [ours.get(column, column) for column in columns]
            rows = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise SlideError(
            f"{path}: not readable as a table ({reason}); give a CSV file, UTF-8, with the columns wsi,mpp"
        ) from error
    notes = [f"the column {column} is taken as {name}" for column, name in ours.items() if column != name]
    notes += [] if delimiter == "," else [f"its fields are taken as separated by {DELIMITERS[delimiter]}"]
    if notes:
        log.info("%s: %s", path, "; ".join(notes))
    found: dict[str, float] = {}
    low, high = PLAUSIBLE_MPP
    for line, row in rows:
        wsi, mpp = (row["wsi"] or "").strip(), number((row["mpp"] or "").replace(",", "."))
        if not wsi or Path(wsi).name != wsi:
            raise SlideError(
                f"{path}, line {line}: wsi {wsi!r}; the name of a slide's file is expected, without folders"
            )
        if row["mpp"] is not None and not row["mpp"].strip():
            continue
        if mpp is None or not low <= mpp <= high:
            raise SlideError(
                f"{path}, line {line}: mpp {row['mpp']!r} of {wsi}; um per level-0 px are expected, {low:g} to {high:g}"
            )
        if wsi in found:
            raise SlideError(f"{path}, line {line}: {wsi} stands there twice; leave one of its lines")
        found[wsi] = mpp
    return found


def _delimiter_of(header: str) -> str:
    """What separates the fields: a comma, unless only another mark parts off a column mpp."""
    names = {mark: [plain_header(name.strip().strip('"')) for name in header.split(mark)] for mark in DELIMITERS}
    return next((mark for mark in DELIMITERS if "mpp" in names[mark]), ",")


def _column_of(path: Path, name: str, columns: Sequence[str]) -> str:
    """The column that is ours of this `name`. Raises SlideError where there is none, or several could be."""
    candidates = [column for column in columns if plain_header(column) in _COLUMNS[name].split()]
    if name in columns:
        return name
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise SlideError(
            f"{path}: the columns {', '.join(candidates)} could each be {name}; rename the right one to it"
        )
    found = ", ".join(columns) or "nothing"
    raise SlideError(f"{path}: no column {name}; found {found}: name the slide's file wsi and its um/px mpp")


def slide_mpp(path: Path | str) -> float | None:
    """A slide's level-0 um/px; None where it does not say. Raises SlideError."""
    with open_slide(path) as slide:
        return slide.mpp


class Slide:
    """A slide open for reading; made by `open_slide`.

    Attributes:
        path, name: the file, and its name without the extension.
        width, height: level-0 px.
        level_dimensions: (width, height) of each level, in its own px.
        level_downsamples: level-0 px per px of each level: a whole number wherever that explains the level's size, its
            last column and row being rounded, and else OpenSlide's, the mean over both axes.
        mpp: um per level-0 px, or None where the file does not say, or not plausibly.
        mpp_problem: why mpp is None, in a few words.
        told_mpp: mpp as the user told it, or None.
        own_mpp: mpp as the file says it, or None.
        objective: nominal magnification of the objective, or None.
        vendor: OpenSlide's name for the scanner's format; "image" for a plain image.
        bounds: (x, y, width, height) of the scanned area in level-0 px, or None where the file does not say.
    """

    path: Path
    name: str
    width: int
    height: int
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    mpp: float | None = None
    mpp_problem: str | None = NOT_IN_FILE
    told_mpp: float | None = None
    own_mpp: float | None = None
    objective: float | None = None
    vendor: str
    bounds: tuple[int, int, int, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self):
        # A worker process gets the path and opens its own handle.
        return open_slide, (self.path, self.told_mpp)

    def close(self) -> None:
        """Give the file handle back; reading afterwards is a SlideError."""
        raise NotImplementedError

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read (height, width, 3) uint8 RGB of a level.

        Args:
            x, y: top-left corner in level-0 px.
            level: pyramid level, 0 the finest.
            width, height: px of that level.

        Unscanned and transparent pixels, and those beyond the edge, show the slide's background colour.

        Raises:
            SlideError: the level does not exist, or the file cannot be read there.
        """
        self._check_region(level, width, height)
        return self._read(int(x), int(y), level, int(width), int(height))

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read (height, width, 3) uint8 RGB whose top-left corner is px (x, y) of a level; otherwise as `read_region`.

        Where OpenSlide has to be asked, it is for the nearest level-0 px: less than half a px of the level off.
        """
        self._check_region(level, width, height)
        return self._read_level(level, int(x), int(y), int(width), int(height))

    def check_level(self, level: int) -> None:
        """Raise a SlideError that lists the levels unless `level` is one of them."""
        if 0 <= level < len(self.level_dimensions):
            return
        levels = ", ".join(
            f"{index} ({width} x {height}, downsample {downsample:.4g})"
            for index, ((width, height), downsample) in enumerate(
                zip(self.level_dimensions, self.level_downsamples, strict=True)
            )
        )
        raise SlideError(f"{self.path}: there is no level {level}; choose one of {levels}")

    def thumbnail(self, *, downsample: float | None = None, max_side: int | None = None) -> NDArray[np.uint8]:
        """The whole slide, smaller: (h, w, 3) uint8 RGB.

        Args: exactly one of
            downsample: level-0 px per thumbnail px, at least 1.
            max_side: px of the thumbnail's longer side; a smaller slide comes as it is.

        It is averaged down (a box filter over every pixel) from the nearest finer level, block by block, so that memory
        is bounded by the thumbnail and one block.
        """
        width, height = self._thumbnail_size(downsample, max_side)
        wanted = min(self.width / width, self.height / height)
        finer = [level for level, factor in enumerate(self.level_downsamples) if factor <= wanted * (1 + 1e-6)]
        level = max(finer, key=lambda level: self.level_downsamples[level], default=0)

        level_width, level_height = self.level_dimensions[level]
        scale_x, scale_y = level_width / width, level_height / height
        step_x, step_y = max(1, int(READ_BLOCK / scale_x)), max(1, int(READ_BLOCK / scale_y))
        thumbnail = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(0, height, step_y):
            bottom = min(top + step_y, height)
            for left in range(0, width, step_x):
                right = min(left + step_x, width)
                box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
                thumbnail[top:bottom, left:right] = self._averaged(level, box, (right - left, bottom - top))
        return thumbnail

    def quick_hash(self) -> str:
        """A cheap digest of the content: sha256 over the file's size and its first and last MiB, in hexadecimal.

        Of a slide of several files (MIRAX, VMS, DICOM) only the one that was opened is looked at.
        """
        digest = hashlib.sha256()
        try:
            size = self.path.stat().st_size
            digest.update(f"{size}\n".encode())
            with self.path.open("rb") as file:
                digest.update(file.read(_HASHED_BYTES))
                file.seek(max(size - _HASHED_BYTES, 0))
                digest.update(file.read(_HASHED_BYTES))
        except OSError as error:
            raise SlideError(f"{self.path}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()

    def _check_region(self, level: int, width: int, height: int) -> None:
        self.check_level(level)
        if width < 1 or height < 1:
            raise SlideError(f"{self.path}: a region of {width} x {height} px asked for; at least 1 x 1 is needed")

    def _file_resolution(self) -> Resolution:
        return Resolution(None, NOT_IN_FILE)

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        raise NotImplementedError

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        raise NotImplementedError

    def _thumbnail_size(self, downsample: float | None, max_side: int | None) -> tuple[int, int]:
        if downsample is None and max_side is not None:
            downsample = max(self.width, self.height) / max_side
        elif downsample is None or max_side is not None:
            raise ValueError("thumbnail: give exactly one of downsample and max_side")
        downsample = max(downsample, 1.0)
        return max(1, round(self.width / downsample)), max(1, round(self.height / downsample))

    def _averaged(self, level: int, box: tuple[float, float, float, float], size: tuple[int, int]) -> NDArray[np.uint8]:
        """A box of a level, in its (fractional) px, averaged down to `size` (width, height)."""
        left, top = math.floor(box[0]), math.floor(box[1])
        right = min(math.ceil(box[2] - 1e-9), self.level_dimensions[level][0])
        bottom = min(math.ceil(box[3] - 1e-9), self.level_dimensions[level][1])
        pixels = self._read_level(level, left, top, right - left, bottom - top)
        inside = (
            box[0] - left,
            box[1] - top,
            min(box[2], right) - left,
            min(box[3], bottom) - top,
        )
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, box=inside))


class _OpenSlideSlide(Slide):
    """A slide read through OpenSlide; its handle may be shared by threads."""

    def __init__(self, path: Path, handle: openslide.OpenSlide) -> None:
        self.path, self.name = path, path.stem
        self._handle: openslide.OpenSlide | None = handle
        properties = handle.properties
        self.width, self.height = handle.dimensions
        self.level_dimensions = tuple((int(width), int(height)) for width, height in handle.level_dimensions)
        # By these OpenSlide places regions, as if the rounding of a level's size were spread over the level.
        self._reader_downsamples = tuple(float(downsample) for downsample in handle.level_downsamples)
        self.level_downsamples = tuple(
            _whole_downsample(self.level_dimensions[0], size, downsample)
            for size, downsample in zip(self.level_dimensions, self._reader_downsamples, strict=True)
        )
        self.objective = number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        self.bounds = _bounds(properties)
        self._background = _background(properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR))
        self._lock = threading.Lock()
        self._tiles: TileReader | None = None
        self._chosen = False

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        if self._tiles is not None:
            self._tiles.close()
        self._handle = None

    def _file_resolution(self) -> Resolution:
        assert self._handle is not None  # noqa: S101 - it was just opened
        return file_resolution(self._handle.properties, self.width, self.height)

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        downsample, reader_downsample = self.level_downsamples[level], self._reader_downsamples[level]
        column, row = round(x / downsample), round(y / downsample)
        if max(abs(x / downsample - column), abs(y / downsample - row)) < _WHOLE:
            return self._read_level(level, column, row, width, height)
        place = round(x / downsample * reader_downsample), round(y / downsample * reader_downsample)
        return self._read_by_openslide(*place, level, width, height)

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        tiles = self._tile_reader()
        if tiles is not None:
            return tiles.read(level, x, y, width, height)
        level_width, level_height = self.level_dimensions[level]
        downsample = self._reader_downsamples[level]
        place = _level0(x, width, level_width, downsample), _level0(y, height, level_height, downsample)
        return self._read_by_openslide(*place, level, width, height)

    def _tile_reader(self) -> TileReader | None:
        """The fast reader, chosen at the first read, or None where OpenSlide reads."""
        with self._lock:
            if self._handle is None:
                raise SlideError(_closed(self.path))
            if not self._chosen:
                self._tiles = self._verified_tile_reader() if self.vendor in _TILED_VENDORS else None
                self._chosen = True
            return self._tiles

    def _verified_tile_reader(self) -> TileReader | None:
        tiles = TileReader.open(self.path, self.level_dimensions, self._background)
        if tiles is None or self._reads_the_same(tiles):
            return tiles
        tiles.close()
        log.info("%s: read through OpenSlide: the fast reader does not give the same pixels", self.path)
        return None

    def _reads_the_same(self, tiles: TileReader) -> bool:
        """Whether a few regions are, pixel by pixel, what OpenSlide makes of them, or damaged by its account too."""
        judge = openslide.OpenSlide(self.path)
        try:
            for level, x, y in tiles.probes(derive_seed(self.path.name, self.width, self.height)):
                downsample = self._reader_downsamples[level]
                x, y = _whole_near(x, downsample), _whole_near(y, downsample)
                place = round(x * downsample), round(y * downsample)
                ours = theirs = None
                with suppress(SlideError):
                    ours = tiles.read(level, x, y, PROBE, PROBE)
                try:
                    theirs = _opaque(np.asarray(judge.read_region(place, level, (PROBE, PROBE))), self._background)
                except openslide.OpenSlideError:
                    judge.close()  # it refuses all later reads
                    judge = openslide.OpenSlide(self.path)
                same = ours is theirs if ours is None or theirs is None else np.array_equal(ours, theirs)
                if not same:
                    return False
        finally:
            judge.close()
        return True

    def _read_by_openslide(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        if self._handle is None:
            raise SlideError(_closed(self.path))
        try:
            region = self._handle.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            # OpenSlide refuses every later read of this handle too: the slide as a whole has failed.
            raise SlideError(_damaged(self.path, f"level {level} cannot be read at ({x}, {y})", error)) from error
        return _opaque(np.asarray(region), self._background)


class _ImageSlide(Slide):
    """A plain image as a slide of one level, decoded whole at the first read.

    Its resolution tags say how to print it, so the mpp is unknown. EXIF orientation is not applied: coordinates are
    those of the stored pixels, which is what other readers of the same file see.
    """

    def __init__(self, path: Path, image: Image.Image) -> None:
        self.path, self.name = path, path.stem
        self._image: Image.Image | None = image
        self._pixels: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()
        self.width, self.height = image.size
        self.level_dimensions = (image.size,)
        self.level_downsamples = (1.0,)
        self.vendor = "image"

    def close(self) -> None:
        if self._image is not None:
            self._image.close()
        self._image = self._pixels = None

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        del level  # there is but one
        pixels = self._decoded()
        region = np.full((height, width, 3), _WHITE, dtype=np.uint8)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, self.width), min(y + height, self.height)
        if left < right and top < bottom:
            region[top - y : bottom - y, left - x : right - x] = pixels[top:bottom, left:right]
        return region

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        return self._read(x, y, level, width, height)

    def _decoded(self) -> NDArray[np.uint8]:
        with self._lock:
            if self._pixels is None:
                if self._image is None:
                    raise SlideError(_closed(self.path))
                try:
                    self._pixels = _rgb(self._image)
                except _PILLOW_FAILURES as error:
                    raise SlideError(_damaged(self.path, "cannot be read", error)) from error
            return self._pixels


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise SlideError(f"{path}: a folder, where a slide file is expected; give the file itself")
    if not path.exists():
        raise SlideError(f"{path}: no such file; check the path")
    if not os.access(path, os.R_OK):
        raise SlideError(f"{path}: may not be read; check its permissions")
    if path.stat().st_size == 0:
        raise SlideError(f"{path}: the file is empty (0 bytes); copy or download it again")


def _check_tiles(path: Path, handle: openslide.OpenSlide) -> None:
    """Raise SlideError for tiles that no memory would hold: OpenSlide ends the process where it gets none."""
    for level in range(handle.level_count):
        width, height = (
            number(handle.properties.get(f"openslide.level[{level}].tile-{side}")) for side in ("width", "height")
        )
        if width and height and width * height > _MOST_TILE_PIXELS:
            handle.close()
            raise SlideError(
                f"{path}: damaged: says that a tile of level {level} has {width:.0f} x {height:.0f} px; copy or "
                "download it again"
            )


def _open_image(path: Path) -> Slide:
    if path.suffix.lower() not in _PILLOW_EXTENSIONS:
        known = " ".join(sorted(SLIDE_EXTENSIONS | IMAGE_EXTENSIONS))
        raise SlideError(
            f"{path}: not a slide that OpenSlide knows; the file is damaged or incomplete, or not one of {known}"
        )
    try:
        with warnings.catch_warnings():
            # Up to twice Pillow's limit (179 megapixels, 0.5 GB) an image is large, not hostile.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        raise SlideError(
            f"{path}: neither OpenSlide nor Pillow can read it; the file is damaged or no image"
        ) from error
    except Image.DecompressionBombError as error:
        raise SlideError(
            f"{path}: too large for an image without a pyramid ({error}); convert it to a tiled pyramidal TIFF"
        ) from error
    except _PILLOW_FAILURES as error:
        raise SlideError(_damaged(path, "cannot be opened", error)) from error
    if image.mode not in _PILLOW_MODES:
        image.close()
        raise SlideError(
            f"{path}: pixels of Pillow's mode {image.mode!r}; 8 bits per channel are expected (RGB, grey, palette, "
            "CMYK), convert it first"
        )
    return _ImageSlide(path, image)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Decode to (H, W, 3) uint8, transparency composed on white."""
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        return _opaque(np.asarray(image.convert("RGBA")), _WHITE)
    return np.asarray(image.convert("RGB"))


def _opaque(rgba: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Compose (H, W, 4) straight-alpha pixels on a colour: (H, W, 3) uint8."""
    alpha = rgba[..., 3]
    rgb = np.ascontiguousarray(rgba[..., :3])
    unclear = alpha != 255
    if unclear.any():
        weight = alpha[unclear][:, None].astype(np.float32) / 255
        mixed = rgb[unclear] * weight + np.asarray(background, dtype=np.float32) * (1 - weight)
        rgb[unclear] = np.rint(mixed).astype(np.uint8)
    return rgb


def _whole_downsample(size: tuple[int, int], level_size: tuple[int, int], downsample: float) -> float:
    """`downsample`, or the whole number near it by which both sides come out to less than a px."""
    whole = float(round(downsample))
    explains = all(abs(side / whole - level_side) < 1 for side, level_side in zip(size, level_size, strict=True))
    return whole if explains else downsample


def _level0(start: int, size: int, extent: int, downsample: float) -> int:
    """The level-0 px nearest to px `start` of a level; before it where a region of `size` would else pass the edge, and
    the background be blended into the level's last px.
    """
    place = round(start * downsample)
    return math.floor(start * downsample) if start + size <= extent < place / downsample + size else place


def _whole_near(start: int, downsample: float) -> int:
    """The last px of a level, up to `start`, that begins where a level-0 px does."""
    places = np.arange(max(start, 0), -1, -1)
    off = np.abs(np.rint(places * downsample) / downsample - places)
    return int(places[np.argmax(off < _WHOLE)])


def _bounds(properties) -> tuple[int, int, int, int] | None:
    names = (
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
    )
    try:
        x, y, width, height = (int(properties[name]) for name in names)
    except (KeyError, ValueError):
        return None
    return x, y, width, height


def _background(text: str | None) -> tuple[int, int, int]:
    """OpenSlide's background colour, six hexadecimal digits; white where there is none."""
    try:
        red, green, blue = bytes.fromhex(text or "ffffff")
    except ValueError:
        return _WHITE
    return red, green, blue


def _damaged(path: Path, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{path}: {what} ({reason}); the file is damaged, incomplete or of an unsupported kind, get it again"


def _closed(path: Path) -> str:
    return f"{path}: cannot be read, it was closed; open it again"
