"""The report page: self-contained, whatever names hold; and, in a real browser, what it does with mouse and keys."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from utils.core.geometry import patch_grid
from utils.pictures.attention_map import AttentionMap
from utils.pictures.overlay import MapStyle, Overlay, Picture
from utils.pictures.prediction_caption import Caption
from utils.pictures.report_page import write_report
from utils.pictures.top_patches import MapPatch, attention_groups

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def picture_of(width, height, side=400):
    rng = np.random.default_rng(0)
    scale = side / max(width, height)
    shape = (max(1, round(height * scale)), max(1, round(width * scale)), 3)
    return Picture(rng.integers(100, 256, shape, dtype=np.uint8), width, height, 0.5)


def page_of(path, picture, attention, *, slide="slide", style=None, patches=3, patch=None, **said):
    style = style or MapStyle()
    patch = np.full((16, 16, 3), 120, np.uint8) if patch is None else patch
    top, least = (
        [MapPatch(int(index), patch) for index in few] for few in (attention.top(patches), attention.lowest(patches))
    )
    said = {"answer": "b (75.0%)", "probabilities": {"a": 0.25, "b": 0.75}, "notes": [], "facts": []} | said
    write_report(
        path, slide, Overlay(picture, attention, style), Caption(**said), attention_groups(attention, top, least)
    )
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def attention():
    coords = patch_grid(800, 600, 100, 100)
    weights = np.linspace(1, 3, len(coords))
    return AttentionMap(coords, weights / weights.sum(), 100)


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_left_to_fill_in(tmp_path, attention):
    page = page_of(tmp_path / "a.html", picture_of(800, 600), attention)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert not re.search(r"url\(|@import|https?://", page)
    assert "@@" not in page
    assert page.count('<li><button data-patch="') == 6
    assert "b (75.0%)" in page
    assert "25.0%" in page


def test_names_are_text_and_nothing_else(tmp_path, attention):
    evil = '<script>alert("x")</script> & "quoted" {{ slide }} {% raw %}'
    page = page_of(
        tmp_path / "a.html", picture_of(800, 600), attention, slide=evil, answer=evil, notes=[evil],
        probabilities={evil: 1.0}, facts=[(evil, evil)],
    )  # fmt: skip
    assert "<script>alert" not in page
    assert page.count(escape(evil)) >= 7


@pytest.mark.parametrize("scale", ["attention", "percentile"])
def test_the_page_says_what_colour_means(tmp_path, attention, scale):
    page = page_of(tmp_path / "a.html", picture_of(800, 600), attention, style=MapStyle(scale=scale))
    low, high = re.findall(
        r'<span class="legend"><span id="low">([^<]+)</span><img [^>]+><span id="high">([^<]+)</span>', page
    )[0]
    assert (low, high) == ("0", "100" if scale == "percentile" else f"{attention.attention.max():.3g}")
    assert html.escape(MapStyle(scale=scale).label(attention)) in page


def test_a_hundred_thousand_patches_stay_under_15_mb(tmp_path):
    coords = patch_grid(80_000, 82_000, 254, 254)
    rng = np.random.default_rng(1)
    weights = rng.random(len(coords))
    attention = AttentionMap(coords, weights / weights.sum(), 254)
    assert len(attention) > 100_000
    smooth = Image.fromarray(rng.integers(0, 256, (250, 250, 3), dtype=np.uint8)).resize((1951, 2000))
    page_of(tmp_path / "a.html", Picture(np.asarray(smooth), 80_000, 82_000, 0.25), attention)
    assert (tmp_path / "a.html").stat().st_size < 15e6


def test_large_patches_in_numbers_are_made_smaller(tmp_path, attention):
    rng = np.random.default_rng(0)
    textured = rng.integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    for count, least_side in ((2, 1024), (24, 192)):
        page = page_of(tmp_path / "a.html", picture_of(800, 600), attention, patches=count, patch=textured)
        assert (tmp_path / "a.html").stat().st_size < 13e6
        images = re.findall(r'<button [^>]+><img src="data:image/jpeg;base64,([^"]+)"', page)
        assert len(images) == 2 * count
        assert Image.open(io.BytesIO(base64.b64decode(images[0]))).width >= least_side


# Appended to a page: does what a reader would, and leaves what came of it in the document.
ACTIONS = """
<pre id="outcome"></pre><script>
addEventListener("load", () => {
  const seen = {}, status = () => message.textContent;
  const pressed = key => view.dispatchEvent(new KeyboardEvent("keydown", {key}));
  const pointer = (kind, x, y) => view.dispatchEvent(new PointerEvent(kind, {clientX: x, clientY: y, pointerId: 1}));
  view.setPointerCapture = () => {};
  const box = view.getBoundingClientRect();
  const spot = (x, y) => [box.left + left + zoom * x / perPixel, box.top + top_ + zoom * y / perPixel];
  pointer("pointermove", ...spot(250, 450)); seen.hover = status();
  pressed("Home"); seen.home = status();
  pressed("ArrowLeft"); seen.left = status();
  pressed("ArrowUp"); seen.up = status();
  pressed("End"); seen.end = status();
  pressed("p"); seen.previous = status();
  const before = zoom; pressed("+"); seen.zoomed = zoom / before;
  pressed("0"); seen.fitted = Math.abs(zoom / before - 1) < 1e-9;
  pressed("Home"); pressed("Enter"); seen.opened = large.open && large.querySelector("h2").textContent;
  document.getElementById("show").click(); seen.closed = !large.open; seen.shown = status();
  const slider = document.getElementById("opacity"); slider.value = 20; slider.dispatchEvent(new Event("input"));
  seen.opacity = getComputedStyle(document.getElementById("heat")).opacity;
  const heat = document.getElementById("heat"), canvas = document.createElement("canvas");
  canvas.width = heat.naturalWidth; canvas.height = heat.naturalHeight;
  const pen = canvas.getContext("2d"); pen.drawImage(heat, 0, 0);
  const pixel = (x, y) => [...pen.getImageData(x, y, 1, 1).data];
  seen.first = pixel(10, 10); seen.last = pixel(canvas.width - 10, canvas.height - 10);
  seen.ranks = [ranks[0], ranks[count - 1]]; seen.percentiles = [percentiles[0], percentiles[count - 1]];
  seen.bar = document.getElementById("bar").textContent.trim();
  document.getElementById("outcome").textContent = JSON.stringify(seen);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_mouse_and_keys_in_a_browser(tmp_path, attention):
    page = page_of(tmp_path / "a.html", picture_of(800, 600), attention)
    (tmp_path / "tried.html").write_text(page.replace("</body>", ACTIONS + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--window-size=1200,900", (tmp_path / "tried.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    outcome = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert outcome is not None, done.stderr[-2000:]
    seen = json.loads(html.unescape(outcome[1]))
    count, weights = len(attention), attention.attention
    hovered = int(np.flatnonzero((attention.coords == (200, 400)).all(axis=1))[0])
    assert seen["hover"].startswith(f"Patch {attention.ranks[hovered]} of {count} by attention")
    assert "at level-0 px (200, 400)" in seen["hover"]
    assert float(seen["hover"].split("attention: ")[1].split(",")[0]) == pytest.approx(weights[hovered], rel=1e-2)
    assert seen["home"].startswith("Patch 1 of 48")
    assert "(700, 500)" in seen["home"]
    assert "(600, 500)" in seen["left"]
    assert "(600, 400)" in seen["up"]
    assert seen["end"].startswith("Patch 48 of 48")
    assert seen["previous"].startswith("Patch 47 of 48")
    assert seen["zoomed"] == pytest.approx(1.4)
    assert seen["fitted"]
    assert seen["opened"].startswith("Rank 1 of 48")
    assert seen["closed"]
    assert seen["shown"].startswith("Patch 1 of 48")
    assert seen["opacity"] == "0.2"
    assert seen["first"] == [68, 1, 84, 255]
    assert seen["last"] == [253, 231, 37, 255]
    assert seen["ranks"] == [48, 1]
    assert seen["percentiles"] == [0, 100]
    assert re.fullmatch(r"\d+ (µm|mm)", seen["bar"])
