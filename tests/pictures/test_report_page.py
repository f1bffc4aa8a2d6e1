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
from utils.pictures.evidence_map import EvidenceMap, EvidenceOverlay
from utils.pictures.overlay import MapStyle, Overlay, Picture
from utils.pictures.prediction_caption import Caption
from utils.pictures.report_page import write_report
from utils.pictures.top_patches import MapPatch, attention_groups

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")


def picture_of(width, height, side=400):
    rng = np.random.default_rng(0)
    scale = side / max(width, height)
    shape = (max(1, round(height * scale)), max(1, round(width * scale)), 3)
    return Picture(rng.integers(100, 256, shape, dtype=np.uint8), width, height, 0.5)


def page_of(path, picture, attention, *, slide="slide", style=None, patches=3, patch=None, classes=(), **said):
    style = style or MapStyle()
    patch = np.full((16, 16, 3), 120, np.uint8) if patch is None else patch
    top, least = (
        [MapPatch(int(index), patch) for index in few] for few in (attention.top(patches), attention.lowest(patches))
    )
    said = {"answer": "b (75.0%)", "probabilities": {"a": 0.25, "b": 0.75}, "notes": [], "facts": []} | said
    signs = np.where(np.arange(len(attention)) % 2, 1, -1).astype(np.float32)
    evidence = EvidenceMap(classes, np.tile(signs, (len(classes), 1)), np.zeros(2), np.zeros(2))
    write_report(
        path, slide, Overlay(picture, attention, style), Caption(**said), attention_groups(attention, top, least),
        [EvidenceOverlay(picture, attention, evidence, name) for name in classes],
    )  # fmt: skip
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
    for count, side, least_side in ((2, 1200, 1024), (24, 600, 192)):
        textured = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        page = page_of(tmp_path / "a.html", picture_of(800, 600), attention, patches=count, patch=textured)
        assert (tmp_path / "a.html").stat().st_size < 13e6
        images = re.findall(r'<button [^>]+><img src="data:image/jpeg;base64,([^"]+)"', page)
        assert len(images) == 2 * count
        assert least_side <= Image.open(io.BytesIO(base64.b64decode(images[0]))).width < side


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


FRAME = """<!DOCTYPE html><pre id="outcome"></pre><iframe width="{width}" height="{height}" srcdoc="{page}"></iframe>
<script>
const waiting = setInterval(() => {{
  const outcome = document.querySelector("iframe").contentDocument.getElementById("outcome");
  if (!outcome?.textContent) return;
  document.getElementById("outcome").textContent = outcome.textContent;
  clearInterval(waiting);
}}, 50);
</script>"""


def chromium(folder, *flags):
    """Run Chromium without a window, and return what it prints."""
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([str(CHROMIUM), *fixed, *flags], capture_output=True, text=True, timeout=120)


def outcome_in_browser(page, actions, folder, size=(1200, 900)):
    """Return what `actions`, appended to a page, left in the element "outcome"; the page is in a frame of `size`, as
    a window is never narrower than 500 px.
    """
    inside = page.replace("</body>", actions + "</body>")
    frame = FRAME.format(width=size[0], height=size[1], page=html.escape(inside))
    (folder / "tried.html").write_text(frame, encoding="utf-8")
    done = chromium(folder, "--dump-dom", "--virtual-time-budget=4000", (folder / "tried.html").as_uri())
    outcome = re.search(r'<pre id="outcome">(.+?)</pre>', done.stdout, re.DOTALL)
    assert outcome is not None, done.stderr[-2000:]
    return json.loads(html.unescape(outcome[1]))


@needs_browser
def test_mouse_and_keys_in_a_browser(tmp_path, attention):
    seen = outcome_in_browser(page_of(tmp_path / "a.html", picture_of(800, 600), attention), ACTIONS, tmp_path)
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


LONG_NAMES = "invasive ductal carcinoma of no special type, grade 3, with lymphocytes", "a" * 90

HOW_IT_FITS = """
<pre id="outcome"></pre><script>
addEventListener("load", () => {
  const controls = [...document.querySelectorAll("button, select, input")].filter(element => element.offsetParent);
  const boxes = controls.map(control => control.getBoundingClientRect());
  document.getElementById("outcome").textContent = JSON.stringify({
    page: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
    height: Math.min(...boxes.map(box => box.height)), width: Math.min(...boxes.map(box => box.width)),
    right: Math.max(...boxes.map(box => box.right)), left: Math.min(...boxes.map(box => box.left)),
    beside: window.innerHeight - view.getBoundingClientRect().height, touch: view.style.touchAction,
  });
});
</script>
"""


@needs_browser
@pytest.mark.parametrize("size", [(800, 600), (400, 4000), (4000, 400)])
def test_a_narrow_screen_shows_all_and_is_used_by_thumb(tmp_path, size):
    coords = patch_grid(*size, 100, 100)
    attention = AttentionMap(coords, np.linspace(1, 3, len(coords)) / (2 * len(coords)), 100)
    page = page_of(
        tmp_path / "a.html", picture_of(*size), attention, slide="S" * 120, answer=" ".join(LONG_NAMES),
        classes=LONG_NAMES, probabilities=dict.fromkeys(LONG_NAMES, 0.5), facts=[("checkpoint", "/folder" * 30)],
        notes=["n" * 200], evidence="e" * 200,
    )  # fmt: skip
    seen = outcome_in_browser(page, HOW_IT_FITS, tmp_path, (390, 844))
    assert seen["window"] <= 390
    assert seen["page"] <= seen["window"]
    assert min(seen["height"], seen["width"]) >= 44
    assert 0 <= seen["left"] <= seen["right"] <= seen["window"]
    assert seen["beside"] > 200  # the page can be moved beside the slide, and over it too
    assert seen["touch"] == "pan-y"


GESTURES = """
<pre id="outcome"></pre><script>
addEventListener("load", () => {
  const seen = {}, box = view.getBoundingClientRect();
  view.setPointerCapture = () => {};
  const touch = (kind, id, x, y) => view.dispatchEvent(
    new PointerEvent(kind, {clientX: box.left + x, clientY: box.top + y, pointerId: id, pointerType: "touch"}));
  const middle = () => [(view.clientWidth / 2 - left) / zoom, (view.clientHeight / 2 - top_) / zoom];
  const under = (x, y) => [(x - left) / zoom, (y - top_) / zoom];
  const whole = zoom, before = [under(150, 200), under(250, 200)];
  touch("pointerdown", 1, 150, 200); touch("pointerdown", 2, 250, 200);
  touch("pointermove", 1, 100, 180); touch("pointermove", 2, 400, 180);
  seen.pinched = zoom / whole; seen.held = [before, [under(100, 180), under(400, 180)]];
  seen.touch = view.style.touchAction;
  touch("pointerup", 1, 100, 180);
  const kept = [zoom, left, top_];
  touch("pointermove", 2, 400, 180); seen.jumped = kept.some((value, index) => value !== [zoom, left, top_][index]);
  touch("pointermove", 2, 420, 210); seen.dragged = [left - kept[1], top_ - kept[2]];
  touch("pointerup", 2, 420, 210); seen.picked = current;
  const wheel = keys => {
    const event = new WheelEvent("wheel", {deltaY: -100, cancelable: true, ...keys}), old = zoom;
    view.dispatchEvent(event);
    return [event.defaultPrevented, zoom > old];
  };
  seen.scrolled = wheel({}); seen.wheeled = wheel({ctrlKey: true});
  view.focus(); seen.wheeled_in_focus = wheel({});
  const centre = middle(), zoomed = zoom;
  const resized = (width, height) => {
    view.style.width = width; view.style.height = height;
    dispatchEvent(new Event("resize"));
  };
  resized("300px", "350px");
  seen.resized = [zoom / zoomed, middle()[0] - centre[0], middle()[1] - centre[1]];
  fit(); resized("500px", "400px");
  seen.whole = zoom / Math.min(view.clientWidth / slide.overview[0], view.clientHeight / slide.overview[1]);
  document.getElementById("outcome").textContent = JSON.stringify(seen);
});
</script>
"""


@needs_browser
def test_fingers_wheel_and_resizing_keep_the_view(tmp_path, attention):
    page = page_of(tmp_path / "a.html", picture_of(800, 600), attention)
    seen = outcome_in_browser(page, GESTURES, tmp_path)
    assert seen["pinched"] == pytest.approx(3, rel=0.05)
    before, after = np.array(seen["held"])
    np.testing.assert_allclose(after, before, atol=8)  # what was under the fingers stays there, in px of 400
    assert seen["touch"] == "none"
    assert not seen["jumped"]
    assert seen["dragged"] == pytest.approx([20, 30])
    assert seen["picked"] == -1  # gestures are no taps
    assert seen["scrolled"] == [False, False]
    assert seen["wheeled"] == seen["wheeled_in_focus"] == [True, True]
    assert seen["resized"] == pytest.approx([1, 0, 0], abs=0.01)
    assert seen["whole"] == pytest.approx(1)


@needs_browser
@pytest.mark.skipif(not shutil.which("pdftoppm"), reason="no pdftoppm here to look at the print")
@pytest.mark.parametrize("size", [(800, 600), (400, 4000), (4000, 400)])
def test_print_shows_the_whole_slide_with_each_map_and_its_legend(tmp_path, size):
    coords = patch_grid(*size, 100, 100)
    attention = AttentionMap(coords, np.linspace(1, 3, len(coords)) / (2 * len(coords)), 100)
    picture = picture_of(*size, side=800)
    h, w = picture.shape
    corner = max(8, min(h, w) // 4)
    picture.thumbnail[:] = 255
    for y, x in ((0, 0), (0, w - corner), (h - corner, 0), (h - corner, w - corner)):
        picture.thumbnail[y : y + corner, x : x + corner] = 0
    style = MapStyle(alpha=0)
    page_of(tmp_path / "a.html", picture, attention, style=style, classes=("benign", "malignant"), patches=0)
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'a.pdf'}", (tmp_path / "a.html").as_uri())
    subprocess.run(["pdftoppm", "-r", "130", "-gray", tmp_path / "a.pdf", tmp_path / "p"], check=True)
    text = " ".join(subprocess.check_output(["pdftotext", "-layout", tmp_path / "a.pdf", "-"], text=True).split())
    for title, ends in (("percentile 0", "100 Colour"), ("benign -1", "+1 Colour"), ("malignant -1", "+1 Colour")):
        assert title in text
        assert ends in text.split(title)[1]
    assert "benign: against (dark) and for (bright)" in text
    assert len(re.findall(r"\d (?:µm|mm) ", text)) >= 3
    assert "Opacity" not in text
    from scipy.ndimage import find_objects, label

    black = 0
    for path in tmp_path.glob("p-*.pgm"):
        areas, _ = label(np.asarray(Image.open(path)) < 40)
        sizes = [tuple(side.stop - side.start for side in area) for area in find_objects(areas)]
        black += sum(min(sides) >= 5 and max(sides) < 1.3 * min(sides) and (sides[0] > 12) for sides in sizes)
    assert black >= 3 * 4  # the corners of each of the maps
