"""Cohorts fetched from a server on this machine that drops, truncates, corrupts and refuses as servers do."""

import csv
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datasets import download
from datasets.download import RECIPE, download_cohort, fetch
from tests.web import zipped
from utils.bags.settings import Cohort
from utils.bags.store import peek_bag
from utils.core.cohorts import KNOWN_COHORTS
from utils.core.errors import DownloadError
from utils.core.recipe import Recipe
from utils.mil_dataset import MILDataset

CONTENT = bytes(range(256)) * 20_000  # 5 MB
MD5 = hashlib.md5(CONTENT).hexdigest()  # noqa: S324 - what the record tells
DIM = 1024


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)


@pytest.fixture
def file(server):
    server.files["/file"] = CONTENT
    return f"{server.url}/file"


def test_a_dropped_connection_goes_on_where_it_broke(server, file, tmp_path):
    server.faults = ["drop", "drop", 503]
    fetch(file, tmp_path / "file", algorithm="md5", expected=MD5, size=len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + half // 2}-", f"bytes={half + half // 2}-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    server.ranges.clear()
    fetch(file, tmp_path / "file", algorithm="md5", expected=MD5)
    assert not server.ranges  # it is there


def test_a_truncated_file_of_a_server_that_tells_no_length_goes_on(server, file, tmp_path):
    server.faults = ["truncate"]
    fetch(file, tmp_path / "file", algorithm="md5", expected=MD5, size=len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-"]


def test_no_more_is_taken_than_there_is(server, file, tmp_path, monkeypatch):
    server.faults = ["endless"]
    sizes = []
    digest = hashlib.file_digest

    def measured(file, algorithm):
        sizes.append(os.fstat(file.fileno()).st_size)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", measured)
    with pytest.raises(DownloadError, match="is damaged"):
        fetch(file, tmp_path / "file", algorithm="md5", expected=MD5, size=len(CONTENT))
    assert sizes[0] <= len(CONTENT) + 2 * 2**20


def test_a_range_that_was_not_asked_for_is_not_appended(server, file, tmp_path):
    server.faults = ["drop", "elsewhere"]
    fetch(file, tmp_path / "file", algorithm="md5", expected=MD5, size=len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_fills_up_is_told_at_once(server, file, tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"file\.part: cannot be written \(.*No space left.*another --output_dir"):
        fetch(file, tmp_path / "file", algorithm="md5", expected=MD5)
    assert len(server.ranges) == 1


def test_places_that_cannot_be(file, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DownloadError, match=r"taken/inside: cannot be made .*give another --output_dir"):
        fetch(file, tmp_path / "taken" / "inside" / "file", algorithm="md5", expected=MD5)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DownloadError, match="folder: is a folder, expected a file"):
        fetch(file, tmp_path / "folder", algorithm="md5", expected=MD5)


def test_a_server_that_knows_no_ranges_begins_anew(server, file, tmp_path):
    server.faults = ["drop", "no ranges"]
    fetch(file, tmp_path / "file", algorithm="md5", expected=MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_what_a_killed_run_left_is_used_also_when_it_was_all(server, file, tmp_path):
    for left in (CONTENT[:1000], CONTENT):
        (tmp_path / "file.part").write_bytes(left)
        fetch(file, tmp_path / "file", algorithm="md5", expected=MD5)
        assert (tmp_path / "file").read_bytes() == CONTENT
        (tmp_path / "file").unlink()
    assert server.ranges == ["bytes=1000-", f"bytes={len(CONTENT)}-"]


def test_a_corrupt_file_is_removed_and_named(server, file, tmp_path):
    server.faults = ["corrupt"]
    with pytest.raises(DownloadError, match=r"is damaged \(md5 .*, expected .* and was removed; run the same"):
        fetch(file, tmp_path / "file", algorithm="md5", expected=MD5)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(b"an earlier, broken one")
    fetch(file, tmp_path / "file", algorithm="md5", expected=MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_never_answers_well_is_given_up_with_what_came_kept(server, file, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(download.log, "propagate", True)
    caplog.set_level("INFO", logger=download.log.name)
    server.faults = ["drop"] + [500] * 20
    with pytest.raises(DownloadError, match=r"cannot be fetched \(.*500.*; the first 2\.6 MB are kept: run"):
        fetch(file, tmp_path / "file", algorithm="md5", expected=MD5)
    assert (tmp_path / "file.part").stat().st_size == len(CONTENT) // 2
    assert len([record for record in caplog.records if "tried again" in record.getMessage()]) == 1
    server.ranges.clear()
    server.faults = []
    with pytest.raises(DownloadError, match="404"):
        fetch(f"{server.url}/nothing", tmp_path / "nothing", algorithm="md5", expected=MD5)
    assert len(server.ranges) == 1  # asked once


TABLE = """case_id,slide_id,site,oncotree_code,extra
TCGA-A1-A0SB,TCGA-A1-A0SB-01Z-00-DX1.B34C,A1,ACBC,x
TCGA-A1-A0SD,TCGA-A1-A0SD-01Z-00-DX1.1111.svs,A1,IDC,y
TCGA-A1-A0SE,TCGA-A1-A0SE-01Z-00-DX1.2222.svs,A1,ILC,"a, b"
TCGA-A1-A0SF,TCGA-A1-A0SF-01Z-00-DX1.3333.svs,A1,IDC,
"""
SLIDES = ("TCGA-A1-A0SD-01Z-00-DX1.1111", "TCGA-A1-A0SE-01Z-00-DX1.2222", "TCGA-A1-A0SB-01Z-00-DX1.B34C")


def archive(names=SLIDES, cohort="BRCA") -> bytes:
    return zipped({name: torch.full((5, DIM), float(number)) for number, name in enumerate(names)}, cohort)


@pytest.fixture
def published(server, monkeypatch):
    """The study's table and the record, as they are published but small, on this machine."""

    def publish(table: str = TABLE, packed: bytes | None = None, name: str = "breast") -> None:
        server.publish(monkeypatch, name, table, archive() if packed is None else packed)

    return publish


def test_a_cohort_is_fetched_unpacked_and_ready_to_train_on(published, server, tmp_path, monkeypatch, caplog):
    published()
    folder = tmp_path / "datasets" / "breast"
    with caplog.at_level("INFO"):
        download_cohort("breast", folder)
    assert {path.name for path in folder.iterdir()} == {"features", "labels.csv"}
    files = {path.name for path in (folder / "features").iterdir()}
    assert files == {f"{name}.pt" for name in SLIDES} | {"recipe.json"}
    assert not list(tmp_path.rglob("evil.pt"))
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["case_id", "wsi_id", "label"]
    assert [row["wsi_id"] for row in rows[:2]] == [SLIDES[2], SLIDES[0]]
    assert rows[2] == {
        "case_id": "TCGA-A1-A0SE", "wsi_id": SLIDES[1], "label": "ILC", "slide_id": f"{SLIDES[1]}.svs", "site": "A1",
        "oncotree_code": "ILC", "extra": "a, b",
    }  # fmt: skip
    assert "3 slides (IDC 2, ILC 1); 1 slide of ACBC" in caplog.text
    assert "1 slide without features, such as TCGA-A1-A0SF" in caplog.text
    monkeypatch.chdir(tmp_path)
    dataset = MILDataset.of_cohort(Cohort(dataset="breast", allow=("missing",)))
    assert [dataset.class_names[row.label] for row in dataset.rows] == ["IDC", "ILC"]
    assert dataset.features(1)[0, 0] == 1
    server.ranges.clear()
    server.files.pop("/record")
    download_cohort("breast", folder)  # the features are not asked for again
    assert len(server.ranges) == 1


def test_the_declared_recipe_is_the_extractors_own(published, tmp_path):
    """A model that is trained on these features finds its way to raw slides."""
    published()
    download_cohort("breast", tmp_path)
    found = peek_bag(tmp_path / "features" / f"{SLIDES[0]}.pt").passport
    assert found.recipe.as_dict() == json.loads(json.dumps(RECIPE))
    assert (found.recipe.patch_size, found.recipe.mpp) == (256, 0.5)
    transform = found.recipe.transform
    assert transform["resize"] is None
    other = Recipe(backbone="resnet50", patch_size=256, transform=transform)
    assert not found.recipe.differences(other)
    assert found.recipe.differences(replace(other, backbone="uni"))


def test_a_killed_unpacking_goes_on_and_a_broken_archive_is_named(published, server, tmp_path, monkeypatch):
    published()
    copy, copied = download.shutil.copyfileobj, []

    def killed(source, target, *size):
        copied.append(target)
        if len(copied) == 2:
            raise KeyboardInterrupt
        copy(source, target, *size)

    monkeypatch.setattr(download.shutil, "copyfileobj", killed)
    with pytest.raises(KeyboardInterrupt):
        download_cohort("breast", tmp_path)
    monkeypatch.setattr(download.shutil, "copyfileobj", copy)
    features = tmp_path / "features"
    assert [path.name for path in features.iterdir()] == [f"{SLIDES[0]}.pt"]
    before = (features / f"{SLIDES[0]}.pt").stat().st_mtime_ns
    server.ranges.clear()
    download_cohort("breast", tmp_path)
    assert (features / f"{SLIDES[0]}.pt").stat().st_mtime_ns == before
    assert len(list(features.glob("*.pt"))) == 3
    assert len(server.ranges) == 2  # the table and the record; the archive was there

    published(packed=b"PK no zip at all")
    with pytest.raises(DownloadError, match=r"BRCA\.zip: damaged"):
        download_cohort("breast", tmp_path / "other")


def test_labels_alone_and_a_table_of_ones_own_stays(published, server, tmp_path):
    published()
    download_cohort("breast", tmp_path, labels_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]
    assert len(server.ranges) == 1
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label\nmine,mine,IDC\n")
    with pytest.raises(DownloadError, match=r"labels\.csv: is there, and is not the study's table; move it away"):
        download_cohort("breast", tmp_path, labels_only=True)
    assert "mine" in (tmp_path / "labels.csv").read_text()
    server.files["/tables/tcga_brca_subset.csv"] += b"tampered"
    with pytest.raises(DownloadError, match=r"is damaged \(sha256"):
        download_cohort("breast", tmp_path / "other", labels_only=True)


def test_tupacs_numbers_are_its_classes(published, tmp_path, monkeypatch, caplog):
    table = "case_id,slide_id,label\n1,TUPAC-TR-001,0\n2,TUPAC-TR-002,1\n"
    published(table, archive(["TUPAC-TR-001", "TUPAC-TR-002"], "TUPAC"), "tupac")
    with caplog.at_level("INFO"):
        download_cohort("tupac", tmp_path / "datasets" / "tupac")
    assert "2 slides (Low 1, High 1)" in caplog.text
    monkeypatch.chdir(tmp_path)
    dataset = MILDataset.of_cohort(Cohort(dataset="tupac"))
    assert [dataset.class_names[row.label] for row in dataset.rows] == ["Low", "High"]


def test_a_full_disk_is_known_before(published, server, tmp_path, monkeypatch):
    published()
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DownloadError, match=r"0\.0 MB free, but BRCA\.zip needs .* give --output_dir"):
        download_cohort("breast", tmp_path)
    assert len(server.ranges) == 2
    monkeypatch.undo()


def test_the_record_without_the_archive_is_told(published, server, tmp_path):
    published()
    server.files["/record"] = b'{"files": []}'
    with pytest.raises(DownloadError, match=r"does not tell where BRCA\.zip is \(not listed\)"):
        download_cohort("breast", tmp_path)


def test_the_commands(published, server, tmp_path, monkeypatch, capsys):
    published()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["download", "breast"])
    download.main()
    assert "uv run train.py --mil LiteMIL --dataset breast" in capsys.readouterr().out
    slide = b"a slide"
    server.publish_slide(monkeypatch, slide)
    monkeypatch.setattr("sys.argv", ["download", "test-slide"])
    download.main()
    assert (tmp_path / "testSlides" / "CMU-1-Small-Region.svs").read_bytes() == slide


def test_the_real_slide_is_the_published_one(shared_data):
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == download.TEST_SLIDE_SHA256
    assert path.stat().st_size == download.TEST_SLIDE_BYTES


def test_every_known_cohort_has_a_source():
    assert set(download.SOURCES) == set(KNOWN_COHORTS)
