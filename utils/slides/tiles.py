"""Read tiled JPEG and JPEG 2000 TIFFs, such as SVS, without OpenSlide: each tile is decoded once and cached.

Positions and sizes are px of the level read. For every file that `TileReader.open` accepts, the pixels equal
OpenSlide's.
"""

import logging
import math
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from utils.core.errors import SlideError

# A row of patches of 1024 px touches at most six rows of 240-px tiles, one of 256 px three; on a slide 120,000 px wide
# these three take the 256 MiB. Strips may be lower than tiles, so that more rows of them are needed.
CACHE_ROWS, CACHE_HEIGHT = 6, 1024
CACHE_BYTES = 256 * 2**20
MOST_TILE_PIXELS = 2**28  # 1 GB; a level that is a single strip stays below
PROBE = 96  # px: side of the regions that are compared with OpenSlide's

_WHITE = (255, 255, 255)
_JPEG = 7
JPEG_2000 = {33003: "ycbcr", 33005: "rgb"}  # Aperio's compressions
_COLOUR_SPACES = {2: "rgb", 6: "ycbcr"}  # TIFF's photometric interpretations
PLANES_APART = 2  # TIFF's planar configuration of colours that are stored apart
CODESTREAM = b"\xff\x4f\xff\x51"  # how JPEG 2000 begins
_SOS, _EOI, _RST = b"\xff\xda", b"\xff\xd9", 0xD0  # JPEG's markers of a scan, the end, and restarts
# Errors that tifffile raises on damaged or odd files: sizes of 0, counts beyond any memory, inconsistent pages.
TIFF_FAILURES = (
    tifffile.TiffFileError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    ArithmeticError, RuntimeError, MemoryError,
)  # fmt: skip
_DECODING_FAILURES = (*TIFF_FAILURES, imagecodecs.Jpeg8Error, imagecodecs.Jpeg2kError)

# tifffile logs every odd tag; our errors report those that matter.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


# Decodes a tile, given its number and the bytes of its planes (one, if the colours are stored together), to
# (tile_height, tile_width, 3) uint8 RGB.
Decoder = Callable[[int, Sequence[bytes]], NDArray[np.uint8]]


Page = tifffile.TiffPage | tifffile.TiffFrame


def keyframe(page: Page) -> tifffile.TiffPage:
    """Return the page that describes how this one is stored: itself, or the first of several that are alike."""
    assert page.keyframe is not None  # noqa: S101 - for the type checker: every page has one once the file is read
    return page.keyframe


def tile_size(page: tifffile.TiffPage) -> tuple[int, int]:
    """Return (width, height) of a page's tiles; a strip is a tile as wide as the page."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


@dataclass(frozen=True, eq=False)
class Level:
    """A level of the slide: where its tiles are in the file, as (planes, tiles) arrays, and how to decode one."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: NDArray[np.int64]
    byte_counts: NDArray[np.int64]
    decode: Decoder

    @classmethod
    def of_pages(cls, pages: Sequence[Page], decode: Decoder) -> Self | None:
        """Return the level whose colours are in these pages; None if they do not list all its tiles."""
        page = keyframe(pages[0])
        (width, height), (tile_width, tile_height) = (page.imagewidth, page.imagelength), tile_size(page)
        if min(width, height, tile_width, tile_height) < 1:
            return None
        planes = len(pages) * (page.samplesperpixel if page.planarconfig == PLANES_APART else 1)
        tiles = -(-width // tile_width) * -(-height // tile_height)
        offsets = np.array([offset for page in pages for offset in page.dataoffsets], dtype=np.int64)
        byte_counts = np.array([count for page in pages for count in page.databytecounts], dtype=np.int64)
        if not len(offsets) == len(byte_counts) == planes * tiles:
            return None
        tables = offsets.reshape(planes, tiles), byte_counts.reshape(planes, tiles)
        return cls(width, height, tile_width, tile_height, *tables, decode)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        return self.tile_height, self.tile_width, 3

    @property
    def tiles_across(self) -> int:
        return -(-self.width // self.tile_width)

    @property
    def bytes_to_keep(self) -> int:
        """The size of the rows of tiles that a row of patches touches."""
        rows = max(CACHE_ROWS, 1 + -(-CACHE_HEIGHT // self.tile_height))
        return rows * self.tiles_across * math.prod(self.tile_shape)

    def is_there(self, index: int) -> bool:
        """Return whether the file holds this tile."""
        return bool(self.byte_counts[:, index].all())

    def whole_tile(self, left: int, top: int, right: int, bottom: int) -> int | None:
        """Return the number of the tile that is exactly this region; None if there is none, it is missing, or alone."""
        if left % self.tile_width or top % self.tile_height or self.offsets.shape[1] == 1:
            return None
        index = top // self.tile_height * self.tiles_across + left // self.tile_width
        is_whole = (bottom - top, right - left, 3) == self.tile_shape
        return index if is_whole and self.is_there(index) else None


class _Tile:
    """Memory for a tile's pixels, a future that is done once they are read, and how many threads use them."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels, self.ready, self.users = pixels, Future[None](), 0


class TileCache:
    """The most recently used tiles, `nbytes` in all and at most `limit`, whose memory is reused."""

    def __init__(self, limit: int) -> None:
        self._limit, self.nbytes = limit, 0
        self._tiles: OrderedDict[tuple[int, int], _Tile] = OrderedDict()
        self._spare: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tiles)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._tiles

    @contextmanager
    def tile(
        self,
        key: tuple[int, int],
        shape: tuple[int, int, int],
        fill: Callable[[tuple[int, int], NDArray[np.uint8]], None],
    ) -> Iterator[NDArray[np.uint8]]:
        """Provide the pixels of a tile within the block. If several threads need one at once, one of them fills it."""
        with self._lock:
            cached = self._tiles.get(key)
            if cached is not None:
                self._tiles.move_to_end(key)
            tile = cached or _Tile(self._room(shape))
            self._tiles[key] = tile
            tile.users += 1
        try:
            if cached is None:
                self._fill(key, tile, fill)
            tile.ready.result()
            yield tile.pixels
        finally:
            with self._lock:
                tile.users -= 1
                if not tile.users and self._tiles.get(key) is not tile:
                    self._spare.append(tile.pixels)

    def _fill(
        self, key: tuple[int, int], tile: _Tile, fill: Callable[[tuple[int, int], NDArray[np.uint8]], None]
    ) -> None:
        try:
            fill(key, tile.pixels)
            tile.ready.set_result(None)
        except BaseException as error:
            # Other threads must not wait for this tile forever; the next request for it tries again.
            tile.ready.set_exception(error)
            with self._lock:
                if self._tiles.get(key) is tile:
                    del self._tiles[key]
                    self.nbytes -= tile.pixels.nbytes
            raise

    def _room(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        size = math.prod(shape)
        while self._tiles and self.nbytes + size > self._limit:
            _, dropped = self._tiles.popitem(last=False)
            self.nbytes -= dropped.pixels.nbytes
            if not dropped.users:
                self._spare.append(dropped.pixels)
        self.nbytes += size
        self._spare = [pixels for pixels in self._spare if pixels.shape == shape]
        return self._spare.pop() if self._spare else np.empty(shape, dtype=np.uint8)


class TileReader:
    """A tiled slide open for reading; made by `TileReader.open`, may be shared by threads, must be closed.

    Decoded tiles are cached; beyond `CACHE_ROWS` rows of tiles and `CACHE_BYTES` the least recently used are dropped.
    If several threads need the same tile at once, one decodes it; different tiles are decoded in parallel. Only a read
    of exactly one tile that is not cached yet bypasses the cache: patches that coincide with tiles do not share them.
    """

    def __init__(self, path: Path, levels: Sequence[Level], background: tuple[int, int, int] = _WHITE) -> None:
        self.path = path
        self._levels = levels
        self._background = background
        self._file = path.open("rb", buffering=0)
        self._file_lock = threading.Lock()
        self.cache = TileCache(min(max(page.bytes_to_keep for page in levels), CACHE_BYTES))

    @classmethod
    def open(
        cls, path: Path | str, level_dimensions: Sequence[tuple[int, int]], background: tuple[int, int, int] = _WHITE
    ) -> Self | None:
        """Return a reader for the file; None unless it is a TIFF whose tiled pages are exactly OpenSlide's levels.

        Args:
            level_dimensions: (width, height) of each level.
            background: the colour of missing tiles and of px beyond the edges.

        Every level has to be of 8-bit RGB or YCbCr pixels in JPEG tiles of any chroma subsampling, with or without
        shared tables, or in Aperio's JPEG 2000 tiles.
        """
        path = Path(path)
        try:
            with tifffile.TiffFile(path, is_ome=False) as file:
                levels = [_level(file.pages, *dimensions) for dimensions in level_dimensions]
                # If an Aperio file lacks a tile, OpenSlide makes it, and those above it, from the finer level.
                makes_up = file.is_svs and len(levels) > 1
            readable = [level for level in levels if level is not None]
            if len(readable) < len(levels) or (makes_up and any((level.byte_counts == 0).any() for level in readable)):
                return None
            return cls(path, readable, background)
        except TIFF_FAILURES:
            return None

    def close(self) -> None:
        """Close the file and drop the decoded tiles; reading afterwards is a SlideError."""
        self._file.close()
        self.cache = TileCache(0)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read (height, width, 3) uint8 RGB at px (x, y) of a level, with background beyond its edges.

        Raises:
            SlideError: a tile cannot be read, or the reader is closed.
        """
        page = self._levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, page.width), min(y + height, page.height)
        whole = page.whole_tile(left, top, right, bottom) if (right - left, bottom - top) == (width, height) else None
        if whole is not None and (level, whole) not in self.cache:
            return self._decoded(level, whole)
        region = np.empty((height, width, 3), dtype=np.uint8)
        if right - left < width or bottom - top < height:
            region[...] = self._background
        for row in range(top // page.tile_height, -(-bottom // page.tile_height)):
            tile_y = row * page.tile_height
            upper, lower = max(top, tile_y), min(bottom, tile_y + page.tile_height)
            for column in range(left // page.tile_width, -(-right // page.tile_width)):
                tile_x = column * page.tile_width
                first, last = max(left, tile_x), min(right, tile_x + page.tile_width)
                index = row * page.tiles_across + column
                target = region[upper - y : lower - y, first - x : last - x]
                if page.is_there(index):
                    with self.cache.tile((level, index), page.tile_shape, self._fill) as tile:
                        target[...] = tile[upper - tile_y : lower - tile_y, first - tile_x : last - tile_x]
                else:
                    target[...] = self._background
        return region

    def probes(self, seed: int) -> list[tuple[int, int, int]]:
        """Return (level, x, y) of regions of `PROBE` px to compare with OpenSlide's: in each level one around the far
        corner, and one (two at level 0) around a corner between tiles, at the largest of a few tiles drawn at random.
        """
        rng = np.random.default_rng(seed)
        corners = []
        for number, page in enumerate(self._levels):
            for _ in range(1 if number else 2):
                index = max(rng.integers(page.offsets.shape[1], size=8), key=lambda index: page.byte_counts[0, index])
                row, column = divmod(int(index), page.tiles_across)
                corner = (column + 1) * page.tile_width, (row + 1) * page.tile_height
                corners.append((number, min(corner[0], page.width), min(corner[1], page.height)))
            corners.append((number, page.width, page.height))
        return [(level, x - PROBE // 2, y - PROBE // 2) for level, x, y in corners]

    def _fill(self, key: tuple[int, int], pixels: NDArray[np.uint8]) -> None:
        # Copying into reused memory is cheaper than keeping the decoder's output, which is newly allocated each time.
        pixels[...] = self._decoded(*key)

    def _decoded(self, level: int, index: int) -> NDArray[np.uint8]:
        page = self._levels[level]
        planes = zip(page.offsets[:, index].tolist(), page.byte_counts[:, index].tolist(), strict=True)
        try:
            tile = page.decode(index, [self._bytes(*plane) for plane in planes])
            if tile.shape != page.tile_shape or tile.dtype != np.uint8:
                raise ValueError(f"it holds {tile.shape} {tile.dtype}, not {page.tile_shape} uint8")
        except _DECODING_FAILURES as error:
            if self._file.closed:
                raise SlideError(f"{self.path}: closed already; open the slide again") from error
            row, column = divmod(index, page.tiles_across)
            reason = " ".join(str(error).split())
            raise SlideError(
                f"{self.path}: level {level}, tile {column} of row {row} cannot be read ({reason}); the file is "
                "damaged or incomplete, get it again"
            ) from error
        return tile

    def _bytes(self, offset: int, count: int) -> bytes:
        missing = offset + count - os.fstat(self._file.fileno()).st_size
        if missing > 0:
            raise ValueError(f"the file ends {missing} bytes before the tile does")
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), count, offset)
        with self._file_lock:  # Windows
            self._file.seek(offset)
            return self._file.read(count)


def _level(pages: tifffile.TiffPages, width: int, height: int) -> Level | None:
    """Return the level in the only tiled page of this size; None if there is not just one, or we cannot decode it."""
    tiled = [page for page in pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
    fitting = [page for page in tiled if (page.imagewidth, page.imagelength) == (width, height)]
    if len(fitting) != 1:
        return None
    decode = fast_decoder(fitting[0])
    return None if decode is None else Level.of_pages(fitting, decode)


def fast_decoder(page: tifffile.TiffPage) -> Decoder | None:
    """Return a decoder that gives OpenSlide's pixels; None for tiles that are not JPEG or Aperio's JPEG 2000."""
    plain = (page.bitspersample, page.samplesperpixel, page.sampleformat, page.planarconfig, page.tiledepth)
    if plain != (8, 3, 1, 1, 1) or page.imagedepth != 1 or page.fillorder != 1 or page.predictor != 1:
        return None
    if page.compression == _JPEG:
        space = _COLOUR_SPACES.get(page.photometric)
        return None if space is None else partial(_decode_jpeg, tables=page.jpegtables, space=space)
    space = JPEG_2000.get(page.compression)
    return None if space is None else partial(_decode_jpeg_2000, space=space)


def _decode_jpeg(_: int, planes: Sequence[bytes], tables: bytes | None, space: str) -> NDArray[np.uint8]:
    (data,) = planes
    # The decoder silently fills missing data with grey, so the markers are checked for damage.
    body = data.rstrip(b"\0")
    if not body.endswith(_EOI):
        raise ValueError("its JPEG stream has no end")
    scan = np.frombuffer(body, dtype=np.uint8)[body.rfind(_SOS) :]
    marked = scan[np.flatnonzero(scan == 0xFF)[1:-1] + 1]  # without the scan's beginning and its end
    if marked.any() and not ((marked == 0) | (marked & 0xF8 == _RST)).all():
        raise ValueError("its JPEG stream is corrupt")
    return imagecodecs.jpeg8_decode(data, tables=tables, colorspace=space, outcolorspace="rgb")


def _decode_jpeg_2000(_: int, planes: Sequence[bytes], space: str) -> NDArray[np.uint8]:
    (data,) = planes
    if not data.startswith(CODESTREAM):
        raise ValueError("it holds no JPEG 2000 codestream")
    # Three components begin at byte 42 of the codestream, each with its depth and its steps in x and y.
    if data[43:45] + data[46:48] + data[49:51] != bytes([1] * 6):
        raise ValueError("a JPEG 2000 stream with subsampled colours, which only OpenSlide decodes as it does")
    tile = imagecodecs.jpeg2k_decode(data)
    return ycbcr_to_rgb(tile) if space == "ycbcr" else tile


def ycbcr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert (..., 3) by JFIF in 16-bit fixed point, rounded as libjpeg and OpenSlide do."""
    luma, blue, red = (pixels[..., channel].astype(np.int32) for channel in range(3))
    blue, red = blue - 128, red - 128
    half = 1 << 15
    rgb = (
        luma + ((91881 * red + half) >> 16),
        luma + ((-22554 * blue - 46802 * red + half) >> 16),
        luma + ((116130 * blue + half) >> 16),
    )
    return np.clip(np.stack(rgb, axis=-1), 0, 255).astype(np.uint8)
