"""Where each toolkit keeps a bag: features, coordinates and recipe, in the opened file and in the files beside it.

A layout is recognized by what is in the file and what stands beside it, never by the name of a folder alone. Features
are only pointed at; what is found is checked in `store`.
"""

import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from utils.core.errors import FeatureFileError
from utils.core.files import read_json
from utils.core.passport import Passport
from utils.core.recipe import Recipe, backbone_name

# No slide has so many pixels a side.
_LONGEST = 10**8
TENSOR_FILE = "a tensor (N, D) or a dict with 'features'"


@dataclass(frozen=True)
class Places:
    """Where a bag's patches are: `coords`, the level-0 pixels of their top-left corners as far as the file says so, and
    their edge in level-0 pixels. `withheld` says why coordinates that exist are not given; `source` is the file that
    holds them where it is not the features' own.
    """

    coords: Any = None
    patch_size_level0: int | None = None
    withheld: str | None = None
    source: Path | None = None


@dataclass(frozen=True)
class Found:
    """`features`: an HDF5 dataset that is not read yet, or a tensor; what is known of how they were made; `places`
    reads where the patches are, given the slide's level-0 um/px where that is known.
    """

    features: Any
    passport: Passport | None = None
    places: Callable[[float | None], Places] = lambda _: Places()


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
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


def find_h5(file: h5py.File, path: Path, feat_type: str) -> Found:
    """The bag in an opened HDF5 file; `feat_type` "features" is the file's own, whatever it calls them.

    Raises FeatureFileError when there are none, several, or features of a whole slide.
    """
    features = _feature_dataset(file, path, feat_type)
    if isinstance(file.get("features"), h5py.Group):
        return _atlaspatch(file, features)
    if "unit" in file.attrs or ("feats" in file and "features" not in file):
        return _stamp(file, path, features)
    if isinstance(file.get("coords"), h5py.Dataset):
        return _trident_or_clam(file, path, features)
    return _torchmil(path, features)


def find_pt(content: Any, path: Path, feat_type: str) -> Found:
    """The bag in what a PyTorch file holds; the same rules as for `find_h5`."""
    if isinstance(content, torch.Tensor):
        return _slide2vec(path, content) or _slideflow(path, content) or _clam(path, content)
    features = content.get(feat_type) if isinstance(content, dict) else None
    if not isinstance(features, torch.Tensor | np.ndarray):
        found = (
            f"a dict with {', '.join(map(repr, content)) or 'nothing'}" if isinstance(content, dict) else type(content)
        )
        raise FeatureFileError(f"{path}: no {feat_type!r} in it; found {found}, expected {TENSOR_FILE}")
    return _litemil(path, content, features)


def as_array(values: Any, path: Path) -> np.ndarray:
    """A tensor, an array or a list as an array; NumPy has no bfloat16, which becomes float32."""
    try:
        if isinstance(values, torch.Tensor):
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise FeatureFileError(f"{path}: holds a tensor that is no plain array ({failure})") from failure


def length(value: Any) -> int | None:
    """A length in pixels as a file says it; None for what is none (TRIDENT writes an unknown one as the word None)."""
    edge = round(_positive(value) or 0)
    return edge if 0 < edge < _LONGEST else None


def _feature_dataset(file: h5py.File, path: Path, feat_type: str) -> h5py.Dataset:
    data = file.get(feat_type)
    if data is None and feat_type == "features":
        data = file.get("feats")
    if data is None and isinstance(group := file.get("features"), h5py.Group):
        data = group.get(feat_type)
    if isinstance(data, h5py.Group) and feat_type == "features":
        data = _only_encoder(data, path)
    if isinstance(data, h5py.Dataset) and data.shape is not None:
        return data
    found = ", ".join(f"{name} {getattr(item, 'shape', '(a group)')}" for name, item in file.items()) or "nothing"
    what = "is not in the file" if data is None else "is not an array"
    raise FeatureFileError(f"{path}: {feat_type!r} {what}; found {found}; name the features with --feat_type")


def _only_encoder(group: h5py.Group, path: Path) -> h5py.Dataset | h5py.Group:
    encoders = {name: item for name, item in group.items() if isinstance(item, h5py.Dataset)}
    if len(encoders) > 1:
        listed = ", ".join(f"{name} {item.shape}" for name, item in encoders.items())
        raise FeatureFileError(f"{path}: features of several encoders: {listed}; name one with --feat_type")
    return next(iter(encoders.values()), group)


# HDF5


def _trident_or_clam(file: h5py.File, path: Path, features: h5py.Dataset) -> Found:
    """TRIDENT's file, and ours; CLAM's and the first LiteMIL's have the same arrays without attributes."""
    attributes = file["coords"].attrs
    recipe = _grid(attributes) | {"backbone": _backbone(features.attrs.get("encoder"))}
    slide = _canvas(attributes) | {"name": _text(attributes.get("name"))}

    def places(_: float | None) -> Places:
        return _with_clams_size(Places(_h5_coords(file), _footprint(attributes)), path)

    return Found(features, _passport(recipe, slide), places)


def _stamp(file: h5py.File, path: Path, features: h5py.Dataset) -> Found:
    """Coordinates in micrometers from the slide's corner; older files say `tile_size` for `tile_size_um`."""
    attributes = file.attrs
    kind, unit = _text(attributes.get("feat_type")), _text(attributes.get("unit"))
    if kind not in (None, "tile"):
        raise FeatureFileError(f"{path}: features of a whole {kind}, not a bag of patches; expected feat_type 'tile'")
    tile_um = _positive(attributes.get("tile_size_um", attributes.get("tile_size") if unit == "um" else None))
    tile_px = length(attributes.get("tile_size_px"))
    # Extractors' names may end in eight digits of their weights' digest.
    extractor = re.sub(r"-[0-9a-f]{8}$", "", _text(attributes.get("extractor")) or "")
    passport = _passport({"backbone": _backbone(extractor), "patch_size": tile_px}, _resolution(tile_um, tile_px))

    def places(mpp: float | None) -> Places:
        coords = _h5_coords(file)
        if coords is None:
            return Places()
        if unit != "um":
            said = "in no known unit" if unit is None else f"in the unit {unit!r}"
            return Places(withheld=f"its coords are {said}; expected unit 'um'")
        if mpp is None:
            return Places(withheld="its coords are in um, and the slide's um per pixel is not known")
        in_pixels = np.rint(coords.astype(np.float64) / mpp) if coords.dtype.kind in "iuf" else coords
        return Places(in_pixels, length(tile_um / mpp) if tile_um else None)

    return Found(features, passport, places)


def _atlaspatch(file: h5py.File, features: h5py.Dataset) -> Found:
    """A group with a dataset per encoder; rows of `coords` are x, y, width and height read, level."""
    recipe = _grid(file.attrs) | {"backbone": _backbone(str(features.name).rpartition("/")[2])}

    def places(_: float | None) -> Places:
        coords = _h5_coords(file)
        if coords is not None and coords.ndim == 2 and coords.shape[1] == 5:
            coords = coords[:, :2]
        return Places(coords, _footprint(file.attrs))

    return Found(features, _passport(recipe, _canvas(file.attrs)), places)


def _torchmil(path: Path, features: h5py.Dataset) -> Found:
    """Features alone; the coordinates are in a folder beside the features', under the same name."""
    return Found(features, None, lambda _: _h5_companion(_beside(path, "coords", path.name)) or Places())


# PyTorch


def _litemil(path: Path, content: Mapping[str, Any], features: Any) -> Found:
    """Our dict and the first version's, whose coordinates at a level above 0 are that level's pixels."""
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    said = metadata.get("level")
    level = _number(said)

    def places(_: float | None) -> Places:
        found = content.get("coords")
        coords = None if found is None else as_array(found, path)
        if coords is None or not coords.size:
            return Places(patch_size_level0=length(content.get("patch_size_level0")))
        if level or (level is None and said is not None):
            shown = f"{level:g}" if level else repr(said)
            return Places(withheld=f"its coords are pixels of level {shown}, not of level 0")
        footprint = content.get("patch_size_level0", metadata.get("patch_size") if level == 0 else None)
        return Places(coords, length(footprint))

    recipe = {"backbone": _backbone(metadata.get("backbone")), "patch_size": length(metadata.get("patch_size"))}
    return Found(features, _passport(recipe), places)


def _slide2vec(path: Path, features: torch.Tensor) -> Found | None:
    record_path = path.with_name(f"{path.stem}.meta.json")
    record = _json(record_path) if record_path.is_file() else {}
    kind = record.get("artifact_type")
    if kind is None:
        return None
    if kind != "tile_embeddings":
        raise FeatureFileError(
            f"{path}: {kind!r} by its {record_path.name}, not a bag of patches; expected 'tile_embeddings'"
        )
    # The spacing delivered is within slide2vec's tolerance (5%) of the one asked for.
    mpp, patch_size = _positive(record.get("requested_spacing_um")), length(record.get("requested_tile_size_px"))
    recipe = {"backbone": _backbone(record.get("encoder_name")), "patch_size": patch_size}

    def places(_: float | None) -> Places:
        beside = _beside(path, "tiles", f"{path.stem}.coordinates.npz")
        recorded = Path(_text(record.get("coordinates_npz_path")) or beside)
        source = beside if beside.is_file() else recorded
        size = length(record.get("tile_size_lv0"))
        if not source.is_file():
            return Places(patch_size_level0=size)
        x, y = _npz_arrays(source, "x", "y")
        if x.shape != y.shape:
            raise FeatureFileError(f"{source}: x of shape {x.shape}, y of shape {y.shape}; expected two of one shape")
        return Places(np.stack([x, y], axis=-1), size or _tile_size(source), source=source)

    return Found(features, _passport(recipe, {"mpp_delivered": mpp}), places)


def _tile_size(coordinates: Path) -> int | None:
    """`tile_size_lv0` from the record beside slide2vec's coordinates: at its top, or in one of its sections."""
    path = coordinates.with_name(f"{coordinates.stem}.meta.json")
    record = _json(path) if path.is_file() else {}
    sections = [record, *(section for section in record.values() if isinstance(section, dict))]
    return next((size for section in sections if (size := length(section.get("tile_size_lv0")))), None)


def _slideflow(path: Path, features: torch.Tensor) -> Found | None:
    """Tile centers in level-0 pixels beside the bag, the tiles' size in the folder's `bags_config.json`."""
    index, config = path.with_name(f"{path.stem}.index.npz"), path.with_name("bags_config.json")
    if not index.is_file() and not config.is_file():
        return None
    settings = _json(config) if config.is_file() else {}
    tile_px, tile_um = length(settings.get("tile_px")), _positive(settings.get("tile_um"))
    extractor = settings.get("extractor")
    name = _text(extractor.get("class")) if isinstance(extractor, dict) else None
    # slideflow.model.extractors.retccl.RetCCLFeatures is RetCCL.
    name = re.sub(r"_?Features$", "", name.rpartition(".")[2]) if name else None

    def places(mpp: float | None) -> Places:
        if not index.is_file():
            return Places()
        if tile_um is None:
            said = f"tile_um {settings.get('tile_um')!r}" if config.is_file() else "not there"
            return Places(withheld=f"{index.name} holds tile centers, and {config.name} is no help ({said}, not um)")
        if mpp is None:
            return Places(withheld=f"{index.name} holds tile centers, and the slide's um per pixel is not known")
        size = int(tile_um / mpp)  # slideflow rounds down, both here and in half a tile
        if not 0 < size < _LONGEST:
            return Places(withheld=f"{config.name} says tile_um {tile_um:g}, at {mpp:g} um per pixel no tile's size")
        (centers,) = _npz_arrays(index, "arr_0")
        return Places(centers - size // 2, size, source=index)

    recipe = {"backbone": _backbone(name), "patch_size": tile_px}
    return Found(features, _passport(recipe, _resolution(tile_um, tile_px)), places)


def _clam(path: Path, features: torch.Tensor) -> Found:
    """`pt_files/<id>.pt`, with the coordinates in `h5_files/<id>.h5` or where the patches were cut, if at all."""

    def places(_: float | None) -> Places:
        stored = _h5_companion(_beside(path, "h5_files", f"{path.stem}.h5"))
        patches = _h5_companion(_beside(path, "patches", f"{path.stem}.h5"))
        return _with_clams_size(stored, path) if stored else patches or Places()

    return Found(features, _declared(path), places)


# Companions: files beside the features'


def _beside(path: Path, folder: str, name: str) -> Path:
    return path.absolute().parent.parent / folder / name


def _declared(path: Path) -> Passport | None:
    """What `recipe.json` in the folder says of how the bare files in it were made."""
    declaration = path.with_name("recipe.json")
    return _passport(_json(declaration)) if declaration.is_file() else None


def _h5_companion(source: Path) -> Places | None:
    if not source.is_file():
        return None
    with open_h5(source) as file:
        coords = _h5_coords(file)
        return None if coords is None else Places(coords, _footprint(file["coords"].attrs), source=source)


def _with_clams_size(places: Places, path: Path) -> Places:
    """The places, with the size that CLAM's `patches/<id>.h5` gives to patches at the very same coordinates."""
    if places.coords is None or places.patch_size_level0 is not None:
        return places
    patches = _h5_companion(_beside(path, "patches", f"{path.stem}.h5"))
    if patches is None or not np.array_equal(patches.coords, places.coords):
        return places
    return replace(places, patch_size_level0=patches.patch_size_level0)


def _npz_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of numbers, integers as int64; nothing pickled is loaded."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [np.asarray(file[name]) for name in names]
    except (OSError, ValueError, LookupError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as failure:
        raise FeatureFileError(
            f"{path}: not readable as NumPy arrays {' and '.join(names)} ({failure}); extract it again"
        ) from failure
    if any(array.dtype.kind not in "iuf" for array in arrays):
        kinds = " and ".join(str(array.dtype) for array in arrays)
        raise FeatureFileError(f"{path}: coords of type {kinds}; expected numbers")
    return [array if array.dtype.kind == "f" else array.astype(np.int64) for array in arrays]


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path, FeatureFileError)
    if not isinstance(content, dict):
        raise FeatureFileError(f"{path}: holds {json.dumps(content)[:40]}; expected named values")
    return content


# What attributes and records say; whatever is missing, of another type or TRIDENT's word None is not known


def _h5_coords(file: h5py.File) -> np.ndarray | None:
    coords = file.get("coords")
    return coords[()] if isinstance(coords, h5py.Dataset) and coords.shape is not None else None


def _footprint(attributes: Mapping[str, Any]) -> int | None:
    """A patch's edge in level-0 pixels: as it stands there, or by CLAM's downsample (of x and y, which are equal)."""
    patch_size, downsample = _positive(attributes.get("patch_size")), attributes.get("downsample")
    across = {_positive(factor) for factor in np.ravel(downsample)} if downsample is not None else set()
    factor = across.pop() if len(across) == 1 else None
    in_clams_way = length(patch_size * factor) if patch_size and factor else None
    return length(attributes.get("patch_size_level0")) or in_clams_way


def _grid(attributes: Mapping[str, Any]) -> dict[str, float | None]:
    """The recipe's patch size and stride, in pixels at the resolution read, and the magnification that was."""
    patch_size, overlap = length(attributes.get("patch_size")), _number(attributes.get("overlap"))
    stride = None if patch_size is None or overlap is None else length(patch_size - overlap)
    return {
        "patch_size": patch_size,
        "stride": stride,
        "magnification": _positive(attributes.get("target_magnification")),
    }


def _canvas(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": length(attributes.get("level0_width")),
        "height": length(attributes.get("level0_height")),
        "objective": _positive(attributes.get("level0_magnification")),
    }


def _resolution(tile_um: float | None, tile_px: int | None) -> dict[str, Any]:
    return {"mpp_delivered": tile_um / tile_px if tile_um and tile_px else None}


def _passport(recipe: Mapping[str, Any], slide: Mapping[str, Any] | None = None) -> Passport | None:
    """What is known, as a passport; None where nothing is known of the recipe."""
    known, found = (
        {name: value for name, value in part.items() if value is not None} for part in (recipe, slide or {})
    )
    return Passport(Recipe.from_dict(known), found) if known else None


def _backbone(value: Any) -> str | None:
    name = _text(value)
    return backbone_name(name) if name else None


def _text(value: Any) -> str | None:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text if isinstance(text, str) and text not in ("", "None") else None


def _number(value: Any) -> float | None:
    try:
        number = float(np.asarray(value).item())
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None
