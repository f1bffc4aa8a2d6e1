"""Patches that weigh the same have no order, and weights that are no attention are not called so."""

import json

import numpy as np
import pandas as pd
import pytest

from tests.pictures.test_visualizer import RECORD
from tests.synthetic import place_image, write_pyramid
from utils.core.geometry import patch_grid
from utils.pictures.attention_map import AttentionMap, models_of, weight_name
from utils.pictures.heatmap import heatmap_figure
from utils.pictures.overlay import GREY, MapStyle, Overlay, Picture
from utils.pictures.top_patches import attention_groups, patch_records
from utils.pictures.visualizer import AttentionVisualizer

SIZE = 500, 400
COORDS = patch_grid(*SIZE, 50, 50)  # 80 patches
PICTURE = Picture(np.full((40, 50, 3), 200, np.uint8), *SIZE, 0.5)
SHARE = "share of winning features"


def sparse(count=6, name=SHARE):
    """As maxPool's: a few patches supply all of the embedding, the others nothing."""
    attention = np.zeros(len(COORDS))
    attention[10 : 10 + count] = np.arange(1, count + 1) / np.arange(1, count + 1).sum()
    return AttentionMap(COORDS, attention, 50, name)


def uniform(noise=0.0, name="uniform weight"):
    attention = np.full(len(COORDS), 1 / len(COORDS)) * (1 + noise * np.random.default_rng(0).normal(size=80))
    return AttentionMap(COORDS, attention, 50, name)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_pyramid(tmp_path_factory.mktemp("slide") / "place.tiff", place_image(*SIZE), mpp=0.5, tile=128)


def test_ties_share_the_mean_of_their_ranks():
    attention = AttentionMap(COORDS[:5], np.array([0.1, 0.3, 0.1, 0.2, 0.3]), 50)
    assert attention.mean_ranks.tolist() == [4.5, 1.5, 4.5, 3, 1.5]
    assert attention.percentiles.tolist() == [12.5, 87.5, 12.5, 50, 87.5]
    assert attention.equals.tolist() == [2, 2, 2, 1, 2]


def test_no_patch_of_many_that_are_lowest_is_among_the_most_attended():
    attention = sparse(6)
    assert attention.top(10).tolist() == [15, 14, 13, 12, 11, 10]
    most, least = attention_groups(attention, [], [])
    assert (most.title, least.title) == (
        f"patches with the highest {SHARE}", f"patches with the lowest {SHARE} (0 of the 74 that share the lowest)",
    )  # fmt: skip
    records = patch_records(attention, 10, None)
    assert [record.mean_rank for record in records] == [1, 2, 3, 4, 5, 6, *[43.5] * 10]
    assert [record.equal_patches for record in records] == [1] * 6 + [74] * 10


@pytest.mark.parametrize("noise", [0, 1e-8])  # sums in float32 are not quite equal
def test_where_all_weigh_the_same_none_is_most_attended(noise):
    attention = uniform(noise)
    assert attention.is_uniform
    assert len(attention.top(10)) == len(attention.lowest(10)) == 0
    assert set(attention.percentiles) == {50}
    for scale in ("attention", "percentile"):
        figure = heatmap_figure(Overlay(PICTURE, attention, MapStyle(scale=scale)), title="S1", top_k=10)
        title = figure.axes[0].get_title().replace("\n", " ")
        assert "Uniform: this model weighs every patch alike. All 80 patches weigh the same" in title
        assert len(figure.axes) == 1  # no colour bar
        assert not [text for text in figure.axes[0].texts if text.get_text().isdigit()]
        painted = np.asarray(figure.axes[0].images[1].get_array())
        np.testing.assert_allclose(painted[..., :3], np.broadcast_to(GREY, (40, 50, 3)))


def test_many_equal_patches_have_no_colour_on_the_scale_of_ranks():
    attention = sparse()
    by_rank, by_value = (Overlay(PICTURE, attention, MapStyle(scale=scale)) for scale in ("percentile", "attention"))
    np.testing.assert_allclose(by_rank.colours[30, 30, :3], GREY)
    assert by_rank.colours[7, 27, :3] == pytest.approx(by_value.colours[7, 27, :3], abs=0.01)  # the highest
    assert by_value.colours[30, 30, 2] == pytest.approx(0.329, abs=0.01)  # the scale's lowest colour
    label = by_rank.style.label(attention)
    assert label.startswith(f"{SHARE} percentile within the slide")
    assert "grey: 74 of 80 patches, equal and so without a rank" in label
    assert "grey" not in by_value.style.label(attention)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"name": "LiteMIL"}, "attention"),
        ({"name": "maxPool"}, SHARE),
        ([{"name": "meanPool"}, {"name": "meanPool"}], "uniform weight"),
        ([{"name": "maxPool"}, {"name": "ABMIL"}], "mean weight"),
        ({"name": "one's own"}, "attention"),
    ],
)
def test_weights_are_called_what_the_model_gives(model, name):
    assert weight_name({"model": model}) == name


@pytest.mark.parametrize("model", [{"name": "LiteMIL"}, [{"name": "LiteMIL"}]])
def test_models_is_read_first_and_model_of_earlier_records(model):
    assert models_of({"model": model}) == [{"name": "LiteMIL"}]
    assert models_of({"model": model, "models": [{"model": {"name": "maxPool"}}]}) == [{"name": "maxPool"}]


@pytest.mark.usefixtures("coarse_figures")
def test_the_pictures_of_max_pooling_speak_of_winning_features(slide, tmp_path):
    record = RECORD | {"model": {"name": "maxPool"}, "seen_in_training": False}
    AttentionVisualizer().save_set(slide, tmp_path, COORDS, sparse().attention[None], 50, record)
    page = (tmp_path / "place_report.html").read_text(encoding="utf-8")
    shown = page[: page.index("<script>")]
    assert "ttention" not in shown.replace('name="', "").split("<body>")[1]
    assert "Share of winning features of each patch" in shown
    tiles = json.loads((tmp_path / "place_attention.geojson").read_text())
    assert tiles["litemil"]["attention_is"] == SHARE
    classes = {feature["properties"]["classification"]["name"] for feature in tiles["features"]}
    assert classes == {"Share of winning features 80-100%", "Share of winning features equal, no rank"}
    measured = tiles["features"][0]["properties"]["measurements"]
    assert (measured["Attention rank"], measured["Patches of equal attention"]) == (43.5, 74)
    assert len(list((tmp_path / "place_top_patches").glob("top_*.png"))) == 6


@pytest.mark.usefixtures("coarse_figures")
def test_the_pictures_of_mean_pooling_point_at_no_patch(slide, tmp_path):
    record = RECORD | {"model": {"name": "meanPool"}}
    paths = AttentionVisualizer().save_set(slide, tmp_path, COORDS, uniform().attention[None], 50, record)
    assert all(path.exists() for path in paths)
    assert not list((tmp_path / "place_top_patches").glob("*.png"))
    assert pd.read_csv(tmp_path / "place_top_patches" / "patches.csv").columns[0] == "file"
    page = (tmp_path / "place_report.html").read_text(encoding="utf-8")
    assert "Uniform: this model weighs every patch alike. All 80 patches weigh the same" in page
    assert page.count('<span class="legend" hidden>') == 1
    assert '<select id="map">' not in page  # the scales are alike
    assert "data-patch=" not in page.split("<script>")[0]
    tiles = json.loads((tmp_path / "place_attention.geojson").read_text())["features"]
    assert {tile["properties"]["classification"]["name"] for tile in tiles} == {"Uniform weight equal, no rank"}
