"""The extraction benchmark runs, and does not compare what is not equal."""

import numpy as np
import pytest

from tests.benchmarks.scripts import imported, printed, table_cells


@pytest.fixture(scope="module")
def extraction():
    return imported("extraction")


@pytest.mark.slow
def test_reading_prints_a_row_per_contender_and_a_column_per_tile_size():
    flags = ["--parts", "reading", "--side", "1500", "--patches", "20", "--repeats", "1"]
    out = printed("extraction", *flags)
    rows = table_cells(out)
    assert rows[0] == ["", "256-px tiles", "240-px tiles"]
    cells = {row[0]: [float(cell.partition("(")[2].rstrip(")")) for cell in row[1:]] for row in rows[2:]}
    assert cells["OpenSlide, one by one"] == [1.0, 1.0]
    assert {"LiteMIL, 1 thread", "LiteMIL, 2 threads", "OpenSlide, 2 threads"} <= cells.keys()
    assert all(min(ratios) > 0 for ratios in cells.values())
    assert "20 patches of 256 px" in out


def test_the_slides_are_what_they_are_made_for(extraction, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "texture", lambda: np.zeros((extraction.PERIOD,) * 2 + (3,), np.uint8))
    for tile, vendor in [(256, "generic-tiff"), (240, "aperio")]:
        with extraction.open_slide(extraction.write_slide(tmp_path / f"{tile}.tif", 700, tile)) as slide:
            assert slide.vendor == vendor
            assert slide.level_dimensions == ((700, 700), (175, 175), (43, 43))
            assert slide.tile_reader is not None


def test_a_patch_that_differs_ends_the_run(extraction, tmp_path, monkeypatch):
    path = extraction.write_slide(tmp_path / "a.tif", 700, 256)
    corners = extraction.grid(700, 256, 10)
    assert corners == [(0, 0), (256, 0), (0, 256), (256, 256)]
    extraction.check_equal(path, corners, 256)
    monkeypatch.setattr(extraction, "through_openslide", lambda handle, patch, corner: np.zeros((256, 256, 3)))
    with pytest.raises(AssertionError, match=r"\(0, 0\) is not OpenSlide's"):
        extraction.check_equal(path, corners, 256)


def test_the_texture_goes_on_at_its_edges(extraction):
    image = extraction.texture().astype(int)
    inside = np.abs(image[:, 1:] - image[:, :-1]).mean()
    assert np.abs(image[:, 0] - image[:, -1]).mean() < 1.3 * inside
    assert image.std() > 20


@pytest.mark.slow
def test_the_other_parts_print_their_tables():
    flags = ["--parts", "feeding", "extracting", "memory", "--side", "1200", "--patches", "12", "--repeats", "1"]
    out = printed("extraction", *flags, "--extracted", "2", "--strides", "400", "200")
    rows = table_cells(out)
    assert [row[0] for row in rows if row[-1] not in ("multiple", "---:", "MB")] == [
        "OpenSlide, one by one", "LiteMIL, 1 reader", "LiteMIL, 2 readers",
        "OpenSlide, one by one", "LiteMIL",
        "9", "25",
    ]  # fmt: skip
    assert "ResNet50 in single precision on 2 CPU threads, 4 patches" in out
    peaks = [float(row[1].replace(",", "")) for row in rows[-2:]]
    assert max(peaks) < 1.2 * min(peaks)
