"""TIFFs that OpenSlide refuses or shows in part: which image is the slide, its pixels and um/px, what is refused."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.synthetic import stained_image
from utils.core.errors import SlideError
from utils.slides.wsi import open_slide

WIDTH, HEIGHT = 520, 400
PIXELS = stained_image(WIDTH, HEIGHT)
HALF = PIXELS.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
PLANES = np.moveaxis(PIXELS, -1, 0)
TILE = {"tile": (128, 128)}
AT_HALF_UM = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}


def write(path, *images, **writer):
    """A TIFF of images, each with the keywords of tifffile."""
    with tifffile.TiffWriter(path, **writer) as file:
        for pixels, keywords in images:
            file.write(pixels, **{"photometric": "rgb", "metadata": None} | keywords)
    return path


def shown(path):
    """The slide's level 0, its levels, and its um/px."""
    with open_slide(path) as slide:
        return slide.read_level(0, 0, 0, slide.width, slide.height), slide.level_downsamples, slide.mpp


@pytest.mark.parametrize("layout", [TILE, {"rowsperstrip": 64}, {"rowsperstrip": 1}, {}], ids=str)
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "webp", "jpeg2000", "packbits", "png"])
def test_every_compression_and_layout_gives_its_pixels_and_um(tmp_path, compression, layout):
    path = write(tmp_path / "a.tif", (PIXELS, {"compression": compression, **layout, **AT_HALF_UM}))
    pixels, _, mpp = shown(path)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert mpp == pytest.approx(0.5)


@pytest.mark.parametrize("layout", [TILE, {}], ids=["tiled", "untiled"])
@pytest.mark.parametrize("planarconfig", ["separate", "contig"])
def test_regions_are_the_image_and_white_beyond(tmp_path, planarconfig, layout):
    image = PLANES if planarconfig == "separate" else PIXELS
    path = write(tmp_path / "a.tif", (image, {"planarconfig": planarconfig, "compression": "zlib", **layout}))
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region(100, 50, 0, 200, 130), PIXELS[50:180, 100:300])
        corner = slide.read_region(WIDTH - 10, HEIGHT - 10, 0, 20, 20)
    np.testing.assert_array_equal(corner[:10, :10], PIXELS[-10:, -10:])
    assert (corner[10:] == 255).all()
    assert (corner[:, 10:] == 255).all()


def test_a_label_before_the_slide_is_not_the_slide(tmp_path):
    pyramid = [(PIXELS, TILE | AT_HALF_UM), (HALF, TILE | {"subfiletype": 1})]
    for number, first in enumerate(
        ({}, {"tile": (64, 64)})
    ):  # OpenSlide refuses the first, shows the label of the other
        path = write(tmp_path / f"{number}.tif", (PIXELS[:96, :192], first), *pyramid)
        pixels, downsamples, mpp = shown(path)
        np.testing.assert_array_equal(pixels, PIXELS)
        assert (downsamples, mpp) == ((1.0, 2.0), pytest.approx(0.5))


def test_levels_in_subifds_are_levels(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        about = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
        file.write(PIXELS, photometric="rgb", compression="jpeg", subifds=1, metadata=about, **TILE)
        file.write(HALF, photometric="rgb", compression="jpeg", subfiletype=1, **TILE)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert (slide.level_downsamples, slide.mpp) == ((1.0, 2.0), 0.25)
        level1 = slide.read_level(1, 0, 0, WIDTH // 2, HEIGHT // 2)
    assert np.abs(level1.astype(int) - HALF).mean() < 3


@pytest.mark.parametrize("names", [None, ["Red", "Green", "Blue"]])
def test_colours_on_pages_of_their_own_are_put_together(tmp_path, names):
    about = {"axes": "CYX", "PhysicalSizeX": 0.25} | ({"Channel": {"Name": names}} if names else {})
    path = write(tmp_path / "a.ome.tif", (PLANES, {"photometric": "minisblack", "metadata": about, **TILE}))
    pixels, _, mpp = shown(path)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert mpp == 0.25


def test_the_um_are_those_of_the_image_that_is_the_slide(tmp_path):
    label = {"metadata": {"Name": "label image", "axes": "YXS", "PhysicalSizeX": 30.0, "PhysicalSizeY": 30.0}}
    scan = TILE | {"metadata": {"Name": "scan", "axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}}
    pixels, _, mpp = shown(write(tmp_path / "a.ome.tif", (PIXELS[:90, :200], label), (PIXELS, scan)))
    assert (pixels.shape, mpp) == (PIXELS.shape, 0.25)


@pytest.mark.parametrize(("unit", "mpp"), [("um", 0.25), ("micron", 0.25), ("mm", None), ("pixel", None)])
def test_imagej_tells_the_unit_in_its_description(tmp_path, unit, mpp):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, imagej=True, resolution=(4.0, 4.0), metadata={"unit": unit})
    assert shown(tmp_path / "a.tif")[2] == mpp


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA"])
def test_other_kinds_of_pixels_become_rgb(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / "a.tif")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown(tmp_path / "a.tif")[0], expected)


def test_inverted_grey_is_turned_round(tmp_path):
    path = write(tmp_path / "a.tif", (255 - PIXELS[..., 0], {"photometric": "miniswhite"}))
    np.testing.assert_array_equal(shown(path)[0], np.repeat(PIXELS[..., :1], 3, axis=-1))


def test_a_smaller_copy_that_does_not_say_so_is_no_other_image(tmp_path):
    path = write(tmp_path / "a.tif", (PIXELS, TILE), (HALF, TILE))
    np.testing.assert_array_equal(shown(path)[0], PIXELS)


STACK = np.stack([PIXELS] * 3)
REFUSED = {
    "two scenes": ([(PIXELS, TILE), (PIXELS[:390, :500], TILE)], r"cannot be told: 0 \(520 x 400, tiled.*save the one"),
    "two pages": ([(PIXELS[:90, :200], {}), (PIXELS, {})], r"cannot be told: 1 \(520 x 400, not tiled.*0 \(200 x 90"),
    "label alone": ([(PIXELS, {"description": "label 520x400"})], "holds no slide, but 0"),
    "stack": ([(STACK, {})], "a stack of images.*save the one"),
    "tiled stack": ([(STACK, TILE)], "a stack of images"),
    "16 bits": ([(PIXELS.astype(np.uint16), {})], "16 bits.*scale them to 8 bits"),
    "floats": ([(PIXELS.astype(np.float32), {})], "32 bits"),
}


@pytest.mark.parametrize(("images", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_or_read_is_refused_by_name(tmp_path, images, match):
    path = write(tmp_path / "a.tif", *images)
    with pytest.raises(SlideError, match=match) as caught:
        open_slide(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_channels_of_fluorescence_are_refused(tmp_path):
    about = {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "Cy5"]}}
    path = write(tmp_path / "a.ome.tif", (PLANES, {"photometric": "minisblack", "metadata": about, **TILE}))
    with pytest.raises(SlideError, match="3 channels that are not red, green and blue"):
        open_slide(path)


def test_an_unknown_compression_is_told(shared_data):
    with pytest.raises(SlideError, match=r"compression \(52479\) that is not known; convert it"):
        open_slide(shared_data / "bad_slides" / "unopenable.tiff")


def test_what_is_too_large_to_decode_at_once_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.slides.tiff.MOST_TILE_PIXELS", 1000)
    with pytest.raises(SlideError, match="520 x 400 px in one piece"):
        open_slide(write(tmp_path / "a.tif", (PIXELS, {})))


def test_damage_is_told_where_it_is_read(tmp_path):
    path = write(tmp_path / "a.tif", (PIXELS, {"rowsperstrip": 64}))
    path.write_bytes(path.read_bytes()[:300_000])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, 100, 100), PIXELS[:100, :100])
        with pytest.raises(SlideError, match=r"row 3 cannot be read \(the file ends"):
            slide.read_region(0, 200, 0, 50, 50)
    path.write_bytes(b"II*\0" + b"\xff" * 50)
    with pytest.raises(SlideError, match="without an image that can be read"):
        open_slide(path)


def test_a_closed_slide_says_so(tmp_path):
    slide = open_slide(write(tmp_path / "a.tif", (PIXELS, {})))
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read_region(0, 0, 0, 5, 5)
