"""Which files of a folder are slides, and what is said of the others."""

import os
import re

import pytest

from utils.slides.find import find_slides, look_for_slides, no_slide_words


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder, **keywords):
    return [path.relative_to(folder).as_posix() for path in find_slides(folder, **keywords)]


def reasons(folder, **keywords):
    left_out = look_for_slides(folder, **keywords).left_out
    return {reason: [path.relative_to(folder).as_posix() for path in paths] for reason, paths in left_out.items()}


def test_links_to_folders_are_followed_and_each_folder_is_seen_once(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", "s2.svs", "deep/s3.svs")
    folder = fill(tmp_path / "slides", "s1.svs", "sub/s4.svs")
    (folder / "a_link").symlink_to(elsewhere)
    (folder / "another").symlink_to(elsewhere)
    (folder / "0_inside").symlink_to(folder / "sub")
    (elsewhere / "back").symlink_to(folder)
    assert found(folder) == ["a_link/deep/s3.svs", "a_link/s2.svs", "s1.svs", "sub/s4.svs"]


def test_links_that_lead_nowhere_are_said(tmp_path, caplog):
    folder = fill(tmp_path / "slides", "s1.svs")
    (folder / "s3.svs").symlink_to("/nowhere/s3.svs")
    assert found(folder) == ["s1.svs"]
    look_for_slides(folder).log(folder)
    assert "left out links that lead nowhere (1: s3.svs)" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.skipif(os.name != "posix", reason="asks for POSIX permissions")
def test_closed_folders_and_links_into_them_are_said(tmp_path, monkeypatch):
    folder = fill(tmp_path / "slides", "s1.svs", "closed/s2.svs")
    outside = fill(tmp_path / "outside", "s5.svs")
    (folder / "s5.svs").symlink_to(outside / "s5.svs")
    real_scandir, real_stat = os.scandir, type(folder).stat

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real_scandir(path)

    def stat(self, **keywords):
        if self.name == "s5.svs":
            raise PermissionError(13, "Permission denied")
        return real_stat(self, **keywords)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(type(folder), "stat", stat)
    assert found(folder) == ["s1.svs"]
    assert reasons(folder) == {"files and folders without read permission": ["closed", "s5.svs"]}


def test_links_to_missing_and_closed_folders_are_told_from_files(tmp_path, monkeypatch, caplog):
    folder = fill(tmp_path / "slides", "s1.svs")
    for link, to in (("patient9", "/nowhere/patient9"), ("round", "round"), ("2024.old", "/nowhere"),
                     ("patient7", "closed"), ("notes.txt", "/nowhere/notes.txt")):  # fmt: skip
        (folder / link).symlink_to(to)
    real_stat = type(folder).stat

    def stat(self, **keywords):
        if self.name == "patient7":
            raise PermissionError(13, "Permission denied")
        return real_stat(self, **keywords)

    monkeypatch.setattr(type(folder), "stat", stat)
    expected = {
        "links that lead nowhere": ["2024.old", "patient9", "round"],
        "files and folders without read permission": ["patient7"],
    }
    assert reasons(folder) == expected
    assert reasons(folder, extensions=[".svs"]) == expected
    look_for_slides(folder).log(folder)
    assert "(3: 2024.old, patient9, round): repair them; files and folders without read" in caplog.text
    assert "--extensions" not in caplog.text


def test_formats_that_are_not_read_are_named_and_other_files_are_not(tmp_path, caplog):
    folder = fill(tmp_path, "a.svs", "b.vsi", "b.isyntax", "b.kfb", "b.sdpc", "b.qptiff", "labels.csv", "notes.txt")
    assert found(folder) == ["a.svs"]
    look_for_slides(folder).log(folder)
    assert (
        "left out files of formats that are not read (5: b.isyntax, b.kfb, b.qptiff, b.sdpc and 1 more)" in caplog.text
    )
    assert caplog.records[0].levelname == "WARNING"
    assert "convert them, to OME-TIFF for example (--extensions .qptiff tries those as they are)" in caplog.text
    assert found(folder, extensions=[".qptiff"]) == ["b.qptiff"]


def test_tiffs_by_their_other_endings_are_slides(tmp_path):
    assert found(fill(tmp_path, "a.btf", "b.tf8", "c.svs", "c.btf")) == ["a.btf", "b.tf8", "c.svs"]


def test_packed_slides_are_counted(tmp_path):
    fill(tmp_path, "a.svs", "b.svs.gz", "c.zip", "d.tar.gz", "labels.csv.gz", "x.h5.gz")
    assert reasons(tmp_path) == {"packed files": ["b.svs.gz", "c.zip", "d.tar.gz"]}


WITHOUT_SLIDES = {
    "b.vsi": "no slide in it; left out files of formats that are not read (1: b.vsi): convert them, to OME-TIFF",
    "b.svs.gz": r"packed files \(1: b.svs.gz\): unpack those that hold slides",
    "IM0001": r"files with unknown endings \(1: IM0001\): --extensions takes .*, --input any file",
    "b.csv": "no file with a slide's ending in it; check the path, or name the endings with --extensions",
}


@pytest.mark.parametrize(("name", "words"), WITHOUT_SLIDES.items())
def test_why_there_is_no_slide_is_said_with_the_remedy(tmp_path, name, words):
    fill(tmp_path, name)
    assert re.search(words.replace("(1: b.vsi)", r"\(1: b.vsi\)"), no_slide_words(tmp_path, look_for_slides(tmp_path)))


def test_without_a_file_of_the_endings_named_those_of_the_slides_are(tmp_path):
    fill(tmp_path, "a.svs", "b.tif")
    words = no_slide_words(tmp_path, look_for_slides(tmp_path, [".ndpi"]), [".ndpi"])
    assert words == "no file with .ndpi in it; the slides there end in .svs .tif"


def test_endings_that_nobody_knows_are_counted(tmp_path, caplog):
    folder = fill(tmp_path, "a.svs", "IM0001", "b.abc", "b.csv", "a/Data0000.dat")
    assert reasons(folder) == {"files with unknown endings": ["IM0001", "b.abc"]}
    with caplog.at_level("INFO"):
        look_for_slides(folder).log(folder)
    assert "left out files with unknown endings (2: IM0001, b.abc)" in caplog.text
    assert caplog.records[0].levelname == "INFO"


PICTURES = [
    "masks/a.tif", "a_mask.tif", "a-thumbnail.png", "thumb.jpg", "previews/a.jpg", "x/Labels/a.png", "macro.png",
    "out/s_heatmap.png", "out/s_top_patches/top_1.png", "x_thumb_512.png", "thumb_x.png", "mask_x.png",
    "x_mask_level3.png", "contact_sheet.png", "x_mask (1).png", "x-thumbnail-small.png", "x_mask_lvl2.tif",
    "Thumbnail Images/x.png", "xTissueMask.png", "thumbnail001.jpg", "MASK2.tif", "ContactSheet.jpg", "label_s.png",
    "macro s 20x.jpg", "s_label_small.jpg", "x_overview_1024x768.png", "Label Images/a.png",
    "s_qc.png", "S_seg.tif", "s_tissue_2.png",
]  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_slides_are_no_slides_unless_their_ending_is_asked_for(tmp_path, name):
    folder = fill(tmp_path, "s.svs", "s 20x.svs", name)
    assert found(folder) == ["s 20x.svs", "s.svs"]
    assert reasons(folder) == {"masks and pictures by their name": [name]}
    assert name in found(folder, extensions=[name.rpartition(".")[2]])


NO_PICTURES = [
    "masked.tif", "unlabelled.png", "case_1.tif", "macros/x.svs", "maskell_12.svs", "mask_12.svs", "maskell_12.tif",
    "Thumbay_3.png", "label_free_3.tif", "macro_metastasis_12.tif", "masquerade.png", "detailed_study_7.tif",
    "tissue_12.tif", "a_qc.png", "seg_7.tif",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_PICTURES)
def test_names_that_only_look_like_pictures_are_slides(tmp_path, name):
    assert found(fill(tmp_path, name, "s.svs")) == sorted([name, "s.svs"])


def test_where_all_are_called_like_pictures_they_are_the_slides(tmp_path, caplog):
    folder = fill(tmp_path, "mask_1.png", "mask_2.png", "labels.csv")
    assert found(folder) == ["mask_1.png", "mask_2.png"]
    looked = look_for_slides(folder)
    looked.log(folder)
    assert "all its images have names of masks or pictures (mask_1.png, mask_2.png); they are taken" in caplog.text
    assert found(fill(folder, "a.vsi")) == []  # they are pictures of that


def test_what_a_nas_keeps_is_nobodys_slide(tmp_path):
    assert found(fill(tmp_path, "a.svs", "@eaDir/a.svs/SYNOPHOTO_THUMB_XL.jpg", "#recycle/b.svs")) == ["a.svs"]
    assert found(tmp_path, extensions=["jpg"]) == []


def test_beside_a_slide_an_image_of_its_name_is_its_picture(tmp_path):
    folder = fill(tmp_path, "a.svs", "a.png", "b.tif", "b.jpg", "c.svs", "c.tif", "sub/a.png", "d.png", "d.jpg")
    assert found(folder) == ["a.svs", "b.tif", "c.svs", "d.jpg", "d.png", "sub/a.png"]
    assert reasons(folder) == {"files beside a slide of the same name": ["a.png", "b.jpg", "c.tif"]}


def test_beside_a_slide_an_image_of_its_whole_name_is_its_picture(tmp_path):
    folder = fill(
        tmp_path, "x.svs", "x.svs.png", "y.tif", "y.tif.jpg", "z.svs.tif", "z.svs", "w.svs.png", "U.SVS", "u.jpg"
    )
    assert found(folder) == ["U.SVS", "w.svs.png", "x.svs", "y.tif", "z.svs"]
