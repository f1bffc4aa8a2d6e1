"""The fast reader gives OpenSlide's pixels, takes only files where it does, and stands threads and damage."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile

from tests.synthetic import stained_image
from utils.core.errors import SlideError
from utils.slides import tiles
from utils.slides.open_slides import open_slide
from utils.slides.tiles import TileReader

WIDTH, HEIGHT, TILE = 552, 432, 128
APERIO = "Aperio Image Library\r\n552x432 (128x128)|AppMag = 20|MPP = 0.5"
BACKGROUND = (201, 202, 203)


def jpeg(tile, subsampling="420"):
    return imagecodecs.jpeg8_encode(tile, 85, subsampling=subsampling)


def rgb_jpeg(tile):
    return imagecodecs.jpeg8_encode(tile, 85, colorspace="rgb", outcolorspace="rgb")


def jpeg_2000(tile, mct=False):
    return imagecodecs.jpeg2k_encode(tile, 45, codecformat="j2k", mct=mct)


def ycbcr_jpeg_2000(tile):
    luma = tile @ np.array([0.299, 0.587, 0.114])
    chroma = [128 + 0.564 * (tile[..., 2] - luma), 128 + 0.713 * (tile[..., 0] - luma)]
    return jpeg_2000(np.clip(np.stack([luma, *chroma], -1), 0, 255).astype(np.uint8))


def parts(stream):
    """The shared tables of a JPEG stream, and the stream without them."""
    tables, rest, at = b"\xff\xd8", b"\xff\xd8", 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4])
        if stream[at + 1] in (0xDB, 0xC4):
            tables += stream[at:end]
        else:
            rest += stream[at:end]
        at = end
    return tables + b"\xff\xd9", rest + stream[at:]


def write_slide(
    path, encode=jpeg, photometric="ycbcr", compression="jpeg", tile=TILE, missing=(), description=None, **tags
):
    """A pyramid of levels 1, 2, 4 of stained tissue, each tile encoded by `encode`; `missing` holds (level, tile)."""
    image = stained_image(WIDTH, HEIGHT, seed=3, coverage=0.7)
    with tifffile.TiffWriter(path, bigtiff=path.suffix == ".tf8") as writer:
        for number, factor in enumerate((1, 2, 4)):
            level = np.ascontiguousarray(image[::factor, ::factor])
            padded = np.pad(level, [(0, -side % tile) for side in level.shape[:2]] + [(0, 0)], mode="reflect")
            corners = [(y, x) for y in range(0, len(padded), tile) for x in range(0, padded.shape[1], tile)]
            cut = (np.ascontiguousarray(padded[y : y + tile, x : x + tile]) for y, x in corners)
            data = (b"" if (number, index) in missing else encode(pixels) for index, pixels in enumerate(cut))
            writer.write(
                data,
                shape=level.shape,
                dtype=np.uint8,
                tile=(tile, tile),
                photometric=photometric,
                compression=compression,
                subfiletype=int(number > 0 and description is None),
                description=description,
                metadata=None,
                **tags,
            )
    return path


def both(path):
    """OpenSlide's handle, and our reader of the same levels."""
    handle = openslide.OpenSlide(path)
    return handle, TileReader.open(path, handle.level_dimensions, BACKGROUND)


def by_openslide(handle, level, x, y, width, height):
    """Its pixels at level px, on the background; x and y must be whole level-0 px."""
    downsample = round(handle.level_downsamples[level])
    region = np.array(handle.read_region((x * downsample, y * downsample), level, (width, height)))
    region[region[..., 3] == 0, :3] = BACKGROUND
    return region[..., :3]


def differing_pixels(path):
    """Of all levels and something around them; and of regions that cut tiles."""
    handle, reader = both(path)
    assert reader is not None
    count = 0
    for level, (width, height) in enumerate(handle.level_dimensions):
        for box in [(0, 0, width + 20, height + 10), (TILE - 5, 3, 40, 70), (TILE, 0, TILE, TILE)]:
            count += (by_openslide(handle, level, *box) != reader.read(level, *box)).any(-1).sum()
    reader.close()
    handle.close()
    return count


RGB = {"compressionargs": {"outcolorspace": "rgb"}}
KINDS = {
    "4:2:0": {"subsampling": (2, 2)},
    "4:2:2": {"encode": lambda tile: jpeg(tile, "422"), "subsampling": (2, 1)},
    "4:4:4": {"encode": lambda tile: jpeg(tile, "444"), "subsampling": (1, 1)},
    "4:1:1": {"encode": lambda tile: jpeg(tile, "411"), "subsampling": (4, 1)},
    "RGB in JPEG": {"encode": rgb_jpeg, "photometric": "rgb", **RGB},
    "240-px tiles": {"tile": 240, "subsampling": (2, 2)},
    "tables shared": {
        "encode": lambda tile: parts(jpeg(tile))[1],
        "jpegtables": parts(jpeg(np.zeros((TILE, TILE, 3), np.uint8)))[0],
        "subsampling": (2, 2),
    },
    "Aperio, RGB in JPEG": {"encode": rgb_jpeg, "photometric": "rgb", "description": APERIO, **RGB},
    "Aperio, JPEG 2000": {
        "encode": jpeg_2000, "photometric": "rgb", "compression": 33005, "description": APERIO
    },
    "Aperio, JPEG 2000 with its own colour transform": {
        "encode": lambda tile: jpeg_2000(tile, mct=True), "photometric": "rgb", "compression": 33005,
        "description": APERIO,
    },
    "Aperio, JPEG 2000 YCbCr": {
        "encode": ycbcr_jpeg_2000, "photometric": "rgb", "compression": 33003, "description": APERIO
    },
    "missing tiles": {"missing": {(0, 3), (0, 19), (1, 0)}, "subsampling": (2, 2)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_is_openslides(tmp_path, kind):
    assert differing_pixels(write_slide(tmp_path / "a.tif", **KINDS[kind])) == 0


def test_a_big_tiff_too(tmp_path):
    path = write_slide(tmp_path / "a.tf8", subsampling=(2, 2))
    assert path.read_bytes()[2] == 43
    assert differing_pixels(path) == 0


def test_the_kinds_are_what_they_say(tmp_path):
    with tifffile.TiffFile(write_slide(tmp_path / "a.tif", **KINDS["RGB in JPEG"])) as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.RGB
    with tifffile.TiffFile(write_slide(tmp_path / "a.tif", **KINDS["tables shared"])) as file:
        assert file.pages.first.jpegtables
    with openslide.OpenSlide(write_slide(tmp_path / "a.tif", **KINDS["Aperio, JPEG 2000 YCbCr"])) as handle:
        assert handle.properties["openslide.vendor"] == "aperio"


def test_negative_places_and_places_beyond_are_background(tmp_path):
    _, reader = both(write_slide(tmp_path / "a.tif", subsampling=(2, 2)))
    region = reader.read(0, -10, -20, 50, 60)
    assert (region[:20] == BACKGROUND).all()
    assert (region[:, :10] == BACKGROUND).all()
    np.testing.assert_array_equal(region[20:, 10:], reader.read(0, 0, 0, 40, 40))
    first = reader.read(0, -10, 0, TILE + 10, TILE)  # what is inside is one whole tile
    np.testing.assert_array_equal(first[:, 10:], reader.read(0, 0, 0, TILE, TILE))
    assert (reader.read(0, WIDTH, 0, 9, 9) == BACKGROUND).all()
    assert (reader.read(0, -9, -9, 9, 9) == BACKGROUND).all()


# What is left to OpenSlide


def plain(path, **keywords):
    """One level written by tifffile itself."""
    pixels = stained_image(256, 256)
    tifffile.imwrite(path, pixels.astype(keywords.pop("dtype", np.uint8)), photometric="rgb", metadata=None, **keywords)
    return TileReader.open(path, [(256, 256)])


def test_other_compressions_depths_and_layouts_are_not_taken(tmp_path):
    path = tmp_path / "a.tif"
    assert plain(path, tile=(64, 64), compression="jpeg") is not None
    assert plain(path, rowsperstrip=64, compression="jpeg") is None
    assert plain(path, tile=(64, 64)) is None
    assert plain(path, tile=(64, 64), compression="zlib") is None
    assert plain(path, tile=(64, 64), compression="jpeg", dtype=np.uint16, compressionargs={"lossless": True}) is None
    grey = np.zeros((256, 256), np.uint8)
    tifffile.imwrite(path, grey, tile=(64, 64), compression="jpeg", metadata=None)
    assert TileReader.open(path, [(256, 256)]) is None


def test_levels_have_to_be_those_of_openslide(tmp_path):
    path = write_slide(tmp_path / "a.tif", subsampling=(2, 2))
    full, half, quarter = (552, 432), (276, 216), (138, 108)
    assert TileReader.open(path, [full, half, quarter]) is not None
    assert TileReader.open(path, [full, half, (137, 107)]) is None
    with tifffile.TiffWriter(path) as writer:
        for _ in range(2):  # which of the two would be the level?
            writer.write(stained_image(256, 256), tile=(64, 64), compression="jpeg", photometric="rgb", metadata=None)
    assert TileReader.open(path, [(256, 256)]) is None


def test_what_is_no_tiff_is_not_taken(tmp_path):
    for content in (b"", b"text", b"II*\0" + b"\xff" * 40):
        (tmp_path / "a.tif").write_bytes(content)
        assert TileReader.open(tmp_path / "a.tif", [(10, 10)]) is None
    assert TileReader.open(tmp_path / "absent.tif", [(10, 10)]) is None


def test_an_aperio_pyramid_with_missing_tiles_is_left_to_openslide(tmp_path):
    """It makes them, and those above them, from the finer level."""
    _, reader = both(write_slide(tmp_path / "a.svs", **KINDS["Aperio, RGB in JPEG"], missing={(0, 2)}))
    assert reader is None


def test_subsampled_jpeg_2000_is_an_error_and_so_left_to_openslide(tmp_path):
    def subsampled(tile):
        stream = bytearray(jpeg_2000(tile))
        stream[46:48] = stream[49:51] = b"\2\1"
        return bytes(stream)

    path = write_slide(tmp_path / "a.tif", jpeg_2000, "rgb", 33005, description=APERIO)
    with tifffile.TiffFile(path) as file:
        decode = tiles.fast_decoder(tiles.keyframe(file.pages.first))
    with pytest.raises(ValueError, match="subsampled"):
        decode(0, [subsampled(stained_image(TILE, TILE))])


# Threads and memory


@pytest.fixture
def counted(monkeypatch):
    """How often each tile's bytes were decoded."""
    calls, decode, lock = Counter(), imagecodecs.jpeg8_decode, threading.Lock()

    def counting(data, **keywords):
        with lock:
            calls[bytes(data)] += 1
        return decode(data, **keywords)

    monkeypatch.setattr(tiles.imagecodecs, "jpeg8_decode", counting)
    return calls


def test_a_tile_is_decoded_once_for_a_row_of_patches(tmp_path, counted):
    _, reader = both(write_slide(tmp_path / "a.tif", subsampling=(2, 2)))
    for y in range(0, HEIGHT, 70):
        for x in range(0, WIDTH, 70):
            reader.read(0, x, y, 70, 70)
    assert len(counted) == 20
    assert set(counted.values()) == {1}


def test_a_whole_tile_is_the_callers_own(tmp_path, counted):
    _, reader = both(write_slide(tmp_path / "a.tif", subsampling=(2, 2)))
    for _ in range(2):
        first = reader.read(0, TILE, 0, TILE, TILE)
        kept = first.copy()
        first[:] = 0
        np.testing.assert_array_equal(reader.read(0, TILE, 0, TILE, TILE), kept)
        reader.read(0, TILE + 1, 1, 5, 5)  # from now on it is kept
    assert sum(counted.values()) == 3


@pytest.mark.parametrize("limit", [0, 3 * TILE * TILE * 3, tiles.CACHE_BYTES])
def test_threads_that_hammer_a_small_cache_all_see_the_slide(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(tiles, "CACHE_BYTES", limit)
    _, reader = both(write_slide(tmp_path / "a.tif", subsampling=(2, 2)))
    slide = reader.read(0, 0, 0, WIDTH, HEIGHT)
    rng = np.random.default_rng(0)
    corners = np.repeat(
        rng.integers(0, (WIDTH - 90, HEIGHT - 90), size=(150, 2)), 2, axis=0
    )  # neighbours want the same

    def agrees(corner):
        x, y = corner.tolist()
        return np.array_equal(reader.read(0, x, y, 90, 90), slide[y : y + 90, x : x + 90])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(agrees, corners))
    assert reader.cache.nbytes <= max(limit, TILE * TILE * 3)
    assert len(reader.cache) * TILE * TILE * 3 == reader.cache.nbytes


def test_threads_that_want_one_tile_at_once_decode_it_once(tmp_path, counted):
    _, reader = both(write_slide(tmp_path / "a.tif", subsampling=(2, 2)))
    start = threading.Barrier(8)

    def read(_):
        start.wait(10)
        return reader.read(0, 1, 1, 50, 50)

    with ThreadPoolExecutor(8) as pool:
        regions = list(pool.map(read, range(8)))
    assert sum(counted.values()) == 1
    assert all(np.array_equal(region, regions[0]) for region in regions)


def test_without_pread_the_file_is_read_under_a_lock(tmp_path, monkeypatch):
    path = write_slide(tmp_path / "a.tif", subsampling=(2, 2))
    monkeypatch.delattr(tiles.os, "pread", raising=False)
    assert differing_pixels(path) == 0


def test_probes_lie_across_tiles_and_at_the_far_corner(tmp_path):
    _, reader = both(write_slide(tmp_path / "a.tif", subsampling=(2, 2)))
    probes = reader.probes(5)
    assert {level for level, _, _ in probes} == {0, 1, 2}
    assert probes == reader.probes(5) != reader.probes(6)
    half = tiles.PROBE // 2
    corners = [(x + half, y + half) for level, x, y in probes if level == 0]
    assert (WIDTH, HEIGHT) in corners
    assert any(x % TILE == 0 and y % TILE == 0 for x, y in corners)


# Damage


def damaged(path, change):
    """The same slide, its tile 6 of level 0 changed."""
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages.first.dataoffsets[6], file.pages.first.databytecounts[6]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = change(bytes(data[offset : offset + count]))
    path.write_bytes(data)
    return path


def overwrite(middle):
    return lambda tile: tile[: len(tile) // 2] + middle + tile[len(tile) // 2 + len(middle) :]


DAMAGES = {
    "nothing there": lambda tile: bytes(len(tile)),
    "no end": lambda tile: tile[: len(tile) // 2] + bytes(len(tile) - len(tile) // 2),
    "an early end": overwrite(b"\xff\xd9"),
    "set bits": overwrite(b"\xff" * 60),
    "garbage": overwrite(np.random.default_rng(0).bytes(1000)),
    "another tile size": lambda tile: jpeg(np.zeros((64, 64, 3), np.uint8)).ljust(len(tile), b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tile_is_named_and_the_others_are_read(tmp_path, damage):
    path = write_slide(tmp_path / "a.tif", subsampling=(2, 2))
    before = TileReader.open(path, [(WIDTH, HEIGHT)]).read(0, 0, 0, TILE, TILE)
    handle, reader = both(damaged(path, DAMAGES[damage]))
    for box in [(TILE, TILE, TILE, TILE), (TILE + 3, TILE + 3, 10, 10)] * 2:
        with pytest.raises(
            SlideError, match=r"a\.tif: level 0, tile 1 of row 1 cannot be read \(.+\); .*damaged"
        ) as error:
            reader.read(0, *box)
        assert "\n" not in str(error.value)
    assert reader.cache.nbytes == 0
    np.testing.assert_array_equal(reader.read(0, 0, 0, TILE, TILE), before)
    with pytest.raises(openslide.OpenSlideError):  # it does not take it either
        handle.read_region((TILE, TILE), 0, (TILE, TILE))


def test_threads_that_wait_for_a_damaged_tile_get_its_error(tmp_path):
    path = damaged(write_slide(tmp_path / "a.tif", subsampling=(2, 2)), DAMAGES["no end"])
    _, reader = both(path)

    def fails(_):
        with pytest.raises(SlideError, match="tile 1 of row 1"):
            reader.read(0, TILE + 1, TILE + 1, 9, 9)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fails, range(20), timeout=20))


def test_a_cut_file_is_a_slide_error(tmp_path):
    path = write_slide(tmp_path / "a.tif", subsampling=(2, 2))
    _, reader = both(path)
    with tifffile.TiffFile(path) as file:
        end = file.pages.first.dataoffsets[7]
    path.write_bytes(path.read_bytes()[: end - 100])
    with pytest.raises(SlideError, match=r"tile 1 of row 1 cannot be read \(the file ends 100 bytes before"):
        reader.read(0, TILE, TILE, 20, 20)


def test_reading_after_close_is_a_slide_error(tmp_path):
    _, reader = both(write_slide(tmp_path / "a.tif", subsampling=(2, 2)))
    reader.read(0, 3, 3, 5, 5)
    reader.close()
    reader.close()
    for box in [(3, 3, 5, 5), (0, 0, TILE, TILE)]:
        with pytest.raises(SlideError, match=r"a\.tif: closed"):
            reader.read(0, *box)


# Real slides


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("CMU-1-Small-Region.svs", True),
        ("OS-1-detail_pyramid.tiff", True),
        ("small.svs", True),
        ("boxes.tiff", False),  # deflate
        ("test3-DAPI-387.ndpi", False),
        ("ezwsi_multiframe_camelyon_challenge_image.dcm", False),
    ],
)
def test_real_slides_are_read_as_by_openslide(shared_data, name, taken):
    path = shared_data / "slides" / name
    with openslide.OpenSlide(path) as handle, open_slide(path) as slide:
        levels = slide.level_dimensions if taken else slide.level_dimensions[-1:]
        for level, (width, height) in enumerate(levels, len(slide.level_dimensions) - len(levels)):
            theirs = np.array(handle.read_region((0, 0), level, (width, height)))
            assert (theirs[..., 3] == 255).all()
            np.testing.assert_array_equal(slide.read_level(level, 0, 0, width, height), theirs[..., :3])
        assert (slide.tile_reader is not None) == taken
