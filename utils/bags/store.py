"""A bag of patch features, in memory and in our files (`.h5`, `.pt`).

The HDF5 file uses TRIDENT's names, so that other toolkits' loaders read it; the passport stands on its root. Files of
CLAM and of LiteMIL's first version have the same names and are read too.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from utils.core.errors import FeatureFileError
from utils.core.files import load_tensors, save_tensors, whole_file
from utils.core.passport import Passport

FEATURE_EXTENSIONS = (".h5", ".hdf5", ".pt", ".pth")
_PASSPORT = "litemil_passport"
# A chunk of rows is about this large: one read call each, and little more than what is asked for.
_CHUNK_BYTES = 2**20
_TENSOR_FILE = "a tensor (N, D) or a dict with 'features'"


@dataclass(frozen=True)
class BagInfo:
    """What a feature file holds, learned without reading the features."""

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
    if path.suffix.lower() in (".h5", ".hdf5"):
        with _open_h5(path) as file:
            data = _feature_dataset(file, path, feat_type)
            return _info(path, data.shape, np.dtype(data.dtype), _h5_passport(file, path))
    features, content = _load_pt(path, feat_type)
    dtype = np.dtype(str(features.dtype).removeprefix("torch.")) if features.dtype != torch.bfloat16 else np.dtype("f4")
    return _info(path, tuple(features.shape), dtype, _pt_passport(content, path))


def read_bag(path: Path, feat_type: str = "features") -> Bag:
    """Read a whole bag.

    Raises FeatureFileError, naming the file and what is wrong, when it is missing or damaged, has no `feat_type`, is
    not of shape (N, D) or (1, N, D) with N > 0, holds NaN or infinity, or its coordinates do not match.
    """
    path = Path(path)
    if path.suffix.lower() in (".h5", ".hdf5"):
        with _open_h5(path) as file:
            data = _feature_dataset(file, path, feat_type)
            features = _read_h5(data, path)
            passport = _h5_passport(file, path)
            coords, size = _h5_coords(file, path)
    else:
        tensor, content = _load_pt(path, feat_type)
        features = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        passport = _pt_passport(content, path)
        coords, size = _pt_coords(content)
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]
    info = _info(path, features.shape, features.dtype, passport)
    if features.dtype not in (np.float16, np.float32):
        features = features.astype(np.float32)
    _check_finite(path, features)
    if size is None and passport is not None:
        size = passport.slide.get("patch_size_level0")
    return Bag(features, _checked_coords(path, coords, info.num_instances), size, passport)


def write_bag(path: Path, bag: Bag) -> None:
    """Write `bag` to `path` (`.h5` or `.pt` by its ending); the file appears only when it is whole.

    Equal bags give equal bytes: no timestamps, no paths.
    """
    path = Path(path)
    if path.suffix == ".pt":
        coords = torch.empty(0, 2, dtype=torch.int64) if bag.coords is None else torch.from_numpy(bag.coords)
        metadata = json.loads(bag.passport.to_json()) if bag.passport else {}
        save_tensors(path, {"features": torch.from_numpy(bag.features), "coords": coords, "metadata": metadata})
        return
    with whole_file(path, FeatureFileError) as part, h5py.File(part, "w") as file:
        rows = max(1, min(len(bag.features), _CHUNK_BYTES // (bag.features.shape[1] * bag.features.itemsize)))
        features = file.create_dataset("features", data=bag.features, chunks=(rows, bag.features.shape[1]))
        features.attrs.update(_trident_feature_attributes(bag))
        if bag.coords is not None:
            coords = file.create_dataset("coords", data=bag.coords.astype(np.int64))
            coords.attrs.update(_trident_coord_attributes(bag))
        if bag.passport is not None:
            file.attrs[_PASSPORT] = bag.passport.to_json()


def _open_h5(path: Path) -> h5py.File:
    if not path.is_file():
        raise FeatureFileError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError as failure:
        raise FeatureFileError(
            f"{path}: not a readable HDF5 file ({failure}); truncated or of another format: extract it again"
        ) from failure


def _feature_dataset(file: h5py.File, path: Path, feat_type: str) -> h5py.Dataset:
    data = file.get(feat_type)
    if isinstance(data, h5py.Dataset):
        return data
    found = ", ".join(f"{name} {getattr(item, 'shape', '(a group)')}" for name, item in file.items()) or "nothing"
    what = "is a group, not an array" if data is not None else "is not in the file"
    raise FeatureFileError(f"{path}: {feat_type!r} {what}; found {found}; name the features with --feat_type")


def _read_h5(data: h5py.Dataset, path: Path) -> np.ndarray:
    try:
        return data[()]
    except (OSError, RuntimeError) as failure:
        raise FeatureFileError(f"{path}: damaged HDF5 data ({failure}); extract it again") from failure


def _h5_passport(file: h5py.File, path: Path) -> Passport | None:
    text = file.attrs.get(_PASSPORT)
    return None if text is None else _parsed_passport(str(text), path)


def _pt_passport(content: dict[str, Any], path: Path) -> Passport | None:
    metadata = content.get("metadata")
    is_ours = isinstance(metadata, dict) and {"schema", "recipe"} <= metadata.keys()
    return _parsed_passport(json.dumps(metadata), path) if is_ours else None


def _parsed_passport(text: str, path: Path) -> Passport:
    try:
        return Passport.from_json(text)
    except (ValueError, KeyError, TypeError) as failure:
        raise FeatureFileError(
            f"{path}: its feature passport is not readable ({failure}); extract it again"
        ) from failure


def _h5_coords(file: h5py.File, path: Path) -> tuple[np.ndarray | None, int | None]:
    coords = file.get("coords")
    if not isinstance(coords, h5py.Dataset):
        return None, None
    size = coords.attrs.get("patch_size_level0")
    return _read_h5(coords, path), None if size is None or isinstance(size, str) else int(size)


def _load_pt(path: Path, feat_type: str) -> tuple[torch.Tensor, dict[str, Any]]:
    content = load_tensors(path, FeatureFileError, _TENSOR_FILE)
    if isinstance(content, torch.Tensor):
        return content, {}
    features = content.get(feat_type) if isinstance(content, dict) else None
    if isinstance(features, np.ndarray):
        features = torch.from_numpy(features)
    if not isinstance(features, torch.Tensor):
        found = (
            f"a dict with {', '.join(map(repr, content)) or 'nothing'}" if isinstance(content, dict) else type(content)
        )
        raise FeatureFileError(f"{path}: no {feat_type!r} in it; found {found}, expected {_TENSOR_FILE}")
    return features.detach(), content


def _pt_coords(content: dict[str, Any]) -> tuple[np.ndarray | None, int | None]:
    coords = content.get("coords")
    if isinstance(coords, torch.Tensor):
        coords = coords.numpy()
    return (coords if isinstance(coords, np.ndarray) and coords.size else None), None


def _info(path: Path, shape: tuple[int, ...], dtype: np.dtype, passport: Passport | None) -> BagInfo:
    rows = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(rows) != 2 or 0 in rows:
        what = "one vector for the whole slide, not a bag of patches" if len(rows) == 1 and 0 not in rows else "no bag"
        raise FeatureFileError(f"{path}: features of shape {tuple(shape)}: {what}; expected (N, D) with N > 0")
    if not np.issubdtype(dtype, np.floating):
        raise FeatureFileError(f"{path}: features of type {dtype}; expected float16 or float32")
    return BagInfo(rows[0], rows[1], dtype, passport)


def _check_finite(path: Path, features: np.ndarray) -> None:
    # The sum of absolute values is finite exactly when all values are, but for overflow; only then look closer.
    if np.isfinite(np.abs(features).sum(dtype=np.float64)):
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
