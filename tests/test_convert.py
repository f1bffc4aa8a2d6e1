"""Feature files of other toolkits become ours: one by one and in batches that may be killed."""

import csv
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.bags import writers
from tests.cohort import synthetic_bag, write_cohort
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, peek_bag, read_bag, write_bag
from utils.convert import REPORT, Conversion, FileStatus, convert, convert_one, summary
from utils.core.errors import ConfigError, FeatureFileError, SlideError
from utils.slides.open_slides import PLAUSIBLE_MPP

ROOT = Path(__file__).resolve().parents[1]
NAME, MPP = writers.NAME, writers.MPP
FEATURES, COORDS = writers.arrays()
LAYOUTS = {
    "litemil_h5": lambda folder: writers.litemil_h5(folder, FEATURES, COORDS),
    "litemil_pt": lambda folder: writers.litemil_pt(folder, FEATURES, COORDS),
    "clam_h5": lambda folder: writers.clam_h5(folder, FEATURES, COORDS),
    "clam_pt": lambda folder: [writers.clam_patches(folder, COORDS), writers.clam_pt(folder, FEATURES)][1],
    "trident": lambda folder: writers.trident(folder, FEATURES, COORDS),
    "stamp": lambda folder: writers.stamp(folder, FEATURES, COORDS),
    "slideflow": lambda folder: writers.slideflow(folder, FEATURES, COORDS),
    "slide2vec": lambda folder: writers.slide2vec(folder, FEATURES, COORDS),
    "atlaspatch": lambda folder: writers.atlaspatch(folder, {"uni_v1": FEATURES}, COORDS),
    "torchmil": lambda folder: writers.torchmil(folder, FEATURES, COORDS),
}


def run(source: Path, output: Path, **settings) -> list[FileStatus]:
    return convert(Conversion(input=source, output=output, **settings))


def assert_same(found: Bag, wanted: Bag) -> None:
    assert np.array_equal(found.features, wanted.features)
    assert found.features.dtype == wanted.features.dtype
    assert (found.coords is None) == (wanted.coords is None)
    assert wanted.coords is None or np.array_equal(found.coords, wanted.coords)
    assert found.patch_size_level0 == wanted.patch_size_level0
    assert found.passport == wanted.passport


def statuses_of(statuses: list[FileStatus]) -> dict[str, str]:
    return {status.file.name: status.status for status in statuses}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.suffix != ".csv"}


def report(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / REPORT).open(newline="") as file:
        return {Path(row["file"]).name: row for row in csv.DictReader(file)}


@pytest.fixture
def bags(tmp_path) -> Path:
    """Six slides of a synthetic cohort, float32."""
    return write_cohort(tmp_path / "cohort", patients_per_class=3, slides_per_patient=1, dtype="float32")[1]


# One file


@pytest.mark.parametrize("ending", ["h5", "pt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_ours(tmp_path, layout, ending):
    source = LAYOUTS[layout](tmp_path / "theirs")
    (status,) = run(source, tmp_path / "ours", format=ending, mpp=MPP)
    assert status == FileStatus(source, "done", "", *FEATURES.shape, "float32", "yes")
    found = read_bag(tmp_path / "ours" / f"{NAME}.{ending}")  # the dots of a name stay
    assert np.array_equal(found.features, FEATURES)
    assert np.array_equal(found.coords, COORDS)
    assert_same(found, read_bag(source, mpp=MPP))
    assert [path.name for path in (tmp_path / "ours").iterdir()] == [f"{NAME}.{ending}"]


def test_there_and_back_again_is_the_same_bytes(tmp_path, bags):
    for source in sorted(bags.iterdir())[:2]:
        run(source, tmp_path / "there.pt", overwrite=True)
        run(tmp_path / "there.pt", tmp_path / "back.h5", overwrite=True)
        assert (tmp_path / "back.h5").read_bytes() == source.read_bytes()


def test_the_output_says_the_format_or_format_does(tmp_path, bags):
    source = bags / "P000-S1.h5"
    (tmp_path / "v1.0").mkdir()
    for output, ending, wanted in [
        ("a.pt", None, "a.pt"),
        ("a.h5", "h5", "a.h5"),
        ("b", None, "b/P000-S1.h5"),
        ("b", "pt", "b/P000-S1.pt"),
        ("v1.0", "pt", "v1.0/P000-S1.pt"),
    ]:
        run(source, tmp_path / output, format=ending)
        assert_same(read_bag(tmp_path / wanted), read_bag(source))


@pytest.mark.parametrize(
    ("output", "settings", "message"),
    [
        ("a.npz", {}, r"a\.npz: ends in '\.npz'; end it in \.h5 or \.pt"),
        ("a.pt", {"format": "h5"}, r"a\.pt: does not end in --format h5"),
        ("cohort/features/P000-S1.h5", {}, r"P000-S1\.h5: the file to convert"),
        ("cohort/features", {"overwrite": True}, r"P000-S1\.h5: the file to convert"),
    ],
)
def test_outputs_for_one_file_that_cannot_be(tmp_path, bags, output, settings, message):
    before = contents(bags)
    with pytest.raises(ConfigError, match=message):
        run(bags / "P000-S1.h5", tmp_path / output, **settings)
    assert contents(bags) == before


def test_an_input_that_is_not_there_or_no_feature_file(tmp_path):
    (tmp_path / "a.npz").touch()
    for name, message in {"b.h5": "no such file or folder", "a.npz": r"ends in '\.npz'; expected a feature"}.items():
        with pytest.raises(FeatureFileError, match=message):
            run(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_single_file_raises(tmp_path):
    source = writers.trident_slide(tmp_path, FEATURES)
    with pytest.raises(FeatureFileError, match=r"one vector for the whole slide"):
        run(source, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


# Precision


def test_dtype_rounds_the_features_and_the_passport_says_so(tmp_path, bags):
    source = bags / "P000-S1.h5"
    wanted = read_bag(source)
    run(source, tmp_path / "half.h5", dtype="float16")
    half = read_bag(tmp_path / "half.h5")
    assert half.passport.recipe == replace(wanted.passport.recipe, dtype="float16")
    assert_same(half, replace(wanted, features=wanted.features.astype("float16"), passport=half.passport))
    # Widening does not bring back what rounding took.
    run(tmp_path / "half.h5", tmp_path / "wide.h5", dtype="float32")
    wide = read_bag(tmp_path / "wide.h5")
    assert_same(wide, replace(half, features=half.features.astype("float32")))
    assert wide.passport.recipe.dtype == "float16"


def test_what_float16_cannot_hold_is_refused_by_name(tmp_path):
    features = np.ones((4, 3), np.float32)
    features[2, 1] = -70_000
    write_bag(tmp_path / "large.h5", Bag(features))
    with pytest.raises(FeatureFileError, match=r"large\.h5: features of up to 7e\+04, and float16 ends at 6\.55e\+04"):
        run(tmp_path / "large.h5", tmp_path / "out.h5", dtype="float16")
    assert not (tmp_path / "out.h5").exists()
    features[2, 1] = 65_504
    write_bag(tmp_path / "large.h5", Bag(features))
    run(tmp_path / "large.h5", tmp_path / "out.h5", dtype="float16")
    assert read_bag(tmp_path / "out.h5").features.max() == 65_504


def test_without_dtype_features_stay_as_they_are_stored(tmp_path):
    for dtype in ("float16", "float32"):
        write_bag(tmp_path / f"{dtype}.h5", Bag(FEATURES.astype(dtype)))
        run(tmp_path / f"{dtype}.h5", tmp_path / "out.pt", overwrite=True)
        assert peek_bag(tmp_path / "out.pt").dtype == dtype


# The slides' resolution


def test_one_mpp_or_each_slides_own():
    with pytest.raises(ConfigError, match=r"one of --mpp .* and --slides_dir"):
        Conversion(input=Path("a"), output=Path("b"), mpp=0.5, slides_dir=Path("slides"))
    limits = next(field for field in Conversion.__dataclass_fields__.values() if field.name == "mpp").metadata
    assert (limits["least"], limits["most"]) == PLAUSIBLE_MPP


def write_slide(path: Path, mpp: float | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_pyramid(path, stained_image(64, 64), mpp=mpp, downsamples=(1,), tile=64)


def test_each_slides_own_mpp_places_its_patches(tmp_path, caplog):
    first = writers.stamp(tmp_path, FEATURES, COORDS)
    folder = first.parent
    for name in ("twice", "unsaid", "lost"):
        shutil.copy(first, folder / f"{name}.h5")
    write_slide(tmp_path / "slides" / "deep" / f"{NAME}.tif", MPP)
    write_slide(tmp_path / "slides" / "twice.tif", 2 * MPP)
    write_slide(tmp_path / "slides" / "unsaid.tif", None)
    statuses = run(folder, tmp_path / "out", slides_dir=tmp_path / "slides")
    coordinates = {status.file.stem: status.coordinates for status in statuses}
    assert coordinates == {NAME: "yes", "twice": "yes", "unsaid": "withheld", "lost": "withheld"}
    assert np.array_equal(read_bag(tmp_path / "out" / f"{NAME}.h5").coords, COORDS)
    assert np.array_equal(read_bag(tmp_path / "out" / "twice.h5").coords, COORDS // 2)
    assert read_bag(tmp_path / "out" / "lost.h5").coords is None
    assert "no slide for lost.h5; " in caplog.text
    assert "unsaid" not in caplog.text


def test_slides_that_do_not_fit(tmp_path, bags):
    write_slide(tmp_path / "slides" / "other.tif", MPP)
    with pytest.raises(ConfigError, match=r"no slide has a feature file's name, such as P000-S1\.h5"):
        run(bags, tmp_path / "out", slides_dir=tmp_path / "slides")
    for folder in "ab":
        write_slide(tmp_path / "slides" / folder / "P000-S1.tif", MPP)
    with pytest.raises(ConfigError, match=r"a/P000-S1\.tif and .*b/P000-S1\.tif both have its name"):
        run(bags, tmp_path / "out", slides_dir=tmp_path / "slides")
    with pytest.raises(SlideError, match="not a folder"):
        run(bags, tmp_path / "out", slides_dir=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


# A folder


def test_a_folder_is_converted_without_its_subfolders(tmp_path, bags):
    shutil.copytree(bags, bags / "inner")
    (bags / ".hidden.h5").write_bytes(b"a fork of another system")
    (bags / "notes.txt").write_text("no features")
    statuses = run(bags, tmp_path / "out", format="pt")
    names = [f"P{number:03d}-S1" for number in range(6)]
    assert [status.file.name for status in statuses] == [f"{name}.h5" for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*(f"{name}.pt" for name in names), REPORT]
    for name in names:
        assert_same(read_bag(tmp_path / "out" / f"{name}.pt"), read_bag(bags / f"{name}.h5"))


def test_a_folder_of_folders_lists_them(tmp_path):
    writers.clam_h5(tmp_path, FEATURES, COORDS)
    writers.clam_pt(tmp_path, FEATURES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FeatureFileError, match=r"no feature file .* give one of its folders: h5_files, pt_files$"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(FeatureFileError, match=r"empty: no feature file .* the folder that holds them"):
        run(tmp_path / "empty", tmp_path / "out")


def test_two_files_of_one_slide_are_refused_before_anything_is_written(tmp_path, bags):
    shutil.copy(bags / "P003-S1.h5", bags / "P003-S1.hdf5")
    with pytest.raises(ConfigError, match=r"P003-S1\.h5 and .*P003-S1\.hdf5 would both be written to .*P003-S1\.h5"):
        run(bags, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_sources_are_never_in_the_way(tmp_path, bags):
    (tmp_path / "link").symlink_to(bags)
    for output in (bags, bags / ".." / "features", tmp_path / "link"):
        with pytest.raises(ConfigError, match="the folder of the files to convert"):
            run(bags, output, format="pt", overwrite=True)
    with pytest.raises(ConfigError, match=r"the name of a file, where .* is a folder"):
        run(bags, tmp_path / "out.h5")
    run(bags, bags / "converted")
    assert statuses_of(run(bags, bags / "converted")) == dict.fromkeys(contents(bags / "converted"), "there already")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "P000-S1.h5").symlink_to(bags / "P000-S1.h5")
    with pytest.raises(ConfigError, match="the file to convert"):
        run(bags, linked, overwrite=True)


@pytest.fixture
def faulty(bags) -> Path:
    """The six slides, three of them bad."""
    write_bag(bags / "P001-S1.h5", Bag(np.full((3, 16), np.nan, np.float32)))
    (bags / "P002-S1.h5").write_bytes((bags / "P002-S1.h5").read_bytes()[:-200])
    with h5py.File(bags / "P003-S1.h5", "w") as file:
        file["features"] = np.ones(16, np.float32)
    return bags


def test_a_bad_file_does_not_stop_the_others(tmp_path, faulty, script):
    done = script("utils.convert", faulty, tmp_path / "out")
    assert done.code == 1
    assert done.errors == [f"error: {faulty}: 3 of 6 files not converted; {tmp_path / 'out' / REPORT} says why"]
    assert sorted(contents(tmp_path / "out")) == ["P000-S1.h5", "P004-S1.h5", "P005-S1.h5"]
    rows = report(tmp_path / "out")
    assert [name for name, row in rows.items() if row["status"] == "failed"] == [f"P00{n}-S1.h5" for n in (1, 2, 3)]
    assert "48 values are NaN or infinite" in rows["P001-S1.h5"]["reason"]
    assert "P002-S1.h5: not a readable HDF5 file" in rows["P002-S1.h5"]["reason"]
    assert "one vector for the whole slide" in rows["P003-S1.h5"]["reason"]
    assert "P003-S1.h5: features of shape (16,): one vector for the whole slide" in done.out
    # Mended, the same command does the rest.
    write_cohort(faulty.parent, patients_per_class=3, slides_per_patient=1, dtype="float32")
    for name in ("P000-S1.h5", "P004-S1.h5", "P005-S1.h5"):
        (tmp_path / "out" / name).touch()  # newer than its source again
    again = script("utils.convert", faulty, tmp_path / "out")
    assert again.code == 0
    assert [row["status"] for row in report(tmp_path / "out").values()].count("there already") == 3


def test_the_report_and_the_table_account_for_every_file(tmp_path, script):
    path = writers.stamp(tmp_path, FEATURES, COORDS)
    shutil.copy(path, path.with_stem("second"))
    writers.trident(tmp_path, FEATURES, COORDS).rename(path.with_stem("third"))
    torch.save(torch.ones(1200, 8), path.parent / "fourth.pt")
    done = script("utils.convert", path.parent, tmp_path / "out", "--dtype", "float16")
    assert done.code == 0
    assert done.out.startswith(
        "status  features   coordinates  files  patches\n"
        "done    4 float16  withheld         2       14\n"
        "done    4 float16  yes              1        7\n"
        "done    8 float16  none             1    1,200\n"
        "Coordinates withheld (where um per pixel is what lacks, give --mpp or --slides_dir):\n"
        f"  {NAME}.h5, second.h5: its coords are in um, and the slide's um per pixel is not known\n"
    )
    assert f"They are in {tmp_path / 'out'} (took " in done.out
    assert done.out.rstrip().endswith(f"utils.audit --labels_csv LABELS.csv --features_dir {tmp_path / 'out'}")
    rows = report(tmp_path / "out")
    assert list(rows) == [f"{NAME}.h5", "fourth.pt", "second.h5", "third.h5"]
    assert list(rows["third.h5"].values())[1:7] == ["done", "", "7", "4", "float16", "yes"]
    assert rows["second.h5"]["coordinates"] == "withheld"
    assert "in um" in rows["second.h5"]["reason"]


def test_the_summary_stays_short():
    statuses = [FileStatus(Path(f"in/{n}.h5"), "failed", f"in/{n}.h5: same") for n in range(10_000)]
    statuses += [FileStatus(Path(f"in/x{n}.h5"), "failed", f"in/x{n}.h5: reason {n}") for n in range(40)]
    lines = summary(statuses).splitlines()
    assert lines[:3] == [
        "status  features  coordinates   files  patches",
        "failed  -         -            10,040        0",
        "Failed:",
    ]
    assert lines[3] == "  0.h5, 1.h5, 2.h5 and 9997 more: same"
    assert lines[4] == "  x0.h5: reason 0"
    assert lines[-1] == f"  and 31 more reasons: see {REPORT}"
    assert len(lines) == 14


# Once more


def test_what_is_there_is_not_read_nor_written_again(tmp_path, bags, monkeypatch):
    run(bags, tmp_path / "out", dtype="float16")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.h5")}
    monkeypatch.setattr("utils.convert.read_bag", None)
    statuses = run(bags, tmp_path / "out", dtype="float16")
    assert {status.status for status in statuses} == {"there already"}
    assert {status.dtype for status in statuses} == {"float16"}
    assert {status.coordinates for status in statuses} == {"yes"}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_there_and_something_else_stays_unless_overwrite_is_given(tmp_path, bags):
    source, target = bags / "P000-S1.h5", tmp_path / "out.h5"
    bag = read_bag(source)
    half = replace(bag, features=bag.features.astype("float16"))
    other = replace(bag.passport, recipe=replace(bag.passport.recipe, backbone="another"))
    for there, message in [
        (half, r"features: found \(\d+, 16\) float16, expected \(\d+, 16\) float32"),
        (replace(bag, features=bag.features[1:], coords=bag.coords[1:]), r"features: found"),
        (replace(bag, passport=other), "backbone: found another, expected synthetic"),
        (replace(bag, passport=None), "backbone: found none, expected synthetic"),
        (replace(bag, coords=None), "other coordinates"),
        (replace(bag, coords=bag.coords + 1), "other coordinates"),
        (None, "not a readable HDF5 file.*the output exists"),
    ]:
        target.write_bytes(b"no HDF5") if there is None else write_bag(target, there)
        before = target.read_bytes()
        with pytest.raises(FeatureFileError, match=rf"{target}: .*{message}.*convert with --overwrite"):
            run(source, target)
        assert target.read_bytes() == before
        assert [status.status for status in run(source, target, overwrite=True)] == ["done"]
        assert target.read_bytes() == source.read_bytes()


def test_a_source_that_is_newer_is_told(tmp_path, bags):
    source, target = bags / "P000-S1.h5", tmp_path / "out.h5"
    run(source, target)
    now = target.stat().st_mtime_ns
    os.utime(source, ns=(now, now))
    assert run(source, target)[0].status == "there already"
    os.utime(source, ns=(now, now + 1))
    with pytest.raises(FeatureFileError, match="older than its source"):
        run(source, target)


def test_an_mpp_that_was_not_known_before_or_was_another(tmp_path):
    source, target = writers.stamp(tmp_path, FEATURES, COORDS), tmp_path / "out.h5"
    assert run(source, target)[0].coordinates == "withheld"
    assert run(source, target) == [replace(run(source, target)[0], status="there already")]
    with pytest.raises(FeatureFileError, match="other coordinates"):
        run(source, target, mpp=MPP)
    assert run(source, target, mpp=MPP, overwrite=True)[0].coordinates == "yes"
    assert run(source, target, mpp=MPP)[0].status == "there already"
    with pytest.raises(FeatureFileError, match="other coordinates"):
        run(source, target, mpp=2 * MPP)


def test_another_encoder_of_the_same_width_is_not_taken_for_the_same(tmp_path):
    source = writers.atlaspatch(tmp_path, {"uni_v1": FEATURES, "conch": FEATURES}, COORDS)
    conversion = Conversion(input=source, output=tmp_path / "out.h5", feat_type="conch")
    assert convert_one(source, tmp_path / "out.h5", conversion).status == "done"
    assert convert_one(source, tmp_path / "out.h5", conversion).status == "there already"
    with pytest.raises(FeatureFileError, match="backbone: found conch"):
        convert_one(source, tmp_path / "out.h5", replace(conversion, feat_type="uni_v1"))


def test_a_killed_batch_goes_on_to_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(60):
        bag = synthetic_bag(f"S{number:03d}", rng.standard_normal((64, 32)).astype("float32"), rng)
        write_bag(tmp_path / "in" / f"S{number:03d}.pt", bag)
    settings = "--dtype", "float16"
    command = [sys.executable, "-m", "utils.convert", tmp_path / "in", tmp_path / "out", *settings]
    batch = subprocess.Popen([str(part) for part in command], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out/*.h5"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    batch.kill()
    assert batch.wait() == -9
    there = contents(tmp_path / "out")
    assert 5 <= len(there) < 60
    assert not (tmp_path / "out" / REPORT).exists()

    statuses = run(tmp_path / "in", tmp_path / "out", dtype="float16")
    assert [status.status for status in statuses].count("there already") == len(there)
    run(tmp_path / "in", tmp_path / "undisturbed", dtype="float16")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert len(contents(tmp_path / "out")) == 60


def test_a_real_bag_without_a_unit_keeps_its_features_and_tells_why_not_its_coordinates(tmp_path, shared_data):
    (source,) = (shared_data / "bags").glob("mopadi_*.h5")
    (status,) = run(source, tmp_path / "out.h5", mpp=0.25)
    assert (status.patches, status.dim, status.dtype, status.coordinates) == (777, 512, "float32", "withheld")
    assert "no known unit" in status.reason
    with h5py.File(source) as file:
        assert np.array_equal(read_bag(tmp_path / "out.h5").features, file["feats"][()])


def test_a_link_that_leads_nowhere_is_a_failed_file(tmp_path):
    (tmp_path / "in").mkdir()
    write_bag(tmp_path / "in" / "a.h5", Bag(np.ones((2, 3), "f4")))
    (tmp_path / "in" / "b.h5").symlink_to(tmp_path / "nowhere.h5")
    statuses = convert(Conversion(input=tmp_path / "in", output=tmp_path / "out"))
    assert [(status.file.name, status.status) for status in statuses] == [("a.h5", "done"), ("b.h5", "failed")]
    assert "no such file" in statuses[1].reason


def test_the_report_keeps_the_rows_of_files_that_are_there(tmp_path):
    for folder, name in (("one", "a"), ("two", "b")):
        write_bag(tmp_path / folder / f"{name}.h5", Bag(np.ones((3, 4), np.float32)))
        run(tmp_path / folder, tmp_path / "out")
    first = report(tmp_path / "out")
    assert list(first) == ["a.h5", "b.h5"]
    (refused,) = run(tmp_path / "two", tmp_path / "out", dtype="float16")
    assert refused.status == "failed"
    assert report(tmp_path / "out") == {"a.h5": first["a.h5"], "b.h5": first["b.h5"] | {"last_error": refused.reason}}
