"""The page of all slides: what it tells, that it links beside itself, and that it can be filtered and ordered."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from utils.slides.contact_sheet import SheetRow, write_contact_sheet


class Page(HTMLParser):
    """The cards' texts, part by part, all links, and the words above the cards."""

    def __init__(self, text):
        super().__init__()
        self.cards, self.links, self.head, self._within = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.links += [named[name] for name in ("src", "href") if name in named]
        if tag == "li":
            self.cards.append([])
            self._within = True

    def handle_endtag(self, tag):
        if tag == "li":
            self._within = False

    def handle_data(self, data):
        if self._within:
            self.cards[-1].append(data)
        elif not self.cards:
            self.head += data


def sheet(tmp_path, rows, about=()):
    write_contact_sheet(tmp_path / "contact_sheet.html", rows, about)
    return (tmp_path / "contact_sheet.html").read_text(encoding="utf-8")


def test_the_page_tells_all_and_links_beside_itself(tmp_path):
    rows = [
        SheetRow("a.svs", "done", "", 1234, 0.49912, tmp_path / "previews" / "sub" / "a #1%.jpg"),
        SheetRow("b.svs", "failed", "b.svs: damaged"),
        SheetRow("c.svs", "skipped", "", 1, None),
    ]
    page = Page(sheet(tmp_path, rows, ["Recipe: mine", "all shards"]))
    assert page.cards == [
        ["a.svs", "done, 1,234 patches, 0.4991 µm/px"],
        ["no picture", "b.svs", "failed", "b.svs: damaged"],
        ["no picture", "c.svs", "skipped, 1 patch"],
    ]
    assert {unquote(link) for link in page.links} == {"previews/sub/a #1%.jpg"}
    assert not any("#" in link or ":" in link for link in page.links)
    for words in ("3 slides", "1 done, 1 failed, 1 skipped; 1,235 patches, median 618 per slide",
                  "Recipe: mine. all shards", "dropped: blurred"):  # fmt: skip
        assert words in page.head
    assert " um" not in page.head


def test_nothing_a_name_says_becomes_code(tmp_path):
    bad = """<script>alert(1)</script> "' & {{ cards }} {% raw %} ${count}"""
    text = sheet(tmp_path, [SheetRow(bad, bad, bad, 1, 0.5, tmp_path / f"{bad.replace('/', '')}.jpg")], [bad])
    assert text.count("<script>") == 1  # our own
    page = Page(text)
    assert page.cards[0] == [bad, f"{bad}, 1 patch, 0.5 µm/px", bad]
    assert bad in page.head
    assert {unquote(link) for link in page.links} == {f"{bad.replace('/', '')}.jpg"}


def test_ten_thousand_slides_are_a_small_page_that_loads_lazily(tmp_path):
    rows = [SheetRow(f"slide_{n}", "done", "", n, 0.5, tmp_path / f"slide_{n}.jpg") for n in range(10_000)]
    text = sheet(tmp_path, rows)
    assert len(text) < 3_000_000
    assert text.count('loading="lazy"') == 10_000
    assert "data:" not in text
    assert not re.search(r"https?://", text)


def test_a_page_of_nothing_is_a_page(tmp_path):
    assert "0 of 0 slides" in sheet(tmp_path, [])


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = """<script>
const seen = () => [...document.querySelectorAll("li")].filter(card => !card.hidden)
  .map(card => card.querySelector("b").textContent).join(",");
const found = [], choose = (id, value, event) => {
  const field = document.getElementById(id);
  field.value = value; field.dispatchEvent(new Event(event)); found.push(seen());
};
for (const order of ["name", "few", "many", "fine", "given"]) choose("order", order, "change");
choose("filter", "DONE s1", "input");
found.push(document.getElementById("shown").textContent);
choose("status", "failed", "change");
choose("filter", "", "input");
choose("status", "", "change");
const [first, second] = [...document.querySelectorAll("li")].map(card => card.getBoundingClientRect());
found.push(first.top === second.top && document.documentElement.scrollWidth <= innerWidth);
document.title = found.join("|");
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1400, 400])
def test_ordering_and_filtering_in_a_browser(tmp_path, width):
    rows = [
        SheetRow("s10", "done", "", 9, 0.5),
        SheetRow("s2", "done", "", 100, 0.25),
        SheetRow("s1", "failed", "why"),
        SheetRow("s1b", "done", "", 20, 1.0),
    ]
    text = sheet(tmp_path, rows)
    (tmp_path / "driven.html").write_text(text.replace("</body>", DRIVER))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}/user",
               f"--window-size={width},900"]  # fmt: skip
    dom = subprocess.run(
        [*command, (tmp_path / "driven.html").as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    title = re.search("<title>(.*?)</title>", dom)
    assert title
    assert title[1].split("|") == [
        "s1,s1b,s2,s10",
        "s10,s1b,s2,s1",  # unknown last, whichever way
        "s2,s1b,s10,s1",
        "s2,s10,s1b,s1",
        "s10,s2,s1,s1b",
        "s10,s1b",
        "2 of 4 slides",
        "",
        "s1",
        "s10,s2,s1,s1b",
        "true",  # several in a row, and nothing beyond the edge
    ]
