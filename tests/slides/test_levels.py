"""Levels count where they show what level 0 shows, at the factor at which they show it."""

import math

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.synthetic import stained_image
from utils.core.errors import SlideError
from utils.slides.levels import whole_downsample
from utils.slides.patching import choose_sampling
from utils.slides.tissue import detect_tissue
from utils.slides.wsi import open_slide

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


def test_sizes_that_a_whole_number_explains_are_believed_unseen():
    assert whole_downsample((1000, 750), (250, 187)) == whole_downsample((1000, 750), (250, 188)) == 4
    assert whole_downsample((1000, 750), (256, 256)) is None


def test_the_padded_case(shared_cases):
    with open_slide(shared_cases / "slides" / "padded_levels.tif") as slide:
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)
