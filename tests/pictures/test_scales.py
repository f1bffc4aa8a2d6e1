"""What colour says: nearly uniform attention is said to be, and the scale of multiples shows it flat."""

import re

import numpy as np
import pytest
from matplotlib import colormaps

from tests.pictures.test_report_page import page_of
from utils.core.geometry import patch_grid
from utils.pictures.attention_map import AttentionMap
from utils.pictures.heatmap import detailed_figure, heatmap_figure
from utils.pictures.overlay import MapStyle, Overlay, Picture
from utils.pictures.picture_set import captioned_figure
from utils.pictures.prediction_caption import Caption

COORDS = patch_grid(1000, 800, 50, 50)  # 320 patches
PICTURE = Picture(np.full((80, 100, 3), 200, np.uint8), 1000, 800, 0.5)


def attention_of(spread: float) -> AttentionMap:
    weights = np.exp(spread * np.random.default_rng(0).normal(size=len(COORDS)))
    return AttentionMap(COORDS, weights / weights.sum(), 50)


def test_the_effective_number_of_patches():
    assert AttentionMap(COORDS[:4], np.full(4, 0.25), 50).effective_count == pytest.approx(4)
    assert AttentionMap(COORDS[:4], np.array([0, 1.0, 0, 0]), 50).effective_count == pytest.approx(1)
    assert AttentionMap(COORDS[:4], np.array([0, 0.5, 0.5, 0]), 50).effective_count == pytest.approx(2)
    assert attention_of(0.5).effective_count == pytest.approx(320 * np.exp(-0.125), rel=0.05)  # log-normal


@pytest.mark.parametrize(("spread", "is_said"), [(0.01, True), (0.2, True), (0.6, False), (2, False)])
def test_nearly_uniform_attention_is_said_to_be_on_each_picture(tmp_path, spread, is_said):
    attention = attention_of(spread)
    overlay = Overlay(PICTURE, attention, MapStyle())
    title = heatmap_figure(overlay, title="S1", top_k=3).axes[0].get_title().replace("\n", " ")
    facts = captioned_figure(overlay, Caption(probabilities={"a": 1.0}), "S1", 3).subfigs[1].axes[3].texts[0].get_text()
    page = page_of(tmp_path / "a.html", PICTURE, attention)
    for text in (title, " ".join(facts.split()), page):
        assert ("attention is nearly uniform" in text) is is_said
        assert (f"as if {attention.effective_count:,.0f} of 320 patches" in text) is is_said


def test_the_scale_of_multiples_is_flat_where_attention_is():
    flat, steep = (Overlay(PICTURE, attention_of(spread), MapStyle(scale="uniform")) for spread in (0.01, 2))
    middle = colormaps["viridis"](0.5)[:3]
    np.testing.assert_allclose(flat.colours[..., :3], np.broadcast_to(middle, (80, 100, 3)), atol=0.05)
    assert np.ptp(steep.colours[..., :3], axis=(0, 1)).max() > 0.8
    assert flat.style.limits(flat.attention) == (-1, 1)


def test_half_and_double_are_as_far_from_the_middle_and_nothing_is_the_least():
    attention = AttentionMap(COORDS[:8], np.array([4, 2, 0.5, 0.25, 1, 0.25, 0, 0]) / 8, 50)
    style = MapStyle(scale="uniform")
    assert style.values(attention).tolist() == [2, 1, -1, -2, 0, -2, -2, -2]
    assert style.limits(attention) == (-2, 2)
    assert style.end_texts(attention) == ("1/4 x or less", "4 x")
    assert (
        style.label(attention)
        == "attention as a multiple of uniform, logarithmic, 1 in the middle (highest: 4 x uniform)"
    )
    steep = AttentionMap(COORDS, np.r_[1.0, np.zeros(319)], 50)
    assert MapStyle(scale="uniform").end_texts(steep) == ("1/512 x or less", "512 x")


def test_the_colour_bar_has_multiples():
    figure = heatmap_figure(Overlay(PICTURE, attention_of(1), MapStyle(scale="uniform")), title="S1", top_k=0)
    figure.draw_without_rendering()
    labels = {label.get_text() for label in figure.axes[1].get_yticklabels()} - {""}
    assert {"1 x", "2 x", "1/2 x"} <= labels
    assert detailed_figure(
        Overlay(PICTURE, attention_of(1), MapStyle(scale="uniform")),
        title="",
        top_k=0,
        probabilities={"a": 1.0},
        facts=[],
    )


@pytest.mark.parametrize("scale", ["percentile", "attention", "uniform"])
def test_the_page_has_each_scale_the_chosen_one_first(tmp_path, scale):
    page = page_of(tmp_path / "a.html", PICTURE, attention_of(1), style=MapStyle(scale=scale), classes=("a", "b"))
    options = re.findall(r"<option [^>]+>([^<]+)</option>", page)
    assert sorted(options[:3]) == [
        "attention, from 0 to the highest",
        "attention, percentile",
        "attention, times uniform",
    ]
    assert options[0] == MapStyle(scale=scale).title(attention_of(1))
    assert options[3:] == ["evidence for a", "evidence for b"]
