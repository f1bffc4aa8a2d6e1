"""The file formats of each toolkit: where features, coordinates and recipe are, in a bag's file and in those beside it.

A format is recognized by what is in the file and which files are beside it, never by a folder's name alone. Features
are not read here; `store` reads and checks them.
"""

import json
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

from utils.bags import fields
from utils.core.errors import FeatureFileError
from utils.core.files import read_json
from utils.core.passport import Passport

TENSOR_FILE = "a tensor (N, D) or a dict with 'features'"


@dataclass(frozen=True)
class PatchCoords:
    """Where a bag's patches are: `coords`, the level-0 pixels of their top-left corners, and their edge in level-0
    pixels, each None where the file does not say. `problem` says why coordinates that exist cannot be used; `source` is
    the file that holds them if it is not the features' own.
    """

    coords: Any = None
    patch_size_level0: int | None = None
    problem: str | None = None
    source: Path | None = None


@dataclass(frozen=True)
class RawBag:
    """A bag as its file holds it, not checked yet: `features`, an HDF5 dataset not read yet or a tensor; the passport,
    as far as it is known; and `locate`, which reads where the patches are, given the slide's level-0 um/px or None.
    """

    features: Any
    passport: Passport | None = None
    locate: Callable[[float | None], PatchCoords] = lambda _: PatchCoords()


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file; any error HDF5 raises until it is closed becomes a FeatureFileError."""
    if not path.is_file():
        raise FeatureFileError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as failure:
        raise FeatureFileError(
            f"{path}: not a readable HDF5 file ({failure}); truncated, damaged or of another format: extract it again"
        ) from failure


def find_h5(file: h5py.File, path: Path, feat_type: str) -> RawBag:
    """Find the bag in an opened HDF5 file; `feat_type` "features" means the file's own, under whatever name.

    Raises FeatureFileError when there are none or several, or they describe a whole slide.
    """
    features = _feature_dataset(file, path, feat_type)
    if isinstance(file.get("features"), h5py.Group):
        return _atlaspatch(file, features)
    if "unit" in file.attrs or ("feats" in file and "features" not in file):
        return _stamp(file, path, features)
    if isinstance(file.get("coords"), h5py.Dataset):
        return _trident_or_clam(file, path, features)
    return _torchmil(path, features)


def find_pt(content: Any, path: Path, feat_type: str) -> RawBag:
    """Find the bag in the content of a PyTorch file, by the same rules as `find_h5`."""
    if isinstance(content, torch.Tensor):
        return _slide2vec(path, content) or _slideflow(path, content) or _clam(path, content)
    features = content.get(feat_type) if isinstance(content, dict) else None
    if not isinstance(features, torch.Tensor | np.ndarray):
        holds = (
            f"a dict with {', '.join(map(repr, content)) or 'nothing'}" if isinstance(content, dict) else type(content)
        )
        raise FeatureFileError(f"{path}: no {feat_type!r} in it; found {holds}, expected {TENSOR_FILE}")
    return _litemil(path, content, features)


def as_array(values: Any, path: Path) -> np.ndarray:
    """Convert a tensor or a list to an array; NumPy has no bfloat16, which becomes float32."""
    try:
        if isinstance(values, torch.Tensor):
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise FeatureFileError(f"{path}: holds a tensor that is not a plain array ({failure})") from failure


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
    items = ", ".join(f"{name} {getattr(item, 'shape', '(a group)')}" for name, item in file.items()) or "nothing"
    problem = "is not in the file" if data is None else "is not an array"
    raise FeatureFileError(f"{path}: {feat_type!r} {problem}; found {items}; name the features with --feat_type")


def _only_encoder(group: h5py.Group, path: Path) -> h5py.Dataset | h5py.Group:
    encoders = {name: item for name, item in group.items() if isinstance(item, h5py.Dataset)}
    if len(encoders) > 1:
        listed = ", ".join(f"{name} {item.shape}" for name, item in encoders.items())
        raise FeatureFileError(f"{path}: features of several encoders: {listed}; name one with --feat_type")
    return next(iter(encoders.values()), group)


# HDF5


def _trident_or_clam(file: h5py.File, path: Path, features: h5py.Dataset) -> RawBag:
    """Find the bag of TRIDENT and of LiteMIL; CLAM and the first LiteMIL write the same arrays without attributes."""
    attributes = file["coords"].attrs
    recipe = fields.grid_fields(attributes) | {"backbone": fields.backbone_of(features.attrs.get("encoder"))}
    slide = fields.slide_fields(attributes) | {"name": fields.as_text(attributes.get("name"))}

    def locate(_: float | None) -> PatchCoords:
        return _with_clams_size(PatchCoords(_h5_coords(file), fields.footprint(attributes)), path)

    return RawBag(features, fields.make_passport(recipe, slide), locate)


def _stamp(file: h5py.File, path: Path, features: h5py.Dataset) -> RawBag:
    """Find the bag of STAMP: coordinates in um from the slide's corner; older files have `tile_size`, in um too."""
    attributes = file.attrs
    kind, unit = fields.as_text(attributes.get("feat_type")), fields.as_text(attributes.get("unit"))
    if kind not in (None, "tile"):
        raise FeatureFileError(f"{path}: features of a whole {kind}, not a bag of patches; expected feat_type 'tile'")
    tile_um = fields.as_positive(attributes.get("tile_size_um", attributes.get("tile_size") if unit == "um" else None))
    tile_px = fields.as_length(attributes.get("tile_size_px"))
    # Extractors' names may end in eight digits of their weights' digest.
    extractor = re.sub(r"-[0-9a-f]{8}$", "", fields.as_text(attributes.get("extractor")) or "")
    recipe = {"backbone": fields.backbone_of(extractor), "patch_size": tile_px}

    def locate(mpp: float | None) -> PatchCoords:
        coords = _h5_coords(file)
        if coords is None:
            return PatchCoords()
        if unit != "um":
            units = "in no known unit" if unit is None else f"in the unit {unit!r}"
            return PatchCoords(problem=f"its coords are {units}; expected unit 'um'")
        if mpp is None:
            return PatchCoords(problem="its coords are in um, and the slide's um per pixel is not known")
        in_pixels = np.rint(coords.astype(np.float64) / mpp) if coords.dtype.kind in "iuf" else coords
        return PatchCoords(in_pixels, fields.as_length(tile_um / mpp) if tile_um else None)

    return RawBag(features, fields.make_passport(recipe, fields.mpp_fields(tile_um, tile_px)), locate)


def _atlaspatch(file: h5py.File, features: h5py.Dataset) -> RawBag:
    """Find the bag of AtlasPatch, a dataset per encoder. Rows of `coords` are x, y, width and height read, level."""
    recipe = fields.grid_fields(file.attrs) | {"backbone": fields.backbone_of(str(features.name).rpartition("/")[2])}

    def locate(_: float | None) -> PatchCoords:
        coords = _h5_coords(file)
        if coords is not None and coords.ndim == 2 and coords.shape[1] == 5:
            coords = coords[:, :2]
        return PatchCoords(coords, fields.footprint(file.attrs))

    return RawBag(features, fields.make_passport(recipe, fields.slide_fields(file.attrs)), locate)


def _torchmil(path: Path, features: h5py.Dataset) -> RawBag:
    """Find the bag of torchmil; its coordinates are in a sibling folder `coords`, in a file of the same name."""
    return RawBag(features, None, lambda _: _h5_companion(_beside(path, "coords", path.name)) or PatchCoords())


# PyTorch


def _litemil(path: Path, content: Mapping[str, Any], features: Any) -> RawBag:
    """Find the bag of our dict, or the first version's, whose coordinates are pixels of the level it was read at."""
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    recorded = metadata.get("level")
    level = fields.as_number(recorded)

    def locate(_: float | None) -> PatchCoords:
        stored = content.get("coords")
        coords = None if stored is None else as_array(stored, path)
        if coords is None or not coords.size:
            return PatchCoords(patch_size_level0=fields.as_length(content.get("patch_size_level0")))
        if level or (level is None and recorded is not None):
            number = f"{level:g}" if level else repr(recorded)
            return PatchCoords(problem=f"its coords are pixels of level {number}, not of level 0")
        edge = content.get("patch_size_level0", metadata.get("patch_size") if level == 0 else None)
        return PatchCoords(coords, fields.as_length(edge))

    patch_size = fields.as_length(metadata.get("patch_size"))
    recipe = {"backbone": fields.backbone_of(metadata.get("backbone")), "patch_size": patch_size}
    return RawBag(features, fields.make_passport(recipe), locate)


def _slide2vec(path: Path, features: torch.Tensor) -> RawBag | None:
    """Find the bag of slide2vec, which has a record beside it; coordinates in `tiles/` or where the record says."""
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
    mpp = fields.as_positive(record.get("requested_spacing_um"))
    patch_size = fields.as_length(record.get("requested_tile_size_px"))
    recipe = {"backbone": fields.backbone_of(record.get("encoder_name")), "patch_size": patch_size}

    def locate(_: float | None) -> PatchCoords:
        source = _beside(path, "tiles", f"{path.stem}.coordinates.npz")
        if not source.is_file():
            source = Path(fields.as_text(record.get("coordinates_npz_path")) or source)
        size = fields.as_length(record.get("tile_size_lv0"))
        if not source.is_file():
            return PatchCoords(patch_size_level0=size)
        x, y = _npz_arrays(source, "x", "y")
        if x.shape != y.shape:
            raise FeatureFileError(f"{source}: x of shape {x.shape}, y of shape {y.shape}; expected two of one shape")
        return PatchCoords(np.stack([x, y], axis=-1), size or _tile_size(source), source=source)

    return RawBag(features, fields.make_passport(recipe, {"mpp_delivered": mpp}), locate)


def _tile_size(coordinates: Path) -> int | None:
    """Return `tile_size_lv0` of the record beside slide2vec's coordinates, at its top or in one of its sections."""
    path = coordinates.with_name(f"{coordinates.stem}.meta.json")
    record = _json(path) if path.is_file() else {}
    sections = [record, *(section for section in record.values() if isinstance(section, dict))]
    return next((size for section in sections if (size := fields.as_length(section.get("tile_size_lv0")))), None)


def _slideflow(path: Path, features: torch.Tensor) -> RawBag | None:
    """Find the bag of Slideflow: tile centers in level-0 pixels beside it, the tiles' size in `bags_config.json`."""
    index, config = path.with_name(f"{path.stem}.index.npz"), path.with_name("bags_config.json")
    if not index.is_file() and not config.is_file():
        return None
    settings = _json(config) if config.is_file() else {}
    tile_px, tile_um = fields.as_length(settings.get("tile_px")), fields.as_positive(settings.get("tile_um"))
    extractor = settings.get("extractor")
    name = fields.as_text(extractor.get("class")) if isinstance(extractor, dict) else None
    # slideflow.model.extractors.retccl.RetCCLFeatures is RetCCL.
    name = re.sub(r"_?Features$", "", name.rpartition(".")[2]) if name else None

    def locate(mpp: float | None) -> PatchCoords:
        if not index.is_file():
            return PatchCoords()
        if tile_um is None:
            why = f"tile_um {settings.get('tile_um')!r}" if config.is_file() else "not there"
            return PatchCoords(problem=f"{index.name} holds tile centers, and {config.name} is no help ({why}, not um)")
        if mpp is None:
            return PatchCoords(problem=f"{index.name} holds tile centers, and the slide's um per pixel is not known")
        size = int(tile_um / mpp)  # slideflow rounds down, both here and in half a tile
        if not 0 < size < fields.LONGEST:
            return PatchCoords(
                problem=f"{config.name} says tile_um {tile_um:g}, at {mpp:g} um per pixel no tile's size"
            )
        (centers,) = _npz_arrays(index, "arr_0")
        return PatchCoords(centers - size // 2, size, source=index)

    recipe = {"backbone": fields.backbone_of(name), "patch_size": tile_px}
    return RawBag(features, fields.make_passport(recipe, fields.mpp_fields(tile_um, tile_px)), locate)


def _clam(path: Path, features: torch.Tensor) -> RawBag:
    """Find the bag of CLAM, `pt_files/<id>.pt`; coordinates, if any, are in `h5_files/<id>.h5` or `patches/<id>.h5`."""

    def locate(_: float | None) -> PatchCoords:
        stored = _h5_companion(_beside(path, "h5_files", f"{path.stem}.h5"))
        patches = _h5_companion(_beside(path, "patches", f"{path.stem}.h5"))
        return _with_clams_size(stored, path) if stored else patches or PatchCoords()

    return RawBag(features, _declared(path), locate)


# Files beside the features'


def _beside(path: Path, folder: str, name: str) -> Path:
    return path.absolute().parent.parent / folder / name


def _declared(path: Path) -> Passport | None:
    """Return the passport that `recipe.json` declares for the bare tensors in its folder."""
    declaration = path.with_name("recipe.json")
    return fields.make_passport(_json(declaration)) if declaration.is_file() else None


def _h5_companion(source: Path) -> PatchCoords | None:
    if not source.is_file():
        return None
    with open_h5(source) as file:
        coords = _h5_coords(file)
        return None if coords is None else PatchCoords(coords, fields.footprint(file["coords"].attrs), source=source)


def _with_clams_size(stored: PatchCoords, path: Path) -> PatchCoords:
    """Add the patch size from CLAM's `patches/<id>.h5`, if that holds the very same coordinates."""
    if stored.coords is None or stored.patch_size_level0 is not None:
        return stored
    patches = _h5_companion(_beside(path, "patches", f"{path.stem}.h5"))
    if patches is None or not np.array_equal(patches.coords, stored.coords):
        return stored
    return replace(stored, patch_size_level0=patches.patch_size_level0)


def _npz_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Read arrays of numbers, integers as int64; nothing pickled is loaded."""
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


def _h5_coords(file: h5py.File) -> np.ndarray | None:
    coords = file.get("coords")
    return coords[()] if isinstance(coords, h5py.Dataset) and coords.shape is not None else None
