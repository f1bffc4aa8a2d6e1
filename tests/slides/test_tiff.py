"""TIFFs that OpenSlide refuses or shows in part: which image is the slide, its pixels and um/px, what is refused."""

import os
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from tests.tiffs import HALF, HEIGHT, LABEL, PIXELS, PLANES, STRIPS, TILE, WIDTH, shown, write
from utils.core.errors import SlideError
from utils.slides.open_slides import open_slide

AT_HALF_UM = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}


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


@pytest.mark.parametrize("layout", [TILE, STRIPS], ids=["tiled", "strips"])  # OpenSlide opens the first
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_the_unit_is_read_in_either_encoding_whichever_reader_opens_the_file(tmp_path, encoding, layout):
    description = "ImageJ=1.53t\nunit=\N{MICRO SIGN}m\nmin=0.0\n".encode(encoding)
    keywords = {"description": description, "resolution": (4, 4), "resolutionunit": "NONE"}
    assert shown(write(tmp_path / "a.tif", (PIXELS, layout | keywords)))[2] == 0.25


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
    "two scenes": (
        [(PIXELS, TILE), (PIXELS[:390, :500], TILE)],
        r"is the slide: 0 \(520 x 400, tiled.*save the right one",
    ),
    "two pages": (
        [(PIXELS[:90, :200], {}), (PIXELS, {})],
        r"is the slide: 1 \(520 x 400, not tiled.*0 \(200 x 90",
    ),
    "label alone": ([(PIXELS, {"description": "label 520x400"})], "holds no slide, but 0"),
    "stack": ([(STACK, {})], "a stack of images.*save the right one"),
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


# Damage


def damaged_copies(path, count, seed):
    """Copies of a TIFF with one to four bytes of its directories changed."""
    rng = np.random.default_rng(seed)
    content = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        offsets = [page.offset for page in file.pages]
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 5)):
            changed[min(len(changed) - 1, rng.choice(offsets) + rng.integers(300))] = rng.integers(256)
        yield bytes(changed)


OME = {"metadata": {"axes": "CYX", "PhysicalSizeX": 0.5}, "photometric": "minisblack"}
DAMAGED = {
    "label, pyramid in SubIFDs": ([(LABEL, {}), (PIXELS, TILE | {"subifds": 1}), (HALF, TILE)], "a.tif"),
    "a page per colour": ([(PLANES, TILE | OME)], "a.ome.tif"),
    "strips": ([(PIXELS, STRIPS | {"compression": "lzw", "predictor": True})], "a.tif"),
    "label, JPEG": ([(LABEL, {}), (PIXELS, TILE | {"compression": "jpeg"})], "a.tif"),
}


@pytest.mark.parametrize(("images", "name"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_directories_are_a_slide_error_or_are_read(tmp_path, images, name):
    path, outcomes = write(tmp_path / name, *images), set()
    for content in list(damaged_copies(path, 100, seed=1)):
        path.write_bytes(content)
        try:
            with open_slide(path) as slide:
                if slide.width * slide.height < 10**7:
                    slide.thumbnail(max_side=32)
            outcomes.add("read")
        except SlideError as error:
            outcomes.add("refused" if str(error).startswith(f"{path}: ") else str(error))
    assert outcomes == {"read", "refused"}


def with_tag(path, page, code, value, dtype=None):
    """The same file with another value of a tag of one of its pages."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[page].tags[code].overwrite(value, dtype=dtype)
    return path


@pytest.mark.parametrize("label", [[(LABEL, {})], []], ids=["label", "alone"])
@pytest.mark.parametrize(("value", "dtype"), [(0, None), (-112, "i")])
@pytest.mark.parametrize("code", [256, 257, 322, 323])
def test_a_page_without_pixels_is_refused(tmp_path, code, value, dtype, label):
    path = with_tag(write(tmp_path / "a.tif", *label, (PIXELS, TILE)), len(label), code, value, dtype)
    with pytest.raises(SlideError, match=r"get it again|copy it again|cannot tell"):
        open_slide(path)


def test_jpeg_tables_of_another_type_are_damage(tmp_path):
    tables = {"extratags": [(347, 3, 3, (1, 2, 3), True)]}
    path = write(tmp_path / "a.tif", (LABEL, {}), (PIXELS, TILE | {"compression": "jpeg"} | tables))
    with open_slide(path) as slide, pytest.raises(SlideError, match="tile 0 of row 0 cannot be read"):
        slide.read_level(0, 0, 0, 10, 10)


def test_a_property_whose_name_is_damaged_is_left_out(tmp_path):
    description = b"Aperio Image Library v1\r\n520x400 (128x128) JPEG/RGB Q=70|\xff\xfe = 3|MPP = 0.5"
    path = write(tmp_path / "a.svs", (PIXELS, TILE | {"compression": "jpeg", "description": description}))
    assert shown(path)[2] == 0.5


def handles_to(path):
    return [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(path)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_refused_file_is_closed(tmp_path, monkeypatch):
    closed = []
    original = openslide.OpenSlide.close
    monkeypatch.setattr(openslide.OpenSlide, "close", lambda self: (closed.append(self), original(self)))
    path = write(tmp_path / "a.tif", (PIXELS, TILE), (PIXELS[:390, :500], TILE))
    with pytest.raises(SlideError, match="cannot tell"):
        open_slide(path)
    assert closed
    assert handles_to(path) == []


# What errors say


def test_an_unread_compression_is_named_and_not_called_damage(tmp_path):
    path = with_tag(write(tmp_path / "a.tif", (LABEL, {}), (PIXELS, TILE)), 1, 259, 65000)
    with pytest.raises(SlideError, match=r"compression \(EER_V0\) that is not known; convert it .*vips") as caught:
        open_slide(path)
    assert "damaged" not in str(caught.value)


def test_jpeg_2000_with_subsampled_colours_is_named_and_not_called_damage(tmp_path):
    path = write(tmp_path / "a.tif", (LABEL, {}), (PIXELS, TILE | {"compression": "jpeg2000"}))
    content = bytearray(with_tag(path, 1, 259, 33005).read_bytes())
    start = -1
    while (start := content.find(b"\xff\x4f\xff\x51", start + 1)) >= 0:
        content[start + 46 : start + 48] = content[start + 49 : start + 51] = b"\2\2"
    path.write_bytes(content)
    with pytest.raises(SlideError, match=r"APERIO_JP2000_RGB.*subsampled.*convert it") as caught:
        open_slide(path)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("layout", [TILE, STRIPS], ids=["tiled", "strips"])  # OpenSlide opens the first
@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        ((PIXELS.astype(int) - 128).astype(np.int8), "signed integers of 8 bits.*shift them to 0 to 255"),
        ((PIXELS / 255).astype(np.float32), "floating-point numbers of 32 bits"),
    ],
    ids=["signed", "float"],
)
def test_other_numbers_are_refused_whichever_reader_opens_them(tmp_path, pixels, match, layout):
    with pytest.raises(SlideError, match=match):
        open_slide(write(tmp_path / "a.tif", (pixels, layout)))
