"""Check which kinds of pixels a TIFF's image has, and convert them to 8-bit RGB."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from utils.core.errors import SlideError, plural
from utils.slides.levels import ReadLevel
from utils.slides.resolution import ome_images
from utils.slides.slide import WHITE, opaque
from utils.slides.tiff_images import TiffImage
from utils.slides.tiles import CODESTREAM, PLANES_APART, keyframe, ycbcr_to_rgb

CONVERT = (
    "convert it to a tiled pyramid (vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg, or QuPath's export)"
)
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _SEPARATED, _YCBCR = 0, 1, 2, 3, 5, 6
_GREYS = (_MINISWHITE, _MINISBLACK)
_PREMULTIPLIED, _STRAIGHT = 1, 2  # the kinds of alpha among TIFF's extra samples; 0 says nothing
_CMYK = 1  # TIFF's ink set
_UNSIGNED, _SIGNED = 1, 2
_SAMPLES = {_SIGNED: "signed integers", 3: "floating-point numbers"}
# Compressions whose decoders give RGB whatever TIFF says of the colours: JPEG, JPEG XR, JPEG XL, WebP.
_GIVE_RGB = frozenset({6, 7, 22610, 33007, 34892, 34927, 34934, 50001, 50002, 52546})
_JPEG_2000 = frozenset({33003, 33004, 33005, 34712})
_CODING_STYLE = b"\xff\x52"  # the segment of a JPEG 2000 codestream
_CHANNELS = ({"r", "red"}, {"g", "green"}, {"b", "blue"})
_FLUORESCENCE = re.compile(r"\b(Fluor|EmissionWavelength|ExcitationWavelength)\s*=|Fluorescence\"")
# In transmitted light the median px is this bright in every channel, and the brightest px are nearly grey.
_LEAST_MEDIAN, _LEAST_BALANCE = 60, 0.5
_GRID, _SIDE = 5, 64  # regions sampled along a side, and their side in px


def check_colours(path: Path, image: TiffImage) -> None:
    """Raise SlideError unless the pixels are colours or grey of 8 bits."""
    planes = image.axes.translate(str.maketrans("", "", "YX"))
    if planes not in ("", "S", "C"):
        problem = f"a stack of images (axes {image.axes})"
        raise SlideError(f"{path}: it holds {problem}; save the right one as a separate file")
    for pages in image.levels:
        page = keyframe(pages[0])
        for problem, remedy in (_sample_problem(page), _colour_problem(image, page)):
            if problem:
                raise SlideError(f"{path}: it holds {problem}; {remedy}")


def check_samples(path: Path, image: TiffImage) -> None:
    """Raise SlideError for pixels that OpenSlide opens, and shows wrongly or not at all."""
    page = image.page
    if page.sampleformat in _SAMPLES or page.bitspersample > 16:
        problem, remedy = _sample_problem(page)
        raise SlideError(f"{path}: it holds {problem}; {remedy}")


def openslide_shows_colours(image: TiffImage) -> bool:
    """Return whether OpenSlide shows the colours of a page that it opens.

    It shows only the first of several grey samples, and takes a fourth sample of no stated meaning for alpha.
    """
    page = image.page
    if page.photometric in _GREYS:
        return page.samplesperpixel == 1 or _alpha(page) is not None
    return page.photometric != _RGB or page.samplesperpixel == len(_CHANNELS) or _alpha(page) is not None


def _sample_problem(page: tifffile.TiffPage) -> tuple[str, str]:
    """Return the problem with the number format of the pixels, and what to do; ("", "") if there is none."""
    bits = page.bitspersample
    remedy = f"scale them to 8 bits, and {CONVERT}"
    if page.sampleformat == _SIGNED:
        remedy = f"shift them to 0 to 255, and {CONVERT}"
    if page.sampleformat != _UNSIGNED:
        samples = _SAMPLES.get(page.sampleformat, f"pixels in sample format {page.sampleformat}")
        return f"{samples} of {bits} bits, where unsigned integers of 8 bits are expected", remedy
    is_bilevel = bits == 1 and page.samplesperpixel == 1 and page.photometric in (*_GREYS, _PALETTE)
    if bits != 8 and not is_bilevel:
        return f"pixels of {bits} bits, where 8 bits per colour are expected", remedy
    return "", ""


def _colour_problem(image: TiffImage, page: tifffile.TiffPage) -> tuple[str, str]:
    """Return the problem with the colours, and what to do; ("", "") if there is none."""
    samples, channels = page.samplesperpixel, _channel_count(image)
    if page.photometric not in (*_GREYS, _RGB, _PALETTE, _SEPARATED, _YCBCR):
        return f"colours of the kind {name_of(page.photometric)}", CONVERT
    if page.photometric == _PALETTE and page.colormap is None:
        return "a palette image without its palette", "get it again"
    if page.photometric == _SEPARATED and (samples < 4 or page.tags.valueof(332, _CMYK) != _CMYK):
        return f"{samples} inks that are not cyan, magenta, yellow and black", CONVERT
    if page.photometric in (_RGB, _YCBCR) and samples < len(_CHANNELS):
        return f"{plural(samples, 'colour')} per pixel, where red, green and blue are expected", CONVERT
    if len(image.levels[0]) > 1 and page.photometric not in _GREYS:
        return f"{len(image.levels[0])} pages of the kind {name_of(page.photometric)} for one image", CONVERT
    if channels not in (1, len(_CHANNELS)) or (channels > 1 and _are_fluorescence(image)):
        remedy = "give a brightfield slide, with its colours stored as RGB"
        return f"{channels} channels that are not red, green and blue, as fluorescence has", remedy
    return "", ""


def name_of(value: Any) -> str:
    return str(getattr(value, "name", value))


def _channel_count(image: TiffImage) -> int:
    """Return how many channels a grey image has, alpha aside; 1 for other images."""
    page = image.page
    if page.photometric not in _GREYS:
        return 1
    samples = page.samplesperpixel - (_alpha(page) is not None)
    return max(len(image.levels[0]), samples)


def _alpha(page: tifffile.TiffPage) -> int | None:
    """Return the kind of alpha that the last sample is; None if it is not alpha."""
    kinds = page.extrasamples
    return kinds[-1] if kinds and kinds[-1] in (_PREMULTIPLIED, _STRAIGHT) else None


def _are_fluorescence(image: TiffImage) -> bool:
    """Return whether the OME-XML names the channels other than by colours, or with dyes or wavelengths."""
    attributes, names = _channels(image)
    if any(name and name not in colours for name, colours in zip(names, _CHANNELS, strict=False)):
        return True
    return not all(names) and any(_FLUORESCENCE.search(channel) for channel in attributes)


def are_unnamed_channels(image: TiffImage) -> bool:
    """Return whether there are three channels, and the file does not say if they are red, green and blue."""
    names = _channels(image)[1][: len(_CHANNELS)]
    return _channel_count(image) == len(_CHANNELS) and not (len(names) == len(_CHANNELS) and all(names))


def _channels(image: TiffImage) -> tuple[list[str], list[str]]:
    """Return the attributes of an image's channels in the OME-XML, and their names in lower case, "" for a number."""
    root = image.page.parent
    images = ome_images(root.ome_metadata or "") if isinstance(root, tifffile.TiffFile) else []
    if image.ome_number is None or image.ome_number >= len(images):
        return [], []
    attributes: list[str] = re.findall(r"<(?:\w+:)?Channel\b([^>]*)>", images[image.ome_number])
    quoted = [re.search(r"\bName\s*=\s*\"([^\"]*)\"", channel) for channel in attributes]
    names = [re.sub(r"(?i)^(channel)?\s*[\d: ]*$", "", name[1]).lower() if name else "" for name in quoted]
    return attributes, names


def check_brightfield(path: Path, level: int, size: tuple[int, int], read: ReadLevel) -> None:
    """Raise SlideError unless the pixels of a level of this size are bright in all three channels, as in transmitted
    light; fluorescence is dark.
    """
    width, height = size
    corners = [
        (round(x), round(y))
        for y in np.linspace(0, max(height - _SIDE, 0), _GRID)
        for x in np.linspace(0, max(width - _SIDE, 0), _GRID)
    ]
    side_x, side_y = min(_SIDE, width), min(_SIDE, height)
    pixels = np.concatenate([read(level, x, y, side_x, side_y).reshape(-1, 3) for x, y in corners])
    sums = pixels.sum(axis=1, dtype=int)
    brightest = pixels[sums >= np.percentile(sums, 95)].mean(axis=0)
    if np.median(pixels, axis=0).min() < _LEAST_MEDIAN or brightest.min() < _LEAST_BALANCE * brightest.max():
        raise SlideError(
            f"{path}: it holds 3 channels without names, too dark for the red, green and blue of a brightfield slide; "
            "if they are, save the image as RGB"
        )


def to_rgb_of(page: tifffile.TiffPage) -> Callable[[NDArray], NDArray[np.uint8]]:
    """Return the function that converts a page's decoded samples (h, w, s) to (h, w, 3) uint8 RGB."""
    if page.photometric == _PALETTE and page.colormap is not None:
        return partial(_by_palette, (np.asarray(page.colormap) >> 8).astype(np.uint8).T)
    if page.photometric == _SEPARATED:
        return lambda samples: np.asarray(Image.fromarray(samples[..., :4], "CMYK").convert("RGB"))
    if page.photometric in _GREYS:
        return partial(_by_grey, page.bitspersample == 1, page.photometric == _MINISWHITE, _alpha(page))
    if page.photometric == _YCBCR and _needs_conversion(page):
        return partial(_by_ycbcr, page.tags.valueof(529), page.tags.valueof(532), _alpha(page))
    return partial(_by_colour, _alpha(page))


def _by_palette(colours: NDArray[np.uint8], samples: NDArray) -> NDArray[np.uint8]:
    return colours[samples[..., 0]]


def _by_grey(is_bilevel: bool, is_inverted: bool, alpha: int | None, samples: NDArray) -> NDArray[np.uint8]:
    """Convert grey, or red, green and blue that are stored as grey."""
    pixels = samples.astype(np.uint8)
    pixels = pixels * np.uint8(255) if is_bilevel else pixels
    opacity = pixels[..., -1:] if alpha is not None else pixels[..., :0]
    pixels = pixels[..., :-1] if alpha is not None else pixels
    pixels = 255 - pixels if is_inverted else pixels
    rgb = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    return _by_colour(alpha, np.concatenate([rgb, opacity], axis=-1))


def _by_colour(alpha: int | None, samples: NDArray) -> NDArray[np.uint8]:
    """Convert RGB; alpha, if it is the last sample, is composed on white, other samples are left out."""
    rgb = np.ascontiguousarray(samples[..., :3], dtype=np.uint8)
    if alpha is None or samples.shape[-1] < 4:
        return rgb
    opacity = samples[..., -1:].astype(np.uint8)
    if alpha == _STRAIGHT:
        return opaque(np.concatenate([rgb, opacity], axis=-1), WHITE)
    return np.minimum(rgb.astype(np.uint16) + (255 - opacity), 255).astype(np.uint8)


def _by_ycbcr(
    coefficients: Sequence[int] | None, limits: Sequence[int] | None, alpha: int | None, samples: NDArray
) -> NDArray[np.uint8]:
    """Convert YCbCr by the file's coefficients and limits of black and white, which are fractions, or JFIF's.

    Divisors of zero count as one, as in libtiff.
    """
    if coefficients is None and limits is None:
        rgb = ycbcr_to_rgb(samples[..., :3])
    else:
        red, green, blue = _fractions(coefficients) if coefficients else (0.299, 0.587, 0.114)
        black, white, zero_b, most_b, zero_r, most_r = _fractions(limits) if limits else (0, 255, 128, 255, 128, 255)
        values = samples[..., :3].astype(np.float64)
        luma = (values[..., 0] - black) * 255 / ((white - black) or 1)
        chroma_b = (values[..., 1] - zero_b) * 127 / ((most_b - zero_b) or 1)
        chroma_r = (values[..., 2] - zero_r) * 127 / ((most_r - zero_r) or 1)
        of_red, of_blue = luma + chroma_r * 2 * (1 - red), luma + chroma_b * 2 * (1 - blue)
        of_green = (luma - red * of_red - blue * of_blue) / (green or 1)
        rgb = np.clip(np.rint(np.stack([of_red, of_green, of_blue], axis=-1)), 0, 255).astype(np.uint8)
    return _by_colour(alpha, np.concatenate([rgb, samples[..., 3:].astype(np.uint8)], axis=-1))


def _fractions(values: Sequence[int]) -> list[float]:
    return [values[index] / (values[index + 1] or 1) for index in range(0, len(values), 2)]


def _needs_conversion(page: tifffile.TiffPage) -> bool:
    """Return whether the decoder leaves the colours as YCbCr."""
    if page.planarconfig == PLANES_APART:
        return True
    if page.compression in _JPEG_2000:
        is_subsampled, is_transformed = codestream(page)
        return not is_subsampled and not is_transformed
    return page.compression not in _GIVE_RGB


def codestream(page: tifffile.TiffPage) -> tuple[bool, bool]:
    """Return whether the first tile's JPEG 2000 codestream has subsampled colours, which the decoder converts to RGB,
    and whether it has a colour transform of its own, which the decoder reverses.
    """
    extents = zip(page.dataoffsets, page.databytecounts, strict=False)
    offset, size = next(((offset, size) for offset, size in extents if size), (0, 0))
    handle = page.parent.filehandle
    handle.seek(offset)
    data: bytes = handle.read(min(size, 1024))
    start = data.find(CODESTREAM)
    style = data.find(_CODING_STYLE, start)
    if start < 0 or style < 0:
        return False, False
    components = data[start + 42 : start + 42 + 3 * min(page.samplesperpixel, 3)]  # depth, step in x, step in y of each
    steps = components[1::3] + components[2::3]
    return steps != bytes([1] * len(steps)), data[style + 8 : style + 9] not in (b"", b"\0")
