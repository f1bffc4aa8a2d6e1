"""extractFeatures.py over folders: what its report keeps, what is told of slides, and what it says at the end."""

import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import read_bag
from utils.core.errors import ConfigError
from utils.core.files import is_free
from utils.features import extraction
from utils.slides import batch
from utils.slides.settings import ExtractionFiles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ("--backbone", "stain", "--patch_size", 64, "--tissue_threshold", 0)


@pytest.fixture
def extract(script, tmp_path):
    """Run extractFeatures.py on the folder `slides` into the folder `out`."""

    def run(*flags: object, output: str = "out"):
        return script("extractFeatures", "--input_dir", tmp_path / "slides", "--output_dir", tmp_path / output, *flags)

    return run


@pytest.fixture
def slides(tmp_path) -> Path:
    """Three slides of 0.5 um/px."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for number, name in enumerate("abc"):
        write_pyramid(folder / f"{name}.tif", stained_image(192, 128, seed=number), mpp=0.5, downsamples=(1,), tile=64)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """Six plain images, which say nothing of their um/px."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(stained_image(192, 128, seed=number)).save(folder / f"s{number}.png")
    return folder


def report_of(tmp_path: Path) -> pd.DataFrame:
    return pd.read_csv(tmp_path / "out" / "extraction_report.csv", keep_default_na=False).set_index("output")


def test_a_mistyped_rerun_changes_neither_report_nor_contact_sheet(slides, extract, tmp_path):
    assert extract(*RECIPE, "--mpp", 0.5).code == 0
    first, sheet = report_of(tmp_path), (tmp_path / "out" / "contact_sheet.html").read_text()
    mistyped = extract(*RECIPE, "--mpp", 1)
    assert mistyped.code == 1
    assert "3 failed" in mistyped.out
    assert len(mistyped.errors) == 2
    assert "the same of 2 more (b.h5, c.h5): made with another recipe" in mistyped.errors[1]
    second = report_of(tmp_path)
    assert second["last_error"].str.contains("made with another recipe").all()
    columns = [name for name in first if name != "last_error"]
    pd.testing.assert_frame_equal(second[columns], first[columns])
    again = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert again.count("previews/a.jpg") == sheet.count("previews/a.jpg") > 0
    assert "made with another recipe" in again
    assert "at 0.5 µm/px" in again  # the recipe of what is there


def test_a_rerun_on_fewer_slides_keeps_the_rows_of_the_others(slides, extract, tmp_path):
    assert extract(*RECIPE).code == 0
    first = report_of(tmp_path)
    write_pyramid(slides / "d.tiff", stained_image(128, 128), mpp=0.5, downsamples=(1,), tile=64)
    for flags, made in ((("--limit", 1), 3), (("--extensions", ".tiff"), 4), ((), 4)):
        assert extract(*RECIPE, *flags).code == 0
        report = report_of(tmp_path)
        assert len(report) == made
        assert (report["patches"] == 6).sum() == 3
        assert list(report["seconds"][list(first.index)]) == list(first["seconds"])
        assert (tmp_path / "out" / "contact_sheet.html").read_text().count("<li ") == made


def sheet_of(tmp_path: Path) -> str:
    return (tmp_path / "out" / "contact_sheet.html").read_text(encoding="utf-8")


def test_all_shards_have_one_contact_sheet(slides, extract, tmp_path):
    """Rebuilt from the reports that are there; something else that is called alike is nobody's report."""
    assert extract(*RECIPE, "--shard", "3/3").code == 0
    assert [sheet_of(tmp_path).count(f"previews/{name}.jpg") // 2 for name in "abc"].count(1) == 1
    assert "Shards that have reported: 3 of 3" in sheet_of(tmp_path)
    other = tmp_path / "out" / "extraction_report_of_mine.csv"
    other.write_text("mine")
    for shard in ("1/3", "2/3"):
        assert extract(*RECIPE, "--shard", shard).code == 0
    text = sheet_of(tmp_path)
    assert "3 slides" in text
    assert all(text.count(f"previews/{name}.jpg") == 2 for name in "abc")
    assert "Shards that have reported: all of 3" in text
    assert "patches of 64 px at level 0" in text
    assert other.read_text() == "mine"
    assert [path.name for path in (tmp_path / "out").glob("contact_sheet*")] == ["contact_sheet.html"]


def test_a_shard_that_reports_while_the_sheet_is_written_is_on_it(slides, extract, tmp_path, monkeypatch):
    assert extract(*RECIPE, "--shard", "1/2").code == 0
    report = tmp_path / "out" / "extraction_report_1_of_2.csv"
    late = report.rename(tmp_path / "late.csv")
    write = batch.write_contact_sheet

    def write_and_let_the_other_report(*sheet):
        write(*sheet)
        if late.exists():
            late.rename(report)

    monkeypatch.setattr(batch, "write_contact_sheet", write_and_let_the_other_report)
    assert extract(*RECIPE, "--shard", "2/2").code == 0
    assert "3 slides" in sheet_of(tmp_path)


def test_what_qc_dropped_is_told_of_slides_that_are_skipped(slides, extract, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "utils.features.encoding.patch_quality", lambda patches, _: np.array(["pen"] + [""] * (len(patches) - 1))
    )
    for _ in range(2):
        assert extract(*RECIPE, "--qc").code == 0
        assert report_of(tmp_path)["reason"].str.endswith("--qc dropped 1 pen").all()
        (tmp_path / "out" / "extraction_report.csv").unlink()


def test_of_one_slide_by_two_recipes_each_has_its_preview(slides, script, tmp_path):
    for name, size in (("one", 64), ("two", 32)):
        flags = (*RECIPE[:2], "--patch_size", size, "--tissue_threshold", 0, "--preview")
        assert (
            script("extractFeatures", "--input", slides / "a.tif", "--output", tmp_path / f"{name}.h5", *flags).code
            == 0
        )
    assert {path.stem for path in (tmp_path / "previews").iterdir()} == {"one", "two"}


def test_slides_without_um_per_px_are_told_in_a_line_with_the_remedy(images, extract, tmp_path):
    for flags in (("--dry_run",), ()):
        outcome = extract(*RECIPE, "--mpp", 0.5, *flags)
        assert outcome.code == 1
        assert len(outcome.errors) == 2
        assert "the same of 5 more (s1.png, s2.png, s3.png and 2 more): its um/px is needed" in outcome.errors[1]
        assert "give it with --slide_mpp" in outcome.errors[1]
    assert len(report_of(tmp_path)) == 6
    assert extract(*RECIPE, "--mpp", 0.5, "--dry_run").out.count("failed") == 1


def test_one_value_tells_the_um_per_px_of_all_and_the_table_wins(images, extract, tmp_path):
    (tmp_path / "mpp.csv").write_text("wsi,mpp\ns0.png,0.25\n")
    flags = (*RECIPE, "--mpp", 0.5, "--slide_mpp", 0.5)
    outcome = extract(*flags, "--slides_csv", tmp_path / "mpp.csv")
    assert outcome.code == 0, outcome.err
    assert "mpp.csv: its rows win; --slide_mpp 0.5 holds for the slides without one" in outcome.err
    told = [read_bag(tmp_path / "out" / f"s{number}.h5").passport.slide["mpp"] for number in range(3)]
    assert told == [0.25, 0.5, 0.5]
    refused = extract(*flags)
    assert "s0.h5: made with another recipe (slide's mpp: found 0.25, expected 0.5)" in refused.errors[0]
    assert "out of range" in extract(*RECIPE, "--slide_mpp", 250).errors[0]


def test_slides_that_say_otherwise_themselves_are_told(slides, extract):
    outcome = extract(*RECIPE, "--slide_mpp", 0.62)
    assert outcome.code == 0
    assert "a.tif: its own um/px, 0.5, contradicts the 0.62 given for it, which is used" in outcome.err
    assert "the same of 2 more (b.tif, c.tif)" in outcome.err
    assert "contradicts" not in extract(*RECIPE, "--slide_mpp", 0.51, output="other").err


@pytest.fixture
def coarser(tmp_path) -> Path:
    """A folder of two slides of 0.25 um/px."""
    folder = tmp_path / "coarser"
    folder.mkdir()
    for name in "xy":
        write_pyramid(folder / f"{name}.tif", stained_image(192, 128, seed=7), mpp=0.25, downsamples=(1,), tile=64)
    return folder


MIXED = "the patches of 2 slides have 0.25 um/px (x.tif, y.tif), those of 3 0.5: their features show different scales"


@pytest.mark.parametrize("shards", [("1/1", "1/1"), ("1/2", "2/2")])
def test_slides_that_join_a_folder_of_another_scale_are_told(slides, coarser, script, extract, tmp_path, shards):
    """At the start, in the dry run too, in the closing lines, in the report and on the contact sheet."""
    assert extract(*RECIPE).code == 0
    if shards[0] != "1/1":
        out = tmp_path / "out"
        (out / "extraction_report.csv").rename(out / "extraction_report_1_of_2.csv")
        (coarser / "z.tif").write_bytes((coarser / "x.tif").read_bytes())  # the other shard's
    flags = ("--input_dir", coarser, "--output_dir", tmp_path / "out", *RECIPE)
    flags += () if shards[1] == "1/1" else ("--shard", shards[1])
    before = sorted((tmp_path / "out").iterdir())
    planned = script("extractFeatures", *flags, "--dry_run")
    assert sorted((tmp_path / "out").iterdir()) == before
    done = script("extractFeatures", *flags)
    assert done.code == 0
    for outcome in (planned, done):
        assert "have 0.25 um/px" in outcome.err
        assert "Note: the patches of" in outcome.out
    report = pd.read_csv(report_path_of(tmp_path, shards[1]), keep_default_na=False)
    assert report["reason"].str.contains("0.25 um/px, unlike most").sum() == (2 if shards[1] == "1/1" else 1)
    assert "Note: the patches of " in sheet_of(tmp_path)
    if shards[1] == "1/1":
        assert MIXED in planned.err
        assert f"Note: {MIXED}" in done.out
        cut = script("extractFeatures", *flags[:4], *RECIPE, "--mpp", 1, "--dry_run")
        assert "have different" not in cut.err


def report_path_of(tmp_path: Path, shard: str) -> Path:
    name = "extraction_report" if shard == "1/1" else f"extraction_report_{shard.replace('/', '_of_')}"
    return tmp_path / "out" / f"{name}.csv"


def test_a_dry_run_reads_past_damage_where_the_run_does(slides, extract):
    for path in slides.iterdir():
        path.unlink()
    path = slides / "one_level.svs"
    about = "Aperio Image Library v11.2.1 \r\n1024x768 [0,0 1024x768] (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    image = stained_image(1024, 768, seed=1)
    tifffile.imwrite(
        path, image, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None, description=about
    )
    with tifffile.TiffFile(path) as file:
        start, size = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    content = bytearray(path.read_bytes())
    content[start + size // 2 : start + size] = b"\xff" * (size - size // 2)
    path.write_bytes(content)
    flags = ("--backbone", "stain", "--patch_size", 128)
    assert "1 of 1 slide would fail" in extract(*flags, "--dry_run").out
    planned = extract(*flags, "--skip_damaged", "--dry_run")
    assert planned.code == 0, planned.err
    count = int(re.search(r"(\d+) patches to extract", planned.out)[1])
    kept = int(re.search(r"1 extracted \((\d+) patches", extract(*flags, "--skip_damaged").out)[1])
    assert 0 < kept < count <= kept + 4


def test_a_template_of_the_table_is_written_filled_in_and_given_back(images, script, extract, tmp_path):
    write_pyramid(images / "own.tif", stained_image(128, 128), mpp=0.25, downsamples=(1,), tile=64)
    (images / "bad.svs").write_text("no slide")
    table = tmp_path / "mpp.csv"
    outcome = script("extractFeatures", "--input_dir", images, "--write_slides_csv", table)
    assert outcome.code == 0, outcome.err
    assert "8 slides, 1 with their own um/px, 7 without" in outcome.out
    rows = pd.read_csv(table, index_col="wsi")
    assert rows["mpp"]["own.tif"] == 0.25
    assert rows["note"]["s0.png"] == "not in the file"
    again = script("extractFeatures", "--input_dir", images, "--write_slides_csv", table)
    assert "exists already and is not overwritten" in again.errors[0]
    (images / "bad.svs").unlink()
    rows.drop("bad.svs").assign(mpp=rows["mpp"].fillna(0.5)).to_csv(table)
    assert extract(*RECIPE, "--mpp", 0.5, "--slides_csv", table).code == 0
    rows.assign(mpp=rows["mpp"].where(rows.index == "own.tif")).to_csv(table)
    assert extract(*RECIPE, "--mpp", 0.5, "--slides_csv", table, "--limit", 1, output="empty").code == 0


def test_two_slides_of_one_name_have_no_template(slides, script, tmp_path):
    shutil.copytree(slides, slides / "site")
    outcome = script("extractFeatures", "--input_dir", slides, "--write_slides_csv", tmp_path / "mpp.csv")
    assert "a table knows slides by their names" in outcome.errors[0]
    with pytest.raises(ConfigError, match="--input_dir needs --output_dir"):
        ExtractionFiles(input_dir=slides)


def test_the_end_says_where_things_are_how_long_it_took_and_what_is_next(slides, script, extract, tmp_path):
    out = tmp_path / "out"
    words = extract(*RECIPE).out.splitlines()
    assert words[0].startswith("3 extracted (18 patches), 0 skipped, 0 no tissue, 0 failed (took ")
    assert words[1] == (
        f"Features are in {out}; report in {out / 'extraction_report.csv'}; pictures in {out / 'contact_sheet.html'}"
    )
    assert words[2] == f"Next: uv run python -m utils.audit --features_dir {out} --labels_csv labels.csv"
    one = script("extractFeatures", "--input", slides / "a.tif", "--output", tmp_path / "a.h5", *RECIPE).out
    assert f"Features are in {tmp_path / 'a.h5'}" in one
    assert "Next: uv run predict.py" in one


def test_the_end_says_first_what_to_do_about_what_failed(slides, extract, tmp_path):
    (slides / "bad.svs").write_text("no slide")
    mend, then = extract(*RECIPE).out.splitlines()[-2:]
    report = tmp_path / "out" / "extraction_report.csv"
    assert mend.startswith(f"Next: mend what failed, or the flags, as the reasons in {report} say, and extract again;")
    assert then.startswith("Then: uv run python -m utils.audit")
    assert extract(*RECIPE, "--mpp", 1).out.splitlines()[-1] == mend
    (slides / "bad.svs").unlink()
    assert extract(*RECIPE).out.splitlines()[-1].startswith("Next: uv run python -m utils.audit")


def test_features_in_a_cohorts_own_folder_are_audited_by_its_name(slides, extract, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert extract(*RECIPE, output="datasets/mine/features").out.splitlines()[-1].endswith("utils.audit --dataset mine")


def test_two_processes_on_one_folder_share_the_slides(extract, tmp_path):
    """This one begins when the other is at its first slide."""
    (tmp_path / "slides").mkdir()
    for number in range(8):
        image = stained_image(1024, 768, seed=number)
        write_pyramid(tmp_path / "slides" / f"{number}.tif", image, mpp=0.5, downsamples=(1,), tile=256)
    command = [sys.executable, ROOT / "extractFeatures.py", "--input_dir", tmp_path / "slides", "--output_dir",
               tmp_path / "out", *RECIPE]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([str(part) for part in command], **pipes)
    while process.poll() is None and not list(tmp_path.glob("out/.*.h5*")):
        time.sleep(0.005)
    outcome = extract(*RECIPE)
    other = process.communicate(timeout=240)
    assert (outcome.code, process.returncode) == (0, 0), (outcome, other)
    assert "warning" not in outcome.err + other[1]
    counts = [int(re.search(r"(\d+) extracted", out)[1]) for out in (outcome.out, other[0])]
    assert sum(counts) == 8, (outcome, other)
    report = report_of(tmp_path)
    assert sorted(report.index) == [f"{number}.h5" for number in range(8)]
    assert set(report["status"]) <= {"done", "skipped"}
    assert (report["seconds"] != "").all()
    assert (tmp_path / "out" / "contact_sheet.html").read_text().count("<li data-status") == 8
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".")]


def test_what_another_process_is_at_is_done_last_and_waited_for(
    slides, extract, tmp_path, monkeypatch, claimed_elsewhere
):
    holder, looks = claimed_elsewhere(tmp_path / "out" / "a.h5"), []

    def look(claim):
        if not looks:
            assert sorted(path.name for path in (tmp_path / "out").glob("*.h5")) == ["b.h5", "c.h5"]
            threading.Timer(0.3, lambda: (holder.kill(), holder.wait())).start()
        looks.append(is_free(claim))
        return looks[-1]

    monkeypatch.setattr(batch, "is_free", look)
    monkeypatch.setattr(batch, "SECONDS_BETWEEN_LOOKS", 0.05)
    ended = extract(*RECIPE)
    assert ended.code == 0
    assert looks == [False] * (len(looks) - 1) + [True]  # of one slide alone
    assert len(looks) > 1
    said = f"{tmp_path / 'out' / 'a.h5'}: process {holder.pid} on {platform.node()} is extracting it; waiting for it"
    assert said in ended.err
    assert report_of(tmp_path)["status"].tolist() == ["done"] * 3
    assert not list((tmp_path / "out").glob(".*"))


def test_waiting_for_another_process_can_be_interrupted(slides, extract, tmp_path, monkeypatch, claimed_elsewhere):
    claimed_elsewhere(tmp_path / "out" / "a.h5")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "is_free", interrupt)
    assert extract(*RECIPE).code == 130
    assert sorted(report_of(tmp_path).index) == ["b.h5", "c.h5"]


def test_a_dead_process_is_not_waited_for(slides, extract, tmp_path, claimed_elsewhere):
    holder = claimed_elsewhere(tmp_path / "out" / "a.h5")
    holder.kill()
    holder.wait()
    ended = extract(*RECIPE)
    assert (ended.code, "waiting" in ended.err) == (0, False)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_single_slide_that_another_process_is_at_is_one_line(slides, script, tmp_path, claimed_elsewhere):
    target = tmp_path / "out" / "a.h5"
    holder = claimed_elsewhere(target)
    ended = script("extractFeatures", "--input", slides / "a.tif", "--output", target, *RECIPE)
    assert ended.code == 1
    (line,) = ended.errors
    assert f"{target}: process {holder.pid} on {platform.node()} is extracting it; wait" in line


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_made_since_the_run_began_is_made(slides, extract, tmp_path, monkeypatch, overwrite):
    """Files of before are made anew by --overwrite, once."""
    if overwrite:
        assert extract(*RECIPE).code == 0
    work_through = extraction.work_through

    def let_another_run_pass_first(*arguments):
        monkeypatch.undo()
        assert extract(*RECIPE, "--overwrite", "--limit", 2).code == 0
        return work_through(*arguments)

    monkeypatch.setattr(extraction, "work_through", let_another_run_pass_first)
    assert extract(*RECIPE, *(["--overwrite"] if overwrite else [])).code == 0
    report = report_of(tmp_path)
    assert report["status"].to_dict() == {"a.h5": "skipped", "b.h5": "skipped", "c.h5": "done"}
    assert report["reason"].str.startswith("made by another process meanwhile; ").tolist() == [True, True, False]
    assert (report["seconds"] != "").all()


def test_why_a_slide_failed_outlives_runs_on_others(slides, extract, tmp_path):
    (slides / "z.tif").write_bytes(b"II*\0 no slide")
    assert extract(*RECIPE).code == 1
    why = report_of(tmp_path).loc["z.h5", "reason"]
    assert "z.tif" in why
    for flags in (("--limit", 1), ("--limit", 2, "--overwrite")):
        assert extract(*RECIPE, *flags).code == 0
        report = report_of(tmp_path)
        assert (report.loc["z.h5", "status"], report.loc["z.h5", "reason"]) == ("failed", why)
        assert len(report) == 4
    assert (tmp_path / "out" / "contact_sheet.html").read_text().count("<li data-status") == 4
