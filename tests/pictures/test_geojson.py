"""Attention as GeoJSON: RFC 7946's structure, QuPath's frame, and the numbers that were given."""

import json
import zipfile

import numpy as np
import pytest

from tests.synthetic import place_image, write_pyramid
from utils.core.geometry import patch_grid
from utils.pictures.attention_map import AttentionMap
from utils.pictures.geojson import write_attention
from utils.slides.open_slides import open_slide

COORDS = patch_grid(300, 200, 50, 50)


@pytest.fixture
def slide(tmp_path):
    with open_slide(write_pyramid(tmp_path / "place.tiff", place_image(300, 200), mpp=0.5)) as opened:
        yield opened


@pytest.fixture
def attention():
    weights = np.arange(1, len(COORDS) + 1, dtype=float)
    return AttentionMap(COORDS, weights / weights.sum(), 50)


@pytest.mark.parametrize("bounds", [None, (100, 40, 200, 160)])
def test_tiles_lie_in_qupaths_frame(tmp_path, slide, attention, bounds):
    slide.bounds = bounds
    write_attention(tmp_path / "a.geojson", attention, slide, "viridis", {"prediction": "a (90%)"})
    content = json.loads((tmp_path / "a.geojson").read_text())
    offset = list(bounds[:2]) if bounds else [0, 0]
    assert content["type"] == "FeatureCollection"
    assert content["litemil"] == {
        "slide": "place", "offset": offset, "width": 300, "height": 200, "prediction": "a (90%)",
    }  # fmt: skip
    assert len(content["features"]) == len({feature["id"] for feature in content["features"]}) == len(COORDS)
    for corner, feature in zip(COORDS, content["features"], strict=True):
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert len(ring) == 5
        ring = np.array(ring) + offset
        np.testing.assert_array_equal(ring.min(axis=0), corner)
        np.testing.assert_array_equal(ring.max(axis=0), corner + 50)
        (x0, y0), (x1, y1), (x2, y2) = ring[:3]
        assert (x1 - x0) * (y2 - y1) - (y1 - y0) * (
            x2 - x1
        ) > 0  # counterclockwise, as the standard asks of outer rings
        assert feature["properties"]["objectType"] == "tile"


def test_measurements_and_classes(tmp_path, slide, attention):
    write_attention(tmp_path / "a.geojson", attention, slide, "viridis", {})
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    measured = [feature["properties"]["measurements"] for feature in features]
    np.testing.assert_allclose([values["Attention"] for values in measured], attention.attention)
    np.testing.assert_allclose(
        [values["Attention percentile"] for values in measured], attention.percentiles, atol=1e-3
    )
    assert [values["Attention rank"] for values in measured] == attention.ranks.tolist()
    classes = [feature["properties"]["classification"] for feature in features]
    assert classes[0] == {"name": "Attention 0-20%", "color": [68, 1, 84]}
    assert classes[-1] == {"name": "Attention 80-100%", "color": [253, 231, 37]}
    for found, percentile in zip(classes, attention.percentiles, strict=True):
        low, high = found["name"].split()[1].rstrip("%").split("-")
        assert int(low) <= percentile <= int(high)
    assert len({found["name"] for found in classes}) == 5


def test_the_same_map_gives_the_same_bytes(tmp_path, slide, attention):
    for name in ("a", "b"):
        write_attention(tmp_path / f"{name}.geojson", attention, slide, "magma", {})
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()


def test_ids_and_classes_tell_models_apart(tmp_path, slide, attention):
    found = {}
    for model in ("LiteMIL 1a2b3c", "LiteMIL 4d5e6f"):
        write_attention(tmp_path / "a.geojson", attention, slide, "magma", {}, model=model)
        features = json.loads((tmp_path / "a.geojson").read_text())["features"]
        found[model] = {feature["id"] for feature in features}
        # QuPath takes what stands before the colon as the class that these are derived from.
        assert features[-1]["properties"]["classification"]["name"] == f"{model}: attention 80-100%"
    assert not set.intersection(*found.values())


def test_a_zipped_file_holds_the_same_and_is_the_same_whenever_it_is_written(tmp_path, slide, attention, monkeypatch):
    write_attention(tmp_path / "a.geojson", attention, slide, "magma", {})
    write_attention(tmp_path / "a.geojson.zip", attention, slide, "magma", {})
    with zipfile.ZipFile(tmp_path / "a.geojson.zip") as archive:
        assert archive.namelist() == ["a.geojson"]
        assert archive.read("a.geojson") == (tmp_path / "a.geojson").read_bytes()
    before = (tmp_path / "a.geojson.zip").read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_attention(tmp_path / "a.geojson.zip", attention, slide, "magma", {})
    assert (tmp_path / "a.geojson.zip").read_bytes() == before
