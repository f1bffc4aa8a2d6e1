"""Which patches lie in annotated areas."""

import json

import numpy as np
import pytest

from utils.core.errors import SlideError
from utils.slides.annotated_patches import annotated_patches

EDGE = 100
GRID = np.stack(np.meshgrid(np.arange(10), np.arange(8)), axis=-1).reshape(-1, 2) * EDGE
WORDS = {"tumour": "tumour", "Stroma": "benign"}


def square(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]


def write(path, *areas, **more):
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"objectType": "annotation", **({"classification": {"name": name}} if name else {})},
        }
        for name, *rings in areas
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}))
    return path


def cells(mask: np.ndarray) -> set[tuple[int, int]]:
    return {tuple(corner // EDGE) for corner in GRID[mask].tolist() for corner in [np.array(corner)]}


def test_a_patch_is_of_a_class_that_covers_half_of_it(tmp_path):
    path = write(tmp_path / "a.geojson", ("Tumour", square(130, 0, 225, 160)))
    inside, is_ignored = annotated_patches(path, WORDS, GRID, EDGE, None)
    # 70% of column 1, all of column 2, 55% of column 3; all of row 0, 60% of row 1 (of the corner cells 42% and 33%).
    assert cells(inside["tumour"]) == {(1, 0), (2, 0), (3, 0), (2, 1)}
    assert not is_ignored.any()
    assert list(inside) == ["tumour"]


def test_holes_several_areas_and_classes_count(tmp_path):
    path = write(
        tmp_path / "a.geojson",
        ("tumour", square(0, 0, 500, 500), square(100, 100, 300, 300)),
        ("Tumour: Necrosis", square(700, 0, 50, 100)),
        ("tumour", square(750, 0, 50, 100)),
        ("stroma", square(600, 600, 100, 100)),
        ("Ignore*", square(0, 0, 100, 800)),
    )
    inside, is_ignored = annotated_patches(path, WORDS, GRID, EDGE, None)
    rim = {(x, y) for x in range(5) for y in range(5)} - {(x, y) for x in range(1, 4) for y in range(1, 4)}
    assert cells(inside["tumour"]) == rim | {(7, 0)}
    assert cells(inside["benign"]) == {(6, 6)}
    assert cells(is_ignored) == {(0, y) for y in range(8)}


def test_areas_of_other_classes_beside_areas_to_ignore_are_not_used(tmp_path):
    path = write(
        tmp_path / "a.geojson",
        ("Necrosis", [[0, 0], [100, 0], [50, 100], [0, 0]]),
        ("Ignore*", square(0, 0, 100, 800)),
        ("tumour", square(500, 0, 100, 100)),
    )
    inside, is_ignored = annotated_patches(path, WORDS, GRID, EDGE, None)
    assert {name: cells(mask) for name, mask in inside.items()} == {"tumour": {(5, 0)}}
    assert cells(is_ignored) == {(0, y) for y in range(8)}


def test_outlines_beyond_the_patches_and_patches_beyond_the_outlines(tmp_path):
    path = write(tmp_path / "a.geojson", ("tumour", square(-500, -500, 600, 600)))
    inside, _ = annotated_patches(path, WORDS, GRID, EDGE, None)
    assert cells(inside["tumour"]) == {(0, 0)}
    far = write(tmp_path / "b.geojson", ("tumour", square(5000, 5000, 10, 10)))
    assert not annotated_patches(far, WORDS, GRID, EDGE, None)[0]["tumour"].any()


def test_any_polygon_agrees_with_points_in_it(tmp_path):
    from matplotlib.path import Path as Polygon

    rng = np.random.default_rng(0)
    angles = np.sort(rng.random(9)) * 2 * np.pi
    corners = np.stack([500 + 380 * np.cos(angles), 400 + 330 * np.sin(angles)], axis=1)
    path = write(tmp_path / "a.geojson", ("tumour", [*corners.tolist(), corners[0].tolist()]))
    inside, _ = annotated_patches(path, WORDS, GRID, EDGE, None)
    steps = (np.arange(50) + 0.5) * EDGE / 50
    points = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    shares = np.array([Polygon(corners).contains_points(corner + points).mean() for corner in GRID])
    clear = np.abs(shares - 0.5) > 0.03
    assert (inside["tumour"] == (shares >= 0.5))[clear].all()
    assert clear.sum() > 70


def test_an_origin_that_the_file_records_is_added(tmp_path):
    path = write(tmp_path / "a.geojson", ("tumour", square(0, 0, 100, 100)), litemil={"offset": [200, 300]})
    assert cells(annotated_patches(path, WORDS, GRID, EDGE, None)[0]["tumour"]) == {(2, 3)}


def test_a_file_without_areas_annotates_nothing(tmp_path):
    inside, is_ignored = annotated_patches(write(tmp_path / "a.geojson"), WORDS, GRID, EDGE, None)
    assert inside == {}
    assert not is_ignored.any()


@pytest.mark.parametrize(("name", "listed"), [("Carcinoma", "Carcinoma"), ("", "no class")])
def test_areas_of_other_classes_alone_are_refused_with_the_flag_that_names_them(tmp_path, name, listed):
    path = write(tmp_path / "a.geojson", (name, square(0, 0, 100, 100)))
    with pytest.raises(SlideError, match=rf"class tumour, Stroma; there are {listed}; .*--annotation_class"):
        annotated_patches(path, WORDS, GRID, EDGE, None)
