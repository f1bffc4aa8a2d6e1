"""Which image of a TIFF is the slide: by structure, by names, with pages missing, or spread over files."""

import struct

import numpy as np
import pytest
import tifffile

from tests.tiffs import HALF, LABEL, PIXELS, PLANES, STRIPS, TILE, shown, write
from utils.core.errors import SlideError
from utils.slides.open_slides import open_slide

SMALL_TILE = {"tile": (64, 64)}
THUMBNAIL = np.ascontiguousarray(PIXELS[::4, ::4])
REDUCED = {"subfiletype": 1}


def test_an_untiled_slide_wins_over_its_tiled_thumbnail(tmp_path):
    path = write(tmp_path / "a.tif", (THUMBNAIL, SMALL_TILE), (PIXELS, STRIPS))
    np.testing.assert_array_equal(shown(path)[0], PIXELS)


LABEL_BEFORE_STRIPS = {
    "tiled": [(LABEL, SMALL_TILE)],
    "with levels": [(LABEL, SMALL_TILE | {"subifds": 1}), (LABEL[::2, ::2], SMALL_TILE | REDUCED)],
}


@pytest.mark.parametrize("label", LABEL_BEFORE_STRIPS.values(), ids=LABEL_BEFORE_STRIPS)
def test_a_tiled_label_and_a_larger_untiled_slide_are_refused(tmp_path, label):
    path = write(tmp_path / "a.tif", *label, (PIXELS, STRIPS))
    with pytest.raises(
        SlideError,
        match=r"is the slide: 1 \(520 x 400, not tiled, axes YXS\), 0 \(192 x 96, tiled",
    ) as caught:
        open_slide(path)
    assert str(caught.value).count("192 x 96") == 1


def test_a_smaller_untiled_photograph_is_no_rival_of_a_tiled_slide(tmp_path):
    path = write(tmp_path / "a.tif", (PIXELS[:300, :400], {}), (PIXELS, TILE))
    np.testing.assert_array_equal(shown(path)[0], PIXELS)


# Missing pages


def with_next_directory(path, page, following):
    """The same file, where the directory after a page begins at `following`."""
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offset = file.pages[page].offset
    (tags,) = struct.unpack_from("<H", content, offset)
    struct.pack_into("<I", content, offset + 2 + 12 * tags, following)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("following", [10**9, 0xFFFFFFFF, 16])
@pytest.mark.parametrize(
    "first", [(LABEL, {}), (THUMBNAIL, {}), (LABEL, SMALL_TILE)], ids=["label", "thumbnail", "tiled"]
)
def test_a_chain_of_pages_that_breaks_off_is_refused(tmp_path, first, following):
    path = with_next_directory(write(tmp_path / "a.tif", first, (PIXELS, TILE)), 0, following)
    with pytest.raises(SlideError, match=r"incomplete|copy it again"):
        open_slide(path)


@pytest.mark.parametrize("count", [2, 130])
def test_a_chain_that_goes_round_is_refused(tmp_path, count):
    path = write(tmp_path / "a.tif", *[(LABEL[:8, :8], {})] * count)
    with tifffile.TiffFile(path) as file:
        last_but_one = file.pages[count - 2].offset
    with pytest.raises(SlideError, match=rf"breaks off after {count}; .*incomplete"):
        open_slide(with_next_directory(path, count - 1, last_but_one))


def test_a_subifd_beyond_the_end_is_refused(tmp_path):
    path = write(tmp_path / "a.tif", (LABEL, {"subifds": 1}), (PIXELS, TILE))
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[330].overwrite([10**9])
    with pytest.raises(SlideError, match=r"SubIFD of page 0 is missing.*incomplete"):
        open_slide(path)


# Names

NAMED = {
    "tiled, label-free": [(PIXELS, TILE | {"description": "Label-free stain, H&E"})],
    "its levels too": [
        (PIXELS, TILE | {"description": "Label-free stain, H&E"}),
        (HALF, TILE | REDUCED),
    ],
    "strips, overview scan": [(PIXELS, STRIPS | {"description": "overview scan of case 7"})],
    "much larger than an unnamed tiled page": [
        (THUMBNAIL[:90], SMALL_TILE),
        (PIXELS, TILE | {"description": "macro dissection 12"}),
    ],
    "beside a plain label": [
        (LABEL, {"description": "label"}),
        (PIXELS, TILE | {"description": "macro dissection 12"}),
    ],
    "a lone tiled image": [(PIXELS, TILE | {"description": "macro"})],
    "after a LabelImage": [(LABEL, {"description": "LabelImage"}), (PIXELS, STRIPS)],
    "after a label_image": [(LABEL, {"description": "label_image"}), (PIXELS, STRIPS)],
}


@pytest.mark.parametrize("images", NAMED.values(), ids=NAMED)
def test_a_word_does_not_outvote_structure(tmp_path, images):
    np.testing.assert_array_equal(shown(write(tmp_path / "a.tif", *images))[0], PIXELS)


def test_a_word_in_the_name_of_the_only_ome_image_is_no_label(tmp_path):
    about = {"axes": "YXS", "Name": "macro dissection 12", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    pixels, _, mpp = shown(write(tmp_path / "a.ome.tif", (PIXELS, TILE | {"metadata": about})))
    np.testing.assert_array_equal(pixels, PIXELS)
    assert mpp == 0.5


@pytest.mark.parametrize(
    "description",
    [
        "label 520x400",
        "Aperio Image Library v11.2.1\r\nmacro 520x400",
        "Label_Image",
        "a.svs [thumbnail]",
        "label image #2",
    ],
)
def test_a_lone_page_that_says_it_is_a_label_is_refused(tmp_path, description):
    path = write(tmp_path / "a.tif", (PIXELS, {"description": description}))
    with pytest.raises(SlideError, match="holds no slide, but 0"):
        open_slide(path)


def test_a_small_untiled_page_does_not_win_over_a_large_image_by_a_name(tmp_path):
    for keywords in (TILE | {"description": "overview", "subifds": 1}, STRIPS | {"description": "label-free stain"}):
        levels = [(HALF, TILE | REDUCED)] if "subifds" in keywords else []
        path = write(tmp_path / "a.tif", (THUMBNAIL[:90], {}), (PIXELS, keywords), *levels)
        with pytest.raises(SlideError, match="cannot tell"):
            open_slide(path)


# Several files

OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{uuid}">'
    "{images}</OME>"
)


def ome_image(number, pixels, file, colours=3):
    """An image of OME-XML, (0.25 + number / 10) um/px, that lies in the files named."""
    height, width = pixels.shape[:2]
    files = file if isinstance(file, list) else [file]
    data = "".join(
        f'<TiffData FirstC="{index}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
        for index, name in enumerate(files)
    )
    channels = '<Channel SamplesPerPixel="3"/>' if len(files) == 1 else '<Channel SamplesPerPixel="1"/>' * colours
    mpp = 0.25 + number / 10
    return (
        f'<Image ID="Image:{number}" Name="scene {number}"><Pixels ID="P:{number}" DimensionOrder="XYCZT" Type="uint8" '
        f'SizeX="{width}" SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}">'
        f"{channels}{data}</Pixels></Image>"
    )


@pytest.mark.parametrize("layout", [TILE, STRIPS], ids=["tiled", "strips"])
@pytest.mark.parametrize("kept", [["a.ome.tif", "b.ome.tif"], ["b.ome.tif"], ["a.ome.tif"]], ids=" ".join)
def test_each_file_of_a_set_gives_its_own_image_and_um(tmp_path, layout, kept):
    scenes = {"a.ome.tif": PIXELS[:200, :240], "b.ome.tif": PIXELS}
    images = "".join(ome_image(number, pixels, name) for number, (name, pixels) in enumerate(scenes.items()))
    for name in kept:
        description = OME.format(uuid=name, images=images)
        write(tmp_path / name, (scenes[name], layout | {"description": description}))
    for name in kept:
        pixels, _, mpp = shown(tmp_path / name)
        np.testing.assert_array_equal(pixels, scenes[name])
        assert mpp == pytest.approx(0.25 if name == "a.ome.tif" else 0.35)


@pytest.mark.parametrize("count", [3, 1], ids=["all there", "one there"])
def test_an_image_spread_over_files_is_refused(tmp_path, count):
    names = [f"c{number}.ome.tif" for number in range(3)]
    for name, plane in list(zip(names, PLANES, strict=True))[:count]:
        description = OME.format(uuid=name, images=ome_image(0, PIXELS, names))
        write(tmp_path / name, (plane, TILE | {"photometric": "minisblack", "description": description}))
    with pytest.raises(SlideError, match=r"parts of image 0 .* are in other files.*save it as one file"):
        open_slide(tmp_path / "c0.ome.tif")
