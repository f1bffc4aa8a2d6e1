"""A bag of patch features, in memory and in files (`.h5`, `.pt`). Files of LiteMIL and other toolkits are read, ours
are written.

Our HDF5 file uses TRIDENT's names, so that other toolkits' loaders read it; its root has the passport as an attribute.
`formats` knows where each toolkit keeps its data; here these become a checked bag, or are refused.
"""

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

from utils.bags.bag_writer import PASSPORT, BagWriter, HDF5Writer, TensorWriter
from utils.bags.direct_read import Fingerprint, RowMap, map_rows
from utils.bags.fields import as_length
from utils.bags.formats import TENSOR_FILE, PatchCoords, RawBag, as_array, find_h5, find_pt, open_h5
from utils.core.errors import FeatureFileError
from utils.core.files import whole_file
from utils.core.passport import Passport
from utils.core.tensor_files import load_tensors

_HDF5_EXTENSIONS, _TENSOR_EXTENSIONS = (".h5", ".hdf5"), (".pt", ".pth")
FEATURE_EXTENSIONS = _HDF5_EXTENSIONS + _TENSOR_EXTENSIONS


@dataclass(frozen=True)
class BagInfo:
    """The size and passport of a feature file, known without reading the features, and the `dtype` they are read as.
    `fingerprint` shows whether the file has changed since.
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
    corner, or None; `patch_size_level0`, the patch's edge in level-0 pixels, or None; the passport, or None.
    `coords_withheld` says why coordinates that the file, or one beside it, holds cannot be used.
    """

    features: np.ndarray
    coords: np.ndarray | None = None
    patch_size_level0: int | None = None
    passport: Passport | None = None
    coords_withheld: str | None = None


class StoredFeatures:
    """The features `(N, D)` of a file, read on demand and checked as `read_bag` does."""

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
        """Yield blocks `(n, D)` in the file's order; of an HDF5 file only one block is in memory at a time."""
        with _opened(self.path, self.feat_type) as raw:
            stored = raw.features
            rows = _plain_rows(self.path, stored)
            bag = (0,) if stored.ndim == 3 else ()
            for start in range(0, len(self), rows_each):
                stop = start + rows_each
                block = stored[(*bag, slice(start, stop))] if rows is None else rows.read(start, stop)
                yield torch.from_numpy(_converted(self.path, block, self.info.dtype, start))


@dataclass(frozen=True)
class StoredBag:
    """A `Bag` whose features are still in their file."""

    features: StoredFeatures
    coords: np.ndarray | None = None
    patch_size_level0: int | None = None
    passport: Passport | None = None
    coords_withheld: str | None = None


def is_feature_file(path: Path) -> bool:
    return path.suffix.lower() in FEATURE_EXTENSIONS


def is_tensor_file(path: Path) -> bool:
    return path.suffix.lower() in _TENSOR_EXTENSIONS


def peek_bag(path: Path, feat_type: str = "features") -> BagInfo:
    """Return the bag's size and passport. Raises FeatureFileError as `read_bag` does, but does not check the values."""
    path = Path(path)
    fingerprint = Fingerprint.at(path)  # taken first, so that any later change is noticed
    with _opened(path, feat_type) as raw:
        return replace(_info(path, raw), fingerprint=fingerprint)


def peek_coords(path: Path, feat_type: str = "features", mpp: float | None = None) -> PatchCoords:
    """Return where the bag's patches are, as `read_bag` does, without reading the features."""
    path = Path(path)
    with _opened(path, feat_type) as raw:
        return _checked(path, raw.locate(mpp), _info(path, raw).num_instances)


def read_bag(path: Path, feat_type: str = "features", mpp: float | None = None) -> Bag:
    """Read a whole bag of ours, or of any format in `formats`, together with the files beside it.

    `feat_type` "features" means the file's own features, under whatever name; any other value names a dataset, an
    encoder or a dict's key. `mpp` is the slide's level-0 um/px if known: coordinates stored in um need it.

    Raises FeatureFileError, naming the file and what is wrong, when it is missing or damaged, has no `feat_type`, is
    not of shape (N, D) or (1, N, D) with N > 0, holds NaN or infinity, or its coordinates do not match.
    """
    path = Path(path)
    with _opened(path, feat_type) as raw:
        info = _info(path, raw)
        features, _ = _read(path, raw, info)
        return Bag(features, *_coords_and_passport(path, raw, info, mpp))


def open_bag(path: Path, feat_type: str = "features", mpp: float | None = None) -> StoredBag:
    """Read a bag as `read_bag` does, except its features, which are read on demand."""
    path = Path(path)
    with _opened(path, feat_type) as raw:
        info = _info(path, raw)
        return StoredBag(StoredFeatures(path, feat_type, info), *_coords_and_passport(path, raw, info, mpp))


def read_features(path: Path, feat_type: str = "features") -> tuple[np.ndarray, RowMap | None]:
    """Return a bag's checked features `(N, D)`, and where their rows are if they can be read straight from there."""
    with _opened(path, feat_type) as raw:
        return _read(path, raw, _info(path, raw))


def write_bag(path: Path, bag: Bag) -> None:
    """Write `bag` to `path`, HDF5 or PyTorch by its ending; the file appears only when it is complete.

    Equal bags give equal bytes: no timestamps, no paths. Raises FeatureFileError for an ending that is none of ours.
    """
    with bag_writer(path, bag.features.shape[1], bag.features.dtype) as writer:
        writer.append(bag.features)
        writer.finish(bag.coords, bag.patch_size_level0, bag.passport)


def check_writable(path: Path) -> None:
    """Raise FeatureFileError unless the path ends as a feature file does."""
    if not is_feature_file(path):
        raise FeatureFileError(f"{path}: ends in {path.suffix!r}; end it in .h5 or .pt")


@contextmanager
def bag_writer(path: Path, dim: int, dtype: np.dtype | str) -> Iterator["BagWriter"]:
    """Write a bag piece by piece: `append` features `(n, D)`, then `finish` with the rest.

    The bytes are those of `write_bag`. HDF5 takes no more memory for more patches; PyTorch's format is written from
    memory. The file appears when the block ends without an error. Raises as `write_bag` does.
    """
    path = Path(path)
    check_writable(path)
    kind = TensorWriter if is_tensor_file(path) else HDF5Writer
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        yield kind(file, dim, np.dtype(dtype))


@contextmanager
def _opened(path: Path, feat_type: str) -> Iterator[RawBag]:
    """Open a file and find its bag; if it has our own passport, that replaces what its attributes say."""
    try:
        with _opened_by_format(path, feat_type) as raw:
            yield raw
    except MemoryError as failure:
        raise FeatureFileError(
            f"{path}: holds more than fits in memory ({failure}); damaged, or extract it with fewer patches"
        ) from failure


@contextmanager
def _opened_by_format(path: Path, feat_type: str) -> Iterator[RawBag]:
    if path.suffix.lower() in _HDF5_EXTENSIONS:
        with open_h5(path) as file:
            raw, own = find_h5(file, path, feat_type), file.attrs.get(PASSPORT)
            yield raw if own is None else replace(raw, passport=_parsed_passport(str(own), path))
        return
    content = load_tensors(path, FeatureFileError, TENSOR_FILE)
    raw = find_pt(content, path, feat_type)
    metadata = content.get("metadata") if isinstance(content, dict) else None
    if isinstance(metadata, dict) and {"schema", "recipe"} <= metadata.keys():
        raw = replace(raw, passport=_parsed_passport(metadata, path))
    yield replace(raw, features=as_array(raw.features, path))


def _parsed_passport(content: str | dict[str, Any], path: Path) -> Passport:
    try:
        return Passport.from_json(content if isinstance(content, str) else json.dumps(content))
    except (ValueError, KeyError, TypeError) as failure:
        raise FeatureFileError(
            f"{path}: its feature passport is not readable ({failure}); extract it again"
        ) from failure


def _read(path: Path, raw: RawBag, info: BagInfo) -> tuple[np.ndarray, RowMap | None]:
    stored, rows = raw.features, _plain_rows(path, raw.features)
    if isinstance(stored, h5py.Dataset):
        stored = stored[()] if rows is None else rows.read()
    features = _converted(path, stored.reshape(info.num_instances, info.dim), info.dtype)
    return features, rows if features.dtype == stored.dtype else None


def _plain_rows(path: Path, stored: Any) -> RowMap | None:
    """Return where the rows are in the file, if they can be read straight from there. Raises FeatureFileError if they
    were never written.
    """
    if not isinstance(stored, h5py.Dataset):
        return None
    rows = map_rows(stored, path)
    if rows is None:
        _check_written(path, stored)
    return rows


def _converted(path: Path, stored: np.ndarray, dtype: np.dtype, start: int = 0) -> np.ndarray:
    """Convert rows, the first of which is number `start`, to `dtype`. Raises FeatureFileError if any is not finite."""
    with np.errstate(over="ignore"):  # values that overflow are refused by _check_finite
        features = stored.astype(dtype, copy=False)
    _check_finite(path, features, start)
    return features


def _info(path: Path, raw: RawBag) -> BagInfo:
    shape: tuple[int, ...] = raw.features.shape
    dtype: np.dtype = raw.features.dtype
    rows = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(rows) != 2 or 0 in rows:
        problem = "no patches" if rows[:1] == (0,) else "no bag"
        if len(rows) == 1 and 0 not in rows:
            problem = "one vector for the whole slide, not a bag of patches"
        raise FeatureFileError(f"{path}: features of shape {tuple(shape)}: {problem}; expected (N, D) with N > 0")
    if not np.issubdtype(dtype, np.floating):
        raise FeatureFileError(f"{path}: features of type {dtype}; expected float16 or float32")
    read_as = dtype if dtype in (np.float16, np.float32) else np.dtype(np.float32)
    return BagInfo(rows[0], rows[1], read_as, raw.passport)


def _check_written(path: Path, dataset: Any) -> None:
    """Raise FeatureFileError if a killed writer left chunks out: HDF5 would read them as zeros."""
    if dataset.is_virtual:
        return
    if dataset.chunks:
        count = dataset.id.get_num_chunks()
        expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    else:
        count, expected = int(dataset.id.get_storage_size() > 0), 1
    if count < expected:
        raise FeatureFileError(
            f"{path}: features of shape {dataset.shape}, of which {count} of {expected} parts were written; "
            "extract it again"
        )


def _check_finite(path: Path, features: np.ndarray, start: int) -> None:
    # One pass that allocates nothing finds the extremes, and a NaN or an infinity is always one of them.
    if all(torch.isfinite(extreme) for extreme in torch.from_numpy(features).aminmax()):
        return
    bad = ~np.isfinite(features)
    row = start + int(np.argmax(bad.any(axis=1)))
    raise FeatureFileError(
        f"{path}: {int(bad.sum())} values are NaN or infinite, the first in row {row}; extract it again"
    )


def _coords_and_passport(
    path: Path, raw: RawBag, info: BagInfo, mpp: float | None
) -> tuple[np.ndarray | None, int | None, Passport | None, str | None]:
    """Return a bag's fields after its features."""
    patches = _checked(path, raw.locate(mpp), info.num_instances)
    size = patches.patch_size_level0
    if size is None and info.passport is not None:
        size = as_length(info.passport.slide.get("patch_size_level0"))
    return patches.coords, size, info.passport, patches.problem


def _checked(path: Path, patches: PatchCoords, num_instances: int) -> PatchCoords:
    """Return the patches with int64 coordinates `(num_instances, 2)`, or with the reason why these cannot be used."""
    if patches.coords is None:
        return patches
    coords = patches.coords
    coords = coords.reshape(coords.shape[1:]) if coords.ndim == 3 and coords.shape[0] == 1 else coords
    expected = (num_instances, 2)
    if coords.shape == expected:
        return replace(patches, coords=_whole_pixels(patches.source or path, coords))
    if patches.source is None:
        raise FeatureFileError(f"{path}: coords of shape {coords.shape}; expected {expected} as the features have")
    return PatchCoords(problem=f"{patches.source} is of other patches (coords of shape {coords.shape}, not {expected})")


def _whole_pixels(path: Path, coords: np.ndarray) -> np.ndarray:
    if coords.dtype.kind not in "iuf":
        raise FeatureFileError(f"{path}: coords of type {coords.dtype}; expected whole level-0 pixels")
    with np.errstate(invalid="ignore"):  # a NaN differs from whatever number it becomes
        whole = coords.astype(np.int64)
    if not np.array_equal(whole, coords):
        raise FeatureFileError(f"{path}: coords hold fractions; expected whole level-0 pixels")
    return whole
