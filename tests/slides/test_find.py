"""Which files of a folder are slides, and what is said of the others."""

import os

import pytest

from utils.slides.find import find_slides, look_for_slides


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder, **keywords):
    return [path.relative_to(folder).as_posix() for path in find_slides(folder, **keywords)]


def reasons(folder):
    left_out = look_for_slides(folder).left_out
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
    assert reasons(folder) == {"what may not be read": ["closed", "s5.svs"]}


def test_formats_that_are_not_read_are_named_and_other_files_are_not(tmp_path, caplog):
    folder = fill(tmp_path, "a.svs", "b.vsi", "b.isyntax", "b.kfb", "b.sdpc", "b.qptiff", "labels.csv", "notes.txt")
    assert found(folder) == ["a.svs"]
    look_for_slides(folder).log(folder)
    assert (
        "left out files of formats that are not read (5: b.isyntax, b.kfb, b.qptiff, b.sdpc and 1 more)" in caplog.text
    )
    assert caplog.records[0].levelname == "WARNING"
    assert found(folder, extensions=[".qptiff"]) == ["b.qptiff"]


def test_endings_that_nobody_knows_are_counted(tmp_path, caplog):
    folder = fill(tmp_path, "a.svs", "IM0001", "b.abc", "b.csv", "a/Data0000.dat")
    assert reasons(folder) == {"files whose endings tell nothing": ["IM0001", "b.abc"]}
    with caplog.at_level("INFO"):
        look_for_slides(folder).log(folder)
    assert "left out files whose endings tell nothing (2: IM0001, b.abc)" in caplog.text
    assert caplog.records[0].levelname == "INFO"


PICTURES = [
    "masks/a.tif", "a_mask.tif", "a-thumbnail.png", "thumb.jpg", "previews/a.jpg", "x/Labels/a.png", "macro.png",
    "out/s_heatmap.png", "out/s_top_patches/top_1.png",
]  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_slides_are_no_slides_unless_their_ending_is_asked_for(tmp_path, name):
    folder = fill(tmp_path, "s.svs", name)
    assert found(folder) == ["s.svs"]
    assert reasons(folder) == {"masks and pictures by their name": [name]}
    assert name in found(folder, extensions=[name.rpartition(".")[2]])


@pytest.mark.parametrize("name", ["masked.tif", "unlabelled.png", "case_1.tif", "thumbs_up.tif", "macros/x.svs"])
def test_names_that_only_look_like_pictures_are_slides(tmp_path, name):
    assert found(fill(tmp_path, name)) == [name]


def test_what_a_nas_keeps_is_nobodys_slide(tmp_path):
    assert found(fill(tmp_path, "a.svs", "@eaDir/a.svs/SYNOPHOTO_THUMB_XL.jpg", "#recycle/b.svs")) == ["a.svs"]
    assert found(tmp_path, extensions=["jpg"]) == []


def test_beside_a_slide_an_image_of_its_name_is_its_picture(tmp_path):
    folder = fill(tmp_path, "a.svs", "a.png", "b.tif", "b.jpg", "c.svs", "c.tif", "sub/a.png", "d.png", "d.jpg")
    assert found(folder) == ["a.svs", "b.tif", "c.svs", "d.jpg", "d.png", "sub/a.png"]
    assert reasons(folder) == {"files beside a slide of the same name": ["a.png", "b.jpg", "c.tif"]}
