"""A bag of patch features, in memory and in files (`.h5`, `.pt`): ours, written and read, and others', read.

Our HDF5 file uses TRIDENT's names, so that other toolkits' loaders read it; the passport stands on its root. Where
other toolkits keep what is in `formats`; here it becomes a bag, or is refused.
"""

import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import torch

from utils.bags.direct_read import Fingerprint, RowMap, map_rows
from utils.bags.formats import TENSOR_FILE, Found, Places, as_array, find_h5, find_pt, length, open_h5
from utils.core.errors import FeatureFileError
from utils.core.files import whole_file
from utils.core.passport import Passport
from utils.core.recipe import Recipe
from utils.core.tensors import load_tensors, tensor_bytes

_HDF5_EXTENSIONS, _TENSOR_EXTENSIONS = (".h5", ".hdf5"), (".pt", ".pth")
FEATURE_EXTENSIONS = _HDF5_EXTENSIONS + _TENSOR_EXTENSIONS
_PASSPORT = "litemil_passport"
# Everything in our files begins at a multiple of this, so that the features begin at the same place in all of them.
_ALIGNMENT = 512


@dataclass(frozen=True)
class BagInfo:
    """What a feature file holds, learned without reading the features; `dtype` is the one they are read as.
    `fingerprint` tells whether the file is still the one that was looked at.
    """

    num_instances: int
    dim: int
    dtype: np.dtype
    passport: Passport | None
    fingerprint: Fingerprint | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        return self.num_instances * self.dim * self.dtype.itemsize


@dataclass(frozen=True)
class Bag:
    """`features (N, D)` float16 or float32; `coords (N, 2)` int64, the level-0 pixel (x, y) of each patch's top-left
    corner, or None; `patch_size_level0`, the patch's edge in level-0 pixels, or None; how it was made, or None.
    `coords_withheld` says why there are no coordinates although the file, or one beside it, holds some.
    """

    features: np.ndarray
    coords: np.ndarray | None = None
    patch_size_level0: int | None = None
    passport: Passport | None = None
    coords_withheld: str | None = None


class StoredFeatures:
    """The features `(N, D)` of a file, read and checked (as `read_bag` does) when they are asked for."""

    def __init__(self, path: Path, feat_type: str, info: BagInfo) -> None:
        self.path, self.feat_type, self.info = path, feat_type, info

    def __len__(self) -> int:
        return self.info.num_instances

    @property
    def shape(self) -> tuple[int, int]:
        return self.info.num_instances, self.info.dim

    def whole(self) -> torch.Tensor:
        return torch.from_numpy(read_features(self.path, self.feat_type)[0])

    def blocks(self, rows_each: int) -> Iterator[torch.Tensor]:
        """`(n, D)` in the file's order; of an HDF5 file one block at a time is in memory."""
        with _found(self.path, self.feat_type) as found:
            stored = found.features
            rows = _plain_rows(self.path, stored)
            bag = (0,) if stored.ndim == 3 else ()
            for start in range(0, len(self), rows_each):
                taken = slice(start, start + rows_each)
                part = stored[(*bag, taken)] if rows is None else rows.read(taken.start, taken.stop)
                yield torch.from_numpy(_as_kept(self.path, part, self.info.dtype, start))


@dataclass(frozen=True)
class StoredBag:
    """What `Bag` is, the features left in their file."""

    features: StoredFeatures
    coords: np.ndarray | None = None
    patch_size_level0: int | None = None
    passport: Passport | None = None
    coords_withheld: str | None = None


def is_feature_file(path: Path) -> bool:
    return path.suffix.lower() in FEATURE_EXTENSIONS


def peek_bag(path: Path, feat_type: str = "features") -> BagInfo:
    """The bag's size and passport. Raises FeatureFileError as `read_bag` does, but for what only the values show."""
    path = Path(path)
    fingerprint = Fingerprint.at(path)  # before the look: what changes after it is noticed
    with _found(path, feat_type) as found:
        return replace(_info(path, found), fingerprint=fingerprint)


def peek_places(path: Path, feat_type: str = "features", mpp: float | None = None) -> Places:
    """Where the bag's patches are, as `read_bag` finds them, without reading the features."""
    path = Path(path)
    with _found(path, feat_type) as found:
        return _checked(path, found.places(mpp), _info(path, found).num_instances)


def read_bag(path: Path, feat_type: str = "features", mpp: float | None = None) -> Bag:
    """Read a whole bag, of ours or of any layout `formats` knows, with what the files beside it tell.

    `feat_type` "features" is the file's own features, whatever it calls them; another name is a dataset, an encoder or
    a dict's key. `mpp` is the slide's level-0 um/px where it is known: coordinates stored in um need it.

    Raises FeatureFileError, naming the file and what is wrong, when it is missing or damaged, has no `feat_type`, is
    not of shape (N, D) or (1, N, D) with N > 0, holds NaN or infinity, or its coordinates do not match.
    """
    path = Path(path)
    with _found(path, feat_type) as found:
        info = _info(path, found)
        features, _ = _read(path, found, info)
        return Bag(features, *_placed(path, found, info, mpp))


def open_bag(path: Path, feat_type: str = "features", mpp: float | None = None) -> StoredBag:
    """All of a bag that `read_bag` gives but its features, which are read when they are asked for."""
    path = Path(path)
    with _found(path, feat_type) as found:
        info = _info(path, found)
        return StoredBag(StoredFeatures(path, feat_type, info), *_placed(path, found, info, mpp))


def read_features(path: Path, feat_type: str = "features") -> tuple[np.ndarray, RowMap | None]:
    """The features of a bag alone, `(N, D)`, checked; and where their rows lie if they can be read again from there."""
    with _found(path, feat_type) as found:
        return _read(path, found, _info(path, found))


def write_bag(path: Path, bag: Bag) -> None:
    """Write `bag` to `path`, HDF5 or PyTorch by its ending; the file appears only when it is whole.

    Equal bags give equal bytes: no timestamps, no paths. Raises FeatureFileError for an ending that is none of ours.
    """
    with bag_writer(path, bag.features.shape[1], bag.features.dtype) as writer:
        writer.append(bag.features)
        writer.finish(bag.coords, bag.patch_size_level0, bag.passport)


def check_writable(path: Path) -> None:
    """Raise FeatureFileError unless the name is one that a feature file can be written under."""
    if not is_feature_file(path):
        raise FeatureFileError(f"{path}: ends in {path.suffix!r}; end it in .h5 or .pt")


@contextmanager
def bag_writer(path: Path, dim: int, dtype: np.dtype | str) -> Iterator["BagWriter"]:
    """Write a bag piece by piece: `append` features `(n, D)`, then `finish` with the rest.

    The bytes are those of `write_bag`. HDF5 takes no more memory for more patches; PyTorch's format is written from
    memory. The file appears when the block ends well after `finish`. Raises as `write_bag` does.
    """
    path = Path(path)
    check_writable(path)
    kind = _TensorWriter if path.suffix.lower() in _TENSOR_EXTENSIONS else _HDF5Writer
    with whole_file(path) as part, part.open("wb") as file:
        yield kind(file, dim, np.dtype(dtype))


class BagWriter:
    """Features first, then all else; made by `bag_writer`."""

    def __init__(self, file: IO[bytes], dim: int, dtype: np.dtype) -> None:
        self.file, self.dim, self.dtype, self.num_instances = file, dim, dtype, 0

    def append(self, features: np.ndarray) -> None:
        self.num_instances += len(features)
        self._append(np.ascontiguousarray(features, self.dtype))

    def finish(self, coords: np.ndarray | None, patch_size_level0: int | None, passport: Passport | None) -> None:
        raise NotImplementedError

    def _append(self, features: np.ndarray) -> None:
        raise NotImplementedError


class _HDF5Writer(BagWriter):
    """HDF5's own part of the file is made in memory at the end, and put around the features: HDF5 ends the process when
    a disk fills up under it, and needs their number beforehand.
    """

    def __init__(self, file: IO[bytes], dim: int, dtype: np.dtype) -> None:
        super().__init__(file, dim, dtype)
        self.start = self._frame(1, None, None, None)[1]
        file.seek(self.start)

    def _append(self, features: np.ndarray) -> None:
        self.file.write(features.data)

    def finish(self, coords: np.ndarray | None, patch_size_level0: int | None, passport: Passport | None) -> None:
        frame, start = self._frame(self.num_instances, coords, patch_size_level0, passport)
        assert start == self.start  # noqa: S101 - what precedes the features does not depend on what follows
        for place, content in frame.written.items():
            self.file.seek(place)
            self.file.write(content)
        self.file.truncate(frame.length)

    def _frame(
        self, rows: int, coords: np.ndarray | None, patch_size_level0: int | None, passport: Passport | None
    ) -> tuple["_Frame", int]:
        """The file but for its features, and where these begin."""
        frame = _Frame()
        unwritten = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        unwritten.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        unwritten.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        with h5py.File(frame, "w", alignment_threshold=1, alignment_interval=_ALIGNMENT) as file:
            features = file.create_dataset("features", (rows, self.dim), self.dtype, dcpl=unwritten)
            start = features.id.get_offset()
            features.attrs.update(_trident_feature_attributes(passport))
            if coords is not None:
                placed = file.create_dataset("coords", data=coords.astype(np.int64))
                placed.attrs.update(_trident_coord_attributes(passport, patch_size_level0))
            if passport is not None:
                file.attrs[_PASSPORT] = passport.to_json()
        return frame, start


class _Frame(io.RawIOBase):
    """Remembers what is written where."""

    def __init__(self) -> None:
        self.written: dict[int, bytes] = {}
        self.length = self.place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def truncate(self, size: int | None = None) -> int:
        self.length = self.place if size is None else size
        return self.length

    def write(self, content: Any) -> int:
        self.written[self.place] = bytes(content)
        self.place += len(content)
        self.length = max(self.length, self.place)
        return len(content)


class _TensorWriter(BagWriter):
    def __init__(self, file: IO[bytes], dim: int, dtype: np.dtype) -> None:
        super().__init__(file, dim, dtype)
        self.parts = [np.empty((0, dim), dtype)]

    def _append(self, features: np.ndarray) -> None:
        self.parts.append(features)

    def finish(self, coords: np.ndarray | None, patch_size_level0: int | None, passport: Passport | None) -> None:
        coords = np.empty((0, 2), np.int64) if coords is None else coords.astype(np.int64)
        content = {
            "features": _as_tensor(np.concatenate(self.parts)),
            "coords": _as_tensor(coords),
            "metadata": json.loads(passport.to_json()) if passport else {},
        }
        if patch_size_level0 is not None:
            content["patch_size_level0"] = patch_size_level0
        self.file.write(tensor_bytes(content))


def _as_tensor(values: np.ndarray) -> torch.Tensor:
    # PyTorch takes arrays that are writable, and saves the whole memory a view looks into.
    return torch.from_numpy(np.require(values, requirements=("C", "W")))


@contextmanager
def _found(path: Path, feat_type: str) -> Iterator[Found]:
    """Where the bag is in the file, which stays open meanwhile; our own passport before what other writers tell."""
    try:
        with _found_in(path, feat_type) as found:
            yield found
    except MemoryError as failure:
        raise FeatureFileError(
            f"{path}: holds more than fits in memory ({failure}); damaged, or extract it with fewer patches"
        ) from failure


@contextmanager
def _found_in(path: Path, feat_type: str) -> Iterator[Found]:
    if path.suffix.lower() in _HDF5_EXTENSIONS:
        with open_h5(path) as file:
            found, own = find_h5(file, path, feat_type), file.attrs.get(_PASSPORT)
            yield found if own is None else replace(found, passport=_parsed_passport(str(own), path))
        return
    content = load_tensors(path, FeatureFileError, TENSOR_FILE)
    found = find_pt(content, path, feat_type)
    metadata = content.get("metadata") if isinstance(content, dict) else None
    if isinstance(metadata, dict) and {"schema", "recipe"} <= metadata.keys():
        found = replace(found, passport=_parsed_passport(metadata, path))
    yield replace(found, features=as_array(found.features, path))


def _parsed_passport(found: str | dict[str, Any], path: Path) -> Passport:
    try:
        return Passport.from_json(found if isinstance(found, str) else json.dumps(found))
    except (ValueError, KeyError, TypeError) as failure:
        raise FeatureFileError(
            f"{path}: its feature passport is not readable ({failure}); extract it again"
        ) from failure


def _read(path: Path, found: Found, info: BagInfo) -> tuple[np.ndarray, RowMap | None]:
    stored, rows = found.features, _plain_rows(path, found.features)
    if isinstance(stored, h5py.Dataset):
        stored = stored[()] if rows is None else rows.read()
    features = _as_kept(path, stored.reshape(info.num_instances, info.dim), info.dtype)
    return features, rows if features.dtype == stored.dtype else None


def _plain_rows(path: Path, stored: Any) -> RowMap | None:
    """Where the rows lie in the file, if they can be read straight from there. Raises FeatureFileError where they were
    never written.
    """
    if not isinstance(stored, h5py.Dataset):
        return None
    rows = map_rows(stored, path)
    if rows is None:
        _check_written(path, stored)
    return rows


def _as_kept(path: Path, stored: np.ndarray, dtype: np.dtype, start: int = 0) -> np.ndarray:
    """Rows from `start` on as `dtype`, known to be finite."""
    with np.errstate(over="ignore"):  # what overflows is refused in our own words
        features = stored.astype(dtype, copy=False)
    _check_finite(path, features, start)
    return features


def _info(path: Path, found: Found) -> BagInfo:
    shape: tuple[int, ...] = found.features.shape
    dtype: np.dtype = found.features.dtype
    rows = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(rows) != 2 or 0 in rows:
        what = "no patches" if rows[:1] == (0,) else "no bag"
        if len(rows) == 1 and 0 not in rows:
            what = "one vector for the whole slide, not a bag of patches"
        raise FeatureFileError(f"{path}: features of shape {tuple(shape)}: {what}; expected (N, D) with N > 0")
    if not np.issubdtype(dtype, np.floating):
        raise FeatureFileError(f"{path}: features of type {dtype}; expected float16 or float32")
    kept = dtype if dtype in (np.float16, np.float32) else np.dtype(np.float32)
    return BagInfo(rows[0], rows[1], kept, found.passport)


def _check_written(path: Path, dataset: Any) -> None:
    """HDF5 gives zeros for what a killed writer never wrote."""
    if dataset.is_virtual:
        return
    if dataset.chunks:
        written = dataset.id.get_num_chunks()
        expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    else:
        written, expected = int(dataset.id.get_storage_size() > 0), 1
    if written < expected:
        raise FeatureFileError(
            f"{path}: features of shape {dataset.shape}, of which {written} of {expected} parts were written; "
            "extract it again"
        )


def _check_finite(path: Path, features: np.ndarray, start: int) -> None:
    # The extremes are found in one pass that allocates nothing, and a NaN or an infinity is always one of them.
    if all(torch.isfinite(extreme) for extreme in torch.from_numpy(features).aminmax()):
        return
    bad = ~np.isfinite(features)
    row = start + int(np.argmax(bad.any(axis=1)))
    raise FeatureFileError(
        f"{path}: {int(bad.sum())} values are NaN or infinite, the first in row {row}; extract it again"
    )


def _placed(
    path: Path, found: Found, info: BagInfo, mpp: float | None
) -> tuple[np.ndarray | None, int | None, Passport | None, str | None]:
    """What a bag holds beside its features."""
    places = _checked(path, found.places(mpp), info.num_instances)
    size = places.patch_size_level0
    if size is None and info.passport is not None:
        size = length(info.passport.slide.get("patch_size_level0"))
    return places.coords, size, info.passport, places.withheld


def _checked(path: Path, places: Places, num_instances: int) -> Places:
    """The places with int64 coordinates `(num_instances, 2)`, or without any and the reason."""
    if places.coords is None:
        return places
    coords = places.coords
    placed = coords.reshape(coords.shape[1:]) if coords.ndim == 3 and coords.shape[0] == 1 else coords
    expected = (num_instances, 2)
    if placed.shape == expected:
        return replace(places, coords=_whole_pixels(places.source or path, placed))
    if places.source is None:
        raise FeatureFileError(f"{path}: coords of shape {placed.shape}; expected {expected} as the features have")
    return Places(withheld=f"{places.source} is of other patches (coords of shape {placed.shape}, not {expected})")


def _whole_pixels(path: Path, placed: np.ndarray) -> np.ndarray:
    if placed.dtype.kind not in "iuf":
        raise FeatureFileError(f"{path}: coords of type {placed.dtype}; expected whole level-0 pixels")
    with np.errstate(invalid="ignore"):  # a NaN differs from whatever number it becomes
        whole = placed.astype(np.int64)
    if not np.array_equal(whole, placed):
        raise FeatureFileError(f"{path}: coords hold fractions; expected whole level-0 pixels")
    return whole


def _trident_feature_attributes(passport: Passport | None) -> dict[str, str]:
    slide, recipe = (passport.slide, passport.recipe) if passport else ({}, Recipe())
    return {"name": str(slide.get("name")), "encoder": str(recipe.backbone), "savetodir": "."}


def _magnification(mpp: float | None) -> float | None:
    return None if mpp is None else round(10 / mpp, 2)


def _trident_coord_attributes(passport: Passport | None, patch_size_level0: int | None) -> dict[str, Any]:
    slide, recipe = (passport.slide, passport.recipe) if passport else ({}, Recipe())
    patch_size, stride = recipe.patch_size, recipe.stride
    values = {
        "patch_size": patch_size,
        "patch_size_level0": patch_size_level0,
        "level0_magnification": slide.get("objective"),
        "target_magnification": recipe.magnification or _magnification(slide.get("mpp_delivered")),
        "overlap": None if patch_size is None or stride is None else patch_size - stride,
        "level0_width": slide.get("width"),
        "level0_height": slide.get("height"),
        "name": slide.get("name"),
    }
    # TRIDENT writes an unknown value as the word None.
    return {name: "None" if value is None else value for name, value in values.items()}
