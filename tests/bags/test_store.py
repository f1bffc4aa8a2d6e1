"""Bags come back as they were written, and a file that is no bag is refused by its name."""

import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.cohort import PATCH_SIZE_LEVEL0, synthetic_bag, synthetic_passport
from utils.bags.store import (
    Bag,
    BagInfo,
    StoredBag,
    bag_writer,
    is_feature_file,
    open_bag,
    peek_bag,
    read_bag,
    write_bag,
)
from utils.core.errors import FeatureFileError, LiteMILError
from utils.core.passport import Passport
from utils.core.recipe import Recipe

FORMATS = ("h5", "pt")


def features_of(rows: int = 7, dim: int = 4, dtype="float16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(dtype)


def bag_of(rows: int = 7, dim: int = 4, dtype="float16") -> Bag:
    return synthetic_bag("slide", features_of(rows, dim, dtype), np.random.default_rng(1))


def coords_of(rows: int = 7) -> np.ndarray:
    return np.arange(2 * rows, dtype=np.int64).reshape(rows, 2) * 256


def write_h5(path: Path, **arrays) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def write_pt(path: Path, content: object, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def same(one: Bag, other: Bag) -> bool:
    assert one.features.dtype == other.features.dtype
    np.testing.assert_array_equal(one.features, other.features)
    assert (one.coords is None) == (other.coords is None)
    if one.coords is not None and other.coords is not None:
        assert one.coords.dtype == other.coords.dtype == np.int64
        np.testing.assert_array_equal(one.coords, other.coords)
    mine, theirs = ((bag.patch_size_level0, bag.passport, bag.coords_withheld) for bag in (one, other))
    return mine == theirs


def agree(path: Path) -> Bag:
    """The bag, after `peek_bag` has told its size, dtype and passport rightly, and `open_bag` has given the same."""
    bag, info = read_bag(path), peek_bag(path)
    assert info == BagInfo(*bag.features.shape, bag.features.dtype, bag.passport)
    assert info.nbytes == bag.features.nbytes
    stored = open_bag(path)
    assert same(replace(bag, features=whole_of(stored)), bag)
    assert same(Bag(bag.features, stored.coords, stored.patch_size_level0, stored.passport), bag)
    return bag


def whole_of(stored: StoredBag, rows: int = 7) -> np.ndarray:
    """The features of an opened bag, which came in blocks of some rows."""
    blocks = [block.numpy() for block in stored.features.blocks(rows)]
    assert all(len(block) == rows for block in blocks[:-1])
    features = np.concatenate(blocks)
    np.testing.assert_array_equal(stored.features.whole().numpy(), features)
    assert stored.features.shape == features.shape
    return features


def refusal(path: Path, feat_type: str = "features") -> str:
    """The one line with which `read_bag` refuses; it starts with the file, and nothing but FeatureFileError comes."""
    with pytest.raises(FeatureFileError) as caught:
        read_bag(path, feat_type)
    message = str(caught.value)
    assert message.startswith((f"{path}: ", f"{path.parent / path.name}: "))
    with pytest.raises(FeatureFileError) as caught:  # taken block by block, here in a single one
        list(open_bag(path, feat_type).features.blocks(10**6))
    assert str(caught.value) == message
    return message


def test_a_bad_value_is_found_where_it_is_when_features_come_in_blocks(tmp_path):
    features = features_of(20)
    features[13, 2] = np.nan
    path = write_h5(tmp_path / "a.h5", features=features)
    blocks = open_bag(path).features.blocks(5)
    assert [len(next(blocks)) for _ in range(2)] == [5, 5]
    with pytest.raises(FeatureFileError, match=r"a\.h5: 1 values are NaN or infinite, the first in row 13"):
        next(blocks)


def refused_by_both(path: Path, feat_type: str = "features") -> str:
    message = refusal(path, feat_type)
    with pytest.raises(FeatureFileError) as caught:
        peek_bag(path, feat_type)
    assert str(caught.value) == message
    return message


# What is written comes back


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("ending", ["h5", "pt", "hdf5", "pth", "H5", "PT"])
@pytest.mark.parametrize("rows", [1, 7])
def test_round_trip(tmp_path, ending, dtype, rows):
    bag = bag_of(rows, dtype=dtype)
    assert bag.passport is not None
    path = tmp_path / f"slide.1.{ending}"
    write_bag(path, bag)
    assert is_feature_file(path)
    assert same(agree(path), bag)
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208 - no .part is left


@pytest.mark.parametrize("ending", FORMATS)
def test_round_trip_of_features_alone(tmp_path, ending):
    path = tmp_path / f"slide.{ending}"
    write_bag(path, Bag(features_of()))
    bag = agree(path)
    assert same(bag, Bag(features_of()))
    assert bag.coords is None, "coordinates that are not known are not zeros"


@pytest.mark.parametrize("ending", FORMATS)
def test_round_trip_of_the_patch_size_without_a_passport(tmp_path, ending):
    path = tmp_path / f"slide.{ending}"
    bag = Bag(features_of(), coords_of(), 512)
    write_bag(path, bag)
    assert same(agree(path), bag)


@pytest.mark.parametrize("ending", FORMATS)
def test_round_trip_of_coordinates_beyond_32_bits(tmp_path, ending):
    path = tmp_path / f"slide.{ending}"
    coords = coords_of() + 2**40
    write_bag(path, Bag(features_of(), coords))
    np.testing.assert_array_equal(agree(path).coords, coords)


@pytest.mark.parametrize("ending", FORMATS)
def test_views_and_read_only_arrays_are_written_like_any_other(tmp_path, ending):
    whole = features_of(14, 8)
    frozen = np.ascontiguousarray(whole[::-2, ::2])
    write_bag(tmp_path / f"plain.{ending}", Bag(frozen.copy(), coords_of()))
    frozen.flags.writeable = False
    for name, features in {"view": whole[::-2, ::2], "frozen": frozen}.items():
        path = tmp_path / f"{name}.{ending}"
        write_bag(path, Bag(features, np.asfortranarray(coords_of())))
        assert path.read_bytes() == (tmp_path / f"plain.{ending}").read_bytes()


@pytest.mark.parametrize("name", ["slide.npy", "slide", "slide.h5.part", "slide.csv"])
def test_an_ending_that_would_not_be_read_is_not_written(tmp_path, name):
    with pytest.raises(FeatureFileError, match=r"end it in \.h5 or \.pt"):
        write_bag(tmp_path / name, bag_of())
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    assert not is_feature_file(tmp_path / name)


def test_equal_bags_give_equal_bytes_whatever_the_name_and_the_time(tmp_path):
    for name in ("a", "b_and_longer"):
        for ending in FORMATS:
            write_bag(tmp_path / f"{name}.{ending}", bag_of())
        time.sleep(1.05 if name == "a" else 0)  # HDF5 keeps times in whole seconds
    for ending in FORMATS:
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b_and_longer.{ending}").read_bytes()
        write_bag(tmp_path / f"c.{ending}", bag_of(dtype="float32"))
        assert (tmp_path / f"c.{ending}").read_bytes() != (tmp_path / f"a.{ending}").read_bytes()


# TRIDENT's names


def test_tridents_names_and_attributes(tmp_path):
    bag = bag_of()
    write_bag(tmp_path / "slide.h5", bag)
    with h5py.File(tmp_path / "slide.h5") as file:
        assert set(file) == {"features", "coords"}
        features, coords = file["features"], file["coords"]
        assert isinstance(features, h5py.Dataset)
        assert isinstance(coords, h5py.Dataset)
        assert coords.dtype == np.int64
        assert dict(features.attrs) == {"name": "slide", "encoder": "synthetic", "savetodir": "."}
        assert bag.passport is not None
        assert dict(coords.attrs) == {
            "patch_size": 256,
            "patch_size_level0": PATCH_SIZE_LEVEL0,
            "level0_magnification": "None",
            "target_magnification": 20.0,
            "overlap": 0,
            "level0_width": bag.passport.slide["width"],
            "level0_height": bag.passport.slide["height"],
            "name": "slide",
        }


def test_what_is_not_known_is_tridents_word_none(tmp_path):
    write_bag(tmp_path / "slide.h5", Bag(features_of(), coords_of()))
    with h5py.File(tmp_path / "slide.h5") as file:
        attributes = dict(file["coords"].attrs)
    assert set(attributes) == {
        "patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "level0_width",
        "level0_height", "name",
    }  # fmt: skip
    assert set(attributes.values()) == {"None"}
    assert read_bag(tmp_path / "slide.h5").patch_size_level0 is None


@pytest.mark.parametrize(
    ("rows", "dim", "dtype"), [(1, 1, "f2"), (2, 4, "f2"), (600, 1024, "f2"), (5000, 2048, "f4"), (3, 9000, "f4")]
)
def test_features_lie_in_one_piece(tmp_path, rows, dim, dtype):
    features = features_of(rows, dim, dtype)
    write_bag(tmp_path / "slide.h5", Bag(features, coords_of(rows), 256))
    with h5py.File(tmp_path / "slide.h5") as file:
        data = file["features"]
        assert data.chunks is None
        place = data.id.get_offset()
        np.testing.assert_array_equal(data, features)
    with (tmp_path / "slide.h5").open("rb") as file:
        file.seek(place)
        assert file.read(features.nbytes) == features.tobytes()


@pytest.mark.parametrize("ending", ["h5", "pt"])
@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 90]])
def test_written_in_pieces_the_bytes_are_the_same(tmp_path, ending, cuts):
    features, coords = features_of(100, 8, "f2"), coords_of(100)
    whole, pieces = tmp_path / f"whole.{ending}", tmp_path / f"pieces.{ending}"
    passport = synthetic_passport("slide")
    write_bag(whole, Bag(features, coords, 256, passport))
    with bag_writer(pieces, 8, "float16") as writer:
        for part in np.split(features, cuts):
            writer.append(part)
        writer.finish(coords, 256, passport)
    assert pieces.read_bytes() == whole.read_bytes()
    np.testing.assert_array_equal(read_bag(pieces).features, features)


@pytest.mark.parametrize("ending", ["h5", "pt"])
def test_what_ends_amid_the_pieces_leaves_no_file(tmp_path, ending):
    def interrupted():
        with bag_writer(tmp_path / f"a.{ending}", 8, "float16") as writer:
            writer.append(np.zeros((5, 8), "f2"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file size there")
def test_a_full_disk_is_one_line_and_no_file(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(LiteMILError, match=r"slide.h5: cannot be written \(File too large\); free some space"):
            write_bag(tmp_path / "slide.h5", Bag(features_of(1000, 64)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


# What others have written is read


@pytest.mark.parametrize("settings", [{"chunks": (3, 4)}, {"chunks": (3, 2), "compression": "gzip"}, {}])
def test_what_was_never_written_is_not_read_as_zeros(tmp_path, settings):
    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("features", (7, 4), "f4", **settings)
        if settings:
            data[:4] = features_of(4, dtype="f4")
    assert "parts were written; extract it again" in refusal(path)


def test_features_in_other_files_are_read(tmp_path):
    write_h5(tmp_path / "a.h5", features=features_of())
    layout = h5py.VirtualLayout((7, 4), "f2")
    layout[:] = h5py.VirtualSource(tmp_path / "a.h5", "features", (7, 4))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_virtual_dataset("features", layout)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["features"] = h5py.ExternalLink("a.h5", "features")
    for name in ("b.h5", "c.h5"):
        np.testing.assert_array_equal(read_bag(tmp_path / name).features, features_of())


def test_tridents_magnification_is_kept_when_its_file_is_rewritten(tmp_path):
    passport = Passport(Recipe(backbone="uni", magnification=20.0), {"objective": 40.0})
    write_bag(tmp_path / "slide.h5", Bag(features_of(), coords_of(), 512, passport))
    with h5py.File(tmp_path / "slide.h5") as file:
        attributes = dict(file["coords"].attrs)
    assert (attributes["level0_magnification"], attributes["target_magnification"]) == (40.0, 20.0)


def test_clams_h5(tmp_path):
    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features_of(dtype="f4"), chunks=(5, 4), maxshape=(None, 4))
        file.create_dataset("coords", data=coords_of().astype("i4"), chunks=(5, 2), maxshape=(None, 2))
    assert same(agree(path), Bag(features_of(dtype="f4"), coords_of()))


def test_tridents_h5(tmp_path):
    path = write_h5(tmp_path / "slide.h5", features=features_of(), coords=coords_of())
    with h5py.File(path, "a") as file:
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512, "level0_magnification": "None"})
    assert same(agree(path), Bag(features_of(), coords_of(), 512, Passport(Recipe(patch_size=256))))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (512, 512), (512.0, 512), (np.int32(512), 512), (np.array([512]), 512), ("512", 512), (511.7, 512),
        ("None", None), (np.bytes_(b"None"), None), (np.nan, None), (np.inf, None), (0, None), (-4, None),
        (np.array([1, 2]), None), (h5py.Empty("i4"), None),
    ],
)  # fmt: skip
def test_a_patch_size_is_a_length_or_unknown(tmp_path, written, read):
    path = write_h5(tmp_path / "slide.h5", features=features_of(), coords=coords_of())
    with h5py.File(path, "a") as file:
        file["coords"].attrs["patch_size_level0"] = written
    size = read_bag(path).patch_size_level0
    assert size == read
    assert size is None or type(size) is int


def test_the_passport_tells_the_patch_size_where_the_coordinates_do_not(tmp_path):
    path = write_h5(tmp_path / "slide.h5", features=features_of(), coords=coords_of())
    with h5py.File(path, "a") as file:
        file.attrs["litemil_passport"] = synthetic_passport("slide").to_json()
    assert read_bag(path).patch_size_level0 == PATCH_SIZE_LEVEL0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bare_tensor(tmp_path, zipped):
    path = write_pt(tmp_path / "slide.pt", torch.from_numpy(features_of(dtype="f4")), zipped)
    assert same(agree(path), Bag(features_of(dtype="f4")))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy, np.ndarray.tolist])
def test_the_first_versions_dict(tmp_path, wrap, zipped):
    content = {
        "features": torch.from_numpy(features_of(dtype="f4")),
        "coords": wrap(coords_of()),
        "metadata": {"slide": "a.svs", "patch_size": 256, "level": np.int64(0), "mpp": np.float64(0.25)},
    }
    expected = Bag(features_of(dtype="f4"), coords_of(), 256, Passport(Recipe(patch_size=256)))
    assert same(agree(write_pt(tmp_path / "slide.pth", content, zipped)), expected)


def test_features_that_are_an_array_in_a_dict(tmp_path):
    path = write_pt(tmp_path / "slide.pt", {"features": features_of(dtype="f4")})
    assert same(agree(path), Bag(features_of(dtype="f4")))


def test_bfloat16_becomes_float32(tmp_path):
    tensor = torch.from_numpy(features_of(dtype="f4")).bfloat16()
    bag = agree(write_pt(tmp_path / "slide.pt", tensor))
    assert bag.features.dtype == np.float32
    np.testing.assert_array_equal(bag.features, tensor.float().numpy())


@pytest.mark.parametrize("dtype", ["f8", ">f4", ">f2"])
def test_other_floats_become_float32(tmp_path, dtype):
    features = features_of(dtype=dtype)
    bag = agree(write_h5(tmp_path / "slide.h5", features=features))
    assert bag.features.dtype == np.dtype("f4")
    np.testing.assert_array_equal(bag.features, features.astype("f4"))


@pytest.mark.parametrize("ending", FORMATS)
def test_a_batch_axis_is_squeezed(tmp_path, ending):
    path = tmp_path / f"slide.{ending}"
    features, coords = features_of()[None], coords_of()[None]
    if ending == "h5":
        write_h5(path, features=features, coords=coords)
    else:
        write_pt(path, {"features": torch.from_numpy(features), "coords": coords})
    assert same(agree(path), Bag(features_of(), coords_of()))


def test_one_patch_of_a_batch_of_one_is_a_bag(tmp_path):
    assert agree(write_h5(tmp_path / "slide.h5", features=features_of(1)[None])).features.shape == (1, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: torch.cat([tensor, tensor], dim=1)[:, :4],
        lambda tensor: tensor.T.contiguous().T,
        lambda tensor: tensor.clone().requires_grad_(),
        lambda tensor: torch.nn.Parameter(tensor),
    ],
    ids=["view", "transposed", "requires grad", "parameter"],
)
@pytest.mark.parametrize("bare", [True, False])
def test_tensors_of_any_kind(tmp_path, change, bare):
    tensor = change(torch.from_numpy(features_of(dtype="f4")))
    path = write_pt(tmp_path / "slide.pt", tensor if bare else {"features": tensor})
    assert same(agree(path), Bag(features_of(dtype="f4")))


def test_coordinates_that_require_a_gradient(tmp_path):
    coords = torch.from_numpy(coords_of()).float().requires_grad_()
    path = write_pt(tmp_path / "slide.pt", {"features": torch.from_numpy(features_of()), "coords": coords})
    np.testing.assert_array_equal(read_bag(path).coords, coords_of())


@pytest.mark.parametrize("ending", FORMATS)
def test_features_under_another_name(tmp_path, ending):
    path = tmp_path / f"slide.{ending}"
    if ending == "h5":
        write_h5(path, mine=features_of(), other=features_of(3))
    else:
        write_pt(path, {"mine": torch.from_numpy(features_of()), "other": 3})
    np.testing.assert_array_equal(read_bag(path, "mine").features, features_of())
    assert peek_bag(path, "mine").num_instances == 7
    message = refused_by_both(path)
    assert "'features'" in message
    assert "mine" in message, "what was found is not told"


# What is no bag is refused


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((512,), "one vector for the whole slide"),
        ((1, 512), None),
        ((1, 1, 512), None),
        ((), "no bag"),
        ((0,), "no patches"),
        ((0, 512), "no patches"),
        ((1, 0, 512), "no patches"),
        ((7, 0), "no bag"),
        ((2, 7, 4), "no bag"),
        ((1, 1, 7, 4), "no bag"),
    ],
)
def test_shapes(tmp_path, ending, shape, reason):
    path = tmp_path / f"slide.{ending}"
    features = np.zeros(shape, "f4")
    write_h5(path, features=features) if ending == "h5" else write_pt(path, torch.from_numpy(features))
    if reason is None:
        assert agree(path).features.shape == (1, 512)
    else:
        message = refused_by_both(path)
        assert f"features of shape {shape}: {reason}" in message
        assert "expected (N, D)" in message


def test_a_dataset_without_a_shape(tmp_path):
    path = write_h5(tmp_path / "slide.h5", features=h5py.Empty("f4"))
    assert "'features' is not an array" in refused_by_both(path)
    path = write_h5(tmp_path / "other.h5", features=features_of(), coords=h5py.Empty("i8"))
    assert read_bag(path).coords is None


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("dtype", ["i4", "u1", "?", "c8"])
def test_features_that_are_no_floats(tmp_path, ending, dtype):
    path = tmp_path / f"slide.{ending}"
    features = np.zeros((7, 4), dtype)
    write_h5(path, features=features) if ending == "h5" else write_pt(path, torch.from_numpy(features))
    assert f"features of type {np.dtype(dtype)}; expected float16 or float32" in refused_by_both(path)


@pytest.mark.parametrize("features", [[["a", "b"]], np.zeros((5, 2), [("a", "f4")])], ids=["words", "records"])
def test_features_that_are_no_numbers(tmp_path, features):
    assert "features of type" in refused_by_both(write_h5(tmp_path / "slide.h5", features=features))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tensor",
    [torch.eye(4).to_sparse(), torch.eye(4).to("meta"), torch.eye(4).to(torch.float8_e4m3fn)],
    ids=["sparse", "meta", "float8"],
)
def test_tensors_that_are_no_plain_arrays(tmp_path, tensor):
    assert "holds a tensor that is not a plain array" in refused_by_both(write_pt(tmp_path / "slide.pt", tensor))


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, ending, dtype, bad):
    features = features_of(200, 8, dtype)
    features[17, 5] = features[17, 6] = features[150, 0] = bad
    path = tmp_path / f"slide.{ending}"
    write_h5(path, features=features) if ending == "h5" else write_pt(path, torch.from_numpy(features))
    assert "3 values are NaN or infinite, the first in row 17" in refusal(path)
    assert peek_bag(path).num_instances == 200


def test_opposite_infinities_do_not_hide_each_other(tmp_path):
    features = features_of(3, 2)
    features[1] = np.inf, -np.inf
    assert "2 values are NaN or infinite, the first in row 1" in refusal(write_h5(tmp_path / "a.h5", features=features))


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_the_largest_values_are_finite(tmp_path, dtype):
    features = np.full((300, 500), np.finfo(dtype).max, dtype)
    write_bag(tmp_path / "slide.h5", Bag(features))
    np.testing.assert_array_equal(read_bag(tmp_path / "slide.h5").features, features)


def test_a_double_that_is_too_large_for_float32(tmp_path):
    features = features_of(dtype="f8")
    features[3, 0] = 1e300
    assert "1 values are NaN or infinite, the first in row 3" in refusal(write_h5(tmp_path / "a.h5", features=features))


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    ("coords", "reason"),
    [
        (coords_of(6), r"coords of shape (6, 2); expected (7, 2)"),
        (coords_of(8), r"coords of shape (8, 2); expected (7, 2)"),
        (coords_of().T.copy(), r"coords of shape (2, 7)"),
        (np.zeros((7, 3)), r"coords of shape (7, 3)"),
        (np.zeros((7, 5), "i4"), r"coords of shape (7, 5)"),
        (np.zeros(14), r"coords of shape (14,)"),
        (coords_of() + 0.5, "coords hold fractions; expected whole level-0 pixels"),
        (np.where(coords_of() == 0, np.nan, 1), "coords hold fractions"),
        (np.where(coords_of() == 0, np.inf, 1), "coords hold fractions"),
        (np.zeros((7, 2), "?"), "coords of type bool"),
    ],
)
def test_coordinates_that_do_not_fit(tmp_path, ending, coords, reason):
    path = tmp_path / f"slide.{ending}"
    if ending == "h5":
        write_h5(path, features=features_of(), coords=coords)
    else:
        write_pt(path, {"features": torch.from_numpy(features_of()), "coords": coords})
    assert reason in refusal(path)


def test_coordinates_of_words(tmp_path):
    path = write_h5(tmp_path / "slide.h5", features=features_of(), coords=[["a", "b"]] * 7)
    assert "coords of type" in refusal(path)


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "u4", "u8"])
def test_whole_coordinates_of_any_type(tmp_path, dtype):
    path = write_h5(tmp_path / "slide.h5", features=features_of(), coords=coords_of().astype(dtype))
    assert same(read_bag(path), Bag(features_of(), coords_of()))


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path, ending):
    whole, path = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    write_bag(whole, bag_of(50, 16))
    data = whole.read_bytes()
    for length in [0, 1, len(data) - 1, *random.Random(0).sample(range(len(data)), 20)]:  # noqa: S311
        path.write_bytes(data[:length])
        refusal(path)


def test_damage_inside_an_hdf5_file_is_refused_or_harmless(tmp_path):
    """Only in the headers at the file's beginning: elsewhere damage can make HDF5 1.14 itself crash or run for ever."""
    whole, path = tmp_path / "whole.h5", tmp_path / "damaged.h5"
    write_bag(whole, bag_of(50, 16))
    data = whole.read_bytes()
    refused = 0
    for place in range(0, 1500, 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        for function in (peek_bag, read_bag):
            try:
                function(path)
            except FeatureFileError as error:
                refused += 1
                assert str(path) in str(error)  # noqa: PT017
    assert refused > 20


@pytest.mark.parametrize("failure", [OSError, RuntimeError, KeyError, ValueError, TypeError])
@pytest.mark.parametrize("method", ["__getitem__", "shape"])
def test_whatever_hdf5_stumbles_over_is_refused(tmp_path, monkeypatch, failure, method):
    def stumble(*_):
        raise failure("bad local heap signature")

    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features_of(), compression="gzip")
    monkeypatch.setattr(h5py.Dataset, method, property(stumble) if method == "shape" else stumble)
    assert "bad local heap signature" in refusal(path)


@pytest.mark.parametrize("name", ["slide.h5", "slide.hdf5", "slide.pt", "slide.pth"])
@pytest.mark.parametrize("content", [b"", b"case_id,wsi_id,label\n" * 99, b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"])
def test_other_files_under_our_endings(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert len(refused_by_both(path).splitlines()) == 1


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_of_the_other_format_is_refused(tmp_path, ending):
    other = "pt" if ending == "h5" else "h5"
    write_bag(tmp_path / f"slide.{other}", bag_of())
    (tmp_path / f"slide.{other}").rename(tmp_path / f"slide.{ending}")
    refused_by_both(tmp_path / f"slide.{ending}")


@pytest.mark.parametrize("ending", FORMATS)
def test_missing_files_and_folders(tmp_path, ending):
    assert "no such file" in refused_by_both(tmp_path / f"slide.{ending}")
    (tmp_path / f"folder.{ending}").mkdir()
    assert "no such file" in refused_by_both(tmp_path / f"folder.{ending}")


@pytest.mark.parametrize(
    "content", [[torch.zeros(3, 2)], {}, {"x": torch.zeros(3, 2)}, {"features": [[1.0]]}, {1: 2}, 7, None, "text"]
)
def test_tensor_files_without_features(tmp_path, content):
    message = refused_by_both(write_pt(tmp_path / "slide.pt", content))
    assert "no 'features' in it; found " in message
    assert "expected a tensor (N, D) or a dict with 'features'" in message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_feature_file_executes_nothing(tmp_path, zipped):
    witness = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch '{witness}'",)

    path = write_pt(tmp_path / "slide.pt", {"features": torch.zeros(3, 2), "metadata": Evil()}, zipped)
    assert "nothing in it was executed" in refused_by_both(path)
    assert not witness.exists()


def test_a_link_that_leads_nowhere(tmp_path):
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["features"] = h5py.SoftLink("/nowhere")
    assert "'features' is not in the file" in refused_by_both(tmp_path / "slide.h5")


# Passports


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        '{"schema": 1, "recipe": {"x": NaN}, "slide": {}, "software": {}}',
        '{"schema": 1, "recipe": [], "slide": {}, "software": {}}',
    ],
)
def test_a_passport_that_is_not_readable_is_told(tmp_path, text):
    path = write_h5(tmp_path / "slide.h5", features=features_of())
    with h5py.File(path, "a") as file:
        file.attrs["litemil_passport"] = text
    assert "its feature passport is not readable" in refused_by_both(path)


def test_a_passport_that_is_not_readable_in_a_tensor_file_is_told(tmp_path):
    for recipe in (None, {"mean": np.zeros(3)}):
        metadata = {"schema": 1, "recipe": recipe, "slide": {}, "software": {}}
        path = write_pt(tmp_path / "slide.pt", {"features": torch.zeros(3, 2), "metadata": metadata})
        assert "its feature passport is not readable" in refused_by_both(path)


def test_metadata_of_others_is_no_passport(tmp_path):
    for metadata in ({"schema": 1}, {"recipe": "x"}, "text", [1], None):
        path = write_pt(tmp_path / "slide.pt", {"features": torch.zeros(3, 2), "metadata": metadata})
        assert agree(path).passport is None


@pytest.mark.parametrize("ending", FORMATS)
def test_a_passport_keeps_nested_fields_and_letters(tmp_path, ending):
    passport = Passport(
        Recipe(transform={"mean": [0.1, 0.2], "resize": None}), {"name": "Präparat 7/µ"}, {"torch": "2"}
    )
    write_bag(tmp_path / f"slide.{ending}", Bag(features_of(), passport=passport))
    assert agree(tmp_path / f"slide.{ending}").passport == passport


# A look at a file is cheap


@pytest.mark.parametrize("ending", FORMATS)
def test_peeking_reads_no_features(tmp_path, ending):
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("the system does not count the bytes a process reads")

    def bytes_read() -> int:
        return int(counters.read_text().split("rchar:")[1].split()[0])

    path = tmp_path / f"slide.{ending}"
    write_bag(path, Bag(np.ones((2**14, 256), "f4")))
    before = bytes_read()
    info = peek_bag(path)
    after_peek = bytes_read()
    assert after_peek - before < path.stat().st_size / 10
    assert (info.num_instances, info.dim) == (2**14, 256)
    read_bag(path)
    if ending == "h5":  # a .pt is mapped into memory, and what is mapped is not counted
        assert bytes_read() - after_peek > path.stat().st_size / 2, "the count does not count"
