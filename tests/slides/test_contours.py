"""A mask's outlines are rings that a geometry library takes, and give the mask back."""

import dataclasses
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
from utils.slides.open_slides import open_slide
from utils.slides.tissue import TISSUE_SETTINGS, TissueMask, detect_tissue


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


@pytest.mark.parametrize(("height", "width"), [(1000, 1200), pytest.param(3000, 4000, marks=pytest.mark.slow)])
def test_a_large_mask_takes_seconds(height, width):
    rng = np.random.default_rng(0)
    mask = ndimage.gaussian_filter(rng.standard_normal((height, width)), 4) > 0
    began = time.process_time()
    polygons = outlines(mask)
    assert time.process_time() - began < 20 * height * width / 12e6
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
        (json.dumps([feature([[["a", "b"]]])]), "not a list of rings"),
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


def test_the_digest_tells_which_tissue_it_is_and_not_how_it_was_told(tmp_path, place):
    path, found = tmp_path / "a.geojson", detect_tissue(place)
    write_contours(path, found, place)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content["features"][::-1], indent=7))
    assert read(path, place).digest == found.digest
    path.write_text(json.dumps(content["features"][1:]))
    assert read(path, place).digest != found.digest


def test_outlines_are_the_detectors_until_somebody_edits_them(tmp_path, place, monkeypatch):
    path = tmp_path / "a.geojson"
    write_contours(path, detect_tissue(place), place)
    assert ContourFile.read(path).is_as_detected(place)
    assert not ContourFile.read(path, ["Tumor"]).is_as_detected(place)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"features": content["features"][1:]}))
    assert not ContourFile.read(path).is_as_detected(place)
    path.write_text(json.dumps(content))
    monkeypatch.setattr(place, "mpp", 0.25)  # the detector would look at it by another thumbnail
    assert not ContourFile.read(path).is_as_detected(place)
    monkeypatch.undo()
    other = dataclasses.replace(TISSUE_SETTINGS, min_chroma=0.5)
    monkeypatch.setattr("utils.slides.contours.TISSUE_SETTINGS", other)
    assert not ContourFile.read(path).is_as_detected(place)


OF_IGNORE = [
    {"name": "Ignore*"},
    {"name": "Tumor: Ignore*"},
    {"names": ["Ignore*", "Fold"]},
    {"names": ["Fold", "ignore"]},
    {"name": "Fold", "parentClass": {"name": "Ignore*"}, "colorRGB": -1},
    {"name": "Exclude"},
    "Artefact: Pen",
    "Pen: artifact",
    {"name": "Necrosis*"},
    {"names": ["Tumor", "Immune cells*"]},
    "Necrosis*: Fold",
]


@pytest.mark.parametrize("classification", OF_IGNORE, ids=str)
def test_what_is_ignored_is_cut_out_however_qupath_says_it(slide, tmp_path, classification):
    hole = feature([HOLE])
    hole["properties"]["classification"] = classification
    inside = feature([SQUARE])
    inside["properties"]["childObjects"] = [hole]
    beside = feature([SQUARE]) | {"childObjects": [hole]}
    for content in ([feature([SQUARE]), hole], [inside], [beside]):
        (tmp_path / "a.geojson").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())  # with a byte order mark
        mask = read(tmp_path / "a.geojson", slide).mask
        assert mask[15, 15]
        assert not mask[25, 25]


def test_missing_cores_of_a_microarray_are_no_tissue(slide, tmp_path):
    core, missing = feature([SQUARE]), feature([[[900, 160], [1500, 160], [1500, 800], [900, 800]]])
    core["properties"] = {"objectType": "tmaCore", "isMissing": False}
    missing["properties"] = {"objectType": "tmaCore", "isMissing": True, "childObjects": [feature([HOLE])]}
    (tmp_path / "a.geojson").write_text(json.dumps([core, missing]))
    mask = read(tmp_path / "a.geojson", slide).mask
    assert mask[15, 15]
    assert not mask[30, 70]
    assert not mask[25, 25]  # drawn inside the missing core


def test_only_the_classes_that_are_wanted_are_tissue(slide, tmp_path):
    left = feature([SQUARE], name="Tumor: Invasive")
    right = feature([[[900, 160], [1500, 160], [1500, 800], [900, 800]]], name="Stroma")
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([left, right, feature([HOLE], name="Ignore*")]))
    for classes in (["tumor"], ["Tumor: Invasive"], ["Tumor:Invasive"], ["invasive:TUMOR "], ["Tumor", "Necrosis"]):
        mask = ContourFile.read(path, classes).mask(slide).mask
        assert mask[15, 15]
        assert not mask[25, 25]
        assert not mask[30, 70]
    refused = "no area of --tissue_classes Necrosis in it; there are Ignore\\*, Stroma, Tumor: Invasive"
    with pytest.raises(SlideError, match=refused):
        ContourFile.read(path, ["Necrosis"]).mask(slide)


def core_of(square, *inside, **properties):
    about = {"objectType": "tmaCore", "isMissing": False, "childObjects": list(inside)} | properties
    return feature(square) | {"properties": about}


LEFT_OF = [[[160, 160], [300, 160], [300, 800], [160, 800]]]


@pytest.mark.parametrize(
    "content",
    [
        [core_of([SQUARE], feature(LEFT_OF))],
        [core_of([SQUARE], feature(LEFT_OF, name="Tumor"), feature([HOLE], name="Ignore*"))],
        [core_of([SQUARE], objectType="TMA core"), feature(LEFT_OF)],
        [core_of([SQUARE], isMissing="false"), feature(LEFT_OF)],
        [core_of([SQUARE], childObjects={"type": "FeatureCollection", "features": [feature(LEFT_OF)]})],
    ],
)
def test_what_is_drawn_in_a_core_is_its_tissue(slide, tmp_path, content):
    (tmp_path / "a.geojson").write_text(json.dumps(content))
    mask = read(tmp_path / "a.geojson", slide).mask
    assert mask[30, 15]
    assert not mask[30, 40]


@pytest.mark.parametrize("inside", [[], [feature([HOLE], name="Ignore*")], [core_of([HOLE], objectType="cell")]])
def test_a_core_without_drawn_tissue_is_tissue(slide, tmp_path, inside):
    (tmp_path / "a.geojson").write_text(json.dumps([core_of([SQUARE], *inside)]))
    mask = read(tmp_path / "a.geojson", slide).mask
    assert mask[30, 15]
    assert mask[30, 40]


@pytest.mark.parametrize("mark", [{"isMissing": "true"}, {"isMissing": "True"}, {"metadata": {"isMissing": "true"}}])
def test_a_core_is_missing_in_every_spelling(slide, tmp_path, mark):
    missing = feature([SQUARE])
    missing["properties"] = {"objectType": "tmaCore"} | mark
    beside = feature([[[900, 160], [1500, 160], [1500, 800], [900, 800]]])
    (tmp_path / "a.geojson").write_text(json.dumps([missing, beside]))
    mask = read(tmp_path / "a.geojson", slide).mask
    assert not mask[30, 15]
    assert mask[30, 70]


def test_a_region_of_qupath_is_neither_tissue_nor_cut_out(slide, tmp_path):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([feature([SQUARE], name="Region*"), feature(LEFT_OF, name="Tumor")]))
    mask = read(path, slide).mask
    assert mask[30, 15]
    assert not mask[30, 40]
    mask = ContourFile.read(path, ["Region*"]).mask(slide).mask
    assert mask[30, 15]
    assert mask[30, 40]


@pytest.mark.parametrize("name", ["Ignore*", "Region*", "Necrosis*", "Tumor: Ignore*"])
def test_a_file_without_tissue_says_what_is_in_it(slide, tmp_path, name):
    (tmp_path / "a.geojson").write_text(json.dumps([feature([SQUARE], name=name)]))
    with pytest.raises(SlideError, match="none of its areas is tissue, by their classes") as refused:
        read(tmp_path / "a.geojson", slide)
    assert f"({name})" in str(refused.value)


def square_at(x, y, side=200):
    return feature([[[x, y], [x + side, y], [x + side, y + side], [x, y + side]]])


BOUNDS = (900, 700, 600, 500)  # of a slide of 1600 x 1230 px
OUTSIDE = {
    "in neither": [square_at(620, 520, 60)],
    "beside the slide": [square_at(-1500, -3000)],
    "one of two": [square_at(0, 0), square_at(620, 20, 60)],
    "at its edge": [square_at(599, 499)],
}


@pytest.mark.parametrize("content", OUTSIDE.values(), ids=OUTSIDE)
def test_outlines_where_nothing_was_scanned_are_refused(slide, tmp_path, monkeypatch, content):
    monkeypatch.setattr(slide, "bounds", BOUNDS)
    (tmp_path / "a.geojson").write_text(json.dumps(content))
    with pytest.raises(SlideError, match=r"a\.geojson: a polygon at \(.*lies outside the scanned area of .*stained"):
        read(tmp_path / "a.geojson", slide)


@pytest.mark.parametrize("ours", [[square_at(0, 0), square_at(920, 720)], [square_at(1200, 900), square_at(300, 200)]])
def test_outlines_that_count_from_two_corners_are_refused(slide, tmp_path, monkeypatch, ours):
    monkeypatch.setattr(slide, "bounds", BOUNDS)
    for content in (ours, ours[::-1]):
        (tmp_path / "a.geojson").write_text(json.dumps(content))
        with pytest.raises(SlideError, match=r"a\.geojson: its polygons contradict each other"):
            read(tmp_path / "a.geojson", slide)


def test_one_corner_holds_for_all_outlines_of_a_file(slide, tmp_path, monkeypatch):
    """A polygon that would lie in the scanned area from either corner goes with those that do not."""
    monkeypatch.setattr(slide, "bounds", (200, 100, 1000, 1000))
    (tmp_path / "a.geojson").write_text(json.dumps([square_at(1100, 1000, 90), square_at(400, 400)]))
    mask = read(tmp_path / "a.geojson", slide).mask
    assert mask[round(500 / 16), round(500 / 16)]
    (tmp_path / "a.geojson").write_text(json.dumps([square_at(0, 0, 90), square_at(400, 400)]))
    mask = read(tmp_path / "a.geojson", slide).mask
    assert mask[round(600 / 16), round(700 / 16)]
    assert not mask[round(460 / 16), round(500 / 16)]


def test_an_outline_of_the_whole_slide_holds_what_was_scanned(slide, tmp_path, monkeypatch):
    monkeypatch.setattr(slide, "bounds", (1500, 1100, 60, 60))
    whole = feature([[[0, 0], [1600, 0], [1600, 1230], [0, 1230]]])
    (tmp_path / "a.geojson").write_text(json.dumps([whole, square_at(1500, 1100, 40)]))
    assert read(tmp_path / "a.geojson", slide).mask.all()


def test_what_is_cut_out_where_nothing_was_scanned_is_said(slide, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(slide, "bounds", BOUNDS)
    for x, y, where in ((620, 520, "outside the scanned area of"), (9000, 520, "beside")):
        beside = square_at(x, y, 60)
        beside["properties"]["classification"] = {"name": "Ignore*"}
        (tmp_path / "a.geojson").write_text(json.dumps([square_at(100, 100), beside]))
        with caplog.at_level("WARNING"):
            assert read(tmp_path / "a.geojson", slide).mask.any()
        assert f"a.geojson: an area to cut out, at ({x}, {y}), lies {where}" in caplog.text


def test_outlines_of_a_file_of_ours_are_refused_where_nothing_was_scanned(tmp_path, place):
    place.bounds = (320, 200, 200, 200)
    write_contours(tmp_path / "a.geojson", detect_tissue(place), place)
    content = json.loads((tmp_path / "a.geojson").read_text())
    content["features"] = [square_at(-300, -150, 40)]
    (tmp_path / "a.geojson").write_text(json.dumps(content))
    with pytest.raises(SlideError, match="outside the scanned area"):
        read(tmp_path / "a.geojson", place)


@pytest.mark.parametrize(("bounds", "corner"), [((300, 200, 1200, 900), 0), ((300, 200, 1200, 900), 1)])
def test_pixels_of_the_whole_slide_are_told_by_where_they_lie(slide, tmp_path, monkeypatch, caplog, bounds, corner):
    monkeypatch.setattr(slide, "bounds", bounds)
    x, y = bounds[:2] if corner else (0, 0)  # absolute, or counted from the scanned area
    square = [[x + 10, y + 10], [x + 1190, y + 10], [x + 1190, y + 890], [x + 10, y + 890]]
    (tmp_path / "a.geojson").write_text(json.dumps([feature([square])]))
    with caplog.at_level("INFO"):
        mask = read(tmp_path / "a.geojson", slide).mask
    assert ("taken as px of the whole slide" in caplog.text) == bool(corner)
    expected = np.zeros_like(mask)
    expected[13:68, 19:93] = True
    assert (mask != expected).mean() < 0.02


CASES = {  # of a slide of 1024 x 768 px: the share of it that is tissue
    "plain": 480, "bom": 480, "xyz": None, "nan_measure": 480, "null_geometry": 480, "point": 480, "necrosis": 480,
    "properties_missing": 480, "unlocked_props_null": 480,
    "ignore_name": 420, "ignore_old_colorRGB": 420, "ignore_derived_names": 420, "artefact_derived_string": 420,
    "parentClass_old": 420, "child_ignore": 420, "tma_missing": 90,
}  # fmt: skip


@pytest.mark.parametrize(("name", "thousands"), CASES.items())
def test_the_cases(shared_cases, name, thousands):
    with open_slide(shared_cases / "slides" / "slide.svs") as slide:
        mask = read(shared_cases / "slides" / "geojson" / f"{name}.geojson", slide)
    if thousands:
        assert mask.fraction * 1024 * 768 == pytest.approx(1000 * thousands, rel=0.05)


@pytest.mark.parametrize("folder", ["mirax_relative", "mirax_absolute"])
def test_the_cases_of_a_frame(shared_cases, folder):
    with open_slide(shared_cases / "slides" / "mirax" / "one.mrxs") as slide:
        mask = read(shared_cases / "slides" / folder / "one.geojson", slide).mask
        rows, columns = np.nonzero(mask)
        scale = slide.width / mask.shape[1]
    assert columns.min() * scale == pytest.approx(3428, abs=20)
    assert rows.min() * scale == pytest.approx(7524, abs=20)


def test_the_recorded_offset_counts_and_not_the_slides_own(tmp_path, place):
    found = detect_tissue(place)
    place.bounds = (64, 32, 400, 300)
    write_contours(tmp_path / "a.geojson", found, place)
    place.bounds = None
    np.testing.assert_array_equal(read(tmp_path / "a.geojson", place).mask, found.mask)
