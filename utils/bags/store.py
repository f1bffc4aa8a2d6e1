"""A bag of patch features, in memory and in files (`.h5`, `.pt`): ours, written and read, and others', read.

Our HDF5 file uses TRIDENT's names, so that other toolkits' loaders read it; the passport stands on its root. Where
other toolkits keep what is in `foreign`; here it becomes a bag, or is refused.
"""

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from utils.bags.foreign import TENSOR_FILE, Found, Places, as_array, find_h5, find_pt, length, open_h5
from utils.bags.rows import Fingerprint, RowMap, map_rows
from utils.core.errors import FeatureFileError
from utils.core.files import load_tensors, save_tensors, write_bytes
from utils.core.passport import Passport

_HDF5_EXTENSIONS, _TENSOR_EXTENSIONS = (".h5", ".hdf5"), (".pt", ".pth")
FEATURE_EXTENSIONS = _HDF5_EXTENSIONS + _TENSOR_EXTENSIONS
_PASSPORT = "litemil_passport"
# A chunk of rows is about this large: one read call each, and little more than what is asked for.
_CHUNK_BYTES = 2**20


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
    """Read a whole bag, of ours or of any layout `foreign` knows, with what the files beside it tell.

    `feat_type` "features" is the file's own features, whatever it calls them; another name is a dataset, an encoder or
    a dict's key. `mpp` is the slide's level-0 um/px where it is known: coordinates stored in um need it.

    Raises FeatureFileError, naming the file and what is wrong, when it is missing or damaged, has no `feat_type`, is
    not of shape (N, D) or (1, N, D) with N > 0, holds NaN or infinity, or its coordinates do not match.
    """
    path = Path(path)
    with _found(path, feat_type) as found:
        info = _info(path, found)
        features, _ = _read(path, found, info)
        places = found.places(mpp)
    places = _checked(path, places, info.num_instances)
    size = places.patch_size_level0
    if size is None and info.passport is not None:
        size = length(info.passport.slide.get("patch_size_level0"))
    return Bag(features, places.coords, size, info.passport, places.withheld)


def read_features(path: Path, feat_type: str = "features") -> tuple[np.ndarray, RowMap | None]:
    """The features of a bag alone, `(N, D)`, checked; and where their rows lie if they can be read again from there."""
    with _found(path, feat_type) as found:
        return _read(path, found, _info(path, found))


def write_bag(path: Path, bag: Bag) -> None:
    """Write `bag` to `path`, HDF5 or PyTorch by its ending; the file appears only when it is whole.

    Equal bags give equal bytes: no timestamps, no paths. Raises FeatureFileError for an ending that is none of ours.
    """
    path = Path(path)
    if not is_feature_file(path):
        raise FeatureFileError(f"{path}: ends in {path.suffix!r}; end it in .h5 or .pt")
    if path.suffix.lower() in _TENSOR_EXTENSIONS:
        save_tensors(path, _tensor_content(bag))
        return
    # Through memory: HDF5 ends the process when a disk fills up under it.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        rows = max(1, min(len(bag.features), _CHUNK_BYTES // (bag.features.shape[1] * bag.features.itemsize)))
        features = file.create_dataset("features", data=bag.features, chunks=(rows, bag.features.shape[1]))
        features.attrs.update(_trident_feature_attributes(bag))
        if bag.coords is not None:
            coords = file.create_dataset("coords", data=bag.coords.astype(np.int64))
            coords.attrs.update(_trident_coord_attributes(bag))
        if bag.passport is not None:
            file.attrs[_PASSPORT] = bag.passport.to_json()
    write_bytes(path, buffer.getvalue())


def _tensor_content(bag: Bag) -> dict[str, Any]:
    coords = np.empty((0, 2), np.int64) if bag.coords is None else bag.coords.astype(np.int64)
    content = {
        "features": _as_tensor(bag.features),
        "coords": _as_tensor(coords),
        "metadata": json.loads(bag.passport.to_json()) if bag.passport else {},
    }
    return content if bag.patch_size_level0 is None else content | {"patch_size_level0": bag.patch_size_level0}


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
    stored, rows = found.features, None
    if isinstance(stored, h5py.Dataset):
        rows = map_rows(stored, path)
        if rows is None:
            _check_written(path, stored)
        stored = stored[()] if rows is None else rows.read()
    with np.errstate(over="ignore"):  # what overflows is refused in our own words
        features = stored.reshape(info.num_instances, info.dim).astype(info.dtype, copy=False)
    _check_finite(path, features)
    return features, rows if features.dtype == stored.dtype else None


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


def _check_finite(path: Path, features: np.ndarray) -> None:
    # The extremes are found in one pass that allocates nothing, and a NaN or an infinity is always one of them.
    if all(torch.isfinite(extreme) for extreme in torch.from_numpy(features).aminmax()):
        return
    bad = ~np.isfinite(features)
    row = int(np.argmax(bad.any(axis=1)))
    raise FeatureFileError(
        f"{path}: {int(bad.sum())} values are NaN or infinite, the first in row {row}; extract it again"
    )


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


def _trident_feature_attributes(bag: Bag) -> dict[str, str]:
    slide, recipe = (bag.passport.slide, bag.passport.recipe) if bag.passport else ({}, {})
    return {"name": str(slide.get("name")), "encoder": str(recipe.get("backbone")), "savetodir": "."}


def _magnification(mpp: float | None) -> float | None:
    return None if mpp is None else round(10 / mpp, 2)


def _trident_coord_attributes(bag: Bag) -> dict[str, Any]:
    slide, recipe = (bag.passport.slide, bag.passport.recipe) if bag.passport else ({}, {})
    patch_size, stride = recipe.get("patch_size"), recipe.get("stride")
    values = {
        "patch_size": patch_size,
        "patch_size_level0": bag.patch_size_level0,
        "level0_magnification": slide.get("objective"),
        "target_magnification": recipe.get("magnification") or _magnification(slide.get("mpp_delivered")),
        "overlap": None if patch_size is None or stride is None else patch_size - stride,
        "level0_width": slide.get("width"),
        "level0_height": slide.get("height"),
        "name": slide.get("name"),
    }
    # TRIDENT writes an unknown value as the word None.
    return {name: "None" if value is None else value for name, value in values.items()}
