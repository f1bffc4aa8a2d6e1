"""Extraction of folders: which slides, at which resolution, past interruptions and full devices."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from tests.conftest import BACKBONE, PATCH
from tests.synthetic import stained_image, write_pyramid
from tests.test_commands import ROOT, recipe
from utils.bags.store import read_bag, write_bag
from utils.core.errors import ConfigError, FeatureFileError, RecipeError, SlideError
from utils.core.files import machine_name
from utils.core.recipe import Recipe
from utils.features import encoding, extraction
from utils.features.extraction import extract_slides
from utils.features.extractor import WSIFeatureExtractor
from utils.features.one_slide import extract_one
from utils.features.settings import Extraction
from utils.slides.batch import slide_targets
from utils.slides.find import find_slides
from utils.slides.settings import ExtractionFiles

THRESHOLD = ("--tissue_threshold", 0.3)


def weights(cohort) -> tuple:
    return "--backbone", BACKBONE, "--weights", cohort.weights, "--patch_size", PATCH, *THRESHOLD


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.h5"))}


@pytest.fixture
def extractor(slide_cohort):
    def make(**settings) -> WSIFeatureExtractor:
        common = {"level": 1, "tissue_threshold": 0.3, "weights": slide_cohort.weights, "device": "cpu"}
        return WSIFeatureExtractor(BACKBONE, PATCH, **{**common, **settings})

    return make


# Resolution


@pytest.mark.parametrize("flags", [("--mpp", 1.0), ("--magnification", 10)])
def test_a_resolution_that_a_level_has_gives_that_levels_features(slide_cohort, script, tmp_path, flags):
    slide = slide_cohort.slides / "P00_0.tif"
    done = script("extractFeatures", "--input", slide, "--output", tmp_path / "a.h5", *weights(slide_cohort), *flags)
    assert done.code == 0, done.err
    found, expected = read_bag(tmp_path / "a.h5"), read_bag(slide_cohort.features / "P00_0.h5")
    np.testing.assert_array_equal(found.features, expected.features)
    np.testing.assert_array_equal(found.coords, expected.coords)
    assert found.passport.recipe.level is None
    assert found.passport.recipe.mpp == 1.0
    assert found.passport.slide["mpp_delivered"] == pytest.approx(1.0)


def test_a_resolution_between_levels(slide_cohort, extractor):
    result = extractor(level=None, mpp=0.8).process(slide_cohort.slides / "P00_0.tif")
    assert result["metadata"]["slide"]["mpp_delivered"] == pytest.approx(0.8)
    assert result["metadata"]["slide"]["patch_size_level0"] == round(PATCH * 1.6)
    assert set(np.diff(np.unique(result["coords"][:, 0]))) <= {round(PATCH * 1.6) * n for n in range(1, 9)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": 1, "mpp": 0.5}, "--level and --mpp: give only one"),
        ({"mpp": 0.5, "magnification": 20}, "--mpp and --magnification: give only one"),
        ({"allow_upsample": True}, "--allow_upsample goes with --mpp or --magnification"),
        ({"mpp": 100}, "--mpp 100: out of range"),
    ],
)
def test_resolutions_that_contradict(settings, message):
    with pytest.raises(ConfigError, match=message):
        Extraction(**settings)


def test_a_slide_too_coarse_is_refused_and_the_batch_goes_on(slide_cohort, script, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    write_pyramid(slides / "coarse.tif", stained_image(512, 512), mpp=2.0, downsamples=(1,))
    write_pyramid(slides / "fine.tif", stained_image(512, 512), mpp=0.25, downsamples=(1,))
    flags = ("--input_dir", slides, "--output_dir", tmp_path / "out", *weights(slide_cohort), "--mpp", 0.5)
    done = script("extractFeatures", *flags)
    assert done.code == 1
    assert "coarse.tif: too coarse for 0.5 um/px" in done.errors[0]
    report = pd.read_csv(tmp_path / "out" / "extraction_report.csv")
    assert dict(zip(report["slide"].map(lambda slide: Path(slide).name), report["status"], strict=True)) == {
        "coarse.tif": "failed", "fine.tif": "done",
    }  # fmt: skip
    assert script("extractFeatures", *flags, "--allow_upsample").code == 0


def test_a_table_tells_the_um_per_px_that_slides_lack(slide_cohort, script, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("a.tif", "b.tif"):
        write_pyramid(slides / name, stained_image(512, 512), downsamples=(1,))
    flags = ("--input_dir", slides, "--output_dir", tmp_path / "out", *weights(slide_cohort), "--mpp", 0.5)
    done = script("extractFeatures", *flags)
    assert done.code == 1
    assert "--slides_csv" in done.errors[0]
    (tmp_path / "mpp.csv").write_text("wsi,mpp\na,0.25\nb.tif,0.5\n")
    done = script("extractFeatures", *flags, "--slides_csv", tmp_path / "mpp.csv")
    assert done.code == 0, done.err
    sizes = {name: read_bag(tmp_path / "out" / f"{name}.h5").patch_size_level0 for name in "ab"}
    assert sizes == {"a": 2 * PATCH, "b": PATCH}
    (tmp_path / "mpp.csv").write_text("wsi,mpp\na,0.25\nb.tif,0.25\n")
    other = script("extractFeatures", *flags, "--slides_csv", tmp_path / "mpp.csv")
    assert "slide's mpp: found 0.5, expected 0.25" in other.errors[0]


def test_slides_of_different_scales_are_told_apart_at_the_start_and_at_the_end(script, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name, mpp in (("a", 0.5), ("b", 0.25), ("c", 0.52), ("d", 0.5)):
        write_pyramid(slides / f"{name}.tif", stained_image(320, 256), mpp=mpp, downsamples=(1,))
    flags = ("--input_dir", slides, "--backbone", "stain", "--patch_size", 32)
    told = "the patches of 1 slide have 0.25 um/px (b.tif), those of 3 0.5"
    done = script("extractFeatures", *flags, "--output_dir", tmp_path / "out")
    assert done.code == 0
    assert told in done.err
    assert told in done.out
    assert "0.25 um/px, unlike most" in (tmp_path / "out" / "extraction_report.csv").read_text()
    sheet = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert told in sheet
    assert "unlike most" in sheet
    alike = script("extractFeatures", *flags, "--output_dir", tmp_path / "other", "--mpp", 0.5)
    assert "the patches of" not in alike.out + alike.err
    (slides / "b.tif").unlink()
    alike = script("extractFeatures", *flags, "--output_dir", tmp_path / "third")
    assert "the patches of" not in alike.out + alike.err


def test_what_is_wrong_with_the_um_per_px_of_many_slides_is_told_once(script, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in "abcd":
        write_pyramid(slides / f"{name}.tif", stained_image(320, 256), mpp=300, downsamples=(1,))
    done = script("extractFeatures", "--input_dir", slides, "--output_dir", tmp_path / "out", "--backbone", "stain",
                  "--patch_size", 32)  # fmt: skip
    assert done.code == 0, done.err
    assert done.err.count("um/px in the file is not plausible") == 2  # the first, and the number of the others


# Damage


def damage_tile(path, number):
    """Make a tile of level 0 unreadable."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        place, count = page.dataoffsets[number], page.databytecounts[number]
    content = bytearray(path.read_bytes())
    content[place + 2 : place + count] = bytes(count - 2)
    path.write_bytes(content)


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])  # read past OpenSlide, and by it
def test_patches_that_cannot_be_read_are_dropped_and_counted_when_asked(script, tmp_path, compression):
    slides, pixels = tmp_path / "slides", np.full((512, 512, 3), (225, 150, 190), np.uint8)
    slides.mkdir()
    tifffile.imwrite(slides / "a.tif", pixels, tile=(128, 128), photometric="rgb", compression=compression,
                     metadata=None, resolution=(20000, 20000), resolutionunit="CENTIMETER")  # fmt: skip
    damage_tile(slides / "a.tif", 5)  # of 4 x 4 tiles
    flags = ("--input_dir", slides, "--output_dir", tmp_path / "out", "--backbone", "stain", "--patch_size", 64)
    assert script("extractFeatures", *flags).code == 1
    done = script("extractFeatures", *flags, "--skip_damaged")
    assert done.code == 0, done.err
    assert "a.tif: 4 of 64 patches cannot be read, and are dropped; the first: level 0" in done.err
    bag = read_bag(tmp_path / "out" / "a.h5")
    assert bag.passport.slide["dropped"] == {"damaged": 4}
    corners = {tuple(corner) for corner in bag.coords.tolist()}
    assert corners == {(x, y) for x in range(0, 512, 64) for y in range(0, 512, 64)} - {
        (x, y) for x in (128, 192) for y in (128, 192)
    }
    assert np.isfinite(bag.features).all()
    assert "4 cannot be read" in (tmp_path / "out" / "extraction_report.csv").read_text()


def test_a_full_disk_ends_the_batch_at_once(slide_cohort, script, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.bags.bag_writer.HDF5Writer.append", full)
    done = script("extractFeatures", "--input_dir", slide_cohort.slides, "--output_dir", tmp_path / "out",
                  "--backbone", "stain", "--patch_size", 64, "--no-preview")  # fmt: skip
    assert done.code == 1
    assert len(done.errors) == 1
    assert "No space left on device" in done.errors[0]


def test_a_kept_edge_is_part_of_the_recipe(script, tmp_path):
    slides, features = tmp_path / "slides", tmp_path / "features"
    slides.mkdir()
    Image.fromarray(stained_image(155, 104)).save(slides / "a.png")
    flags = ("--input_dir", slides, "--backbone", "stain", "--patch_size", 50, "--tissue_threshold", 0)
    flags += ("--output_dir", features)
    kept = (*flags, "--edge", "keep")
    assert script("extractFeatures", *kept).code == 0
    bag = read_bag(features / "a.h5")
    assert bag.coords.tolist() == [[x, y] for y in (0, 50, 54) for x in (0, 50, 100, 105)]
    assert bag.passport.recipe.edge == "keep"
    assert "edges kept" in (features / "contact_sheet.html").read_text()
    assert "1 skipped" in script("extractFeatures", *kept).out
    refused = script("extractFeatures", *flags)
    assert refused.code == 1
    assert "made with another recipe (edge: found keep, expected drop)" in refused.errors[0]
    assert script("extractFeatures", *flags, "--overwrite").code == 0
    assert len(read_bag(features / "a.h5").coords) == 6
    refused = script("extractFeatures", *kept)
    assert "made with another recipe (edge: found drop, expected keep)" in refused.errors[0]


def test_files_that_do_not_record_the_edge_are_of_the_recipe_that_drops_it(script, tmp_path):
    Image.fromarray(stained_image(155, 104)).save(tmp_path / "a.png")
    target = tmp_path / "a.h5"
    flags = ("--input", tmp_path / "a.png", "--output", target, "--backbone", "stain", "--patch_size", 50)
    assert script("extractFeatures", *flags, "--tissue_threshold", 0).code == 0
    bag = read_bag(target)
    older = {name: value for name, value in bag.passport.recipe.as_dict().items() if name != "edge"}
    write_bag(target, replace(bag, passport=replace(bag.passport, recipe=Recipe.from_dict(older))))
    assert "edge" not in read_bag(target).passport.recipe.as_dict()
    for given in ((), ("--edge", "drop")):
        assert "1 skipped" in script("extractFeatures", *flags, "--tissue_threshold", 0, *given).out
    assert "edge: found drop, expected keep" in script(
        "extractFeatures", *flags, "--tissue_threshold", 0, "--edge", "keep"
    ).errors[0]  # fmt: skip


def test_new_slides_keep_their_edge_where_the_training_features_did(tmp_path):
    Image.fromarray(stained_image(155, 104)).save(tmp_path / "a.png")
    made = WSIFeatureExtractor("stain", 50, tissue_threshold=0, edge="keep")
    again = WSIFeatureExtractor.of_recipe(made.recipe, weights=None, batch_size=64, device="cpu")
    np.testing.assert_array_equal(
        again.process(tmp_path / "a.png")["coords"], made.process(tmp_path / "a.png")["coords"]
    )
    dropped = WSIFeatureExtractor("stain", 50, tissue_threshold=0).recipe
    older = {name: value for name, value in dropped.as_dict().items() if name != "edge"}
    for made_by in (dropped, Recipe.from_dict(older)):
        extractor = WSIFeatureExtractor.of_recipe(made_by, weights=None, batch_size=64, device="cpu")
        assert extractor.config.edge == "drop"
        assert len(extractor.process(tmp_path / "a.png")["coords"]) == 6


# Tissue


def test_tissue_goes_out_and_comes_back_edited(slide_cohort, script, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    write_pyramid(slides / "a.tif", stained_image(512, 448, seed=2), mpp=0.5, downsamples=(1, 2), tile=128)
    flags = ("--input_dir", slides, *recipe(slide_cohort))
    assert script("extractFeatures", *flags, "--output_dir", tmp_path / "one", "--save_tissue").code == 0
    drawn = tmp_path / "one" / "tissue" / "a.geojson"
    assert script("extractFeatures", *flags, "--output_dir", tmp_path / "two", "--tissue", drawn.parent).code == 0
    one, two = (read_bag(tmp_path / name / "a.h5") for name in ("one", "two"))
    np.testing.assert_array_equal(one.coords, two.coords)
    square = [[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]
    drawn.write_text(json.dumps([{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [square]}}]))
    again = script("extractFeatures", *flags, "--output_dir", tmp_path / "two", "--tissue", drawn.parent)
    assert again.code == 0, again.err
    assert "1 extracted" in again.out
    assert read_bag(tmp_path / "two" / "a.h5").coords.tolist() == [[0, 0], [128, 0], [0, 128], [128, 128]]


def test_of_many_slides_only_those_with_mended_outlines_are_extracted_anew(script, tmp_path):
    slides, features = tmp_path / "slides", tmp_path / "features"
    slides.mkdir()
    for number in range(12):
        write_pyramid(slides / f"s{number}.tif", stained_image(320, 256, seed=number), mpp=0.5, downsamples=(1, 2))
    flags = ("--input_dir", slides, "--output_dir", features, "--backbone", "stain", "--patch_size", 32)
    assert script("extractFeatures", *flags, "--save_tissue").code == 0
    times = {path.stem: path.stat().st_mtime_ns for path in features.glob("*.h5")}
    drawn = features / "tissue"
    square = {"type": "Polygon", "coordinates": [[[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]]}
    mended = [drawn / "s3.geojson", drawn / "s7.tif.geojson"]
    for path in mended:
        path.write_text(json.dumps([{"type": "Feature", "geometry": square}]))
    (drawn / "s7.geojson").unlink()
    (drawn / "s8.geojson").unlink()

    planned = script("extractFeatures", *flags, "--tissue", drawn, "--dry_run")
    assert planned.out.count("to extract") >= 2
    done = script("extractFeatures", *flags, "--tissue", drawn)
    assert done.code == 0, done.err
    assert "2 extracted" in done.out
    assert "10 skipped" in done.out
    assert f"Tissue by {drawn} in 2 of 12 slides, else detected" in done.out
    assert {stem for stem, time in times.items() if (features / f"{stem}.h5").stat().st_mtime_ns != time} == {
        "s3",
        "s7",
    }
    report = (features / "extraction_report.csv").read_text()
    assert report.count("its outlines have changed") == 2

    for given in (("--tissue", drawn), ()):  # the same command again, and the plain one
        again = script("extractFeatures", *flags, *given)
        assert again.code == 0, again.err
        assert "0 extracted" in again.out
        assert "12 skipped" in again.out
    assert "2 slides keep the tissue of earlier outlines; --tissue DIR compares it" in again.out
    assert (features / "extraction_report.csv").read_text().count("its tissue is that of earlier outlines") == 2
    both = drawn / "s3.tif.geojson"
    both.write_bytes(mended[0].read_bytes())
    failed = script("extractFeatures", *flags, "--tissue", drawn)
    assert "which are the outlines of" in failed.err


def as_qupath_exports(content):
    """What QuPath writes of a file of ours that it has read: its own members, none of ours, in an order of its own."""
    features = [
        {
            "type": "Feature",
            "id": feature["id"],
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[float(round(x)), float(round(y))] for x, y in ring]
                                for ring in feature["geometry"]["coordinates"]],
            },
            "properties": feature["properties"] | {"isLocked": False, "measurements": {}},
        }
        for feature in reversed(content["features"])
    ]  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


def test_outlines_that_come_back_unchanged_from_qupath_are_the_detectors(script, tmp_path):
    slides, features, drawn = (tmp_path / name for name in ("slides", "features", "drawn"))
    slides.mkdir()
    drawn.mkdir()
    for number in range(12):
        image = np.full((300, 400, 3), 243, np.uint8)
        image[40:260, 30:350] = stained_image(320, 220, seed=number)
        write_pyramid(slides / f"s{number}.tif", image, mpp=0.5, downsamples=(1, 2))
    flags = ("--input_dir", slides, "--output_dir", features, "--backbone", "stain", "--patch_size", 32)
    assert script("extractFeatures", *flags, "--save_tissue").code == 0
    for path in (features / "tissue").iterdir():
        content = as_qupath_exports(json.loads(path.read_text()))
        if path.stem in ("s3", "s7"):
            square = [[0, 0], [200, 0], [200, 200], [0, 200], [0, 0]]
            content["features"][0]["geometry"]["coordinates"] = [square]
        (drawn / path.name).write_text(json.dumps(content))
    before = {path.stem: path.read_bytes() for path in features.glob("*.h5")}
    done = script("extractFeatures", *flags, "--tissue", drawn)
    assert done.code == 0, done.err
    assert "2 extracted" in done.out
    assert "10 skipped" in done.out
    assert f"Tissue by {drawn} in 2 of 12 slides, else detected" in done.out
    assert {stem for stem, data in before.items() if (features / f"{stem}.h5").read_bytes() != data} == {"s3", "s7"}
    report = pd.read_csv(features / "extraction_report.csv", keep_default_na=False).set_index("output")
    assert set(report.index[report["tissue"] == "outlines"]) == {"s3.h5", "s7.h5"}
    for name in ("s3", "s7"):  # and back to the detector's
        (drawn / f"{name}.geojson").write_bytes((features / "tissue" / f"{name}.geojson").read_bytes())
    again = script("extractFeatures", *flags, "--tissue", drawn)
    assert "2 extracted" in again.out
    assert {path.stem: path.read_bytes() for path in features.glob("*.h5")} == before


def test_outlines_of_a_slide_that_the_detector_refuses_are_compared(script, tmp_path):
    slides, features, drawn = (tmp_path / name for name in ("slides", "features", "drawn"))
    slides.mkdir()
    drawn.mkdir()
    write_pyramid(slides / "dark.tif", np.full((256, 256, 3), 20, np.uint8), mpp=0.5, downsamples=(1, 2))
    square = {"type": "Polygon", "coordinates": [[[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]]}
    (drawn / "dark.geojson").write_text(json.dumps([{"type": "Feature", "geometry": square}]))
    flags = ("--input_dir", slides, "--output_dir", features, "--backbone", "stain", "--patch_size", 32)
    for count in (1, 0):
        done = script("extractFeatures", *flags, "--tissue", drawn)
        assert f"{count} extracted" in done.out, done.err


def test_outlines_that_are_gone_and_files_of_no_slide_are_said(script, tmp_path):
    slides, features, drawn = (tmp_path / name for name in ("slides", "features", "drawn"))
    slides.mkdir()
    drawn.mkdir()
    for name in ("case_a", "case_b", "case_c"):
        write_pyramid(slides / f"{name}.tif", stained_image(320, 256, seed=1), mpp=0.5, downsamples=(1, 2))
    square = {"type": "Polygon", "coordinates": [[[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]]}
    for name in ("case_a.geojson", "case_b.tif.GeoJSON", "case_c.GEOJSON"):
        (drawn / name).write_text(json.dumps([{"type": "Feature", "geometry": square}]))
    flags = ("--input_dir", slides, "--output_dir", features, "--backbone", "stain", "--patch_size", 32)
    done = script("extractFeatures", *flags, "--tissue", drawn)
    assert f"Tissue by {drawn} in 3 of 3 slides" in done.out
    assert "match no slide" not in done.err
    (drawn / "case_a.geojson").rename(drawn / "case_a1.geojson")
    (drawn / "case_b.tif.GeoJSON").rename(drawn / "x9.geojson")
    done = script("extractFeatures", *flags, "--tissue", drawn, "--limit", 2)
    assert "2 skipped" in done.out
    assert f"Tissue by {drawn} in 0 of 2 slides, else detected" in done.out
    assert f"2 slides keep the tissue of earlier outlines, of which {drawn} has no file: put it back" in done.out
    unused = "2 of 3 files match no slide by name, and are not used: case_a1.geojson (did you mean case_a.geojson?), x9"
    assert unused in done.err
    one = ("--input", slides / "case_a.tif", "--output", tmp_path / "a.h5", *flags[4:], "--tissue", drawn)
    assert "no file for case_a.tif; there are case_a1.geojson, " in script("extractFeatures", *one).err


def test_a_slide_whose_tissue_nobody_drew_fails(slide_cohort, script, tmp_path):
    flags = ("--input", slide_cohort.slides / "P00_0.tif", "--output", tmp_path / "a.h5", *recipe(slide_cohort))
    done = script("extractFeatures", *flags, "--tissue", tmp_path, "--tissue_strict")
    assert "P00_0.geojson: missing; draw the slide's tissue" in done.errors[0]
    assert "--tissue_strict goes with --tissue" in script("extractFeatures", *flags, "--tissue_strict").errors[0]
    (tmp_path / "drawn").mkdir()
    folder = ("--input_dir", slide_cohort.slides, "--output_dir", tmp_path / "out", *recipe(slide_cohort), "--limit", 1)
    done = script("extractFeatures", *folder, "--tissue", tmp_path / "drawn", "--tissue_strict")
    assert f"Tissue by {tmp_path / 'drawn'} in 0 of 1 slide\n" in done.out
    done = script("extractFeatures", *flags, "--tissue", tmp_path / "nowhere")
    assert "no such folder" in done.errors[0]


def test_quality_control_drops_patches_and_tells_why(slide_cohort, script, tmp_path, monkeypatch):
    slide = slide_cohort.slides / "P00_0.tif"
    whole = read_bag(slide_cohort.features / "P00_0.h5")

    def judge(patches, mpp):
        assert mpp == pytest.approx(1.0, rel=1e-3)
        return np.where(
            np.arange(len(patches)) % 3 == 0, "pen", np.where(np.arange(len(patches)) % 3 == 1, "", "white")
        )

    monkeypatch.setattr(encoding, "patch_quality", judge)
    flags = ("--input_dir", slide.parent, "--limit", 1, "--output_dir", tmp_path, *recipe(slide_cohort), "--qc")
    done = script("extractFeatures", *flags)
    assert done.code == 0, done.err
    bag = read_bag(tmp_path / "P00_0.h5")
    np.testing.assert_array_equal(bag.coords, whole.coords[1::3])
    np.testing.assert_allclose(bag.features, whole.features[1::3], rtol=1e-2, atol=1e-3)
    assert bag.passport.slide["dropped"] == {"pen": len(whole.coords[::3]), "white": len(whole.coords[2::3])}
    assert bag.passport.recipe.qc
    report = pd.read_csv(tmp_path / "extraction_report.csv")
    assert report["reason"][0] == f"--qc dropped {len(whole.coords[::3])} pen, {len(whole.coords[2::3])} white"
    monkeypatch.setattr(encoding, "patch_quality", lambda patches, _: np.full(len(patches), "blurred"))
    done = script("extractFeatures", *flags, "--overwrite")
    assert done.code == 0
    assert "1 no tissue" in done.out
    assert "which is all; leave the slide out" in done.err
    plain = [flag for flag in flags if flag != "--qc"]
    assert "qc: found {" in script("extractFeatures", *plain).errors[0]


def test_a_folder_is_to_be_looked_at(slide_cohort, script, tmp_path):
    slides = slide_cohort.slides / "nested"
    flags = ("--input_dir", slides, "--output_dir", tmp_path / "out", *recipe(slide_cohort))
    assert script("extractFeatures", *flags).code == 0
    pictures = sorted((tmp_path / "out" / "previews").iterdir())
    assert [path.stem for path in pictures] == sorted(path.stem for path in slides.iterdir())
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) <= 1200
    sheet = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert all(f'src="previews/{path.name}"' in sheet for path in pictures)
    shutil.rmtree(tmp_path / "out")
    assert script("extractFeatures", *flags, "--no-preview").code == 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".h5", ".csv"}
    one = ("--input", slide_cohort.slides / "P00_0.tif", "--output", tmp_path / "one" / "a.h5", *recipe(slide_cohort))
    assert script("extractFeatures", *one).code == 0
    assert not (tmp_path / "one" / "previews").exists()
    assert script("extractFeatures", *one, "--overwrite", "--preview").code == 0
    assert (tmp_path / "one" / "previews" / "a.jpg").is_file()


def test_a_slide_without_tissue_is_to_be_looked_at_too(slide_cohort, script, tmp_path):
    (tmp_path / "slides").mkdir()
    write_pyramid(tmp_path / "slides" / "glass.tif", np.full((800, 800, 3), 243, np.uint8), mpp=0.5, downsamples=(1, 2))
    flags = ("--input_dir", tmp_path / "slides", "--output_dir", tmp_path / "out", *recipe(slide_cohort))
    assert "glass.tif  no tissue" in script("extractFeatures", *flags, "--dry_run").out
    assert not (tmp_path / "out").exists()
    assert "1 no tissue" in script("extractFeatures", *flags).out
    assert "none of" in (tmp_path / "out" / "extraction_report.csv").read_text()
    with Image.open(tmp_path / "out" / "previews" / "glass.jpg") as picture:
        assert picture.size[0] > 100
    assert 'src="previews/glass.jpg"' in (tmp_path / "out" / "contact_sheet.html").read_text()
    assert not list((tmp_path / "out").glob("*.h5*"))


# Folders


def test_an_extraction_beside_the_slides_goes_on_from_there(slide_cohort, script, tmp_path):
    """What it has written there, pictures among them, are no slides."""
    for name, output in (("within", "within/features"), ("same", "same")):
        shutil.copytree(slide_cohort.slides / "nested", tmp_path / name)
        flags = ("--input_dir", tmp_path / name, "--output_dir", tmp_path / output, *recipe(slide_cohort))
        first, second = (script("extractFeatures", *flags) for _ in range(2))
        assert (first.code, second.code) == (0, 0), second.err
        count = len(list((slide_cohort.slides / "nested").iterdir()))
        assert first.out.startswith(f"{count} extracted")
        assert f"0 extracted (0 patches), {count} skipped" in second.out


def test_each_subfolders_slide_has_its_own_tissue(slide_cohort, script, tmp_path):
    places = []
    for name, flip in (("p1", 1), ("p2", -1)):
        (tmp_path / "slides" / name).mkdir(parents=True)
        image = np.full((512, 512, 3), 243, np.uint8)
        image[:, :200] = stained_image(200, 512, seed=1)
        write_pyramid(tmp_path / "slides" / name / "x.tif", image[:, ::flip], mpp=0.5, downsamples=(1, 2))
    flags = ("--input_dir", tmp_path / "slides", *recipe(slide_cohort), "--keep_structure", "--no-preview")
    assert script("extractFeatures", *flags, "--output_dir", tmp_path / "one", "--save_tissue").code == 0
    drawn = tmp_path / "one" / "tissue"
    assert sorted(path.relative_to(drawn).as_posix() for path in drawn.rglob("*.*")) == ["p1/x.geojson", "p2/x.geojson"]
    done = script("extractFeatures", *flags, "--output_dir", tmp_path / "two", "--tissue", drawn)
    assert done.code == 0, done.err
    for name in ("p1", "p2"):
        one, two = (read_bag(tmp_path / run / name / "x.h5") for run in ("one", "two"))
        np.testing.assert_array_equal(one.coords, two.coords)
        places.append(one.coords[:, 0].mean())
    assert places[1] > places[0] + 100
    for given, message in (("--save_tissue", "--save_tissue writes what"), ("--tissue_threshold=0", "has no meaning")):
        refused = script("extractFeatures", *flags, "--output_dir", tmp_path / "three", "--tissue", drawn, given)
        assert refused.code == 1
        assert message in refused.errors[0]


def test_rows_of_the_slides_csv_that_match_no_slide_are_told(slide_cohort, script, tmp_path):
    (tmp_path / "mpp.csv").write_text("wsi,mpp\nP00_0,0.5\nP00_1.TIFF,0.5\ntypo,0.5\n")
    flags = ("--input_dir", slide_cohort.slides, "--output_dir", tmp_path / "out", *recipe(slide_cohort), "--limit", 1)
    done = script("extractFeatures", *flags, "--slides_csv", tmp_path / "mpp.csv")
    assert done.code == 0
    assert "mpp.csv: 2 of 3 rows match no slide of" in done.err
    assert "by name: P00_1.TIFF, typo" in done.err


def test_what_killed_runs_left_is_cleared_everywhere(slide_cohort, script, tmp_path):
    left = [tmp_path / place / f".a.{machine_name()}-999999999.1.part" for place in ("", "previews", "tissue")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    flags = ("--input_dir", slide_cohort.slides, "--output_dir", tmp_path, *recipe(slide_cohort), "--limit", 1)
    assert script("extractFeatures", *flags).code == 0
    assert not any(path.exists() for path in left)


def test_the_device_chooses_the_precision_and_a_batch_goes_on_elsewhere(slide_cohort, tmp_path, monkeypatch):
    slide = slide_cohort.slides / "P00_0.tif"
    settings = {"backbone": BACKBONE, "weights": slide_cohort.weights, "patch_size": PATCH, "level": 1}
    extract_one(WSIFeatureExtractor(**settings), slide, tmp_path / "a.h5")
    monkeypatch.setattr(WSIFeatureExtractor, "amp_dtype", torch.float16)
    assert extract_one(WSIFeatureExtractor(**settings), slide, tmp_path / "a.h5").status == "skipped"
    with pytest.raises(RecipeError, match="precision"):
        extract_one(WSIFeatureExtractor(**settings, precision="fp32"), slide, tmp_path / "a.h5")


@pytest.mark.parametrize(("backbone", "recorded"), [(BACKBONE, "tf32"), ("stain", "float32")])
def test_a_card_with_tf32_is_recorded_and_a_descriptor_does_without(slide_cohort, monkeypatch, backbone, recorded):
    weights = slide_cohort.weights if backbone == BACKBONE else None
    extractor = WSIFeatureExtractor(backbone, PATCH, weights=weights, device="cpu")
    monkeypatch.setattr("utils.features.extractor.uses_tf32", lambda precision, device: precision != "fp32")
    assert extractor.recipe.precision == recorded


def test_a_name_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(FeatureFileError, match=r"a\.txt: ends in '\.txt'"):
        WSIFeatureExtractor("stain").process("no slide", tmp_path / "a.txt")


def test_subfolders_are_kept_where_asked(slide_cohort, script, tmp_path):
    flags = ("--input_dir", slide_cohort.slides, "--output_dir", tmp_path, *recipe(slide_cohort))
    assert script("extractFeatures", *flags, "--keep_structure").code == 0
    assert {path.parent.name for path in tmp_path.rglob("*.h5")} == {tmp_path.name, "nested"}
    made = contents(tmp_path)
    assert {Path(name).name: content for name, content in made.items()} == contents(slide_cohort.features)


def test_shards_share_the_slides_out_largest_first(slide_cohort):
    def targets(**settings):
        files = ExtractionFiles(input_dir=slide_cohort.slides, output_dir=Path("out"), **settings)
        return list(slide_targets(files, find_slides(slide_cohort.slides)))

    parts = [targets(shard=f"{index}/3") for index in (1, 2, 3)]
    assert sorted(slide for part in parts for slide in part) == sorted(targets())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    sizes = [[slide.stat().st_size for slide in part] for part in parts]
    assert all(part == sorted(part, reverse=True) for part in sizes)
    assert [part[0] for part in sizes] == sorted((part[0] for part in sizes), reverse=True)


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_shard_that_is_none(shard):
    with pytest.raises(ConfigError, match=f"--shard {shard}: give i/n"):
        ExtractionFiles(input_dir=Path("in"), output_dir=Path("out"), shard=shard)


def test_each_shard_has_its_own_report(slide_cohort, script, tmp_path):
    flags = ("--input_dir", slide_cohort.slides, "--output_dir", tmp_path, *recipe(slide_cohort))
    for index in (1, 2):
        assert script("extractFeatures", *flags, "--shard", f"{index}/2").code == 0
    reports = [pd.read_csv(tmp_path / f"extraction_report_{index}_of_2.csv") for index in (1, 2)]
    assert pd.concat(reports)["slide"].is_unique
    assert contents(tmp_path) == contents(slide_cohort.features)


def test_the_report_tells_of_what_was_there(slide_cohort, script, tmp_path):
    flags = ("--input_dir", slide_cohort.slides / "nested", "--output_dir", tmp_path, *recipe(slide_cohort))
    for status in ("done", "skipped"):
        assert script("extractFeatures", *flags).code == 0
        report = pd.read_csv(tmp_path / "extraction_report.csv")
        assert set(report["status"]) == {status}
        lengths = [len(read_bag(tmp_path / f"{Path(slide).stem}.h5").features) for slide in report["slide"]]
        assert list(report["patches"]) == lengths
        assert report["mpp"].to_numpy() == pytest.approx(1.0, rel=1e-3)


def test_a_dry_run_counts_and_writes_nothing(slide_cohort, script, tmp_path):
    flags = ("--input_dir", slide_cohort.slides, "--output_dir", tmp_path / "out", *recipe(slide_cohort))
    done = script("extractFeatures", *flags, "--dry_run")
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    patches = sum(len(read_bag(path).features) for path in slide_cohort.features.glob("*.h5"))
    assert f"{patches} patches to extract" in done.out
    assert "patches/s, as just tried on cpu" in done.out
    assert "Nothing was extracted" in done.out
    assert done.out.count("to extract") == 10 + 1
    again = script("extractFeatures", "--input_dir", slide_cohort.slides, "--output_dir", slide_cohort.features,
                   *recipe(slide_cohort), "--dry_run")  # fmt: skip
    assert "0 patches to extract" in again.out
    assert again.out.count("skipped") == 10


def test_several_devices_share_the_slides(slide_cohort, extractor, tmp_path):
    used = []
    both = extractor(device="cpu,cpu")
    original = WSIFeatureExtractor.extract_to

    def spy(self, *arguments):
        used.append(id(self))
        time.sleep(0.05)  # so that neither does all
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WSIFeatureExtractor, "extract_to", spy)
        statuses = extract_slides(both, ExtractionFiles(input_dir=slide_cohort.slides, output_dir=tmp_path))
    assert [status.status for status in statuses] == ["done"] * 10
    assert len(set(used)) == 2
    assert contents(tmp_path) == contents(slide_cohort.features)


# What goes wrong


def test_what_a_device_cannot_hold_goes_in_halves(slide_cohort, extractor, monkeypatch, caplog):
    whole = extractor(batch_size=8).process(slide_cohort.slides / "P00_0.tif")["features"]
    small = extractor(batch_size=8)
    embed, sizes = small.backbone.embed, []

    def limited(patches):
        if len(patches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(patches))
        return embed(patches)

    monkeypatch.setattr(small.backbone, "embed", limited)
    halved = small.process(slide_cohort.slides / "P00_0.tif")["features"]
    np.testing.assert_allclose(halved, whole, rtol=1e-2, atol=1e-3)
    assert set(sizes) == {1}
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert said[-1] == "cpu: out of memory; going on with batches of 1"
    assert len(said) == len(set(said)) <= 3


def test_a_device_that_holds_no_patch_is_an_error(slide_cohort, extractor, monkeypatch):
    small = extractor()

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(small.backbone, "embed", full)
    with pytest.raises(SlideError, match="does not hold the backbone with a single patch"):
        small.process(slide_cohort.slides / "P00_0.tif")


def test_what_is_no_slides_fault_ends_the_batch_with_a_report(slide_cohort, extractor, monkeypatch, tmp_path):
    original, count = extraction.extract_one, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(extraction, "extract_one", interrupted)
    files = ExtractionFiles(input_dir=slide_cohort.slides, output_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        extract_slides(extractor(), files)
    assert len(pd.read_csv(tmp_path / "extraction_report.csv")) == 3
    assert len(list(tmp_path.glob("*.h5"))) == 3
    monkeypatch.undo()
    statuses = extract_slides(extractor(), files)
    assert sorted(status.status for status in statuses) == ["done"] * 7 + ["skipped"] * 3
    assert contents(tmp_path) == contents(slide_cohort.features)


def test_a_folder_that_cannot_be_written_is_told_before_any_slide(slide_cohort, extractor, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(extraction, "extract_one", lambda *_: pytest.fail("a slide was begun"))
    with pytest.raises(ConfigError, match=r"file/features: cannot be written .*; choose another output folder"):
        extract_slides(
            extractor(), ExtractionFiles(input_dir=slide_cohort.slides, output_dir=tmp_path / "file/features")
        )


def test_a_damaged_slide_leaves_no_file(shared_data, slide_cohort, script, tmp_path):
    done = script("extractFeatures", "--input", shared_data / "bad_slides" / "unreadable.svs", "--output",
                  tmp_path / "a.h5", *weights(slide_cohort), "--patch_size", 8, "--tissue_threshold", 0)  # fmt: skip
    assert done.code == 1
    assert "unreadable.svs" in done.errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signals_leave_whole_files_only(slide_cohort, tmp_path, number, code):
    process = started(slide_cohort, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.h5")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    made = contents(tmp_path)
    expected = contents(slide_cohort.features)
    assert all(expected[name] == content for name, content in made.items())
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".h5", ".csv", ".jpg"}


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_the_files_are_the_same(slide_cohort, tmp_path):
    rng = np.random.default_rng(0)
    start = time.monotonic()
    assert started(slide_cohort, tmp_path / "whole").wait(timeout=300) == 0
    whole = time.monotonic() - start
    kills = 0
    while kills < 20:
        process = started(slide_cohort, tmp_path / "killed")
        time.sleep(rng.uniform(0.2, whole))
        kills += process.poll() is None
        process.kill()
        process.wait()
        if kills % 5 == 0:  # or all is done after a few
            for path in (tmp_path / "killed").glob("*.h5"):
                path.unlink()
    assert started(slide_cohort, tmp_path / "killed").wait(timeout=300) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") == contents(slide_cohort.features)
    suffixes = {path.suffix for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert suffixes == {".h5", ".csv", ".html", ".jpg"}


def started(cohort, target: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / "extractFeatures.py", "--input_dir", cohort.slides, "--output_dir", target]
    return subprocess.Popen([str(part) for part in (*command, *recipe(cohort))], stderr=subprocess.PIPE, text=True)
