"""The feature file of each slide is found in a folder and its subfolders, and two of one slide are told."""

from pathlib import Path

import pytest

from utils.bags.feature_folder import FeatureFolder
from utils.core.errors import FeatureFileError, LabelsError


def touch(folder: Path, *names: str) -> FeatureFolder:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return FeatureFolder(folder)


def test_the_feature_file_of_a_slide_is_found_by_any_of_our_endings(tmp_path):
    folder = touch(tmp_path, "a.h5", "b.hdf5", "c.pt", "d.pth", "e.npy", "f.x.h5")
    found = {slide: folder.find(slide) for slide in ("a", "b", "c", "d", "e", "f", "f.x")}
    names = {slide: path and path.name for slide, path in found.items()}
    assert names == {"a": "a.h5", "b": "b.hdf5", "c": "c.pt", "d": "d.pth", "e": None, "f": None, "f.x": "f.x.h5"}


def test_subfolders_are_searched_but_not_hidden_ones(tmp_path):
    folder = touch(tmp_path, "a.h5", "site/batch/b.pt", ".old/c.h5", "site/._a.h5")
    assert folder.files == {"a": [tmp_path / "a.h5"], "b": [tmp_path / "site/batch/b.pt"]}


def test_slides_with_several_files_are_named_with_them(tmp_path):
    folder = touch(tmp_path, "a.h5", "a.pt", "one/b.h5", "two/b.h5", "c.h5")
    folder.check_unique(["c", "d"])
    with pytest.raises(LabelsError, match=r"slide a has a\.h5 and a\.pt; keep one of them"):
        folder.check_unique(["a", "c"])
    both = r"2 slides with several feature files: slide a has .*, slide b has one/b\.h5 and two/b\.h5; keep one"
    with pytest.raises(LabelsError, match=both):
        folder.check_unique(["a", "b", "c"])


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FeatureFileError, match="no such folder"):
        FeatureFolder(tmp_path / "nowhere")
