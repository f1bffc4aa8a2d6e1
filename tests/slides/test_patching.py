"""Patch plans: that what is read at a coordinate is what lies there, at every level."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.slides.conftest import PLACE_SIZE
from tests.synthetic import place_image, place_of, stained_image, write_pyramid
from utils.core.errors import ConfigError, SlideError
from utils.slides import patching
from utils.slides.open_slides import open_slide
from utils.slides.patching import PatchGrid, plan_patches, read_batches

WIDTH, HEIGHT = PLACE_SIZE


@pytest.fixture(scope="module")
def stained(tmp_path_factory):
    path = tmp_path_factory.mktemp("stained") / "stained.tiff"
    return write_pyramid(path, stained_image(1600, 1200, seed=1), mpp=0.5)


def all_patches(slide, plan, **reading):
    return np.concatenate([batch.numpy() for batch in read_batches(slide, plan, 32, **reading)])


# The slide has 0.5 um/px, and levels of downsample 1, 2.5 and 4: some of these are levels, some between them.
RESOLUTIONS = [
    *({"level": level} for level in range(3)),
    *({"mpp": mpp} for mpp in (0.48, 0.5, 0.517, 0.9, 1.25, 1.6, 2.0, 3.1)),
    {"mpp": 0.3, "allow_upsample": True},
]


@pytest.mark.parametrize("resolution", RESOLUTIONS, ids=str)
@pytest.mark.parametrize("stride", [None, 7, 30])
def test_every_patch_is_the_slide_at_its_coordinates(place_slide, resolution, stride):
    with open_slide(place_slide) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=20, stride=stride, tissue_threshold=0, **resolution))
        patches = all_patches(slide, plan)
    downsample = plan.sampling.downsample
    if "mpp" in resolution:
        tolerance = 1e-12 if plan.sampling.scale != 1 else 0.5 / 20
        assert downsample == pytest.approx(resolution["mpp"] / 0.5, rel=tolerance)
    assert plan.mpp == pytest.approx(0.5 * downsample)
    assert patches.shape == (len(plan), 20, 20, 3)
    # Each column's mean over the rows, and each row's over the columns: rounding to grey levels averages out over all.
    seen_x, seen_y = place_of(patches, WIDTH, HEIGHT)
    # The slide's levels 1 and 2 were cut to whole pixels: what OpenSlide takes for 2.5015 and 4.008 was 2.5 and 4.
    half_pixel, rounding = 0.5 * downsample, 0.4
    for seen, corner in ((seen_x, plan.coords[:, 0]), (seen_y, plan.coords[:, 1])):
        off = seen.mean(axis=(1, 2)) - (corner + 10 * downsample)
        assert np.abs(off).max() <= half_pixel + rounding
        if plan.sampling.scale != 1 and plan.sampling.level == 0:  # resampled: not to half a pixel, but exactly
            assert np.abs(off).max() <= 2 * rounding
    places = corner_pixels(seen_x, plan.coords[:, 0], downsample, axis=2)
    assert np.abs(places).max() <= half_pixel + 1.5 * WIDTH / 255  # a grey level is two px
    # A patch that reached beyond its level would show background, where blue is 255 (OpenSlide's seams cost one level).
    assert np.abs(patches[..., 2].astype(int) - 77).max() <= 2
    assert (plan.coords + plan.patch_size_level0 <= [WIDTH + 1, HEIGHT + 1]).all()
    for column in (0, 1):
        steps = np.diff(np.unique(plan.grid[:, column]))
        assert set(steps) <= {plan.stride_level0}
    assert plan.stride_level0 == max(1, round((stride or 20) * downsample))


def corner_pixels(seen, corner, downsample, axis, size=20):
    """How far the first and the last pixel along an axis are from where they belong."""
    across = seen.mean(axis=3 - axis)
    first, last = across[:, 0] - (corner + 0.5 * downsample), across[:, -1] - (corner + (size - 0.5) * downsample)
    return np.stack([first, last])


def test_a_level_that_is_off_by_less_than_half_a_pixel_is_read_as_it_is(place_slide):
    with open_slide(place_slide) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=20, mpp=0.505, tissue_threshold=0))
        assert (plan.sampling.scale, plan.sampling.level, plan.mpp) == (1, 0, 0.5)
        assert plan_patches(
            slide, PatchGrid(patch_size=100, mpp=0.505, tissue_threshold=0)
        ).sampling.scale == pytest.approx(1.01)


def test_the_nearest_finer_level_is_read(place_slide):
    with open_slide(place_slide) as slide:
        for mpp, level in ((0.7, 0), (1.24, 0), (1.3, 1), (1.9, 1), (2.1, 2), (3.0, 2)):
            assert plan_patches(slide, PatchGrid(patch_size=60, mpp=mpp, tissue_threshold=0)).sampling.level == level


def test_upsampling_is_refused_by_name(place_slide):
    with open_slide(place_slide) as slide:
        assert plan_patches(slide, PatchGrid(patch_size=64, mpp=0.48, tissue_threshold=0)).mpp == pytest.approx(0.48)
        with pytest.raises(SlideError, match=r"place.tiff: too coarse for 0.25 um/px: it has 0.5 um/px.* 2 times"):
            plan_patches(slide, PatchGrid(patch_size=64, mpp=0.25))
        plan = plan_patches(slide, PatchGrid(patch_size=64, mpp=0.25, allow_upsample=True, tissue_threshold=0))
    assert (plan.patch_size_level0, plan.sampling.level, plan.sampling.scale) == (32, 0, 0.5)


def test_an_unknown_mpp_is_an_error_where_it_is_needed(tmp_path):
    path = write_pyramid(tmp_path / "bare.tiff", stained_image(400, 400))
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"bare.tiff: its um/px is needed.*--slides_csv"):
        plan_patches(slide, PatchGrid(patch_size=64, mpp=0.5))
    with open_slide(path, mpp=0.25) as slide:
        assert plan_patches(slide, PatchGrid(patch_size=64, mpp=0.5, tissue_threshold=0)).patch_size_level0 == 128


def test_neighbours_that_are_resampled_meet_without_a_seam(tmp_path):
    """Two patches side by side are the halves of one twice as wide."""
    path = write_pyramid(tmp_path / "a.tiff", stained_image(800, 500, seed=3), mpp=0.5, downsamples=(1,))
    with open_slide(path) as slide:
        small = plan_patches(slide, PatchGrid(patch_size=100, mpp=0.75, tissue_threshold=0))
        large = plan_patches(slide, PatchGrid(patch_size=200, mpp=0.75, tissue_threshold=0))
        left, right = all_patches(slide, small)[:2]
        both = all_patches(slide, large)[0]
    np.testing.assert_array_equal(both[:100], np.concatenate([left, right], axis=1))


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_order_whoever_reads_them(stained, workers):
    with open_slide(stained) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=100))
        batches = list(read_batches(slide, plan, 7, workers=workers))
        assert [len(batch) for batch in batches[:-1]] == [7] * (len(plan) // 7)
        for patch, (x, y) in zip(np.concatenate(batches), plan.coords.tolist(), strict=True):
            np.testing.assert_array_equal(patch, slide.read_region(x, y, 0, 100, 100))


def test_a_patch_at_the_rim_of_a_level_that_was_cut_stays_inside(tmp_path):
    """Level 1 has 37 x 31 px of 8 level-0 px and leaves out the last 4 columns and 2 rows, which must not become
    background in a patch; OpenSlide counts with 8.09, by which the last patch would lie 9 level-0 px off.
    """
    path = write_pyramid(tmp_path / "cut.tiff", place_image(300, 250), downsamples=(1, 8))
    with open_slide(path) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=23, stride=7, level=1, tissue_threshold=0))
        patches = all_patches(slide, plan)
    assert (plan.stride_level0, plan.patch_size_level0) == (56, 184)
    assert plan.coords.tolist() == [[x, y] for y in (0, 56) for x in (0, 56, 112)]
    assert np.abs(patches[..., 2].astype(int) - 77).max() <= 1
    for axis, places in enumerate(place_of(patches, 300, 250)):
        off = corner_pixels(places, plan.coords[:, axis], 8, axis=2 - axis, size=23)
        assert np.abs(off).max() < 2  # level-0 px; a grey level is 1.2 of them, and OpenSlide costs one


def test_a_large_level_does_not_drift(tmp_path):
    """Where OpenSlide's mean over both axes is off by 0.4 %, and the far end of the level by 11 level-0 px."""
    path = write_pyramid(tmp_path / "long.tiff", place_image(2404, 339), downsamples=(1, 4))
    with open_slide(path) as slide:
        assert slide.level_downsamples == (1, 4)
        plan = plan_patches(slide, PatchGrid(patch_size=20, level=1, tissue_threshold=0))
        patches = all_patches(slide, plan)
    off = place_of(patches, 2404, 339)[0].mean(axis=(1, 2)) - (plan.coords[:, 0] + 10 * 4)
    assert np.abs(off).max() < 5  # level-0 px; a grey level is 9 of them


@pytest.mark.parametrize(("level", "size", "stride"), [(0, 64, 64), (1, 160, 160), (2, 257, 257)])
def test_sizes_in_both_units(place_slide, level, size, stride):
    with open_slide(place_slide) as slide:
        patch_size = 64
        plan = plan_patches(slide, PatchGrid(patch_size=patch_size, level=level, tissue_threshold=0))
        assert plan.patch_size == 64
        assert plan.patch_size_level0 == round(64 * slide.level_downsamples[level])
        assert plan.patch_size_level0 == pytest.approx(size, abs=1)
        assert plan.stride_level0 == plan.patch_size_level0
        assert plan.mpp == pytest.approx(0.5 * slide.level_downsamples[level])
        assert plan.coords.dtype == np.int64
        assert (plan.coords % plan.stride_level0 == 0).all()
        assert (plan.coords + plan.patch_size_level0 <= [WIDTH, HEIGHT]).all()
        assert len(plan) == len(plan.grid)


def test_neighbours_differ_by_exactly_the_stride(place_slide):
    with open_slide(place_slide) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=30, stride=11, level=1, tissue_threshold=0))
    assert plan.stride_level0 == 28  # 11 * 2.5015 rounded once, never accumulated
    assert set(np.diff(np.unique(plan.coords[:, 0]))) == {28}
    assert set(np.diff(np.unique(plan.coords[:, 1]))) == {28}


def test_a_kept_edge_is_one_more_column_and_row_that_end_there(tmp_path):
    Image.fromarray(place_image(775, 522)).save(tmp_path / "small.png")
    with open_slide(tmp_path / "small.png") as slide:
        dropped = plan_patches(slide, PatchGrid(patch_size=256, tissue_threshold=0))
        plan = plan_patches(slide, PatchGrid(patch_size=256, tissue_threshold=0, keep_edge=True))
        patches, image = all_patches(slide, plan), slide.read_region(0, 0, 0, 775, 522)
    assert dropped.coords.tolist() == [[x, y] for y in (0, 256) for x in (0, 256, 512)]
    assert plan.coords.tolist() == [[x, y] for y in (0, 256, 266) for x in (0, 256, 512, 519)]
    for patch, (x, y) in zip(patches, plan.coords.tolist(), strict=True):
        np.testing.assert_array_equal(patch, image[y : y + 256, x : x + 256])
    assert covered(dropped, 775, 522).mean() < 0.98
    assert covered(plan, 775, 522).all()


def covered(plan, width, height):
    """(h, w), whether a patch shows each level-0 px."""
    seen = np.zeros((height, width), dtype=bool)
    for x, y in plan.coords.tolist():
        seen[y : y + plan.patch_size_level0, x : x + plan.patch_size_level0] = True
    return seen


@pytest.mark.parametrize("stride", [None, 30, 60])
def test_nothing_is_added_where_the_grid_ends_at_the_edge(tmp_path, stride):
    path = write_pyramid(tmp_path / "even.tiff", place_image(720, 480), mpp=0.5, downsamples=(1, 2, 4))
    with open_slide(path) as slide:
        for resolution in ({}, {"level": 1}, {"level": 2}, {"mpp": 0.5}, {"mpp": 1.0}, {"mpp": 2.0}):
            asked = {"patch_size": 60, "stride": stride, "tissue_threshold": 0, **resolution}
            dropped, kept = (plan_patches(slide, PatchGrid(**asked, keep_edge=keep)) for keep in (False, True))
            np.testing.assert_array_equal(kept.coords, dropped.coords)


@pytest.mark.parametrize("resolution", RESOLUTIONS, ids=str)
@pytest.mark.parametrize("stride", [None, 30])
def test_a_kept_edge_lies_inside_the_level_at_every_resolution(place_slide, resolution, stride):
    asked = {"patch_size": 23, "stride": stride, "tissue_threshold": 0, **resolution}
    with open_slide(place_slide) as slide:
        dropped, plan = (plan_patches(slide, PatchGrid(**asked, keep_edge=keep)) for keep in (False, True))
        patches = all_patches(slide, plan)
        level_downsample = slide.level_downsamples[plan.sampling.level]
        level_size = np.array(slide.level_dimensions[plan.sampling.level])
    places, regular = ([tuple(place) for place in one.coords.tolist()] for one in (plan, dropped))
    assert len(set(places)) == len(places)
    assert set(regular) < set(places)
    assert places == sorted(places, key=lambda place: place[::-1])
    far = plan.coords.max(axis=0) + 23 * plan.sampling.downsample
    level_end = level_size * level_downsample
    # Whole level-0 px: one is lost to where the patch begins and one to where the level ends, at the most.
    assert (far <= level_end + 1e-6).all()
    assert (level_end - far < max(2, level_downsample + 1)).all()
    assert np.abs(patches[..., 2].astype(int) - 77).max() <= 2
    for axis, seen in enumerate(place_of(patches, WIDTH, HEIGHT)):
        off = seen.mean(axis=(1, 2)) - (plan.coords[:, axis] + 11.5 * plan.sampling.downsample)
        assert np.abs(off).max() <= 0.5 * plan.sampling.downsample + 0.4


def test_a_kept_edge_stays_inside_a_level_that_was_cut(tmp_path):
    path = write_pyramid(tmp_path / "cut.tiff", place_image(300, 250), mpp=0.5, downsamples=(1, 8))
    with open_slide(path) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=10, level=1, tissue_threshold=0, keep_edge=True))
        patches = all_patches(slide, plan)
    assert plan.coords.tolist() == [[x, y] for y in (0, 80, 160, 168) for x in (0, 80, 160, 216)]
    assert np.abs(patches[..., 2].astype(int) - 77).max() <= 1


def test_a_kept_edge_needs_tissue_like_any_other_patch(stained):
    with open_slide(stained) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=300, keep_edge=True))
        dropped = plan_patches(slide, PatchGrid(patch_size=300))
    assert set(np.unique(plan.grid[:, 0])) == {0, 300, 600, 900, 1200, 1300}
    assert 0 < len(plan) < len(plan.grid)
    known = {tuple(place) for place in plan.coords.tolist()}
    assert {tuple(place) for place in dropped.coords.tolist()} == {place for place in known if place[0] != 1300}


def test_a_patch_larger_than_the_slide_stays_refused_with_a_kept_edge(place_slide):
    with open_slide(place_slide) as slide:
        assert len(plan_patches(slide, PatchGrid(patch_size=408, tissue_threshold=0, keep_edge=True))) == 2
        with pytest.raises(SlideError, match="larger than the slide"):
            plan_patches(slide, PatchGrid(patch_size=409, tissue_threshold=0, keep_edge=True))


def test_the_threshold_is_the_least_fraction_of_tissue(stained):
    with open_slide(stained) as slide:
        image = slide.read_region(0, 0, 0, 1600, 1200)
        counts = []
        for threshold in (0, 0.1, 0.5, 1):
            plan = plan_patches(slide, PatchGrid(patch_size=100, tissue_threshold=threshold))
            assert len(plan.grid) == 16 * 12
            counts.append(len(plan))
            if threshold == 0.5:
                means = [image[y : y + 100, x : x + 100, 1].mean() for x, y in plan.coords.tolist()]
                assert max(means) < 215  # glass is 244, tissue about 150: at least a third of each is stained
    assert counts[0] == 192
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[3] < counts[2] < counts[1] < counts[0]


def test_levels_agree_on_where_the_tissue_is(stained):
    with open_slide(stained) as slide:
        fine = plan_patches(slide, PatchGrid(patch_size=128, level=0))
        coarse = plan_patches(slide, PatchGrid(patch_size=32, level=2))
    np.testing.assert_array_equal(fine.coords, coarse.coords)
    assert (fine.patch_size_level0, coarse.patch_size_level0) == (128, 128)
    assert coarse.mpp == pytest.approx(2.0)


def test_threshold_0_does_not_run_the_detector(place_slide, monkeypatch):
    def fail(*_):
        raise AssertionError("the detector was run")

    monkeypatch.setattr(patching, "detect_tissue", fail)
    with open_slide(place_slide) as slide:
        assert plan_patches(slide, PatchGrid(patch_size=64, tissue_threshold=0)).tissue is None
        with pytest.raises(AssertionError):
            plan_patches(slide, PatchGrid(patch_size=64))


def test_unknown_mpp_is_none(tmp_path, caplog):
    path = write_pyramid(tmp_path / "a.tiff", stained_image(400, 400))
    with open_slide(path) as slide:
        assert plan_patches(slide, PatchGrid(patch_size=64)).mpp is None
    assert not caplog.records


def test_a_level_that_is_not_there(place_slide):
    with open_slide(place_slide) as slide, pytest.raises(SlideError, match=r"no level 5.*0.*1.*2"):
        plan_patches(slide, PatchGrid(patch_size=64, level=5))


def test_a_patch_larger_than_the_slide(place_slide):
    with open_slide(place_slide) as slide:
        assert len(plan_patches(slide, PatchGrid(patch_size=100, level=2, tissue_threshold=0))) == 1
        for size, level in [(409, 0), (128, 2)]:
            with pytest.raises(SlideError, match=rf"place.tiff: a patch of {size} px is \d+ level-0 px wide, larger"):
                plan_patches(slide, PatchGrid(patch_size=size, level=level))


def test_a_slide_without_tissue(tmp_path):
    path = write_pyramid(tmp_path / "empty.tiff", np.full((600, 600, 3), 243, np.uint8), mpp=0.5)
    with open_slide(path) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=64))
    assert (len(plan), len(plan.grid)) == (0, 81)
    assert re.search(r"empty.tiff: none of 81 patches.*0\.5", plan.shortage)


def test_an_unreadable_patch_is_an_error_not_a_white_patch(shared_data):
    with open_slide(shared_data / "bad_slides" / "unreadable.svs") as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=8, tissue_threshold=0))
        with pytest.raises(SlideError, match=r"unreadable\.svs"):
            list(read_batches(slide, plan, 8))


@pytest.mark.parametrize(
    "keywords",
    [{"patch_size": 0}, {"patch_size": 10, "stride": 0}, {"patch_size": 10, "tissue_threshold": 1.1}],
)
def test_settings_that_make_no_sense(place_slide, keywords):
    with open_slide(place_slide) as slide, pytest.raises(ConfigError, match=r"must be at least 1|0 to 1"):
        plan_patches(slide, PatchGrid(**keywords))


def test_fluorescence_gives_no_patches_of_glass(shared_data):
    with (
        open_slide(shared_data / "slides" / "test3-DAPI-387.ndpi") as slide,
        pytest.raises(SlideError, match="brightfield"),
    ):
        plan_patches(slide, PatchGrid(patch_size=256))


def test_resampling_averages_what_it_leaves_out(tmp_path):
    """Stripes a pixel wide are grey at half the resolution, not one colour or the other."""
    stripes = np.full((400, 400, 3), 255, np.uint8)
    stripes[:, ::2] = 55
    with open_slide(write_pyramid(tmp_path / "stripes.tiff", stripes, mpp=0.5, downsamples=(1,))) as slide:
        plan = plan_patches(slide, PatchGrid(patch_size=64, mpp=1.3, tissue_threshold=0))
        patches = all_patches(slide, plan)
    inside = patches[:, 4:-4, 4:-4].astype(int)
    assert np.abs(inside - 155).max() < 40
    assert inside.std() < 12
