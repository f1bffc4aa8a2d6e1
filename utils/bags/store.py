"""A bag of patch features, in memory and in our files (`.h5`, `.pt`).

The HDF5 file uses TRIDENT's names, so that other toolkits' loaders read it; the passport stands on its root. Files of
CLAM and of LiteMIL's first version have the same names and are read too.
"""

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from utils.core.errors import FeatureFileError
from utils.core.files import load_tensors, save_tensors, write_bytes
from utils.core.passport import Passport

_HDF5_EXTENSIONS, _TENSOR_EXTENSIONS = (".h5", ".hdf5"), (".pt", ".pth")
FEATURE_EXTENSIONS = _HDF5_EXTENSIONS + _TENSOR_EXTENSIONS
_PASSPORT = "litemil_passport"
# A chunk of rows is about this large: one read call each, and little more than what is asked for.
_CHUNK_BYTES = 2**20
_TENSOR_FILE = "a tensor (N, D) or a dict with 'features'"


@dataclass(frozen=True)
class BagInfo:
    """What a feature file holds, learned without reading the features; `dtype` is the one they are read as."""

    num_instances: int
    dim: int
    dtype: np.dtype
    passport: Passport | None

    @property
    def nbytes(self) -> int:
        return self.num_instances * self.dim * self.dtype.itemsize


@dataclass(frozen=True)
class Bag:
    """`features (N, D)` float16 or float32; `coords (N, 2)` int64, the level-0 pixel (x, y) of each patch's top-left
    corner, or None; `patch_size_level0`, the patch's edge in level-0 pixels, or None; how it was made, or None.
    """

    features: np.ndarray
    coords: np.ndarray | None = None
    patch_size_level0: int | None = None
    passport: Passport | None = None


def is_feature_file(path: Path) -> bool:
    return path.suffix.lower() in FEATURE_EXTENSIONS


def peek_bag(path: Path, feat_type: str = "features") -> BagInfo:
    """The bag's size and passport. Raises FeatureFileError as `read_bag` does, but for what only the values show."""
    path = Path(path)
    if path.suffix.lower() in _HDF5_EXTENSIONS:
        with _open_h5(path) as file:
            data = _feature_dataset(file, path, feat_type)
            return _info(path, data.shape, data.dtype, _h5_passport(file, path))
    features, content = _load_pt(path, feat_type)
    return _info(path, features.shape, features.dtype, _pt_passport(content, path))


def read_bag(path: Path, feat_type: str = "features") -> Bag:
    """Read a whole bag.

    Raises FeatureFileError, naming the file and what is wrong, when it is missing or damaged, has no `feat_type`, is
    not of shape (N, D) or (1, N, D) with N > 0, holds NaN or infinity, or its coordinates do not match.
    """
    path = Path(path)
    if path.suffix.lower() in _HDF5_EXTENSIONS:
        with _open_h5(path) as file:
            features = _feature_dataset(file, path, feat_type)[()]
            passport = _h5_passport(file, path)
            coords, size = _h5_coords(file)
    else:
        features, content = _load_pt(path, feat_type)
        passport = _pt_passport(content, path)
        coords, size = _pt_coords(content, path)
    info = _info(path, features.shape, features.dtype, passport)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows or is no number is refused in our own words
        features = features.reshape(info.num_instances, info.dim).astype(info.dtype, copy=False)
        _check_finite(path, features)
    if size is None and passport is not None:
        size = _patch_edge(passport.slide.get("patch_size_level0"))
    return Bag(features, _checked_coords(path, coords, info.num_instances), size, passport)


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
def _open_h5(path: Path) -> Iterator[h5py.File]:
    """The file, open; whatever HDF5 stumbles over before it is closed is a FeatureFileError."""
    if not path.is_file():
        raise FeatureFileError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as failure:
        raise FeatureFileError(
            f"{path}: not a readable HDF5 file ({failure}); truncated, damaged or of another format: extract it again"
        ) from failure


def _feature_dataset(file: h5py.File, path: Path, feat_type: str) -> h5py.Dataset:
    data = file.get(feat_type)
    if isinstance(data, h5py.Dataset) and data.shape is not None:
        return data
    found = ", ".join(f"{name} {getattr(item, 'shape', '(a group)')}" for name, item in file.items()) or "nothing"
    what = "is not in the file" if data is None else "is not an array"
    raise FeatureFileError(f"{path}: {feat_type!r} {what}; found {found}; name the features with --feat_type")


def _h5_passport(file: h5py.File, path: Path) -> Passport | None:
    text = file.attrs.get(_PASSPORT)
    return None if text is None else _parsed_passport(str(text), path)


def _pt_passport(content: dict[str, Any], path: Path) -> Passport | None:
    metadata = content.get("metadata")
    if isinstance(metadata, dict) and {"schema", "recipe"} <= metadata.keys():
        return _parsed_passport(metadata, path)
    return None


def _parsed_passport(found: str | dict[str, Any], path: Path) -> Passport:
    try:
        return Passport.from_json(found if isinstance(found, str) else json.dumps(found))
    except (ValueError, KeyError, TypeError) as failure:
        raise FeatureFileError(
            f"{path}: its feature passport is not readable ({failure}); extract it again"
        ) from failure


def _h5_coords(file: h5py.File) -> tuple[np.ndarray | None, int | None]:
    coords = file.get("coords")
    if not isinstance(coords, h5py.Dataset) or coords.shape is None:
        return None, None
    return coords[()], _patch_edge(coords.attrs.get("patch_size_level0"))


def _patch_edge(value: Any) -> int | None:
    """A patch's edge as a file says it; None for what is no length (TRIDENT writes an unknown one as the word None)."""
    try:
        edge = float(np.asarray(value).item())
    except (TypeError, ValueError):
        return None
    return round(edge) if math.isfinite(edge) and edge > 0 else None


def _load_pt(path: Path, feat_type: str) -> tuple[np.ndarray, dict[str, Any]]:
    content = load_tensors(path, FeatureFileError, _TENSOR_FILE)
    if isinstance(content, torch.Tensor):
        return _as_array(content, path), {}
    features = content.get(feat_type) if isinstance(content, dict) else None
    if not isinstance(features, torch.Tensor | np.ndarray):
        found = (
            f"a dict with {', '.join(map(repr, content)) or 'nothing'}" if isinstance(content, dict) else type(content)
        )
        raise FeatureFileError(f"{path}: no {feat_type!r} in it; found {found}, expected {_TENSOR_FILE}")
    return _as_array(features, path), content


def _as_array(values: Any, path: Path) -> np.ndarray:
    """A tensor, an array or a list as an array; NumPy has no bfloat16, which becomes float32."""
    try:
        if isinstance(values, torch.Tensor):
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise FeatureFileError(f"{path}: holds a tensor that is no plain array ({failure})") from failure


def _pt_coords(content: dict[str, Any], path: Path) -> tuple[np.ndarray | None, int | None]:
    found = content.get("coords")
    coords = None if found is None else _as_array(found, path)
    return (coords if coords is not None and coords.size else None), _patch_edge(content.get("patch_size_level0"))


def _info(path: Path, shape: tuple[int, ...], dtype: np.dtype, passport: Passport | None) -> BagInfo:
    rows = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(rows) != 2 or 0 in rows:
        what = "one vector for the whole slide, not a bag of patches" if len(rows) == 1 and 0 not in rows else "no bag"
        raise FeatureFileError(f"{path}: features of shape {tuple(shape)}: {what}; expected (N, D) with N > 0")
    if not np.issubdtype(dtype, np.floating):
        raise FeatureFileError(f"{path}: features of type {dtype}; expected float16 or float32")
    kept = dtype if dtype in (np.float16, np.float32) else np.dtype(np.float32)
    return BagInfo(rows[0], rows[1], kept, passport)


def _check_finite(path: Path, features: np.ndarray) -> None:
    # The sum is finite exactly when all values are, but for overflow; only then look closer.
    if np.isfinite(features.sum(dtype=np.float64)):
        return
    bad = ~np.isfinite(features)
    if bad.any():
        row = int(np.argmax(bad.any(axis=1)))
        raise FeatureFileError(
            f"{path}: {int(bad.sum())} values are NaN or infinite, the first in row {row}; extract it again"
        )


def _checked_coords(path: Path, coords: np.ndarray | None, num_instances: int) -> np.ndarray | None:
    if coords is None:
        return None
    placed = coords.reshape(coords.shape[1:]) if coords.ndim == 3 and coords.shape[0] == 1 else coords
    if placed.shape != (num_instances, 2):
        expected = (num_instances, 2)
        raise FeatureFileError(f"{path}: coords of shape {placed.shape}; expected {expected} as the features have")
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


def _trident_coord_attributes(bag: Bag) -> dict[str, Any]:
    slide, recipe = (bag.passport.slide, bag.passport.recipe) if bag.passport else ({}, {})
    patch_size, stride = recipe.get("patch_size"), recipe.get("stride")
    values = {
        "patch_size": patch_size,
        "patch_size_level0": bag.patch_size_level0,
        "level0_magnification": slide.get("objective"),
        "target_magnification": None if slide.get("mpp_delivered") is None else round(10 / slide["mpp_delivered"], 2),
        "overlap": None if patch_size is None or stride is None else patch_size - stride,
        "level0_width": slide.get("width"),
        "level0_height": slide.get("height"),
        "name": slide.get("name"),
    }
    # TRIDENT writes an unknown value as the word None.
    return {name: "None" if value is None else value for name, value in values.items()}
