"""The colours of TIFFs: YCbCr, extra samples, channels."""

import numpy as np
import pytest
from PIL import Image

from tests.tiffs import HEIGHT, LABEL, PIXELS, PLANES, STRIPS, TILE, WIDTH, shown, write
from utils.core.errors import SlideError
from utils.slides.open_slides import open_slide

EITHER = pytest.mark.parametrize("layout", [TILE, STRIPS], ids=["tiled", "strips"])  # OpenSlide opens the first
YCBCR = np.asarray(Image.fromarray(PIXELS).convert("YCbCr"))
FROM_YCBCR = np.asarray(Image.fromarray(PIXELS).convert("YCbCr").convert("RGB"))
FAINT = np.full((HEIGHT, WIDTH, 1), 51, dtype=np.uint8)


@EITHER
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("has_label", [False, True])
def test_ycbcr_becomes_rgb(tmp_path, layout, compression, has_label):
    label = [(LABEL, {"description": "label"})] if has_label else []
    path = write(tmp_path / "a.tif", *label, (YCBCR, layout | {"photometric": "ycbcr", "compression": compression}))
    assert np.abs(shown(path)[0].astype(int) - FROM_YCBCR).max() <= 1


def test_ycbcr_follows_the_coefficients_of_the_file(tmp_path):
    red, green, blue = 0.2126, 0.7152, 0.0722
    rgb = PIXELS.astype(float)
    luma = rgb @ [red, green, blue]
    chroma = (rgb[..., 2] - luma) / (2 - 2 * blue) + 128, (rgb[..., 0] - luma) / (2 - 2 * red) + 128
    stored = np.rint(np.stack([luma, *chroma], axis=-1)).astype(np.uint8)
    coefficients = (529, 5, 3, (2126, 10000, 7152, 10000, 722, 10000), True)
    keywords = STRIPS | {"photometric": "ycbcr", "extratags": [coefficients]}
    assert np.abs(shown(write(tmp_path / "a.tif", (stored, keywords)))[0].astype(int) - PIXELS).max() <= 2


@EITHER
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_fourth_sample_without_a_meaning_is_ignored(tmp_path, layout, value):
    pixels = np.dstack([PIXELS, np.full((HEIGHT, WIDTH), value, dtype=np.uint8)])
    path = write(tmp_path / "a.tif", (pixels, layout | {"extrasamples": ["unspecified"]}))
    np.testing.assert_array_equal(shown(path)[0], PIXELS)


@EITHER
@pytest.mark.parametrize("kind", ["assocalpha", "unassalpha"])
def test_alpha_is_composed_on_white_once(tmp_path, layout, kind):
    stored = np.rint(PIXELS * (51 / 255)).astype(np.uint8) if kind == "assocalpha" else PIXELS
    path = write(tmp_path / "a.tif", (np.dstack([stored, FAINT]), layout | {"extrasamples": [kind]}))
    expected = PIXELS * 0.2 + 255 * 0.8
    assert np.abs(shown(path)[0] - expected).max() <= 3


def test_grey_with_alpha_is_clear(tmp_path):
    pixels = np.dstack([PIXELS[..., 0], np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)])
    keywords = STRIPS | {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
    pixels = shown(write(tmp_path / "a.tif", (pixels, keywords)))[0]
    np.testing.assert_array_equal(pixels, np.repeat(PIXELS[..., :1], 3, axis=-1))


INTERLEAVED = {"photometric": "minisblack", "planarconfig": "contig"}


@EITHER
@pytest.mark.parametrize("has_label", [False, True])
@pytest.mark.parametrize("samples", [2, 4, 5])
def test_grey_samples_side_by_side_are_refused(tmp_path, samples, layout, has_label):
    pixels = np.dstack([PIXELS, PIXELS])[..., :samples]
    label = [(LABEL, {"description": "label"})] if has_label else []
    path = write(tmp_path / "a.tif", *label, (pixels, layout | INTERLEAVED))
    with pytest.raises(SlideError, match=f"{samples} channels that are not red, green and blue"):
        open_slide(path)


def fluorescence(seed=0):
    """Dark, each channel with bright spots of its own."""
    rng = np.random.default_rng(seed)
    planes = rng.poisson(8, size=(3, HEIGHT, WIDTH)).astype(np.uint8)
    for plane in planes:
        for x, y in rng.integers(0, (WIDTH - 20, HEIGHT - 20), size=(60, 2)):
            plane[y : y + 16, x : x + 16] = 220
    return planes


CHANNELS = {
    "OME": ("a.ome.tif", {"photometric": "minisblack", "metadata": {"axes": "CYX"}, **TILE}, {"ome": True}),
    "OME, strips": ("a.ome.tif", {"photometric": "minisblack", "metadata": {"axes": "CYX"}, **STRIPS}, {"ome": True}),
    "ImageJ": (
        "a.tif",
        {"photometric": "minisblack", "metadata": {"axes": "CYX", "mode": "composite"}},
        {"imagej": True},
    ),
}


@pytest.mark.parametrize(("name", "keywords", "writer"), CHANNELS.values(), ids=CHANNELS)
def test_three_unnamed_channels_are_colours_where_light_shines_through(tmp_path, caplog, name, keywords, writer):
    path = write(tmp_path / name, (PLANES, keywords), **writer)
    np.testing.assert_array_equal(shown(path)[0], PIXELS)
    assert f"{path}: its three channels have no names" in caplog.text
    path = write(tmp_path / name, (fluorescence(), keywords), **writer)
    with pytest.raises(SlideError, match="3 channels without names, too dark"):
        open_slide(path)


@EITHER
def test_three_samples_side_by_side_are_looked_at_as_well(tmp_path, layout):
    np.testing.assert_array_equal(shown(write(tmp_path / "a.tif", (PIXELS, layout | INTERLEAVED)))[0], PIXELS)
    path = write(tmp_path / "b.tif", (np.moveaxis(fluorescence(), 0, -1), layout | INTERLEAVED))
    with pytest.raises(SlideError, match="too dark"):
        open_slide(path)


def test_dyes_are_no_colours_however_bright(tmp_path):
    about = {"axes": "CYX", "Channel": {"Fluor": ["DAPI", "FITC", "Cy5"]}}
    path = write(tmp_path / "a.ome.tif", (PLANES, {"photometric": "minisblack", "metadata": about, **TILE}))
    with pytest.raises(SlideError, match="not red, green and blue"):
        open_slide(path)


def test_named_colours_need_no_look(tmp_path, caplog):
    about = {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}}
    path = write(tmp_path / "a.ome.tif", (fluorescence(), {"photometric": "minisblack", "metadata": about, **TILE}))
    np.testing.assert_array_equal(np.moveaxis(shown(path)[0], -1, 0), fluorescence())
    assert not caplog.text
