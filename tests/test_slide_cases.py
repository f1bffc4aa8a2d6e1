"""Files and folders on which an extraction once went wrong without a word: what comes of each by the plain command."""

import shutil

import numpy as np
import pandas as pd
import pytest

from utils.bags.store import read_bag

FLAGS = ("--backbone", "stain", "--patch_size", 64)


@pytest.fixture
def cases(shared_cases):
    return shared_cases / "slides"


def extracted(script, slide, target, *flags):
    done = script("extractFeatures", "--input", slide, "--output", target, *(flags or FLAGS))
    assert done.code == 0, done.err
    return read_bag(target)


@pytest.mark.parametrize(
    ("name", "mpp", "patches"),
    [
        ("label_page_first.tif", 0.5, 95),
        ("untiled_resolution_tags.tif", 0.5, 7),
        ("untiled_ome_xml.ome.tif", 0.5, 7),
        ("pyramid_in_subifds.ome.tif", 0.5, 95),
        ("padded_levels.tif", 0.5, 60),
    ],
)
def test_the_slide_is_read_at_its_own_scale(script, cases, tmp_path, name, mpp, patches):
    bag = extracted(script, cases / name, tmp_path / "a.h5", *FLAGS, "--mpp", 0.5)
    assert bag.passport.slide["mpp"] == pytest.approx(mpp)
    assert len(bag.coords) >= patches


def test_levels_padded_to_tiles_give_the_tissue_of_level_0(script, cases, tmp_path):
    coords = {}
    for name, flags in (("levels", ()), ("plain", ("--level", 0))):
        bag = extracted(script, cases / "padded_levels.tif", tmp_path / f"{name}.h5", *FLAGS, *flags)
        coords[name] = bag.coords.tolist()
    assert coords["levels"] == coords["plain"]


def test_outlines_in_either_frame_give_the_same_patches(script, cases, tmp_path):
    found = []
    for frame in ("relative", "absolute"):
        flags = (*FLAGS, "--tissue", cases / f"mirax_{frame}", "--tissue_strict")
        found.append(extracted(script, cases / "mirax" / "one.mrxs", tmp_path / f"{frame}.h5", *flags).coords.tolist())
    assert found[0] == found[1]
    assert found[0]


def test_a_mirax_slide_opens_by_its_folder(script, cases, tmp_path):
    slides = tmp_path / "slides"
    shutil.copytree(cases / "mirax" / "one", slides / "one")
    (slides / "one.mrxs").touch()
    bag = extracted(script, slides / "one.mrxs", tmp_path / "a.h5")
    assert len(bag.coords) > 50
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):  # left there by others
        (slides / "one" / name).write_text("x")
    assert (
        "1 skipped"
        in script("extractFeatures", "--input", slides / "one.mrxs", "--output", tmp_path / "a.h5", *FLAGS).out
    )
    index = slides / "one" / "Index.dat"
    index.chmod(0o644)
    index.write_bytes(index.read_bytes() + b"\0")
    changed = script("extractFeatures", "--input", slides / "one.mrxs", "--output", tmp_path / "a.h5", *FLAGS)
    assert "a.h5: the slide's data has changed since it was made (slide's data_hash: " in changed.errors[0]


def test_the_folder_that_a_mirax_slide_lacks_is_named(script, cases, tmp_path):
    slides, elsewhere = tmp_path / "slides", tmp_path / "elsewhere"
    slides.mkdir()
    shutil.copytree(cases / "mirax", elsewhere)
    shutil.copyfile(cases / "mirax" / "one.mrxs", slides / "alone.mrxs")
    (slides / "link.mrxs").symlink_to(elsewhere / "one.mrxs")
    flags = ("--input_dir", slides, "--output_dir", tmp_path / "out", *FLAGS)
    done = script("extractFeatures", *flags)
    assert f"alone.mrxs: its folder {slides / 'alone'} is missing, which holds the slide's pixels; copy it" in done.err
    assert f"link.mrxs is a link: link {elsewhere / 'one'} beside it too" in done.err.replace("\n", " ")
    (slides / "link").symlink_to(elsewhere / "one")
    (slides / "alone.mrxs").unlink()
    assert script("extractFeatures", *flags).code == 0


def test_mixed_scales_are_told(script, cases, tmp_path):
    for name in ("slide.svs", "slide_40x.svs"):
        (tmp_path / "slides").mkdir(exist_ok=True)
        shutil.copyfile(cases / name, tmp_path / "slides" / name)
    done = script("extractFeatures", "--input_dir", tmp_path / "slides", "--output_dir", tmp_path / "out", *FLAGS)
    assert done.code == 0
    assert done.out.count("their features show different scales") == 1
    assert "their features show different scales" in done.err


def test_pens_are_no_tissue_and_pinkish_glass_is_glass(script, cases, tmp_path):
    flags = ("--backbone", "stain", "--mpp", 8, "--patch_size", 16, "--qc")
    white, pinkish = (
        extracted(script, cases / f"glass_{name}.tif", tmp_path / f"{name}.h5", *flags) for name in ("white", "pinkish")
    )
    assert len(white.coords) == 71
    assert len(pinkish.coords) == pytest.approx(71, abs=1)
    assert len(extracted(script, cases / "pens.tif", tmp_path / "pens.h5", *flags).coords) <= 120


def test_a_grey_image_is_said_to_be_grey(script, cases, tmp_path):
    done = script("extractFeatures", "--input", cases / "grey.png", "--output", tmp_path / "a.h5", *FLAGS)
    assert done.code == 1
    assert "grey.png: it is greyscale" in done.errors[0]


def test_a_damaged_tile_costs_its_patches(script, cases, tmp_path):
    bag = extracted(script, cases / "one_damaged_tile.svs", tmp_path / "a.h5", *FLAGS, "--skip_damaged")
    assert bag.passport.slide["dropped"] == {"damaged": 16}
    inside = (bag.coords >= 256).all(axis=1) & (bag.coords < 512).all(axis=1)
    assert not inside.any()
    assert np.isfinite(bag.features).all()


def people_have(folder, cases):
    """Folders as people have them: each with one slide, that of the links with two."""
    slide, grey = cases / "slide.svs", cases / "grey.png"
    files = {
        "a_thumbnail_beside/a.svs": slide, "a_thumbnail_beside/a.png": grey,
        "c_nas/a.svs": slide, "c_nas/masks/a_mask.tif": cases / "pens.tif",
        "c_nas/@eaDir/a.svs/SYNOPHOTO_THUMB_XL.png": grey,
        "elsewhere/s2.svs": slide, "d_links/s1.svs": slide,
        "e_endings/a.svs": slide, "f_two_endings/x.svs": slide,
        "f_two_endings/x.tif": cases / "pyramid_in_subifds.ome.tif",
    }  # fmt: skip
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    (folder / "d_links" / "patient2").symlink_to("../elsewhere")
    (folder / "d_links" / "s3.svs").symlink_to("/nowhere/s3.svs")
    for ending in ("vsi", "isyntax", "kfb", "sdpc", "qptiff"):
        (folder / "e_endings" / f"b.{ending}").write_text("x")


FOLDERS = {
    "a_thumbnail_beside": (["a.svs"], "a.png"),
    "c_nas": (["a.svs"], "a_mask.tif"),
    "d_links": (["s1.svs", "s2.svs"], "s3.svs"),
    "e_endings": (["a.svs"], "b.isyntax, b.kfb, b.qptiff, b.sdpc and 1 more"),
    "f_two_endings": (["x.svs"], "x.tif"),
}


@pytest.mark.parametrize(("name", "slides", "left_out"), [(name, *about) for name, about in FOLDERS.items()])
def test_folders_that_people_have(script, cases, tmp_path, name, slides, left_out):
    people_have(tmp_path, cases)
    done = script("extractFeatures", "--input_dir", tmp_path / name, "--output_dir", tmp_path / "out", *FLAGS)
    assert done.code == 0, done.err
    report = pd.read_csv(tmp_path / "out" / "extraction_report.csv")
    assert sorted(slide.rpartition("/")[2] for slide in report["slide"]) == slides
    assert set(report["status"]) == {"done"}
    assert left_out in done.err


def test_features_made_inside_the_folder_of_slides_are_no_slides(script, cases, tmp_path):
    shutil.copyfile(cases / "slide.svs", tmp_path / "a.svs")
    for name in ("feat_A", "feat_B"):
        done = script("extractFeatures", "--input_dir", tmp_path, "--output_dir", tmp_path / name, *FLAGS)
        assert done.code == 0, done.err
        assert "1 extracted" in done.out
