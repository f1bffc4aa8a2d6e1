"""Draw synthetic H&E-like slides of two growth patterns, glandular and solid; they show no patient's tissue.

A lesion consists of units with the same content in both patterns, ten nuclei and pale spaces: in the glandular pattern
the nuclei form a ring around a lumen, in the solid one both are scattered. So the patterns differ in architecture and
hardly in colour. Stroma, lymphocytes and fat are alike in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from utils.core.files import whole_file

MPP = 0.5  # um per level-0 px: 20x
MASK_PX = 16  # level-0 px per px of a lesion mask
PATTERNS = ("glandular", "solid")
DESCRIPTION = "Synthetic H&E-like slide, drawn by LiteMIL: not tissue of anyone"

Field = NDArray[np.float32]
Points = NDArray[np.float64]
Mask = NDArray[np.bool_]

_TILE = 256  # px
_DOWNSAMPLES = (1, 4)
_TISSUE, _LESION = 0.67, 0.42  # shares: of tissue in the slide, of lesion in the tissue
_UNIT = 29.0  # px, radius of a unit of the lesion
_NUCLEI, _PALE = 10, 3  # of a unit: nuclei, and pale spaces, which in a gland form the lumen
_RING, _SPACE = 0.76, 0.24  # shares of the unit's radius: the radius of a gland's ring of nuclei, and of a pale space
_GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
_SHAPES = 48  # random shapes of a kind, each drawn many times


@dataclass(frozen=True)
class Site:
    """How a laboratory stains and scans."""

    haematoxylin: tuple[float, float, float]  # optical densities of red, green and blue
    eosin: tuple[float, float, float]
    strength: float
    glass: tuple[float, float, float]  # grey levels of red, green and blue
    blur: float  # px
    noise: float  # grey levels
    quality: int  # of JPEG


SITES = {
    "A": Site((0.65, 0.70, 0.29), (0.08, 0.95, 0.32), 1.0, (243, 242, 245), 0.7, 1.5, 85),
    "B": Site((0.62, 0.72, 0.32), (0.10, 0.93, 0.36), 0.92, (236, 236, 240), 1.0, 2.5, 80),
    "C": Site((0.67, 0.68, 0.27), (0.06, 0.97, 0.27), 1.08, (247, 244, 238), 0.5, 2.0, 90),
}


@dataclass(frozen=True)
class Patient:
    """Pattern and site of a patient, and factors by which the patient's slides differ from the usual values."""

    pattern: str
    site: str
    nuclear_size: float
    chromatin: float
    eosin: float
    pale: float

    @classmethod
    def random(cls, pattern: str, site: str, rng: np.random.Generator) -> Self:
        """Return a random patient of the pattern and site."""
        return cls(pattern, site, *rng.normal(1, (0.05, 0.06, 0.06, 0.06)).clip(0.6, 1.4).tolist())


class Drawing(NamedTuple):
    """A slide's `image (H, W, 3)` uint8 and the mask `lesion (H, W)` bool."""

    image: NDArray[np.uint8]
    lesion: Mask

    def lesion_image(self) -> Image.Image:
        """Return the lesion in black and white, a pixel per square of `MASK_PX`, white if most of it is lesion."""
        height, width = (side // MASK_PX for side in self.lesion.shape)
        squares = self.lesion[: height * MASK_PX, : width * MASK_PX].reshape(height, MASK_PX, width, MASK_PX)
        return Image.fromarray(squares.mean(axis=(1, 3)) > 0.5)


def draw_slide(patient: Patient, width: int, height: int, rng: np.random.Generator) -> Drawing:
    """Draw a slide of a patient: tissue with a lesion in stroma, on glass."""
    canvas = _Canvas(width, height, rng)
    tissue, lesion = _regions(canvas)
    fibres = rng.uniform(0, np.pi)
    nuclei, pale = canvas.empty(), canvas.empty()
    _draw_lesion(canvas, lesion, patient, nuclei, pale)
    _draw_stroma(canvas, tissue & ~lesion, patient, fibres, nuclei, pale)

    cells = ndimage.uniform_filter(lesion.astype(np.float32), 15)
    ground = ndimage.uniform_filter(tissue.astype(np.float32), 5) * (1 - pale)
    streaks = 0.10 * canvas.streaks(2, 9, fibres) * (1 - 0.8 * cells) + 0.06 * canvas.noise(40)
    eosin = ground * (0.30 + streaks) * (1 - 0.5 * nuclei) * patient.eosin
    chromatin = nuclei * (0.62 + 0.10 * canvas.noise(1.2)) * patient.chromatin
    haematoxylin = ground * (chromatin + 0.05 * (1 + cells))
    return Drawing(_scanned(haematoxylin, eosin.clip(0), SITES[patient.site], rng), lesion)


def write_slide(path: Path, image: NDArray[np.uint8], site: str) -> None:
    """Write a pyramidal TIFF of JPEG tiles with its um/px; in Aperio's layout if the path ends in .svs."""
    aperio = f"Aperio Image Library v0 \r\n{DESCRIPTION}|AppMag = {10 / MPP:g}|MPP = {MPP}"
    description = aperio if path.suffix == ".svs" else DESCRIPTION
    jpeg: dict[str, Any] = {
        "compression": "jpeg", "compressionargs": {"level": SITES[site].quality}, "photometric": "rgb",
        "metadata": None, "description": description,
    }  # fmt: skip
    with whole_file(path) as temporary, tifffile.TiffWriter(temporary) as writer:
        for downsample in _DOWNSAMPLES:
            level, is_first = _reduced(image, downsample), downsample == 1
            if path.suffix == ".svs" and not is_first:
                writer.write(_reduced(level, 2), rowsperstrip=16, **jpeg)  # the thumbnail
            density = 1e4 / (MPP * downsample)
            tags = {"tile": (_TILE, _TILE), "resolution": (density, density), "resolutionunit": "centimeter"}
            writer.write(level, subfiletype=0 if is_first else 1, **tags, **jpeg)


def _reduced(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).reduce(factor))


class _Canvas:
    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self.width, self.height, self.rng = width, height, rng

    def empty(self) -> Field:
        return np.zeros((self.height, self.width), np.float32)

    def noise(self, sigma: float) -> Field:
        """Return a random field of mean 0 and standard deviation 1, smooth over `sigma` px."""
        coarse = max(1, int(sigma / 2.5))
        height, width = self.height // coarse + 2, self.width // coarse + 2
        image = Image.fromarray(self._smooth((height, width), sigma / coarse, sigma / coarse))
        full = image.resize((width * coarse, height * coarse), Image.Resampling.BICUBIC) if coarse > 1 else image
        return np.asarray(full)[: self.height, : self.width]

    def streaks(self, sigma: float, length: float, angle: float) -> Field:
        """Return a random field as in `noise`, smooth over `length` px along an angle and over `sigma` px across."""
        coarse = max(1, int(sigma))
        side = int(np.hypot(self.width, self.height)) // coarse + 2
        image = Image.fromarray(self._smooth((side, side), sigma / coarse, length / coarse))
        image = image.resize((side * coarse, side * coarse), Image.Resampling.BILINEAR).rotate(-np.degrees(angle))
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return np.asarray(image.crop((left, top, left + self.width, top + self.height)))

    def _smooth(self, shape: tuple[int, int], *sigmas: float) -> Field:
        field = ndimage.gaussian_filter(self.rng.standard_normal(shape, np.float32), sigmas, mode="wrap", truncate=3)
        return (field / field.std()).astype(np.float32, copy=False)

    def stamp(self, field: Field, centres: Points, shapes: Sequence[Field]) -> None:
        """Draw random shapes (odd sides) around centres (n, 2) of x, y; where they overlap, the maximum counts."""
        numbers = self.rng.integers(len(shapes), size=len(centres)).tolist()
        for (x, y), number in zip(centres.round().astype(int).tolist(), numbers, strict=True):
            reach = len(shapes[number]) // 2
            if reach <= x < self.width - reach and reach <= y < self.height - reach:
                window = field[y - reach : y + reach + 1, x - reach : x + reach + 1]
                np.maximum(window, shapes[number], out=window)

    def lattice(self, step: float, jitter: float, mask: Mask) -> Points:
        """Return the points (n, 2) of x, y in the mask, of a hexagonal lattice with random displacements."""
        rows, columns = np.mgrid[0 : self.height / (step * 0.866), 0 : self.width / step]
        points = np.stack([(columns + 0.5 * (rows % 2)) * step, rows * step * 0.866], axis=-1).reshape(-1, 2)
        points += self.rng.normal(0, jitter, points.shape)
        points = points[((points >= 0) & (points < (self.width - 1, self.height - 1))).all(axis=1)]
        x, y = points.round().astype(int).T
        return points[mask[y, x]]


def _regions(canvas: _Canvas) -> tuple[Mask, Mask]:
    """Return the masks of the tissue and of the lesion in it."""
    rows, columns = np.ogrid[-1 : 1 : canvas.height * 1j, -1 : 1 : canvas.width * 1j]
    from_middle = np.square(np.maximum(abs(rows), abs(columns)))
    shape = 0.35 * canvas.noise(140) - 1.6 * np.square(from_middle)
    tissue = shape > np.quantile(shape[::8, ::8], 1 - _TISSUE)
    field = canvas.noise(200) + 0.25 * canvas.noise(40)
    return tissue, tissue & (field > np.quantile(field[::8, ::8][tissue[::8, ::8]], 1 - _LESION))


def _draw_lesion(canvas: _Canvas, lesion: Mask, patient: Patient, nuclei: Field, pale: Field) -> None:
    rng = canvas.rng
    centres = canvas.lattice(2 * _UNIT, 3.0, lesion)
    radius, turn = _UNIT * rng.normal(1, 0.06, (len(centres), 1)), rng.uniform(0, 2 * np.pi, (len(centres), 1))
    extents = _UNIT * _SPACE * patient.pale * rng.normal(1, 0.06, _SHAPES)
    number = _NUCLEI + _PALE
    if patient.pattern == "glandular":
        step = 2 * np.pi * np.arange(number)
        angle = turn + np.concatenate([step[:_NUCLEI] / _NUCLEI, step[:_PALE] / _PALE])
        distance = radius * np.repeat([_RING, 1.15 * _SPACE], [_NUCLEI, _PALE])
    else:  # evenly spaced, like the seeds of a sunflower
        order = rng.permuted(np.tile(np.arange(number), (len(centres), 1)), axis=1)
        angle, distance = turn + order * _GOLDEN_ANGLE, radius * np.sqrt((order + 0.5) / number)
    points = _around(centres, angle + rng.normal(0, 0.05, angle.shape), distance)
    nuclear, spaces = (points[:, kind].reshape(-1, 2) for kind in (slice(_NUCLEI), slice(_NUCLEI, None)))
    canvas.stamp(pale, spaces, [_blob(extent, 1.0, 0.0, 0.35) for extent in extents])
    canvas.stamp(nuclei, nuclear, _nuclei(rng, 5.2 * patient.nuclear_size, 1.15))


def _draw_stroma(canvas: _Canvas, stroma: Mask, patient: Patient, fibres: float, nuclei: Field, pale: Field) -> None:
    rng = canvas.rng
    turns = fibres + rng.normal(0, 0.25, _SHAPES)
    spindles = [_blob(4.0 * patient.nuclear_size, 2.2, turn, 0.2) for turn in turns]
    canvas.stamp(nuclei, canvas.lattice(34, 12.0, stroma), spindles)
    lymphocytes = stroma & (canvas.noise(30) > 1.7)
    canvas.stamp(nuclei, canvas.lattice(13, 3.0, lymphocytes), _nuclei(rng, 3.9, 1.05))
    fat = stroma & (canvas.noise(60) > 1.9)
    canvas.stamp(pale, canvas.lattice(62, 4.0, fat), [_blob(extent, 1.0, 0.0, 0.1) for extent in (24, 27, 30)])


def _around(centres: Points, angle: Points, distance: Points) -> Points:
    """Return the points (n, k, 2) at angles and distances (n, k) from centres (n, 2)."""
    return centres[:, None] + np.stack([np.cos(angle), np.sin(angle)], axis=-1) * distance[..., None]


def _nuclei(rng: np.random.Generator, extent: float, ratio: float) -> list[Field]:
    turns, extents = rng.uniform(0, np.pi, _SHAPES), rng.normal(extent, 0.06 * extent, _SHAPES)
    return [_blob(size, ratio, turn, 0.2) for size, turn in zip(extents, turns, strict=True)]


def _blob(extent: float, ratio: float, turn: float, softness: float) -> Field:
    """Return an ellipse of ones on zeros with the area of a circle of radius `extent` px.

    The width of its soft rim is `softness` times the radius, so that several small ellipses have as many pixels of each
    value as a large one of their total area.
    """
    reach = int(np.ceil(extent * ratio**0.5 * (1 + softness)))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance = np.hypot(along / ratio**0.5, across * ratio**0.5) / extent
    return np.clip((1 + softness / 2 - distance) / softness, 0, 1).astype(np.float32)


def _scanned(haematoxylin: Field, eosin: Field, site: Site, rng: np.random.Generator) -> NDArray[np.uint8]:
    image = np.empty((*eosin.shape, 3), np.uint8)
    grain = site.noise * rng.standard_normal(eosin.shape, np.float32) + 0.5
    for colour in range(3):
        density = haematoxylin * np.float32(site.haematoxylin[colour]) + eosin * np.float32(site.eosin[colour])
        light = site.glass[colour] * np.exp(np.float32(-np.log(10) * site.strength) * density)
        image[..., colour] = np.clip(ndimage.gaussian_filter(light, site.blur, truncate=3) + grain, 0, 255)
    return image
