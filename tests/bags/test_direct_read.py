"""Rows read straight from a file are what HDF5 says they are, or HDF5 is asked."""

import os
import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.bags.direct_read import map_rows
from utils.core.errors import FeatureFileError


def features_of(rows: int = 100, dim: int = 6, dtype="f4") -> np.ndarray:
    return np.arange(rows * dim).reshape(rows, dim).astype(dtype)


def write(path: Path, features: np.ndarray | None = None, **settings) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features_of() if features is None else features, **settings)
    return path


def mapped(path: Path):
    with h5py.File(path) as file:
        return map_rows(file["features"], path)


def write_in_turns(path: Path, features: np.ndarray, chunk: int, step: int) -> Path:
    """As CLAM writes: a few patches at a time, coordinates between features."""
    kept = {"features": features, "coords": np.zeros((len(features), 2), "i4")}
    with h5py.File(path, "w") as file:
        for name, values in kept.items():
            width = values.shape[1]
            file.create_dataset(name, (0, width), values.dtype, chunks=(chunk, width), maxshape=(None, width))
        for start in range(0, len(features), step):
            for name, values in kept.items():
                file[name].resize(min(start + step, len(features)), axis=0)
                file[name][start : start + step] = values[start : start + step]
    return path


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("chunks", [None, (1, 6), (32, 6), (7, 6), (100, 6), (300, 6)])
def test_rows_of_every_plain_storage(tmp_path, chunks, dtype):
    features = features_of(dtype=dtype)
    path = write(tmp_path / "a.h5", features, chunks=chunks, maxshape=None if chunks is None else (None, 6))
    rows = mapped(path)
    assert rows is not None
    assert rows.shape == (100, 6)
    assert rows.read().dtype == features.dtype
    np.testing.assert_array_equal(rows.read(), features)


@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.integers(0, 80), st.integers(0, 80))
def test_any_part_of_a_file_that_grew_in_turns(tmp_path_factory, count, chunk, step, start, stop):
    features = features_of(count)
    rows = mapped(write_in_turns(tmp_path_factory.mktemp("grown") / "a.h5", features, chunk, step))
    assert rows is not None
    np.testing.assert_array_equal(rows.read(start, stop), features[start:stop])


def test_neighbouring_chunks_are_read_as_one(tmp_path):
    """A thousand chunks of one row need a few reads, not a thousand."""
    rows = mapped(write(tmp_path / "a.h5", features_of(1000), chunks=(1, 6)))
    assert rows is not None
    assert len(rows.offsets) < 50


@pytest.mark.parametrize(
    "settings",
    [
        {"chunks": (10, 6), "compression": "gzip"},
        {"chunks": (10, 6), "shuffle": True},
        {"chunks": (10, 6), "fletcher32": True},
        {"chunks": (10, 3)},
        {"chunks": (10, 8), "maxshape": (None, None)},
        {"data": features_of(dtype=">f4")},
        {"data": features_of(dtype="i4")},
        {"data": features_of()[None]},
        {"data": np.zeros((0, 6), "f4"), "maxshape": (None, 6)},
    ],
    ids=["gzip", "shuffle", "checksum", "narrow", "wide", "big endian", "integers", "three axes", "empty"],
)
def test_what_is_not_plain_is_left_to_hdf5(tmp_path, settings):
    settings = {"features": settings.pop("data", None)} | settings
    assert mapped(write(tmp_path / "a.h5", **settings)) is None


def test_chunks_that_were_never_written_are_left_to_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("features", (100, 6), "f4", chunks=(10, 6), fillvalue=7)
        data[:40] = 1
    assert mapped(tmp_path / "a.h5") is None
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (100, 6), "f4", fillvalue=7)
    assert mapped(tmp_path / "a.h5") is None


def test_a_chunk_that_skipped_its_filter_is_left_to_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("features", (20, 6), "f4", chunks=(10, 6), compression="gzip")
        for start in (0, 10):
            data.id.write_direct_chunk((start, 0), features_of(10).tobytes(), filter_mask=1)
    assert mapped(tmp_path / "a.h5") is None


def test_floats_of_another_make_are_left_to_hdf5(tmp_path):
    """bfloat16, as some tools store it: two bytes that are no float16."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"features", kind, h5py.h5s.create_simple((4, 6)))
        file["features"][:] = features_of(4)
        file["later"] = np.zeros(1000)  # so that rows of another size would not reach beyond the file
    assert mapped(tmp_path / "a.h5") is None


def test_data_that_lies_elsewhere_is_left_to_hdf5(tmp_path):
    write(tmp_path / "a.h5")
    layout = h5py.VirtualLayout((100, 6), "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "a.h5", "features", (100, 6))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_virtual_dataset("features", layout)
    assert mapped(tmp_path / "b.h5") is None
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("features", (100, 6), "f4", external=[(str(tmp_path / "raw"), 0, 2400)])
        file["features"][:] = features_of()
    assert mapped(tmp_path / "c.h5") is None


def test_a_file_with_a_header_of_its_own_is_left_to_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file.create_dataset("features", data=features_of(), chunks=(10, 6))
    assert mapped(tmp_path / "a.h5") is None


def test_a_file_in_memory_is_left_to_hdf5(tmp_path):
    path = write(tmp_path / "a.h5", chunks=(10, 6))
    with h5py.File(path, driver="core") as file:
        assert map_rows(file["features"], path) is None


@pytest.mark.parametrize("change", ["rewritten", "touched", "cut", "gone"])
def test_a_file_that_changes_in_use_is_refused(tmp_path, change):
    path = write(tmp_path / "a.h5", chunks=(10, 6))
    rows = mapped(path)
    assert rows is not None
    if change == "rewritten":
        write(path, features_of(50), chunks=(10, 6))
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(
        FeatureFileError, match=r"a\.h5: (was changed while it was in use|cannot be read \(No such file)"
    ):
        rows.read()


@pytest.mark.parametrize("offset", [10**6, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 100])
def test_rows_beyond_the_files_end_are_left_to_hdf5(tmp_path, offset):
    path = write(tmp_path / "a.h5", chunks=(50, 6))
    rows = mapped(path)
    assert rows is not None
    content, place = path.read_bytes(), int(rows.offsets[0]).to_bytes(8, "little")
    assert content.count(place) == 1
    path.write_bytes(content.replace(place, offset.to_bytes(8, "little")))
    assert mapped(path) is None


def test_a_chunk_that_crosses_the_files_end_is_left_to_hdf5(tmp_path):
    path = write(tmp_path / "a.h5", chunks=(50, 6))
    rows = mapped(path)
    assert rows is not None
    content, place = path.read_bytes(), int(rows.offsets[0]).to_bytes(8, "little")
    path.write_bytes(content.replace(place, (len(content) - 100).to_bytes(8, "little")))
    assert mapped(path) is None


def test_rows_behind_an_external_link_are_left_to_hdf5(tmp_path):
    write(tmp_path / "a.h5", chunks=(50, 6))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"] = h5py.ExternalLink("a.h5", "features")
    assert mapped(tmp_path / "b.h5") is None


def test_random_layouts_agree_with_hdf5(tmp_path):
    rng = random.Random(0)  # noqa: S311
    for number in range(30):
        count, dim, chunk = rng.randint(1, 300), rng.randint(1, 40), rng.randint(1, 64)
        features = features_of(count, dim, rng.choice(["f2", "f4", "f8"]))
        path = tmp_path / f"{number}.h5"
        version = rng.choice(["earliest", "latest"])
        with h5py.File(path, "w", libver=version) as file:
            file.create_dataset("features", data=features, chunks=(min(chunk, count), dim))
        rows = mapped(path)
        assert rows is not None
        start, stop = sorted(rng.sample(range(count + 1), 2)) if count > 1 else (0, 1)
        np.testing.assert_array_equal(rows.read(start, stop), features[start:stop])
