"""A mask's outlines are rings that a geometry library takes, and give the mask back."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from tests.synthetic import stained_image, write_pyramid
from utils.core.errors import SlideError
from utils.slides.contours import ContourFile, fill, outlines, write_contours
from utils.slides.tissue import TissueMask, detect_tissue
from utils.slides.wsi import open_slide


def read(path, slide):
    return ContourFile.read(path).mask(slide)


def area(ring):
    x, y = ring.T
    return np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2


def refilled(polygons, shape):
    mask = np.zeros(shape, dtype=bool)
    for polygon in polygons:
        fill(mask, polygon)
    return mask


@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_outlines_give_the_mask_back(mask):
    polygons = outlines(mask)
    np.testing.assert_array_equal(refilled(polygons, mask.shape), mask)
    pieces = ndimage.label(mask)[1]
    assert len(polygons) == pieces
    for outer, *holes in polygons:
        assert area(outer) > 0
        assert all(area(hole) < 0 for hole in holes)
        for ring in (outer, *holes):
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring), "a ring touches itself"
            sides = np.roll(ring, -1, axis=0) - ring
            assert ((sides == 0).sum(axis=1) == 1).all(), "a side is neither level nor upright"
            assert (np.abs(np.sign(sides) - np.sign(np.roll(sides, -1, axis=0))).sum(axis=1) == 2).all()
    assert sum(area(ring) for polygon in polygons for ring in polygon) == mask.sum()


def test_holes_stay_with_their_piece():
    mask = np.zeros((12, 30), dtype=bool)
    mask[1:11, 1:11] = mask[1:11, 15:28] = True
    mask[3:5, 3:5] = mask[6:9, 6:9] = False
    mask[4:8, 18:24] = False
    mask[5:7, 20:22] = True  # an island in a hole is a piece of its own
    polygons = outlines(mask)
    assert sorted(len(polygon) for polygon in polygons) == [1, 2, 3]


def test_a_large_mask_takes_seconds():
    rng = np.random.default_rng(0)
    mask = ndimage.gaussian_filter(rng.standard_normal((3000, 4000)), 4) > 0
    began = time.perf_counter()
    polygons = outlines(mask)
    assert time.perf_counter() - began < 20
    np.testing.assert_array_equal(refilled(polygons[:200], mask.shape) & ~mask, False)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("contours") / "stained.tiff"
    with open_slide(write_pyramid(path, stained_image(1600, 1230, seed=1), mpp=0.5)) as opened:
        yield opened


def test_round_trip(slide, tmp_path):
    tissue = detect_tissue(slide)
    assert 0 < tissue.mask.sum() < tissue.mask.size
    write_contours(tmp_path / "a.geojson", tissue, slide)
    found = read(tmp_path / "a.geojson", slide)
    np.testing.assert_array_equal(found.mask, tissue.mask)
    assert found.mpp == pytest.approx(tissue.mpp, rel=0.02)
    first = (tmp_path / "a.geojson").read_bytes()
    write_contours(tmp_path / "a.geojson", tissue, slide)
    assert (tmp_path / "a.geojson").read_bytes() == first


def test_what_is_written_is_geojson_as_qupath_has_it(slide, tmp_path):
    write_contours(tmp_path / "a.geojson", detect_tissue(slide), slide)
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    for feature in content["features"]:
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"]["name"] == "Tissue"
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
    ends = np.concatenate([np.array(ring) for f in content["features"] for ring in f["geometry"]["coordinates"]])
    assert (ends.min(axis=0) >= 0).all()
    assert (ends.max(axis=0) <= [1600, 1230]).all()


@pytest.mark.parametrize("records_offset", [True, False])
def test_qupath_counts_from_the_bounds(slide, tmp_path, monkeypatch, records_offset):
    tissue = detect_tissue(slide)
    write_contours(tmp_path / "own.geojson", tissue, slide)
    monkeypatch.setattr(slide, "bounds", (200, 100, 1000, 1000))
    write_contours(tmp_path / "shifted.geojson", tissue, slide)
    own, shifted = (json.loads((tmp_path / f"{name}.geojson").read_text()) for name in ("own", "shifted"))
    corners = [np.array(content["features"][0]["geometry"]["coordinates"][0]) for content in (own, shifted)]
    np.testing.assert_allclose(corners[0] - corners[1], np.broadcast_to([200, 100], corners[0].shape))
    assert shifted["litemil"]["offset"] == [200, 100]
    if not records_offset:  # as QuPath writes it again
        (tmp_path / "shifted.geojson").write_text(json.dumps(shifted["features"]))
    np.testing.assert_array_equal(read(tmp_path / "shifted.geojson", slide).mask, tissue.mask)


SQUARE = [[160, 160], [800, 160], [800, 800], [160, 800], [160, 160]]
HOLE = [[320, 320], [480, 320], [480, 480], [320, 480], [320, 320]]


def feature(coordinates, kind="Polygon", name=None):
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


@pytest.mark.parametrize(
    "content",
    [
        [feature([SQUARE, HOLE])],
        {"type": "FeatureCollection", "features": [feature([[SQUARE, HOLE]], "MultiPolygon", "Tumor")]},
        feature([SQUARE, HOLE]),
        {"type": "Polygon", "coordinates": [SQUARE, HOLE]},
        [feature([SQUARE], name="Tissue"), feature([HOLE], name="Ignore*")],
        [feature([HOLE], name="Artefact"), feature([SQUARE])],
        {"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": [
            {"type": "Polygon", "coordinates": [SQUARE, HOLE]}, {"type": "Point", "coordinates": [3, 4]}]}},
    ],
)  # fmt: skip
def test_what_people_draw_is_read(slide, tmp_path, content):
    (tmp_path / "a.geojson").write_text(json.dumps(content))
    found = read(tmp_path / "a.geojson", slide)
    scale = 1600 / found.mask.shape[1]
    assert scale == pytest.approx(16, rel=0.01)
    expected = np.zeros(found.mask.shape, dtype=bool)
    expected[10:50, 10:50] = True
    expected[20:30, 20:30] = False
    assert (found.mask != expected).mean() < 0.01


def test_areas_that_overlap_are_one(slide, tmp_path):
    (tmp_path / "a.geojson").write_text(json.dumps([feature([SQUARE]), feature([HOLE])]))
    found = read(tmp_path / "a.geojson", slide)
    assert found.mask[25, 25]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "no polygon in it"),
        ("[1]", "not GeoJSON"),
        ('{"type": "FeatureCollection"}', "not GeoJSON"),
        (json.dumps([feature([1, 2], "Point")]), "no polygon in it"),
        (json.dumps([feature([[["a", "b"]]])]), "no list of rings"),
        (json.dumps([feature([[[9000, 9000], [9100, 9000], [9100, 9100]]])]), "lies beside"),
        (json.dumps([{"type": "Feature", "geometry": {"type": "Polygon"}}]), "without three finite corners"),
        (json.dumps([{"type": "Feature", "geometry": {"type": "MultiPolygon"}}]), "no polygon in it"),
        (json.dumps([feature([[[1, 2], [3, 4]]])]), "without three finite corners"),
        (
            '[{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, NaN], [1, 1], [2, 0]]]}}]',
            "finite",
        ),
    ],
)
def test_what_is_no_contour_is_refused(slide, tmp_path, content, message):
    path = tmp_path / "bad.geojson"
    path.write_text(content)
    with pytest.raises(SlideError, match=rf"bad.geojson: .*{message}"):
        read(path, slide)


def test_a_mask_without_tissue_has_no_outline(slide, tmp_path):
    assert outlines(np.zeros((5, 5), dtype=bool)) == []
    write_contours(tmp_path / "a.geojson", TissueMask(np.zeros((5, 5), dtype=bool), None), slide)
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []


@pytest.fixture
def place(tmp_path):
    with open_slide(write_pyramid(tmp_path / "place.tiff", stained_image(640, 480, seed=1), mpp=0.5)) as slide:
        yield slide


def test_what_somebody_edited_is_not_written_over(tmp_path, place, caplog):
    path, found = tmp_path / "a.geojson", detect_tissue(place)
    write_contours(path, found, place)
    written = path.read_bytes()
    write_contours(path, TissueMask(~found.mask, found.mpp), place)
    assert path.read_bytes() != written  # ours: replaced
    write_contours(path, found, place)
    edited = json.loads(written)
    edited["features"] = edited["features"][:-1]
    for content in (edited, {"type": "FeatureCollection", "features": edited["features"]}):
        path.write_text(json.dumps(content))
        before = path.read_bytes()
        with caplog.at_level("WARNING"):
            write_contours(path, found, place)
        assert path.read_bytes() == before
        assert "a.geojson: was edited since it was written, and is kept" in caplog.text
        caplog.clear()


def test_a_file_of_a_slide_of_another_size_is_refused(tmp_path, place):
    write_contours(tmp_path / "a.geojson", detect_tissue(place), place)
    other = write_pyramid(tmp_path / "b.tiff", stained_image(640, 500, seed=1), mpp=0.5)
    refused = pytest.raises(SlideError, match=r"a\.geojson: of a slide of 640 x 480 px, but .*b\.tiff has 640 x 500")
    with open_slide(other) as slide, refused:
        read(tmp_path / "a.geojson", slide)


def test_the_digest_is_that_of_what_was_read(tmp_path, place):
    path = tmp_path / "a.geojson"
    write_contours(path, detect_tissue(place), place)
    drawn = ContourFile.read(path)
    before = drawn.digest
    path.write_text("{}")
    assert drawn.digest == before != ContourFile.read(path).digest


def test_the_recorded_offset_counts_and_not_the_slides_own(tmp_path, place):
    found = detect_tissue(place)
    place.bounds = (64, 32, 400, 300)
    write_contours(tmp_path / "a.geojson", found, place)
    place.bounds = None
    np.testing.assert_array_equal(read(tmp_path / "a.geojson", place).mask, found.mask)
