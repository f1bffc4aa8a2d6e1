"""The index page of a folder of predictions: self-contained, escaped, and sorted and filtered in a real browser."""

import html
import json
import re
import subprocess
from dataclasses import replace

import pytest
from PIL import Image

from tests.pictures.test_report_page import CHROMIUM
from utils.pictures import index_page
from utils.pictures.index_page import IndexRow, write_index

ROWS = [
    IndexRow("s10", "a", {"a": 0.9, "b": 0.1}, 100, "s10_report.html", "a", "P1", False),
    IndexRow("s2", "b", {"a": 0.2, "b": 0.8}, 20, "s2_report.html", "a", "P2", True),
    IndexRow("s1", "b", {"a": 0.4, "b": 0.6}, 3, "s1_prediction.json", "", "", None),
]


@pytest.fixture
def page(tmp_path):
    def write(rows=ROWS, notes=("LiteMIL of outputs/run.",)) -> str:
        write_index(tmp_path / "index.html", rows, notes)
        return (tmp_path / "index.html").read_text(encoding="utf-8")

    return write


def test_every_slide_has_a_row_with_what_is_known_of_it(page):
    text = page()
    assert "@@" not in text
    cells = [re.findall("<td>(.*?)</td>", line) for line in text.splitlines() if line.startswith("<tr")]
    assert cells[1] == ["", '<a href="s2_report.html">s2</a>', "b", "0.800", "0.800", "a", "no", "P2", "20", "yes"]
    assert cells[2][5:] == ["", "", "", "3", "unknown"]
    assert "1 a, 2 b; 1 of 2 labelled slides correct (50%); 1 seen in training, not independent evidence" in text
    assert "For research, not a diagnosis." in text
    assert "<button>calibrated</button>" not in text
    calibrated = page([replace(ROWS[0], calibrated={"a": 0.7, "b": 0.3}), *ROWS[1:]])
    assert "<td>0.900</td><td>0.700</td><td>0.100</td>" in calibrated
    assert "<td>0.800</td><td></td><td>0.800</td>" in calibrated, "a slide without one"
    bare = page([replace(row, label="", case_id="") for row in ROWS])
    assert "<button>label</button>" not in bare
    assert "<label hidden>" in bare


def test_pictures_are_part_of_the_page_unless_they_are_many(page, tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "s10 %_thumbnail.jpg")
    rows = [replace(ROWS[0], thumbnail=tmp_path / "s10 %_thumbnail.jpg"), *ROWS[1:]]
    text = page(rows)
    assert not re.search(r'src="(?!data:image/jpeg;base64,)|url\(|@import|https?://', text)
    assert text.count("<img") == 1
    monkeypatch.setattr(index_page, "MOST_EMBEDDED_BYTES", 10)
    assert 'src="s10%20%25_thumbnail.jpg" loading="lazy"' in page(rows)


def test_names_are_text_and_nothing_else(page):
    bad = '<script>alert("1")</script>\'&'
    rows = [IndexRow(bad, bad, {bad: 0.7, "b": 0.3}, 3, f"{bad}.html", bad, bad, False, 2)]
    text = page(rows, [bad])
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert") >= 6
    assert 'href="%3Cscript' in text


def test_many_classes_show_the_predicted_one_alone(page):
    probabilities = {f"c{number}": 1 / 8 for number in range(8)}
    assert "p(c1)" not in page([IndexRow("s", "c0", probabilities, 3, "s.json")])
    three = {"x": 0.5, "y": 0.3, "z": 0.2}
    assert page([IndexRow("s", "x", three, 3, "s.json")]).count("<button>p(") == 3


def test_somebody_elses_page_is_set_aside(page, tmp_path, caplog):
    (tmp_path / "index.html").write_text("<html>mine</html>")
    page()
    page()
    assert (tmp_path / "index.1.html").read_text() == "<html>mine</html>"
    assert not (tmp_path / "index.2.html").exists()
    assert "moved to" in caplog.text


def test_thousands_of_rows_are_written_at_once(page):
    text = page([replace(ROWS[0], slide=f"s{number}") for number in range(5000)])
    assert text.count("<tr") == 5001
    assert len(text) < 2_000_000


ACTIONS = """
<pre id="outcome"></pre><script>
addEventListener("load", () => {
  const names = () => [...body.rows].filter(line => !line.hidden).map(line => line.cells[1].textContent);
  const head = name => heads.find(one => one.textContent === name).querySelector("button");
  const set = (id, value) => {
    const field = document.getElementById(id); field.value = value; field.dispatchEvent(new Event("input"));
  };
  const seen = {};
  head("slide").click(); seen.slide = names();
  head("p(b)").click(); seen.rising = names();
  head("p(b)").click(); seen.falling = names();
  head("label").click(); seen.empty_last = names();
  set("filter", "p2"); seen.text = names(); set("filter", "");
  set("class", "a"); seen.class = names(); set("class", "");
  set("correct", "wrong"); seen.wrong = names(); seen.shown = document.getElementById("count").textContent;
  set("correct", ""); seen.all = names().length;
  document.getElementById("outcome").textContent = JSON.stringify(seen);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_sorting_and_filtering_in_a_browser(page, tmp_path):
    (tmp_path / "tried.html").write_text(page().replace("</body>", ACTIONS + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, (tmp_path / "tried.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    outcome = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert outcome is not None, done.stderr[-2000:]
    assert json.loads(html.unescape(outcome[1])) == {
        "slide": ["s1", "s2", "s10"], "rising": ["s10", "s1", "s2"], "falling": ["s2", "s1", "s10"],
        "empty_last": ["s2", "s10", "s1"], "text": ["s2"], "class": ["s10"], "wrong": ["s2"],
        "shown": "1 of 3 slides", "all": 3,
    }  # fmt: skip
