"""Slides made up for tests: pyramids whose pixels know their place, and stained-looking images (synthetic, not tissue).

Import with `from tests.synthetic import ...`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage


def write_pyramid(
    path: Path,
    image: NDArray[np.uint8],
    mpp: float | None = None,
    downsamples: Sequence[float] = (1, 2, 4),
    tile: int = 256,
) -> Path:
    """Write (H, W, 3 or 4) uint8 as a tiled, lossless, pyramidal TIFF that OpenSlide opens as `generic-tiff`.

    Each level is the image averaged down by its factor (fractional ones too) and cut to whole pixels; `mpp` (um per
    level-0 px) goes into the resolution tags, and without it the file says nothing of its resolution.
    """
    height, width = image.shape[:2]
    photometric = {"photometric": "rgb"} | ({"extrasamples": ["unassalpha"]} if image.shape[2] == 4 else {})
    with tifffile.TiffWriter(path) as writer:
        for factor in downsamples:
            size = int(width / factor), int(height / factor)
            box = (0, 0, size[0] * factor, size[1] * factor)
            level = image if factor == 1 else np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, box))
            # Without resolution tags tifffile writes 1/1 with unit "none", which OpenSlide does not take for an mpp.
            resolution = {"resolution": (1e4 / (mpp * factor),) * 2, "resolutionunit": "centimeter"} if mpp else {}
            writer.write(
                level,
                tile=(tile, tile),
                compression="zlib",
                subfiletype=0 if factor == 1 else 1,
                metadata=None,
                **photometric,
                **resolution,
            )
    return path


def place_image(width: int, height: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 whose red is x and green is y, both scaled to 0..255; blue is 77 everywhere.

    Averaging keeps the relation, so a pixel of any level tells which part of the slide it shows: see `place_of`.
    """
    image = np.full((height, width, 3), 77, dtype=np.uint8)
    image[..., 0] = np.rint((np.arange(width) + 0.5) * 255 / width)[None, :]
    image[..., 1] = np.rint((np.arange(height) + 0.5) * 255 / height)[:, None]
    return image


def place_of(pixels: NDArray[np.uint8], width: int, height: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The level-0 (x, y) that pixels of a `place_image` show, to width / 255 and height / 255 px."""
    place = pixels.astype(np.float64)
    return place[..., 0] * (width / 255), place[..., 1] * (height / 255)


def stained_image(width: int, height: int, seed: int = 0, coverage: float = 0.35) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 that looks like H&E from afar: pink blobs with purple nuclei on near-white glass.

    `coverage` is the share of the image that the blobs cover (to the pixel, before the edges are softened).
    """
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((-(-height // 16), -(-width // 16)))
    coarse = ndimage.gaussian_filter(coarse, min(coarse.shape) / 8, mode="wrap")
    field = np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    tissue = (field > np.quantile(field, 1 - coverage)).astype(np.float64)
    tissue = ndimage.gaussian_filter(tissue, 1.0)
    grain = ndimage.gaussian_filter(rng.standard_normal((height, width)), 1.5)
    nuclei = ndimage.gaussian_filter((grain > 1.2 * grain.std()).astype(np.float64), 0.7)

    eosin, haematoxylin = np.array([0.05, 0.35, 0.18]), np.array([0.45, 0.50, 0.22])
    density = tissue[..., None] * (eosin * 0.7 + nuclei[..., None] * haematoxylin)
    image = 244 * 10**-density + rng.normal(0, 1.5, (height, width, 1))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def with_stroke(
    image: NDArray[np.uint8],
    colour: tuple[int, int, int],
    start: tuple[int, int],
    length: int = 150,
    width: float = 33,
    bend: float = 4,
) -> NDArray[np.uint8]:
    """(h, w, 3) uint8: the image with a marker's stroke from `start` (x, y) downwards, all in px of the image.

    Along a wave of amplitude `bend`, a little streaky as felt tips are, and blurred at the rim.
    """
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    middle = start[0] + bend * np.sin((y - start[1]) * 2 * np.pi / 80)
    where = (np.abs(x - middle) < width / 2) & (y >= start[1]) & (y < start[1] + length)
    streaks = ndimage.gaussian_filter1d(np.random.default_rng(0).standard_normal(image.shape[1]), 1)
    ink = -np.log10((np.array(colour) + 1) / 256)
    amount = ndimage.gaussian_filter(where.astype(np.float64), 1.2) * (1 + 0.1 * streaks)
    return np.clip(np.rint(image * 10 ** -(amount[..., None] * ink)), 0, 255).astype(np.uint8)
