"""Slides: what is read where, what the file says, and every way a file can be bad."""

import logging
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from tests.slides.conftest import PLACE_SIZE
from tests.synthetic import place_image, place_of, stained_image, write_pyramid
from utils.core.errors import SlideError
from utils.slides import find, open_slides, tiles
from utils.slides import slide as slide_module
from utils.slides.find import find_slides, is_slide_file, slide_bytes
from utils.slides.open_slides import open_slide
from utils.slides.slide_mpps import read_slides_csv
from utils.slides.tiles import TileReader

WIDTH, HEIGHT = PLACE_SIZE


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (130, 17), (255, 201)])
def test_a_region_shows_the_place_it_was_asked_for(place_slide, level, x, y):
    with open_slide(place_slide) as slide:
        downsample = slide.level_downsamples[level]
        region = slide.read_region(x, y, level, 40, 30)
    assert region.shape == (30, 40, 3)
    assert region.dtype == np.uint8
    seen_x, seen_y = place_of(region, WIDTH, HEIGHT)
    tolerance = 2 * WIDTH / 255 + downsample / 2  # two grey levels, and OpenSlide's fraction of a level px
    np.testing.assert_allclose(seen_x[15], x + (np.arange(40) + 0.5) * downsample, atol=tolerance)
    np.testing.assert_allclose(seen_y[:, 20], y + (np.arange(30) + 0.5) * downsample, atol=tolerance)
    assert np.abs(region[..., 2].astype(int) - 77).max() <= 1  # OpenSlide's seams between tiles cost one grey level


def test_level_0_is_lossless(place_slide):
    image = place_image(*PLACE_SIZE)
    with open_slide(place_slide) as slide:
        assert (slide.width, slide.height) == PLACE_SIZE
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, WIDTH, HEIGHT), image)


def test_what_a_slide_says_of_itself(place_slide):
    with open_slide(place_slide) as slide:
        assert slide.name == "place"
        assert slide.path == place_slide
        assert slide.level_dimensions == ((510, 408), (204, 163), (127, 102))
        assert slide.level_downsamples == pytest.approx((1, 2.5, 4), rel=0.003)
        assert slide.mpp == pytest.approx(0.5)
        assert slide.vendor == "generic-tiff"
        assert slide.objective is None
        assert slide.bounds is None


@pytest.mark.parametrize("kind", ["pyramid", "image"])
def test_beyond_the_edge_is_background_never_black(tmp_path, kind):
    dark = np.full((100, 100, 3), 40, dtype=np.uint8)
    path = tmp_path / ("a.tiff" if kind == "pyramid" else "a.png")
    write_pyramid(path, dark, tile=128) if kind == "pyramid" else Image.fromarray(dark).save(path)
    with open_slide(path) as slide:
        region = slide.read_region(-10, 90, 0, 30, 20)
    assert (region[:10, 10:] == 40).all()
    assert (region[10:] == 255).all()
    assert (region[:, :10] == 255).all()
    with open_slide(path) as slide:
        assert (slide.read_region(500, 500, 0, 8, 8) == 255).all()


@pytest.mark.parametrize("name", ["a.tiff", "a.png"])
def test_transparent_pixels_are_white_and_half_transparent_ones_half(tmp_path, name):
    rgba = np.full((64, 64, 4), (100, 0, 200, 255), dtype=np.uint8)
    rgba[:32, :, 3] = 0
    if name.endswith("tiff"):
        write_pyramid(tmp_path / name, rgba, downsamples=(1,), tile=64)
    else:
        rgba[32:, :32, 3] = 51  # a fifth
        Image.fromarray(rgba).save(tmp_path / name)
    with open_slide(tmp_path / name) as slide:
        region = slide.read_region(0, 0, 0, 64, 64)
    assert (region[:32] == 255).all()
    assert (region[32:, 32:] == (100, 0, 200)).all()
    if name.endswith("png"):
        assert (region[32:, :32] == (224, 204, 244)).all()


def test_the_slides_own_background_colour_is_used():
    rgba = np.zeros((1, 2, 4), dtype=np.uint8)
    rgba[0, 1] = (10, 20, 30, 255)
    assert slide_module.opaque(rgba, open_slides.background_colour("E0E1E2")).tolist() == [
        [[224, 225, 226], [10, 20, 30]]
    ]
    assert open_slides.background_colour(None) == open_slides.background_colour("no colour") == (255, 255, 255)


def test_a_thumbnail_is_the_slide_averaged(place_slide):
    with open_slide(place_slide) as slide:
        for keywords, shape in [({"downsample": 5}, (82, 102)), ({"max_side": 51}, (41, 51))]:
            thumbnail = slide.thumbnail(**keywords)
            assert thumbnail.shape == (*shape, 3)
            seen_x, seen_y = place_of(thumbnail, WIDTH, HEIGHT)
            step_x, step_y = WIDTH / shape[1], HEIGHT / shape[0]
            np.testing.assert_allclose(seen_x[7], (np.arange(shape[1]) + 0.5) * step_x, atol=5)
            np.testing.assert_allclose(seen_y[:, 9], (np.arange(shape[0]) + 0.5) * step_y, atol=5)
        assert slide.thumbnail(max_side=10_000).shape == (HEIGHT, WIDTH, 3)  # never enlarged
        with pytest.raises(ValueError, match="exactly one"):
            slide.thumbnail()
        with pytest.raises(ValueError, match="exactly one"):
            slide.thumbnail(downsample=2, max_side=10)


def test_a_thumbnail_is_antialiased(tmp_path):
    """Single black columns, one in eight, become an even grey; picking pixels would give black or white."""
    stripes = np.full((160, 160, 3), 255, dtype=np.uint8)
    stripes[:, ::8] = 0
    Image.fromarray(stripes).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        thumbnail = slide.thumbnail(downsample=8)
    np.testing.assert_allclose(thumbnail, 255 * 7 / 8, atol=1)


def test_thumbnail_blocks_leave_no_seam(place_slide, monkeypatch):
    with open_slide(place_slide) as slide:
        whole = slide.thumbnail(downsample=3.3)
        monkeypatch.setattr(slide_module, "READ_BLOCK", 50)
        blocks = slide.thumbnail(downsample=3.3)
    np.testing.assert_allclose(blocks.astype(int), whole, atol=2)


def test_an_overview_read_in_many_blocks_shows_its_progress(tmp_path, monkeypatch, capsys):
    """As that of a large slide without coarse levels; a quick one shows none."""
    write_pyramid(tmp_path / "giant.tif", place_image(512, 512), downsamples=(1,))
    monkeypatch.setattr(slide_module, "READ_BLOCK", 50)
    with open_slide(tmp_path / "giant.tif") as slide:
        slide.thumbnail(max_side=128)
        assert "giant" not in capsys.readouterr().err
        monkeypatch.setattr(slide_module, "BAR_DELAY_SECONDS", 0)
        slide.thumbnail(max_side=128)
    assert "giant, overview" in (shown := capsys.readouterr().err)
    assert "block/s" in shown or "?block" in shown


def test_a_level_that_is_not_there_is_named_with_the_ones_that_are(place_slide):
    with open_slide(place_slide) as slide:
        for level in (3, -1):
            with pytest.raises(SlideError, match=rf"no level {level}.*0 \(510 x 408.*2 \(127 x 102, downsample 4"):
                slide.read_region(0, 0, level, 10, 10)
        with pytest.raises(SlideError, match="at least 1 x 1"):
            slide.read_region(0, 0, 0, 0, 10)


def test_reading_after_close_is_a_slide_error(place_slide, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    for path in (place_slide, tmp_path / "a.png"):
        with open_slide(path) as slide:
            slide.read_region(0, 0, 0, 4, 4)
        slide.close()  # a second time is no error
        with pytest.raises(SlideError, match=f"{path.name}.*closed"):
            slide.read_region(0, 0, 0, 4, 4)


def test_a_slide_travels_to_another_process(place_slide):
    with open_slide(place_slide) as slide, pickle.loads(pickle.dumps(slide)) as copy:  # noqa: S301 - our own bytes
        np.testing.assert_array_equal(copy.read_region(9, 9, 1, 20, 20), slide.read_region(9, 9, 1, 20, 20))


def test_quick_hash_follows_the_content_not_the_name(tmp_path):
    content = bytes(range(256)) * 12_000  # 3 MB: a middle that is not hashed
    digests = {}
    changed_end = content[:-1] + b"x"
    for name, data in {"a": content, "b": content, "longer": content + b"\0", "end": changed_end}.items():
        path = tmp_path / name
        path.write_bytes(data)
        slide = open_slides.Slide()
        slide.path = path
        digests[name] = slide.quick_hash()
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 3


# Resolution


def mpp_of(tmp_path, caplog, **tags):
    path = tmp_path / "mpp.tiff"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), tile=(64, 64), photometric="rgb", metadata=None, **tags)
    with caplog.at_level(logging.WARNING), open_slide(path) as slide:
        assert slide.vendor == "generic-tiff"
        return slide.mpp


def test_mpp_comes_from_resolution_tags(tmp_path, caplog):
    assert mpp_of(tmp_path, caplog, resolution=(40_000, 40_000), resolutionunit="centimeter") == pytest.approx(0.25)
    assert mpp_of(tmp_path, caplog, resolution=(101_600, 101_600), resolutionunit="inch") == pytest.approx(0.25)
    assert mpp_of(tmp_path, caplog) is None
    assert not caplog.records


@pytest.mark.parametrize("dpi", [72, 96, 10_000_000])
def test_an_implausible_mpp_is_unknown_with_a_warning(tmp_path, caplog, dpi):
    assert mpp_of(tmp_path, caplog, resolution=(dpi, dpi), resolutionunit="inch") is None
    assert "mpp.tiff" in caplog.text
    assert f"{25_400 / dpi:.4g}" in caplog.text


def test_axes_that_disagree_make_the_mpp_unknown(tmp_path, caplog):
    within = mpp_of(tmp_path, caplog, resolution=(40_000, 41_000), resolutionunit="centimeter")
    assert within == pytest.approx((0.25 + 10 / 41) / 2)
    assert not caplog.records
    assert mpp_of(tmp_path, caplog, resolution=(40_000, 20_000), resolutionunit="centimeter") is None
    assert "x and y disagree in the file (0.25 x 0.5 um/px)" in caplog.text


def test_a_plain_image_has_no_mpp(tmp_path, caplog):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", dpi=(50_800, 50_800))
    with open_slide(tmp_path / "a.jpg") as slide:
        assert slide.mpp is None
        assert slide.vendor == "image"
        assert slide.level_dimensions == ((30, 20),)
    assert not caplog.records


# Plain images


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("LA", (90, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ],
)
def test_pixel_modes_become_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.tif" if mode in {"CMYK", "1"} else "a.png")
    Image.new(mode, (8, 8), colour).save(path)
    with open_slide(path) as slide:
        assert (slide.read_region(0, 0, 0, 8, 8) == expected).all()


def test_palettes_and_their_transparent_entry(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    with open_slide(tmp_path / "a.png") as slide:
        region = slide.read_region(0, 0, 0, 8, 8)
    assert region[0, 0].tolist() == [255, 255, 255]
    assert region[1, 1].tolist() == [10, 20, 30]


def test_sixteen_bit_grey_is_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match=r"a\.png.*'I;16'.*8 bits"):
        open_slide(tmp_path / "a.png")


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate a quarter turn"
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    with open_slide(tmp_path / "a.jpg") as slide:
        assert (slide.width, slide.height) == (30, 20)


def test_an_image_too_large_to_decode_is_refused_and_a_large_one_is_not(tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.width == 60
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SlideError, match=r"a\.png: too large.*pyramid"):
        open_slide(tmp_path / "a.png")


# Bad files


def one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["text.svs", "text.png", "text.tiff", "text.xyz"])
def test_a_text_file_is_no_slide(tmp_path, name):
    (tmp_path / name).write_text("not a slide\n" * 100)
    with pytest.raises(SlideError, match=name) as error:
        open_slide(tmp_path / name)
    assert one_line(error)


def test_missing_empty_and_folder(tmp_path):
    (tmp_path / "empty.svs").touch()
    (tmp_path / "folder.svs").mkdir()
    for name, said in [("absent.svs", "no such file"), ("empty.svs", "empty"), ("folder.svs", "folder")]:
        with pytest.raises(SlideError, match=f"{name}: .*{said}") as error:
            open_slide(tmp_path / name)
        assert one_line(error)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif"])
def test_a_truncated_image_fails_by_name(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for share in (0.02, 0.5):
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(SlideError, match=name) as error, open_slide(tmp_path / name) as slide:
            slide.read_region(0, 0, 0, 80, 80)
        assert one_line(error)


def test_a_truncated_pyramid_fails_by_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    path = write_pyramid(tmp_path / "a.tiff", noise, tile=64)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideError, match=r"a\.tiff") as error, open_slide(path) as slide:
        slide.thumbnail(max_side=50)
    assert one_line(error)


def test_damage_inside_a_tile_is_an_error_there_and_nowhere_else(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    path = write_pyramid(tmp_path / "a.tiff", noise, downsamples=(1,), tile=64)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    with open_slide(path) as slide:
        with pytest.raises(SlideError, match=r"a\.tiff: level 0 cannot be read at \(0, 0\)"):
            slide.read_region(0, 0, 0, 256, 256)
        np.testing.assert_allclose(slide.read_region(200, 200, 0, 10, 10), noise[200:210, 200:210], atol=60)


def test_the_bad_slides_each_give_one_clear_line(shared_data):
    paths = sorted((shared_data / "bad_slides").iterdir())
    assert len(paths) == 3
    for path in paths:
        with pytest.raises(SlideError, match=path.name) as error, open_slide(path) as slide:
            slide.thumbnail(max_side=16)
        assert one_line(error)


def test_the_real_slides_say_what_is_known_of_them(shared_data, caplog):
    facts = {
        "CMU-1-Small-Region.svs": ((2220, 2967), 1, 0.499, 20),
        "OS-1-detail_pyramid.tiff": ((1101, 1101), 2, 0.227, None),
        "test3-DAPI-387.ndpi": ((3968, 4864), 7, 0.228, 40),
        "ezwsi_multiframe_camelyon_challenge_image.dcm": ((1152, 700), 1, 28.97, None),
        "boxes.tiff": ((300, 250), 4, None, None),
    }
    for name, (size, levels, mpp, objective) in facts.items():
        with open_slide(shared_data / "slides" / name) as slide:
            assert (slide.width, slide.height) == size
            assert len(slide.level_dimensions) == levels
            assert slide.mpp == (None if mpp is None else pytest.approx(mpp, rel=0.01))
            assert slide.objective == objective
    assert "boxes.tiff: 352.8 um/px in the file is not plausible" in caplog.text


# Finding


@pytest.fixture
def folder(tmp_path):
    names = ["b.SVS", "a.tiff", "sub/c.Mrxs", "sub/deep/d.png", "sub/notes.txt", ".hidden.svs", ".cache/e.svs"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.svs").mkdir()
    return tmp_path


def found(folder, **keywords):
    return [path.relative_to(folder).as_posix() for path in find_slides(folder, **keywords)]


def test_slides_are_found_in_subfolders_whatever_the_case(folder):
    assert found(folder) == ["a.tiff", "b.SVS", "sub/c.Mrxs", "sub/deep/d.png"]


@pytest.mark.parametrize("extensions", [["svs", "MRXS"], [".svs", ".mrxs"], {".SVS", "mrxs"}])
def test_extensions_with_or_without_the_dot(folder, extensions):
    assert found(folder, extensions=extensions) == ["b.SVS", "sub/c.Mrxs"]


def test_a_hidden_parent_of_the_folder_itself_hides_nothing(folder):
    assert found(folder / ".cache") == ["e.svs"]


def test_the_tiles_of_a_vms_slide_are_not_slides(tmp_path):
    for name in ["a.vms", "a_1.jpg", "other/b.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert found(tmp_path) == ["a.vms", "other/b.jpg"]
    assert found(tmp_path, extensions=["jpg"]) == ["a_1.jpg", "other/b.jpg"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(SlideError, match="absent: not a folder"):
        find_slides(tmp_path / "absent")


def test_a_slide_of_several_files_is_as_large_as_all_of_them(tmp_path):
    for name, size in (("a.svs", 5), ("a/b", 9), ("m.mrxs", 1), ("m/Data0.dat", 30), ("m/Index.dat", 2), ("n.mrxs", 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    sizes = {name: slide_bytes(tmp_path / name) for name in ("a.svs", "m.mrxs", "n.mrxs", "gone.svs")}
    assert sizes == {"a.svs": 5, "m.mrxs": 33, "n.mrxs": 4, "gone.svs": 0}


def test_is_slide_file():
    assert is_slide_file("x/a.SVS")
    assert is_slide_file("a.jpeg")
    assert not is_slide_file("a.h5")
    assert not is_slide_file("svs")


# The fast reader, and px of a level


def write_jpeg_pyramid(path, width=700, height=500, factors=(1, 2)):
    image = stained_image(width, height, seed=2, coverage=0.8)
    with tifffile.TiffWriter(path) as writer:
        for factor in factors:
            level = np.asarray(Image.fromarray(image).resize((int(width / factor), int(height / factor))))
            kind = {"compression": "jpeg", "photometric": "rgb", "metadata": None}
            writer.write(level, tile=(128, 128), subfiletype=int(factor > 1), **kind)
    return path


def by_openslide(path, x, y, level, width, height):
    with openslide.OpenSlide(path) as handle:
        return slide_module.opaque(np.asarray(handle.read_region((x, y), level, (width, height))), (255, 255, 255))


@pytest.mark.parametrize("factors", [(1, 2), (1, 2.5), (1, 4.003)])
def test_the_fast_reader_is_chosen_and_gives_openslides_pixels(tmp_path, factors, caplog):
    path = write_jpeg_pyramid(tmp_path / "a.tif", factors=factors)
    with caplog.at_level(logging.INFO), open_slide(path) as slide:
        for x, y, level in [(0, 0, 0), (3, 129, 0), (-5, 450, 0), (690, 490, 0), (0, 0, 1), (20, 40, 1), (33, 47, 1)]:
            np.testing.assert_array_equal(
                slide.read_region(x, y, level, 140, 90), by_openslide(path, x, y, level, 140, 90)
            )
        assert slide.tile_reader is not None
    assert not caplog.records


def test_a_reader_that_is_wrong_by_one_grey_level_is_not_used(tmp_path, caplog, monkeypatch):
    path = write_jpeg_pyramid(tmp_path / "a.tif")
    right = tiles.imagecodecs.jpeg8_decode

    def wrong(data, **keywords):
        pixels = right(data, **keywords)
        pixels[40:90, 40:90, 1] ^= 1
        return pixels

    monkeypatch.setattr(tiles.imagecodecs, "jpeg8_decode", wrong)
    with caplog.at_level(logging.INFO), open_slide(path) as slide:
        for _ in range(2):
            np.testing.assert_array_equal(slide.read_level(0, 5, 5, 99, 99), by_openslide(path, 5, 5, 0, 99, 99))
        assert slide.tile_reader is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "a.tif: read through OpenSlide" in record.message


@pytest.mark.parametrize("damaged_tiles", [{0}, set(range(24)) - {16}])
def test_a_slide_with_damaged_tiles_is_still_read_elsewhere(tmp_path, damaged_tiles):
    """Also where the probes meet damage, which OpenSlide sees too."""
    path = write_jpeg_pyramid(tmp_path / "a.tif", factors=(1,))
    with tifffile.TiffFile(path) as file:
        places = [(file.pages.first.dataoffsets[tile], file.pages.first.databytecounts[tile]) for tile in damaged_tiles]
    data = bytearray(path.read_bytes())
    for offset, count in places:
        data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"a\.tif: level 0, tile 0 of row 0 cannot be read") as error:
                slide.read_level(0, 0, 0, 50, 50)
            assert one_line(error)
            assert slide.read_level(0, 520, 260, 100, 100).std() > 5


def test_a_reader_that_fails_where_openslide_does_not_is_not_used(tmp_path, monkeypatch):
    path = write_jpeg_pyramid(tmp_path / "a.tif", factors=(1,))

    def failing(*_, **__):
        raise ValueError("no stream that it knows")

    monkeypatch.setattr(tiles.imagecodecs, "jpeg8_decode", failing)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_level(0, 5, 5, 99, 99), by_openslide(path, 5, 5, 0, 99, 99))
        assert slide.tile_reader is None


def test_threads_that_read_first_choose_one_reader(tmp_path, monkeypatch):
    path = write_jpeg_pyramid(tmp_path / "a.tif")
    opened, start = [], threading.Barrier(6)
    open_reader = TileReader.open
    monkeypatch.setattr(TileReader, "open", lambda *args: opened.append(1) or open_reader(*args))
    expected = by_openslide(path, 100, 100, 0, 90, 90)
    with open_slide(path) as slide, ThreadPoolExecutor(6) as pool:

        def reads_right(_):
            start.wait(10)
            return np.array_equal(slide.read_level(0, 100, 100, 90, 90), expected)

        assert all(pool.map(reads_right, range(6)))
    assert len(opened) == 1


def test_px_of_a_level_are_whole_px(place_slide, tmp_path):
    """By the fast reader exactly; by OpenSlide to less than half a px of the level, and never past its edge."""
    path = write_jpeg_pyramid(tmp_path / "a.tif", factors=(1, 4.003))
    with open_slide(path) as slide:
        width, height = slide.level_dimensions[1]
        whole = slide.read_level(1, 0, 0, width, height)
        np.testing.assert_array_equal(slide.read_level(1, 37, 21, 60, 50), whole[21:71, 37:97])
    with open_slide(place_slide) as slide:
        for level, downsample in enumerate(slide.level_downsamples):
            width, height = slide.level_dimensions[level]
            seen_x, seen_y = place_of(slide.read_level(level, width - 31, 7, 31, 20), WIDTH, HEIGHT)
            tolerance = WIDTH / 255 + downsample / 2
            np.testing.assert_allclose(seen_x[9], (np.arange(width - 31, width) + 0.5) * downsample, atol=tolerance)
            np.testing.assert_allclose(seen_y[:, 9], (np.arange(7, 27) + 0.5) * downsample, atol=tolerance)
            edge = slide.read_level(level, width - 1, height - 1, 1, 1)
            assert edge[0, 0, 2] == 77  # blended with the background it would be lighter
        with pytest.raises(SlideError, match="no level 3"):
            slide.read_level(3, 0, 0, 5, 5)
        with pytest.raises(SlideError, match="at least 1 x 1"):
            slide.read_level(0, 0, 0, 5, 0)


def test_a_slide_that_travels_keeps_what_the_user_said_of_it(tmp_path):
    path = write_jpeg_pyramid(tmp_path / "a.tif")
    with open_slide(path, 0.7) as slide:
        slide.read_level(0, 0, 0, 5, 5)
        with pickle.loads(pickle.dumps(slide)) as copy:  # noqa: S301 - our own bytes
            assert (copy.mpp, copy.user_mpp, copy.mpp_problem) == (0.7, 0.7, None)
            np.testing.assert_array_equal(copy.read_level(1, 9, 9, 20, 20), slide.read_level(1, 9, 9, 20, 20))


def test_a_closed_slide_gives_its_fast_reader_back(tmp_path):
    slide = open_slide(write_jpeg_pyramid(tmp_path / "a.tif"))
    reader = slide.tile_reader
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read_level(0, 0, 0, 5, 5)
    with pytest.raises(SlideError, match="closed"):
        reader.read(0, 0, 0, 5, 5)


def test_transparent_and_half_transparent_px_are_composed_on_the_slides_colour(tmp_path, monkeypatch):
    """As MIRAX has them: places never scanned, and edges of camera fields."""
    path = write_jpeg_pyramid(tmp_path / "a.tif", factors=(1,))
    region = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    region.putpixel((1, 1), (10, 20, 30, 255))
    region.putpixel((2, 1), (100, 100, 100, 51))  # a fifth
    monkeypatch.setattr(TileReader, "open", lambda *_: None)
    monkeypatch.setattr(open_slides, "background_colour", lambda _: (255, 200, 150))
    with open_slide(path) as slide:
        assert slide.level_dimensions == ((700, 500),)
        monkeypatch.setattr(openslide.OpenSlide, "read_region", lambda *args: region)
        pixels = slide.read_level(0, 0, 0, 4, 3)
    assert pixels[1, 1].tolist() == [10, 20, 30]
    assert pixels[1, 2].tolist() == [224, 180, 140]
    assert (pixels[[0, 2]] == (255, 200, 150)).all()


# What the user says of the um/px


def test_the_users_mpp_wins_and_silences_the_files(tmp_path, caplog):
    path = tmp_path / "a.tiff"
    write_pyramid(path, np.zeros((64, 64, 3), np.uint8), mpp=300, downsamples=(1,), tile=64)
    with open_slide(path, 0.5) as slide:
        assert (slide.mpp, slide.mpp_problem) == (0.5, None)
    assert not caplog.records
    with open_slide(path) as slide:
        assert (slide.mpp, slide.user_mpp) == (None, None)
        assert slide.mpp_problem == "300 um/px in the file is not plausible (0.05 to 40)"
    assert len(caplog.records) == 1
    for mpp in (0, -1, 0.01, 50, float("nan")):
        with pytest.raises(SlideError, match=r"a\.tiff: .* um/px, given for it, is not plausible"):
            open_slide(path, mpp)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", 0.5) as slide:
        assert slide.mpp == 0.5


def test_a_slide_that_says_nothing_says_so_without_a_warning(tmp_path, caplog):
    path = write_pyramid(tmp_path / "a.tiff", np.zeros((64, 64, 3), np.uint8), downsamples=(1,), tile=64)
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_problem) == (None, "not in the file")
    assert not caplog.records


def slides_csv(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "slides.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_of_mpps(tmp_path, encoding):
    text = 'scanner, wsi ,note,mpp\r\nX,"a, b.svs","two\r\nlines",0.25\r\n\r\nY, c ,,0.5\r\n'
    assert read_slides_csv(slides_csv(tmp_path, text, encoding)) == {"a, b.svs": 0.25, "c": 0.5}
    assert read_slides_csv(slides_csv(tmp_path, "wsi,mpp\n")) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column wsi; found nothing: name the slide's file wsi and its um/px mpp"),
        ("wsi:mpp\na:0.5\n", "no column wsi; found wsi:mpp: name"),
        ("wsi,um\na,0.5\n", "no column mpp; found wsi, um: name"),
        ("Slide ID,file,mpp\na,b,0.5\n", "the columns Slide ID, file could each be wsi; rename the right one to it"),
        ("wsi,mpp\na,0.5\nb\n", "line 3: mpp None of b"),
        ("wsi,mpp\na,half\n", "line 2: mpp 'half' of a; um per level-0 px are expected, 0.05 to 40"),
        ("wsi,mpp\na,nan\n", "line 2: mpp 'nan'"),
        ("wsi,mpp\na,352.8\n", "line 2: mpp '352.8'"),
        ("wsi,mpp\n,0.5\n", "line 2: wsi ''"),
        ("wsi,mpp\nsub/a.svs,0.5\n", "line 2: wsi 'sub/a.svs'; .*without folders"),
        ("wsi,mpp\na,0.5\nb,0.5\na,0.5\n", "line 4: a is in the table twice"),
        ('wsi,mpp\n"a,0.5\n', "not readable as a table"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused_by_line(tmp_path, text, said):
    with pytest.raises(SlideError, match=rf"slides\.csv.*{said}") as error:
        read_slides_csv(slides_csv(tmp_path, text))
    assert one_line(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wsi;mpp\na;0,5\n", ["its fields are taken as separated by semicolons"]),
        ("wsi\tmpp\na\t0.5\n", ["its fields are taken as separated by tabs"]),
        ("WSI,MPP\na,0.5\n", ["the column WSI is taken as wsi; the column MPP is taken as mpp"]),
        (
            '"Slide ID";"mpp"\na;0.5\n',
            ["the column Slide ID is taken as wsi; its fields are taken as separated by semicolons"],
        ),
        ("wsi,slide_id,mpp\na,b,0.5\n", []),
        ("filename,mpp\na,0.5\n", ["the column filename is taken as wsi"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_under_other_names_is_read_and_that_is_told(tmp_path, caplog, text, said, encoding):
    caplog.set_level("INFO", "litemil")
    assert read_slides_csv(slides_csv(tmp_path, text, encoding)) == {"a": 0.5}
    assert [message.split("slides.csv: ")[1] for message in caplog.messages] == said


def test_a_table_that_is_not_text_or_not_there(tmp_path):
    with pytest.raises(SlideError, match=r"absent\.csv: not readable as a table \(No such file"):
        read_slides_csv(tmp_path / "absent.csv")
    with pytest.raises(SlideError, match="not readable as a table"):
        read_slides_csv(slides_csv(tmp_path, "wsi,mpp\n\xe9,1\n", "latin-1"))
    with pytest.raises(SlideError, match="not readable as a table"):
        read_slides_csv(tmp_path)


def test_a_series_of_dicom_files_is_one_slide(tmp_path, monkeypatch):
    names = ["a_0.dcm", "a_1.dcm", "b_0.dcm", "broken.dcm", "c.svs", "other/a_0.dcm"]
    slides = [tmp_path / name for name in names]
    series = {"a_0.dcm": "1", "a_1.dcm": "1", "b_0.dcm": "2"}

    def opened(path):
        if path.name not in series:
            raise openslide.OpenSlideError("no DICOM")
        return nullcontext(SimpleNamespace(properties={"dicom.SeriesInstanceUID": series[path.name]}))

    monkeypatch.setattr(find.openslide, "OpenSlide", opened)
    kept = find.one_per_series([*slides, tmp_path / "broken.dcm"])
    assert [path.relative_to(tmp_path).as_posix() for path in kept] == [
        "a_0.dcm", "b_0.dcm", "broken.dcm", "c.svs", "other/a_0.dcm", "broken.dcm",
    ]  # fmt: skip


def test_a_real_dicom_file_tells_its_series(shared_data, tmp_path):
    (found,) = (shared_data / "slides").glob("*.dcm")
    for name in ("a.dcm", "b.dcm"):
        shutil.copy(found, tmp_path / name)
    for name in ("c.dcm", "d.dcm"):
        (tmp_path / name).write_bytes(b"no DICOM")
    slides = [tmp_path / f"{name}.dcm" for name in "abcd"]
    assert find.one_per_series(slides) == [slides[0], *slides[2:]]


def test_a_closed_slide_stays_closed(shared_data):
    slide = open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs")
    slide.close()
    with pytest.raises(SlideError, match="it was closed; open it again"):
        slide.read_region(0, 0, 0, 64, 64)
    with pytest.raises(SlideError, match="it was closed; open it again"):
        slide.read_level(0, 0, 0, 64, 64)


def test_a_tile_no_memory_would_hold_is_an_error_before_it_is_read(tmp_path):
    """OpenSlide would end the process, and a batch with it."""
    path = write_pyramid(tmp_path / "a.tiff", stained_image(600, 400), downsamples=(1, 2))
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[1].tags["TileWidth"].overwrite(2**30)
    with pytest.raises(SlideError, match=r"a\.tiff: damaged: says that a tile of level 1 has 1073741824 x 256 px"):
        open_slide(path)
