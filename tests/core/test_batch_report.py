"""A batch's report keeps the rows of files that are there, whatever a later run makes of them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from utils.core.batch_report import read_report, update_report
from utils.slides.slide_status import ANEW, SlideStatus

ROOT = Path(__file__).resolve().parents[2]
# Adds rows one by one, each of a file that is there, once the other process has begun too.
UPDATES = """
import sys, time
from pathlib import Path
from utils.core.batch_report import update_report
from utils.slides.slide_status import SlideStatus
folder, number = Path(sys.argv[1]), sys.argv[2]
(folder / f"begun{number}").touch()
while not (folder / "begun0").exists() or not (folder / "begun1").exists():
    time.sleep(0.01)
for i in range(40):
    file = folder / f"{number}_{i}.h5"
    file.touch()
    update_report(folder / "report.csv", {file: SlideStatus(file, "done")}, SlideStatus)
"""


@pytest.fixture
def batch(tmp_path):
    """A report of two slides that became files, one that failed, and a function that updates it."""
    for name in ("a.svs", "b.svs", "c.svs", "out/a.h5", "out/site/b.h5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    report = tmp_path / "out" / "report.csv"
    files = {"a": "a.h5", "b": "site/b.h5", "c": "c.h5"}

    def update(**statuses: SlideStatus) -> dict[str, SlideStatus]:
        rows = {
            tmp_path / "out" / files[name]: replace(status, slide=tmp_path / f"{name}.svs")
            for name, status in statuses.items()
        }
        rows = update_report(report, rows, SlideStatus)
        assert rows == read_report(report, SlideStatus)
        return {row.slide.stem: row for row in rows}

    made = SlideStatus(Path(), "done", "--qc dropped 3 pen", 7, 0.5, 12.5, "node1")
    first = update(a=made, b=replace(made, patches=8), c=SlideStatus(Path(), "failed", "damaged"))
    assert [first[name].output for name in "abc"] == ["a.h5", "site/b.h5", "c.h5"]
    return report, update, first


def test_a_run_that_every_file_refuses_loses_nothing(batch):
    _, update, first = batch
    for error in ("made with another recipe", "made with yet another recipe"):
        refused = SlideStatus(Path(), "failed", error, seconds=0.1)
        found = update(a=refused, b=refused, c=refused)
        assert found["a"] == replace(first["a"], last_error=error)
        assert found["b"] == replace(first["b"], last_error=error)
        assert (found["c"].status, found["c"].reason, found["c"].last_error) == ("failed", error, "")
    assert update(a=SlideStatus(Path(), "skipped", patches=7, mpp=0.5))["a"].last_error == ""


def test_a_run_on_fewer_slides_keeps_the_others(batch):
    _, update, first = batch
    found = update(a=SlideStatus(Path(), "done", patches=9))
    assert (found["a"].patches, found["b"], found["c"]) == (9, first["b"], first["c"])


def test_what_a_file_took_is_kept_where_it_is_skipped(batch):
    _, update, _ = batch
    found = update(a=SlideStatus(Path(), "skipped", "is there", 7, 0.5, node="node2"))["a"]
    assert (found.status, found.reason, found.seconds, found.node) == ("skipped", "is there", 12.5, "node1")


def test_what_a_file_was_made_anew_for_is_kept_where_it_is_skipped(batch):
    _, update, _ = batch
    update(a=SlideStatus(Path(), "done", f"{ANEW}; --qc dropped 3 pen", 7))
    for _ in range(2):
        assert update(a=SlideStatus(Path(), "skipped", "is there", 7))["a"].reason == f"is there; {ANEW}"


def test_processes_that_update_one_report_lose_no_rows(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", UPDATES, str(tmp_path), str(number)], cwd=ROOT) for number in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    rows = read_report(tmp_path / "report.csv", SlideStatus)
    assert sorted(row.output for row in rows) == sorted(f"{n}_{i}.h5" for n in range(2) for i in range(40))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_rows_of_files_that_are_gone_go(batch, tmp_path):
    _, update, _ = batch
    (tmp_path / "out" / "site" / "b.h5").unlink()
    (tmp_path / "c.svs").unlink()
    assert set(update(a=SlideStatus(Path(), "done"))) == {"a"}
    (tmp_path / "out" / "a.h5").unlink()
    assert update(a=SlideStatus(Path(), "failed", "damaged"))["a"].status == "failed"


def test_a_report_of_before_is_known_by_its_slides(batch, tmp_path):
    report, update, _ = batch
    rows = [line.rsplit(",", 2)[0] for line in report.read_text().splitlines()]
    report.write_text("\n".join(rows) + "\n")
    found = update(a=SlideStatus(Path(), "failed", "made with another recipe"))
    assert (found["a"].status, found["a"].last_error) == ("done", "made with another recipe")
    assert found["b"].patches == 8


@pytest.mark.parametrize("content", ["slide;status\na;b\n", "slide,status,mine\na,b,c\n", "\0", 'slide,status\n"a'])
def test_what_is_no_such_report_is_set_aside(batch, content, caplog):
    report, update, _ = batch
    report.write_text(content)
    assert set(update(a=SlideStatus(Path(), "done"))) == {"a"}
    assert report.with_name("report.1.csv").read_text() == content
    assert "moved to" in caplog.text
