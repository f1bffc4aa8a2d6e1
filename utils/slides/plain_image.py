"""Plain images (.png, .jpg, .bmp) as slides of one level, read by Pillow."""

import threading
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from utils.core.errors import SlideError
from utils.slides.slide import WHITE, Slide, closed, damaged, opaque

# Pillow's other formats are not needed, and EPS even calls an interpreter.
_FORMATS = ("PNG", "JPEG", "BMP")
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
# Pillow's decoders raise all of these on damaged files.
_FAILURES = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError
)  # fmt: skip


class ImageSlide(Slide):
    """A plain image as a slide of one level, decoded completely at the first read.

    Its resolution tags are meant for printing, so the mpp is unknown. EXIF orientation is not applied: coordinates are
    those of the stored pixels, as in other readers of the file.
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
        del level  # there is only one
        pixels = self._decoded()
        region = np.full((height, width, 3), WHITE, dtype=np.uint8)
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
                    raise SlideError(closed(self.path))
                try:
                    self._pixels = _rgb(self._image)
                except _FAILURES as error:
                    raise SlideError(damaged(self.path, "cannot be read", error)) from error
            return self._pixels


def open_image(path: Path) -> Slide:
    """Open an image. Raises SlideError."""
    try:
        with warnings.catch_warnings():
            # Up to twice Pillow's limit (179 megapixels, 0.5 GB) an image is large, not an attack.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise SlideError(
            f"{path}: neither OpenSlide nor Pillow can read it; the file is damaged or no image"
        ) from error
    except Image.DecompressionBombError as error:
        raise SlideError(
            f"{path}: too large for an image without a pyramid ({error}); convert it to a tiled pyramidal TIFF"
        ) from error
    except _FAILURES as error:
        raise SlideError(damaged(path, "cannot be opened", error)) from error
    if image.mode not in _MODES:
        image.close()
        raise SlideError(
            f"{path}: pixels of Pillow's mode {image.mode!r}; 8 bits per channel are expected (RGB, grey, palette, "
            "CMYK), convert it first"
        )
    return ImageSlide(path, image)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Decode to (H, W, 3) uint8, transparency composed on white."""
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        return opaque(np.asarray(image.convert("RGBA")), WHITE)
    return np.asarray(image.convert("RGB"))
