"""Patch plans: that what is read at a coordinate is what lies there, at every level."""

import numpy as np
import pytest

from tests.slides.conftest import PLACE_SIZE
from tests.synthetic import place_image, place_of, stained_image, write_pyramid
from utils.core.errors import ConfigError, NoTissueError, SlideError
from utils.slides import patching
from utils.slides.patching import plan_patches, read_patches
from utils.slides.wsi import open_slide

WIDTH, HEIGHT = PLACE_SIZE


@pytest.fixture(scope="module")
def stained(tmp_path_factory):
    path = tmp_path_factory.mktemp("stained") / "stained.tiff"
    return write_pyramid(path, stained_image(1600, 1200, seed=1), mpp=0.5)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("stride", [None, 7, 30])
def test_every_patch_is_the_slide_at_its_coordinates(place_slide, level, stride):
    with open_slide(place_slide) as slide:
        plan = plan_patches(slide, patch_size=20, stride=stride, level=level, tissue_threshold=0)
        patches = np.stack(list(read_patches(slide, plan)))
        downsample = slide.level_downsamples[level]
    assert patches.shape == (len(plan), 20, 20, 3)
    seen_x, seen_y = place_of(patches, WIDTH, HEIGHT)
    tolerance = 2 * WIDTH / 255 + downsample / 2
    centre = plan.coords + plan.patch_size_level0 / 2
    np.testing.assert_allclose(seen_x.mean(axis=(1, 2)), centre[:, 0], atol=tolerance)
    np.testing.assert_allclose(seen_y.mean(axis=(1, 2)), centre[:, 1], atol=tolerance)
    # A patch that reached beyond its level would show background, where blue is 255 (OpenSlide's seams cost one level).
    assert np.abs(patches[..., 2].astype(int) - 77).max() <= 1


def test_a_patch_at_the_rim_of_a_level_that_was_cut_stays_inside(tmp_path):
    """Level 1 ends at level-0 column 299 of 300: a patch from 114 to 300 would be blended with the background."""
    path = write_pyramid(tmp_path / "cut.tiff", place_image(300, 250), downsamples=(1, 8))
    with open_slide(path) as slide:
        plan = plan_patches(slide, patch_size=23, stride=7, level=1, tissue_threshold=0)
        patches = np.stack(list(read_patches(slide, plan)))
    assert (plan.stride_level0, plan.patch_size_level0) == (57, 186)
    assert plan.coords.tolist() == [[0, 0], [57, 0], [0, 57], [57, 57]]
    assert np.abs(patches[..., 2].astype(int) - 77).max() <= 1


@pytest.mark.parametrize(("level", "size", "stride"), [(0, 64, 64), (1, 160, 160), (2, 257, 257)])
def test_sizes_in_both_units(place_slide, level, size, stride):
    with open_slide(place_slide) as slide:
        patch_size = 64
        plan = plan_patches(slide, patch_size=patch_size, level=level, tissue_threshold=0)
        assert plan.patch_size == 64
        assert plan.patch_size_level0 == round(64 * slide.level_downsamples[level])
        assert plan.patch_size_level0 == pytest.approx(size, abs=1)
        assert plan.stride_level0 == plan.patch_size_level0
        assert plan.mpp == pytest.approx(0.5 * slide.level_downsamples[level])
        assert plan.coords.dtype == np.int64
        assert (plan.coords % plan.stride_level0 == 0).all()
        assert (plan.coords + plan.patch_size_level0 <= [WIDTH, HEIGHT]).all()
        assert len(plan) == plan.kept_count == plan.grid_count


def test_neighbours_differ_by_exactly_the_stride(place_slide):
    with open_slide(place_slide) as slide:
        plan = plan_patches(slide, patch_size=30, stride=11, level=1, tissue_threshold=0)
    assert plan.stride_level0 == 28  # 11 * 2.5015 rounded once, never accumulated
    assert set(np.diff(np.unique(plan.coords[:, 0]))) == {28}
    assert set(np.diff(np.unique(plan.coords[:, 1]))) == {28}


def test_the_threshold_is_the_least_fraction_of_tissue(stained):
    with open_slide(stained) as slide:
        image = slide.read_region(0, 0, 0, 1600, 1200)
        counts = []
        for threshold in (0, 0.1, 0.5, 1):
            plan = plan_patches(slide, patch_size=100, tissue_threshold=threshold)
            assert plan.grid_count == 16 * 12
            counts.append(len(plan))
            if threshold == 0.5:
                means = [image[y : y + 100, x : x + 100, 1].mean() for x, y in plan.coords.tolist()]
                assert max(means) < 215  # glass is 244, tissue about 150: at least a third of each is stained
    assert counts[0] == 192
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[3] < counts[2] < counts[1] < counts[0]


def test_levels_agree_on_where_the_tissue_is(stained):
    with open_slide(stained) as slide:
        fine = plan_patches(slide, patch_size=128, level=0)
        coarse = plan_patches(slide, patch_size=32, level=2)
    np.testing.assert_array_equal(fine.coords, coarse.coords)
    assert (fine.patch_size_level0, coarse.patch_size_level0) == (128, 128)
    assert coarse.mpp == pytest.approx(2.0)


def test_threshold_0_does_not_run_the_detector(place_slide, monkeypatch):
    def fail(*_):
        raise AssertionError("the detector was run")

    monkeypatch.setattr(patching, "detect_tissue", fail)
    with open_slide(place_slide) as slide:
        assert plan_patches(slide, patch_size=64, tissue_threshold=0).tissue is None
        with pytest.raises(AssertionError):
            plan_patches(slide, patch_size=64)


def test_indices_choose_and_order_patches(stained):
    with open_slide(stained) as slide:
        plan = plan_patches(slide, patch_size=100)
        every = list(read_patches(slide, plan))
        chosen = list(read_patches(slide, plan, [3, 0]))
    np.testing.assert_array_equal(chosen, [every[3], every[0]])


def test_unknown_mpp_is_none(tmp_path, caplog):
    path = write_pyramid(tmp_path / "a.tiff", stained_image(400, 400))
    with open_slide(path) as slide:
        assert plan_patches(slide, patch_size=64).mpp is None
    assert not caplog.records


def test_a_level_that_is_not_there(place_slide):
    with open_slide(place_slide) as slide, pytest.raises(SlideError, match=r"no level 5.*0.*1.*2"):
        plan_patches(slide, patch_size=64, level=5)


def test_a_patch_larger_than_the_slide(place_slide):
    with open_slide(place_slide) as slide:
        assert len(plan_patches(slide, patch_size=100, level=2, tissue_threshold=0)) == 1
        for size, level in [(409, 0), (128, 2)]:
            with pytest.raises(
                SlideError, match=rf"place.tiff: a patch of {size} px at level {level} is larger"
            ) as error:
                plan_patches(slide, patch_size=size, level=level)
            assert not isinstance(error.value, NoTissueError)


def test_a_slide_without_tissue(tmp_path):
    path = write_pyramid(tmp_path / "empty.tiff", np.full((600, 600, 3), 243, np.uint8), mpp=0.5)
    with open_slide(path) as slide, pytest.raises(NoTissueError, match=r"empty.tiff: none of 81 patches.*0\.5"):
        plan_patches(slide, patch_size=64)


def test_an_unreadable_patch_is_an_error_not_a_white_patch(shared_data):
    with open_slide(shared_data / "bad_slides" / "unreadable.svs") as slide:
        plan = plan_patches(slide, patch_size=8, tissue_threshold=0)
        with pytest.raises(SlideError, match=r"unreadable\.svs"):
            list(read_patches(slide, plan))


@pytest.mark.parametrize(
    "keywords",
    [{"patch_size": 0}, {"patch_size": 10, "stride": 0}, {"patch_size": 10, "tissue_threshold": 1.1}],
)
def test_settings_that_make_no_sense(place_slide, keywords):
    with open_slide(place_slide) as slide, pytest.raises(ConfigError, match=r"must be at least 1|0 to 1"):
        plan_patches(slide, **keywords)


def test_fluorescence_gives_no_patches_of_glass(shared_data):
    with (
        open_slide(shared_data / "slides" / "test3-DAPI-387.ndpi") as slide,
        pytest.raises(SlideError, match="brightfield"),
    ):
        plan_patches(slide, patch_size=256)
