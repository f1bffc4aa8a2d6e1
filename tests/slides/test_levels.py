"""Levels count where they show what level 0 shows, at the factor at which they show it."""

import math

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.synthetic import stained_image
from utils.core.errors import SlideError
from utils.slides.levels import fit_levels, whole_downsample
from utils.slides.open_slides import open_slide
from utils.slides.patching import choose_sampling
from utils.slides.tissue import detect_tissue

WIDTH, HEIGHT = 1000, 750


def slide_image() -> np.ndarray:
    """Tissue in the right lower part, so that what is moved shows."""
    pixels = np.full((HEIGHT, WIDTH, 3), 243, dtype=np.uint8)
    pixels[350:700, 500:950] = stained_image(450, 350)
    return pixels


def reduced(pixels, factor, padded_to=None, size=None):
    height, width = pixels.shape[:2]
    small = Image.fromarray(pixels).resize(size or (-(-width // factor), -(-height // factor)), Image.Resampling.BOX)
    if padded_to is None:
        return np.asarray(small)
    canvas = Image.new("RGB", tuple(-(-side // padded_to) * padded_to for side in small.size), (243, 243, 243))
    canvas.paste(small)
    return np.asarray(canvas)


def pyramid(path, *levels, compression="jpeg"):
    with tifffile.TiffWriter(path) as file:
        for number, pixels in enumerate(levels):
            file.write(pixels, tile=(128, 128), photometric="rgb", compression=compression, metadata=None,
                       subfiletype=int(number > 0), resolution=(20000, 20000), resolutionunit="CENTIMETER")  # fmt: skip
    return path


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])  # read past OpenSlide, and by it
def test_levels_padded_to_whole_tiles_are_read_without_the_padding(tmp_path, compression):
    image = slide_image()
    levels = [image, *(reduced(image, factor, padded_to=128) for factor in (2, 4))]
    with open_slide(pyramid(tmp_path / "a.tif", *levels, compression=compression)) as slide:
        assert slide.level_downsamples == (1.0, 2.0, 4.0)
        assert slide.level_dimensions == ((1000, 750), (500, 375), (250, 188))
        seen = slide.read_region(600, 400, 2, 50, 50).astype(int)
        mask = detect_tissue(slide).mask
    assert np.abs(seen - levels[2][100:150, 150:200]).mean() < 4
    with open_slide(pyramid(tmp_path / "plain.tif", image, compression=compression)) as slide:
        expected = detect_tissue(slide).mask
    assert (mask != expected).mean() < 0.02


def test_a_level_of_another_aspect_that_is_squeezed_is_not_used(tmp_path, caplog):
    image = slide_image()
    path = pyramid(tmp_path / "a.tif", image, reduced(image, 2, size=(500, 300)), reduced(image, 4))
    with open_slide(path) as slide:
        assert slide.level_downsamples == (1.0, math.inf, 4.0)
        assert "level 1 does not show what level 0 shows" in caplog.text
        assert choose_sampling(slide, 64, mpp=1.0).level == 0
        assert choose_sampling(slide, 64, mpp=2.0).level == 2
        with pytest.raises(SlideError, match=r"level 1 does not show .*; choose one of 0 \(1000 x 750.*2 \(250 x 188"):
            choose_sampling(slide, 64, level=1)
        assert slide.thumbnail(downsample=2).shape == (375, 500, 3)


def test_a_level_of_another_slide_is_not_used(tmp_path):
    image = slide_image()
    with open_slide(pyramid(tmp_path / "a.tif", image, reduced(image[::-1, ::-1], 2, size=(490, 370)))) as slide:
        assert slide.level_downsamples == (1.0, math.inf)


def test_a_level_by_a_fraction_counts_where_it_shows_the_slide(tmp_path):
    image = slide_image()
    with open_slide(pyramid(tmp_path / "a.tif", image, reduced(image, 0, size=(400, 300)))) as slide:
        assert slide.level_downsamples == (1.0, 2.5)


def test_the_whole_number_that_explains_a_level():
    assert whole_downsample((1000, 750), (250, 187)) == whole_downsample((1000, 750), (250, 188)) == 4
    assert whole_downsample((1000, 750), (256, 256)) is None


# Whole factors by coincidence

SQUARE = np.full((1024, 1024, 3), 243, dtype=np.uint8)
SQUARE[200:900, 150:950] = stained_image(800, 700)


def level_reader(*levels):
    """Read arrays as levels, white beyond their edges."""

    def read(level, x, y, width, height):
        region = np.full((height, width, 3), 255, dtype=np.uint8)
        part = levels[level][y : y + height, x : x + width]
        region[: part.shape[0], : part.shape[1]] = part
        return region

    return read


def fits_of(*levels, read=None):
    sizes = [(pixels.shape[1], pixels.shape[0]) for pixels in levels]
    ratios = [sizes[0][0] / width for width, _ in sizes]
    return [tuple(fit) for fit in fit_levels(sizes, ratios, read or level_reader(*levels), look=True)]


@pytest.mark.parametrize("factor", [8, 16])
def test_padding_that_makes_another_whole_factor_is_left_out(factor):
    padded = reduced(SQUARE, factor, padded_to=256)
    assert fits_of(SQUARE, padded) == [((1024, 1024), 1.0), ((1024 // factor,) * 2, float(factor))]
    between = reduced(SQUARE, 2)
    assert fits_of(SQUARE, between, padded)[1:] == [((512, 512), 2.0), ((1024 // factor,) * 2, float(factor))]


OTHERS = {
    "cropped": reduced(SQUARE, 3)[:256, :256],
    "flipped": reduced(SQUARE, 4)[::-1],
    "mirrored": reduced(SQUARE, 4)[:, ::-1],
    "another slide": reduced(np.ascontiguousarray(SQUARE[::-1, ::-1]), 4),
}


@pytest.mark.parametrize("level", OTHERS.values(), ids=OTHERS)
def test_a_level_of_a_whole_factor_that_shows_something_else_is_not_used(level):
    assert [downsample for _, downsample in fits_of(SQUARE, level)] == [1.0, math.inf]


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
def test_a_coincidence_is_seen_in_files(tmp_path, compression):
    path = pyramid(tmp_path / "a.tif", SQUARE, reduced(SQUARE, 16, padded_to=256), compression=compression)
    with open_slide(path) as slide:
        assert (slide.level_dimensions, slide.level_downsamples) == (((1024, 1024), (64, 64)), (1.0, 16.0))


def noise(size, seed=0):
    return (
        np.clip(np.random.default_rng(seed).normal(240, 9, (size, size, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    )


TRUE = {
    "averaged": [SQUARE, reduced(SQUARE, 2), reduced(SQUARE, 8), reduced(SQUARE, 32)],
    "every so many px": [SQUARE, SQUARE[::4, ::4], SQUARE[::16, ::16]],
    "sharpened": [SQUARE, np.asarray(Image.fromarray(SQUARE).resize((256, 256), Image.Resampling.LANCZOS))],
    "noise, every so many px": [noise(1024), noise(1024)[::4, ::4], noise(1024)[::16, ::16]],
    "even": [np.full_like(SQUARE, 243), np.full((256, 256, 3), 240, dtype=np.uint8)],
}


@pytest.mark.parametrize("levels", TRUE.values(), ids=TRUE)
def test_true_pyramids_keep_all_their_levels(levels):
    assert fits_of(*levels) == [(pixels.shape[1::-1], 1024 / len(pixels)) for pixels in levels]


def test_a_damaged_place_does_not_keep_a_slide_from_opening():
    levels = [SQUARE, reduced(SQUARE, 4)]
    plain = level_reader(*levels)

    def read(level, x, y, width, height):
        if level == 1 and x < 128:
            raise SlideError("damaged")
        return plain(level, x, y, width, height)

    assert fits_of(*levels, read=read)[1] == ((256, 256), 4.0)


def test_ordinary_levels_are_believed_after_a_few_looks():
    levels, looks = [SQUARE, reduced(SQUARE, 4), reduced(SQUARE, 16)], []
    plain = level_reader(*levels)
    fits_of(*levels, read=lambda *place: (looks.append(place), plain(*place))[1])
    assert len(looks) <= 2 * 10


def test_the_padded_case(shared_cases):
    with open_slide(shared_cases / "slides" / "padded_levels.tif") as slide:
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)
