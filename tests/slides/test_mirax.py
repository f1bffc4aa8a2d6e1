"""Which files are a MIRAX slide's own."""

import pytest

from utils.core.errors import SlideError
from utils.slides.find import slide_bytes
from utils.slides.mirax import check_data_folder, data_files
from utils.slides.open_slides import open_slide


@pytest.fixture
def slide(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("Slidedat.ini", "Index.dat", "Data0000.dat", "Data0001.dat"):
        (tmp_path / "a" / name).write_bytes(b"12")
    path = tmp_path / "a.mrxs"
    path.touch()
    return path


def test_what_others_leave_in_the_folder_is_not_the_slides(slide):
    own = data_files(slide)
    assert [path.name for path in own] == ["Data0000.dat", "Data0001.dat", "Index.dat", "Slidedat.ini"]
    for name in ("Thumbs.db", ".DS_Store", "._Index.dat", "desktop.ini", "Data0000 (1).dat", "Index.dat.part"):
        (slide.parent / "a" / name).touch()
    assert data_files(slide) == own
    assert slide_bytes(slide) == 8


def test_a_slide_without_its_folder_is_named(slide, tmp_path):
    check_data_folder(slide)
    check_data_folder(tmp_path / "b.svs")
    link = tmp_path / "sub" / "a.mrxs"
    link.parent.mkdir()
    link.symlink_to(slide)
    with pytest.raises(SlideError, match=r"a\.mrxs is a link: link .*a beside it too"):
        check_data_folder(link)
    (tmp_path / "a").rename(tmp_path / "other")
    for refuse in (check_data_folder, open_slide):
        with pytest.raises(SlideError, match=r"a\.mrxs: its folder .*a is missing"):
            refuse(slide)
    with pytest.raises(SlideError, match=r"the folder of .*a\.mrxs cannot be read"):
        data_files(slide)
