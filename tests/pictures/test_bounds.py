"""Slides with bounds (MIRAX, SCN): pictures and page show what was scanned, and every position stays right."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.pictures.test_report_page import needs_browser, outcome_in_browser, page_of
from tests.pictures.test_visualizer import RECORD
from tests.synthetic import place_image, place_of, write_pyramid
from utils.core.geometry import patch_grid
from utils.pictures.attention_map import AttentionMap
from utils.pictures.evidence_map import EvidenceMap, EvidenceOverlay
from utils.pictures.heatmap import evidence_figure, heatmap_figure
from utils.pictures.overlay import MapStyle, Overlay, Picture
from utils.pictures.picture_set import overview
from utils.pictures.visualizer import AttentionVisualizer
from utils.slides.open_slides import open_slide

SIZE = 1000, 800
BOUNDS = 600, 100, 300, 200
INSIDE = patch_grid(300, 200, 50, 50) + np.array([600, 100])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_pyramid(tmp_path_factory.mktemp("slide") / "place.tiff", place_image(*SIZE), mpp=0.5, tile=128)


@pytest.fixture
def slide(path):
    with open_slide(path) as opened:
        opened.bounds = BOUNDS
        yield opened


def attention_of(coords, highest=7):
    attention = np.linspace(1, 2, len(coords))
    attention[highest] = 20
    return AttentionMap(coords, attention / attention.sum(), 50)


@pytest.mark.parametrize(
    ("bounds", "coords", "area"),
    [
        (BOUNDS, INSIDE, BOUNDS),
        (None, INSIDE, (0, 0, *SIZE)),
        (BOUNDS, np.r_[INSIDE, [[500, 350]]], (500, 100, 400, 300)),  # a patch outside is shown all the same
        ((900, 700, 300, 300), np.array([[940, 740]]), (900, 700, 100, 100)),
        ((5000, 5000, 10, 10), INSIDE, (0, 0, *SIZE)),
    ],
)
def test_the_overview_is_of_what_was_scanned(slide, bounds, coords, area):
    slide.bounds = bounds
    picture = overview(slide, AttentionMap(coords, np.full(len(coords), 1 / len(coords)), 50))
    assert (*picture.corner, picture.width, picture.height) == area
    x, y = place_of(picture.thumbnail, *SIZE)
    np.testing.assert_allclose([x.min(), y.min()], area[:2], atol=5)
    np.testing.assert_allclose([x.max(), y.max()], np.add(area[:2], area[2:]) - 1, atol=5)


def test_maps_and_outlines_lie_where_the_patch_is(slide):
    attention = attention_of(INSIDE)
    picture = overview(slide, attention)
    values = np.zeros((1, len(INSIDE)), np.float32)
    values[0, 7] = 1
    evidence = EvidenceOverlay(picture, attention, EvidenceMap(["a"], values, np.zeros(1), np.zeros(1)), "a")
    figures = (
        heatmap_figure(Overlay(picture, attention, MapStyle(scale="attention")), title="", top_k=1),
        evidence_figure(evidence, title="", text="", top_k=1, alpha=1),
    )
    for figure in figures:
        shown, painted = (np.asarray(image.get_array()) for image in figure.axes[0].images)
        outline = next(patch for patch in figure.axes[0].patches if not patch.get_fill())
        left, top = round(outline.get_x() + 0.5), round(outline.get_y() + 0.5)
        where = np.s_[top : top + round(outline.get_height()), left : left + round(outline.get_width())]
        assert (painted[where][..., :3] == painted[where][0, 0, :3]).all()
        assert painted[where][0, 0, 0] > 0.9  # the highest colour
        x, y = place_of(shown[where], *SIZE)
        np.testing.assert_allclose([x.min(), y.min()], INSIDE[7], atol=5)


@pytest.mark.usefixtures("coarse_figures")
def test_positions_in_files_are_the_whole_frames_and_qupaths_from_the_corner(slide, tmp_path):
    attention = attention_of(INSIDE)
    AttentionVisualizer().save_set(slide, tmp_path, INSIDE, attention.attention[None], 50, RECORD, top_k=2)
    assert np.load(tmp_path / "place_attention.npz")["coords"].tolist() == INSIDE.tolist()
    x, y = INSIDE[7]
    assert (tmp_path / "place_top_patches" / f"top_01_x{x}_y{y}.png").exists()
    tiles = json.loads((tmp_path / "place_attention.geojson").read_text())
    assert tiles["litemil"]["offset"] == [600, 100]
    assert tiles["features"][7]["geometry"]["coordinates"][0][0] == [x - 600, y - 100]
    assert f"level-0 px ({x}, {y})" in (tmp_path / "place_report.html").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "place_thumbnail.jpg").size == (240, 160)


POINTS = """
<pre id="outcome"></pre><script>
addEventListener("load", () => {
  const box = view.getBoundingClientRect(), seen = {};
  view.dispatchEvent(new PointerEvent("pointermove", {
    clientX: box.left + left + zoom * 75 / perPixel, clientY: box.top + top_ + zoom * 125 / perPixel, pointerId: 1}));
  seen.message = message.textContent;
  seen.mark = [mark.style.left, mark.style.top].map(parseFloat).map(px => px * perPixel);
  document.getElementById("outcome").textContent = JSON.stringify(seen);
});
</script>
"""


@needs_browser
def test_the_page_points_at_the_patch_and_names_the_frames_pixels(tmp_path):
    picture = Picture(np.full((200, 300, 3), 200, np.uint8), 300, 200, 0.5, (600, 100))
    page = page_of(tmp_path / "a.html", picture, attention_of(INSIDE))
    seen = outcome_in_browser(page, POINTS, tmp_path)
    assert "at level-0 px (650, 200)" in seen["message"]
    assert seen["mark"] == pytest.approx([50, 100])
