"""Other toolkits' files, written as their owners do, come back as one kind of bag; what is wrong is refused by name."""

import dataclasses
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.bags import writers
from tests.bags.writers import MPP, NAME, PATCH_SIZE, PATCH_SIZE_LEVEL0
from utils.bags.store import Bag, BagInfo, peek_bag, read_bag, write_bag
from utils.core.errors import FeatureFileError
from utils.core.passport import Passport
from utils.core.recipe import Recipe

FEATURES, COORDS = writers.arrays()
OTHER_FEATURES, OTHER_COORDS = writers.arrays(6)
SLIDE = {"name": NAME, "width": 9000, "height": 8000, "objective": 40}
TRIDENT = Passport(Recipe(backbone="uni", patch_size=PATCH_SIZE, stride=PATCH_SIZE - 64, magnification=20), SLIDE)
STAMP = Passport(Recipe(backbone="uni", patch_size=224), {"mpp_delivered": 128 / 224})
SLIDEFLOW = Passport(Recipe(backbone="retccl", patch_size=299), {"mpp_delivered": 128 / 299})
SLIDE2VEC = Passport(Recipe(backbone="phikon-v2", patch_size=PATCH_SIZE), {"mpp_delivered": 0.5})
ATLASPATCH = Passport(
    Recipe(backbone="uni", patch_size=PATCH_SIZE, stride=PATCH_SIZE, magnification=20),
    {"width": 9000, "height": 8000, "objective": 40},
)
LITEMIL = Passport(Recipe(backbone="phikon-v2", patch_size=PATCH_SIZE_LEVEL0))

# What each layout, with all its companions, comes back as when the slide's mpp is known.
LAYOUTS: dict[str, tuple[Callable[[Path], Path], int | None, Passport | None]] = {
    "LiteMIL .h5": (lambda folder: writers.litemil_h5(folder, FEATURES, COORDS), None, None),
    "LiteMIL .pt": (lambda folder: writers.litemil_pt(folder, FEATURES, COORDS), PATCH_SIZE_LEVEL0, LITEMIL),
    "CLAM .h5": (lambda folder: writers.clam_h5(folder, FEATURES, COORDS), None, None),
    "TRIDENT": (lambda folder: writers.trident(folder, FEATURES, COORDS), PATCH_SIZE_LEVEL0, TRIDENT),
    "STAMP": (lambda folder: writers.stamp(folder, FEATURES, COORDS), PATCH_SIZE_LEVEL0, STAMP),
    "slideflow": (lambda folder: writers.slideflow(folder, FEATURES, COORDS), PATCH_SIZE_LEVEL0, SLIDEFLOW),
    "slide2vec": (lambda folder: writers.slide2vec(folder, FEATURES, COORDS), PATCH_SIZE_LEVEL0, SLIDE2VEC),
    "AtlasPatch": (
        lambda folder: writers.atlaspatch(folder, {"uni_v1": FEATURES}, COORDS), PATCH_SIZE_LEVEL0, ATLASPATCH
    ),
    "torchmil": (lambda folder: writers.torchmil(folder, FEATURES, COORDS), None, None),
}  # fmt: skip


def check(
    bag: Bag, coords: np.ndarray | None = COORDS, size: int | None = None, passport: Passport | None = None
) -> None:
    np.testing.assert_array_equal(bag.features, FEATURES)
    assert bag.features.dtype == FEATURES.dtype
    if coords is None:
        assert bag.coords is None
    else:
        assert bag.coords is not None
        assert bag.coords.dtype == np.int64
        np.testing.assert_array_equal(bag.coords, coords)
    assert (bag.patch_size_level0, bag.passport) == (size, passport)


def withheld(path: Path, mpp: float | None = None) -> str:
    bag = read_bag(path, mpp=mpp)
    np.testing.assert_array_equal(bag.features, FEATURES)
    assert bag.coords is None
    assert bag.coords_withheld
    return bag.coords_withheld


def refusal(path: Path, feat_type: str = "features", culprit: Path | None = None) -> str:
    """The one line with which `read_bag` refuses; it starts with the file at fault."""
    with pytest.raises(FeatureFileError) as caught:
        read_bag(path, feat_type, MPP)
    message = str(caught.value)
    assert message.startswith(f"{culprit or path}: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_comes_back_equal(tmp_path, layout):
    write, size, passport = LAYOUTS[layout]
    path = write(tmp_path)
    bag = read_bag(path, mpp=MPP)
    check(bag, COORDS, size, passport)
    assert bag.coords_withheld is None
    assert peek_bag(path) == BagInfo(*FEATURES.shape, FEATURES.dtype, passport)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_becomes_ours(tmp_path, layout):
    bag = read_bag(LAYOUTS[layout][0](tmp_path / "theirs"), mpp=MPP)
    write_bag(tmp_path / "ours.h5", bag)
    check(read_bag(tmp_path / "ours.h5"), bag.coords, bag.patch_size_level0, bag.passport)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_each_layout_in_another_precision(tmp_path, monkeypatch, layout, dtype):
    monkeypatch.setitem(globals(), "FEATURES", FEATURES.astype(dtype))
    path = LAYOUTS[layout][0](tmp_path)
    bag = read_bag(path, mpp=MPP)
    assert bag.features.dtype == peek_bag(path).dtype == ("f4" if dtype == "f8" else dtype)
    np.testing.assert_array_equal(bag.features, FEATURES.astype(bag.features.dtype))


# CLAM, MAD-MIL


def test_a_bare_tensor_alone_has_no_coordinates(tmp_path):
    path = writers.clam_pt(tmp_path, FEATURES)
    check(read_bag(path), None)
    assert read_bag(path).coords_withheld is None


def test_clams_tensor_has_its_coordinates_beside_it(tmp_path):
    path = writers.clam_pt(tmp_path, FEATURES)
    writers.clam_h5(tmp_path, FEATURES, COORDS)
    check(read_bag(path), COORDS)
    writers.clam_patches(tmp_path, COORDS)
    check(read_bag(path), COORDS, PATCH_SIZE_LEVEL0)
    (tmp_path / "h5_files" / f"{NAME}.h5").unlink()
    check(read_bag(path), COORDS, PATCH_SIZE_LEVEL0)


def test_clams_companions_are_found_from_within_the_folder(tmp_path, monkeypatch):
    path = writers.clam_pt(tmp_path, FEATURES)
    writers.clam_patches(tmp_path, COORDS)
    monkeypatch.chdir(path.parent)
    check(read_bag(Path(path.name)), COORDS, PATCH_SIZE_LEVEL0)


def test_clams_h5_has_its_patch_size_beside_it(tmp_path):
    path = writers.clam_h5(tmp_path, FEATURES, COORDS)
    writers.clam_patches(tmp_path, COORDS)
    check(read_bag(path), COORDS, PATCH_SIZE_LEVEL0)


@pytest.mark.parametrize("others", [OTHER_COORDS, COORDS + 1])
def test_the_size_of_other_patches_is_not_taken(tmp_path, others):
    path = writers.clam_h5(tmp_path, FEATURES, COORDS)
    writers.clam_patches(tmp_path, others)
    check(read_bag(path), COORDS, None)


def test_coordinates_of_other_patches_are_withheld(tmp_path):
    path = writers.clam_pt(tmp_path, FEATURES)
    other = writers.clam_patches(tmp_path, OTHER_COORDS)
    assert withheld(path) == f"{other} is of other patches (coords of shape (6, 2), not (7, 2))"
    assert read_bag(path).patch_size_level0 is None
    path = writers.torchmil(tmp_path, FEATURES, OTHER_COORDS)
    assert "of other patches" in withheld(path)
    path = writers.slide2vec(tmp_path, FEATURES, OTHER_COORDS)
    assert "of other patches" in withheld(path)
    path = writers.slideflow(tmp_path, FEATURES, OTHER_COORDS)
    assert "of other patches" in withheld(path, MPP)


# TRIDENT


def test_tridents_word_none_is_not_known(tmp_path):
    path = writers.trident(tmp_path, FEATURES, COORDS)
    with h5py.File(path) as file:
        names = list(file["coords"].attrs)
    writers.attributes(path, "coords", **dict.fromkeys(names, "None"))
    check(read_bag(path), COORDS, None, Passport(Recipe(backbone="uni")))
    writers.attributes(path, "features", encoder="None")
    check(read_bag(path), COORDS)


# STAMP


def test_stamps_coordinates_need_the_slides_mpp(tmp_path):
    path = writers.stamp(tmp_path, FEATURES, COORDS)
    assert withheld(path) == "its coords are in um, and the slide's um per pixel is not known"
    check(read_bag(path), None, None, STAMP)
    check(read_bag(path, mpp=0.5), COORDS // 2, 256, STAMP)


def test_micrometers_are_rounded_to_the_pixel_they_came_from(tmp_path):
    mpp, coords = 0.2527, COORDS + np.array([100_003, 70_001])
    path = writers.stamp(tmp_path, FEATURES, coords)
    with h5py.File(path, "a") as file:
        file["coords"][...] = (coords * mpp).astype("f4")
    np.testing.assert_array_equal(read_bag(path, mpp=mpp).coords, coords)


def test_stamps_older_files_say_tile_size(tmp_path):
    path = writers.stamp(
        tmp_path, FEATURES, COORDS, tile_size_um=None, tile_size_px=None, feat_type=None, tile_size=128.0
    )
    check(read_bag(path, mpp=MPP), COORDS, PATCH_SIZE_LEVEL0, Passport(Recipe(backbone="uni")))


@pytest.mark.parametrize(
    ("unit", "reason"), [("px", "its coords are in the unit 'px'"), (None, "its coords are in no known unit")]
)
def test_coordinates_in_another_unit_are_withheld(tmp_path, unit, reason):
    path = writers.stamp(tmp_path, FEATURES, COORDS, unit=unit)
    assert withheld(path, MPP) == f"{reason}; expected unit 'um'"


@pytest.mark.parametrize("kind", ["slide", "patient"])
def test_stamps_features_of_a_slide_are_refused(tmp_path, kind):
    path = writers.stamp(tmp_path, FEATURES[:1], COORDS[:1], feat_type=kind)
    assert f"features of a whole {kind}, not a bag of patches" in refusal(path)
    with pytest.raises(FeatureFileError, match=f"whole {kind}"):
        peek_bag(path)


def test_a_stamp_file_without_coordinates(tmp_path):
    path = writers.h5(tmp_path / "slide.h5", {"feats": FEATURES}, unit="um")
    check(read_bag(path, mpp=MPP), None)
    assert read_bag(path).coords_withheld is None


def test_a_real_bag_of_another_tool(shared_data):
    path = next((shared_data / "bags").glob("mopadi_*.h5"))
    bag = read_bag(path, mpp=0.25)
    assert bag.features.shape == (777, 512)
    assert bag.features.dtype == np.float32
    assert (bag.coords, bag.patch_size_level0, bag.passport) == (None, None, None)
    assert bag.coords_withheld == "its coords are in no known unit; expected unit 'um'"
    assert peek_bag(path) == BagInfo(777, 512, np.dtype("f4"), None)


# slideflow


def test_slideflows_centers_need_the_slides_mpp(tmp_path):
    path = writers.slideflow(tmp_path, FEATURES, COORDS)
    assert withheld(path) == f"{NAME}.index.npz holds tile centers, and the slide's um per pixel is not known"
    check(read_bag(path, mpp=0.5), COORDS + 128, 256, SLIDEFLOW)


def test_slideflow_rounds_a_tiles_size_down(tmp_path):
    """128 um at 0.2527 um per pixel are 506.5 pixels; the center of a tile of 506 is its corner and 253."""
    path = writers.slideflow(tmp_path, FEATURES, COORDS)
    check(read_bag(path, mpp=0.2527), COORDS + 256 - 253, 506, SLIDEFLOW)


def test_slideflow_takes_the_smaller_half_of_an_odd_tile(tmp_path):
    path = writers.slideflow(tmp_path, FEATURES, COORDS, tile_um=101)
    check(read_bag(path, mpp=1), COORDS + 256 - 50, 101, replace(SLIDEFLOW, slide={"mpp_delivered": 101 / 299}))


@pytest.mark.parametrize("tile_um", [0.3, 1e9])
def test_slideflows_tiles_have_a_size(tmp_path, tile_um):
    path = writers.slideflow(tmp_path, FEATURES, COORDS, tile_um=tile_um)
    assert "at 0.5 um per pixel no tile's size" in withheld(path, 0.5)


def test_a_magnification_is_no_size(tmp_path):
    path = writers.slideflow(tmp_path, FEATURES, COORDS, tile_um="20x")
    assert "bags_config.json is no help (tile_um '20x', not um)" in withheld(path, MPP)
    assert peek_bag(path).passport == Passport(Recipe(backbone="retccl", patch_size=299))
    (tmp_path / "bags_config.json").unlink()
    assert "bags_config.json is no help (not there" in withheld(path, MPP)


def test_slideflows_bag_without_an_index(tmp_path):
    path = writers.slideflow(tmp_path, FEATURES, COORDS)
    (tmp_path / f"{NAME}.index.npz").unlink()
    check(read_bag(path, mpp=MPP), None, None, SLIDEFLOW)


# slide2vec


def test_slide2vecs_coordinates_where_its_record_says(tmp_path):
    path = writers.slide2vec(tmp_path, FEATURES, COORDS, tiles="elsewhere")
    check(read_bag(path), COORDS, PATCH_SIZE_LEVEL0, SLIDE2VEC)
    (tmp_path / "elsewhere" / f"{NAME}.coordinates.npz").unlink()
    check(read_bag(path), None, PATCH_SIZE_LEVEL0, SLIDE2VEC)


def test_slide2vecs_coordinates_beside_it_come_before_those_recorded(tmp_path):
    path = writers.slide2vec(tmp_path, FEATURES, COORDS + 9, tiles="elsewhere")
    writers.npz(tmp_path / "tiles" / f"{NAME}.coordinates.npz", x=COORDS[:, 0], y=COORDS[:, 1])
    check(read_bag(path), COORDS, PATCH_SIZE_LEVEL0, SLIDE2VEC)


@pytest.mark.parametrize("nested", [True, False])
def test_slide2vecs_tile_size_in_the_coordinates_record(tmp_path, nested):
    path = writers.slide2vec(tmp_path, FEATURES, COORDS)
    writers.written(path.with_name(f"{NAME}.meta.json"), {"artifact_type": "tile_embeddings"})
    record = tmp_path / "tiles" / f"{NAME}.coordinates.meta.json"
    if not nested:
        writers.written(record, {"tile_size_lv0": 300})
    check(read_bag(path), COORDS, PATCH_SIZE_LEVEL0 if nested else 300)


@pytest.mark.parametrize(
    ("kind", "features"), [("slide_embeddings", FEATURES[:1]), ("hierarchical_embeddings", FEATURES[None])]
)
def test_what_slide2vec_makes_of_tiles_is_no_bag(tmp_path, kind, features):
    path = writers.slide2vec_other(tmp_path, kind, features)
    assert f"'{kind}' by its {NAME}.meta.json, not a bag of patches; expected 'tile_embeddings'" in refusal(path)


def test_somebody_elses_record_means_nothing(tmp_path):
    path = writers.clam_pt(tmp_path, FEATURES)
    writers.written(path.with_name(f"{NAME}.meta.json"), {"scanner": "S1"})
    check(read_bag(path), None)


# AtlasPatch


def test_of_several_encoders_one_must_be_named(tmp_path):
    path = writers.atlaspatch(tmp_path, {"resnet50": OTHER_FEATURES, "uni_v1": FEATURES}, COORDS)
    for look in (read_bag, peek_bag):
        with pytest.raises(FeatureFileError) as caught:
            look(path)
        listed = "resnet50 (6, 4), uni_v1 (7, 4)"
        assert str(caught.value) == f"{path}: features of several encoders: {listed}; name one with --feat_type"
    for name in ("uni_v1", "features/uni_v1"):
        check(read_bag(path, name), COORDS, PATCH_SIZE_LEVEL0, ATLASPATCH)
    assert peek_bag(path, "resnet50").passport == Passport(
        dataclasses.replace(ATLASPATCH.recipe, backbone="resnet50"), ATLASPATCH.slide
    )
    assert "'conch' is not in the file" in refusal(path, "conch")


def test_a_group_without_features(tmp_path):
    path = writers.atlaspatch(tmp_path, {}, COORDS)
    with h5py.File(path, "a") as file:
        file.create_group("features")
    assert "'features' is not an array; found coords (7, 5), features (a group)" in refusal(path)


# The first LiteMIL


def test_coordinates_of_another_level_are_withheld(tmp_path):
    path = writers.litemil_pt(tmp_path, FEATURES, COORDS, level=2)
    assert withheld(path, MPP) == "its coords are pixels of level 2, not of level 0"
    check(read_bag(path), None, None, LITEMIL)


@pytest.mark.parametrize("level", ["level 1", [1, 1], float("nan")])
def test_a_level_that_cannot_be_read_is_not_level_0(tmp_path, level):
    path = writers.litemil_pt(tmp_path, FEATURES, COORDS, level=level)
    assert withheld(path, MPP) == f"its coords are pixels of level {level!r}, not of level 0"


@pytest.mark.parametrize("names", [("features",), ("features", "feats")])
def test_a_unit_holds_whatever_the_features_are_called(tmp_path, names):
    path = writers.h5(tmp_path / "a.h5", dict.fromkeys(names, FEATURES) | {"coords": COORDS * MPP}, unit="um")
    assert withheld(path) == "its coords are in um, and the slide's um per pixel is not known"
    np.testing.assert_array_equal(read_bag(path, mpp=MPP).coords, COORDS)


def test_clams_downsample_of_x_and_y_is_one(tmp_path):
    path = writers.clam_h5(tmp_path, FEATURES, COORDS)
    patches = writers.clam_patches(tmp_path, COORDS)
    assert read_bag(path).patch_size_level0 == PATCH_SIZE_LEVEL0
    writers.attributes(patches, "coords", downsample=(4.0, 8.0))
    assert read_bag(path).patch_size_level0 is None


# What claims to be enormous


@pytest.mark.parametrize("name", ["features", "coords"])
def test_a_shape_that_fits_no_memory_is_refused(tmp_path, name):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"] = FEATURES
        file.pop(name, None)
        file.create_dataset(name, (10**13, 4 if name == "features" else 2), "f4", chunks=(10**6, 2), compression="gzip")
    message = refusal(path)
    assert "holds more than fits in memory" in message or "0 of" in message


def test_nested_json_is_refused(tmp_path):
    path = writers.slideflow(tmp_path, FEATURES, COORDS)
    (tmp_path / "bags_config.json").write_text("[" * 100_000)
    with pytest.raises(FeatureFileError, match=r"bags_config\.json: not readable as JSON"):
        read_bag(path)


# Damage


def faults(folder: Path) -> dict[str, tuple[Path, str]]:
    """One file per fault: where it is, and what its refusal says."""
    nan, infinite = FEATURES.copy(), FEATURES.copy()
    nan[3:5, 1], infinite[6, 0] = np.nan, np.inf
    return {
        "slide-level": (writers.trident_slide(folder / "a", FEATURES), "one vector for the whole slide"),
        "slide-level .pt": (writers.clam_pt(folder / "b", FEATURES[0]), "one vector for the whole slide"),
        "rank": (writers.clam_pt(folder / "c", np.stack([FEATURES, FEATURES])), "features of shape (2, 7, 4): no bag"),
        "rank .h5": (writers.litemil_h5(folder / "d", FEATURES[None, None], COORDS), "features of shape (1, 1, 7, 4)"),
        "no patches": (writers.litemil_h5(folder / "e", FEATURES[:0], COORDS[:0]), "shape (0, 4): no patches"),
        "no patches, no width": (writers.litemil_h5(folder / "f", np.zeros(0), COORDS[:0]), "features of shape (0,)"),
        "no patches .pt": (writers.clam_pt(folder / "g", FEATURES[:0]), "features of shape (0, 4): no patches"),
        "NaN": (writers.trident(folder / "h", nan, COORDS), "2 values are NaN or infinite, the first in row 3"),
        "infinite": (writers.stamp(folder / "i", infinite, COORDS), "1 values are NaN or infinite, the first in row 6"),
        "encoders": (
            writers.atlaspatch(folder / "j", {"a": FEATURES, "b": FEATURES}, COORDS), "features of several encoders"
        ),
        "integers": (writers.clam_pt(folder / "k", COORDS), "features of type int64"),
        "rows": (writers.trident(folder / "l", FEATURES, OTHER_COORDS), "coords of shape (6, 2); expected (7, 2)"),
        "pickle": (writers.pt(folder / "m.pt", torch.nn.Linear(4, 2)), "neither tensor, array nor plain value"),
        "micrometers": (writers.stamp(folder / "n", FEATURES, COORDS * np.nan), "coords hold fractions"),
    }  # fmt: skip


def test_each_fault_is_refused_by_name(tmp_path):
    for path, reason in faults(tmp_path).values():
        assert reason in refusal(path)


CUT = {
    "CLAM .h5": lambda folder: writers.clam_h5(folder, *writers.arrays(60, 32)),
    "TRIDENT": lambda folder: writers.trident(folder, *writers.arrays(60, 32)),
    "AtlasPatch": lambda folder: writers.atlaspatch(folder, {"uni": writers.arrays(60, 32)[0]}, writers.arrays(60)[1]),
    "bare tensor": lambda folder: writers.clam_pt(folder, writers.arrays(60, 32)[0]),
    "LiteMIL .pt": lambda folder: writers.litemil_pt(folder, *writers.arrays(60, 32)),
}


@pytest.mark.parametrize("layout", CUT)
def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path, layout):
    path = CUT[layout](tmp_path)
    whole = path.read_bytes()
    read_bag(path)
    for size in [0, 1, len(whole) - 1, *random.Random(layout).sample(range(len(whole)), 20)]:  # noqa: S311
        path.write_bytes(whole[:size])
        refusal(path)


COMPANIONS = {
    "slideflow's index": (writers.slideflow, f"{NAME}.index.npz"),
    "slideflow's config": (writers.slideflow, "bags_config.json"),
    "slide2vec's record": (writers.slide2vec, f"tile_embeddings/{NAME}.meta.json"),
    "slide2vec's coordinates": (writers.slide2vec, f"tiles/{NAME}.coordinates.npz"),
    "torchmil's coordinates": (writers.torchmil, f"coords/{NAME}.h5"),
}


@pytest.mark.parametrize("layout", COMPANIONS)
def test_a_damaged_companion_is_refused_by_its_own_name(tmp_path, layout):
    write, name = COMPANIONS[layout]
    path, companion = write(tmp_path, FEATURES, COORDS), tmp_path / name
    whole = companion.read_bytes()
    for size in [0, len(whole) - 1, *random.Random(layout).sample(range(len(whole)), 20)]:  # noqa: S311
        companion.write_bytes(whole[:size])
        refusal(path, culprit=companion)


def test_a_damaged_clam_companion_is_refused_by_its_own_name(tmp_path):
    path, companion = writers.clam_pt(tmp_path, FEATURES), writers.clam_patches(tmp_path, COORDS)
    companion.write_bytes(companion.read_bytes()[:900])
    refusal(path, culprit=companion)


@pytest.mark.parametrize("content", ["[]", "7", '"text"', "null"])
def test_a_record_that_names_nothing_is_refused(tmp_path, content):
    path = writers.slideflow(tmp_path, FEATURES, COORDS)
    (tmp_path / "bags_config.json").write_text(content)
    assert f"holds {content}; expected named values" in refusal(path, culprit=tmp_path / "bags_config.json")


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, True, 10**400, [1, 2]], ids=lambda value: str(value)[:9])
def test_a_record_of_nonsense_is_not_known(tmp_path, value):
    path = writers.slide2vec(tmp_path, FEATURES, COORDS)
    record = dict.fromkeys(("encoder_name", "requested_spacing_um", "tile_size_lv0", "coordinates_npz_path"), value)
    writers.written(path.with_name(f"{NAME}.meta.json"), {"artifact_type": "tile_embeddings", **record})
    assert read_bag(path).coords is not None
    config = {"extractor": value, "tile_px": value, "tile_um": value}
    path = writers.slideflow(tmp_path / "slideflow", FEATURES, COORDS)
    (path.parent / "bags_config.json").write_text(json.dumps(config))
    assert read_bag(path).coords is None


def test_a_companion_is_never_unpickled(tmp_path):
    path = writers.slideflow(tmp_path, FEATURES, COORDS)
    np.savez(tmp_path / f"{NAME}.index.npz", np.array([{"a": 1}], dtype=object))
    assert "not readable as NumPy arrays arr_0" in refusal(path, culprit=tmp_path / f"{NAME}.index.npz")


@pytest.mark.parametrize(
    ("centers", "reason"),
    [
        (np.full((7, 2), "a"), "coords of type <U1; expected numbers"),
        (COORDS + 0.5, "coords hold fractions"),
        (COORDS * np.nan, "coords hold fractions"),
    ],
)
def test_companions_of_no_coordinates(tmp_path, centers, reason):
    path = writers.slideflow(tmp_path, FEATURES, COORDS)
    np.savez(tmp_path / f"{NAME}.index.npz", centers)
    assert reason in refusal(path, culprit=tmp_path / f"{NAME}.index.npz")


def test_unequal_x_and_y_are_refused(tmp_path):
    path = writers.slide2vec(tmp_path, FEATURES, COORDS)
    coordinates = writers.npz(tmp_path / "tiles" / f"{NAME}.coordinates.npz", x=np.arange(7), y=np.arange(6))
    assert "x of shape (7,), y of shape (6,)" in refusal(path, culprit=coordinates)
