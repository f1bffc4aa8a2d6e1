"""Feature files as other toolkits write them, from features `(N, D)` and level-0 top-left coordinates `(N, 2)`.

Each function writes one slide below `folder` and returns the file that holds the features. What a layout says in
another unit or of another point is computed from the same coordinates. Import with `from tests.bags import writers`.
"""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

NAME = "TCGA-A1.DX1"  # dots belong to a slide's name
PATCH_SIZE, PATCH_SIZE_LEVEL0 = 256, 512
MPP = 0.25  # of level 0


def arrays(rows: int = 7, dim: int = 4, dtype: str = "f4") -> tuple[np.ndarray, np.ndarray]:
    """Random features, and coordinates on a grid."""
    rng = np.random.default_rng(rows)
    coords = PATCH_SIZE_LEVEL0 * np.stack([np.arange(rows) % 3, 2 + np.arange(rows) // 3], axis=1).astype(np.int64)
    return rng.standard_normal((rows, dim)).astype(dtype), coords


def h5(path: Path, datasets: dict[str, Any], **attributes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        file.attrs.update(attributes)
    return path


def attributes(path: Path, dataset: str, /, **values: Any) -> None:
    with h5py.File(path, "a") as file:
        file[dataset].attrs.update(values)


def pt(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def written(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def npz(path: Path, *unnamed: np.ndarray, **named: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, *unnamed, **named)
    return path


def litemil_h5(folder: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    return h5(folder / f"{NAME}.h5", {"features": features, "coords": coords})


def litemil_pt(folder: Path, features: np.ndarray, coords: np.ndarray, level: Any = 0) -> Path:
    metadata = {
        "wsi_path": f"/slides/{NAME}.svs",
        "num_patches": len(features),
        "patch_size": PATCH_SIZE_LEVEL0,
        "level": level,
        "tissue_ratio": 0.4,
        "backbone": "phikon-v2",
    }
    content = {"features": torch.from_numpy(features), "coords": coords, "metadata": metadata}
    return pt(folder / f"{NAME}.pt", content)


def clam_h5(folder: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    path = folder / "h5_files" / f"{NAME}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in {"features": features, "coords": coords.astype("i4")}.items():
            shape = values.shape[1]
            file.create_dataset(name, data=values, chunks=(32, shape), maxshape=(None, shape))
    return path


def clam_pt(folder: Path, features: np.ndarray) -> Path:
    return pt(folder / "pt_files" / f"{NAME}.pt", torch.from_numpy(features))


def clam_patches(folder: Path, coords: np.ndarray) -> Path:
    path = h5(folder / "patches" / f"{NAME}.h5", {"coords": coords.astype("i4")})
    attributes(path, "coords", patch_size=PATCH_SIZE, patch_level=1, downsample=(2.0, 2.0), name=NAME)
    return path


def trident(folder: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    path = folder / "features_uni_v1" / f"{NAME}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features, chunks=(1, features.shape[1]))
        file["coords"] = coords
    attributes(path, "features", name=NAME, encoder="uni_v1", savetodir="/out")
    attributes(
        path, "coords", patch_size=PATCH_SIZE, patch_size_level0=PATCH_SIZE_LEVEL0, level0_magnification=40,
        target_magnification=20, overlap=64, level0_width=9000, level0_height=8000, name=NAME,
    )  # fmt: skip
    return path


def trident_slide(folder: Path, features: np.ndarray) -> Path:
    return h5(folder / "slide_features_titan" / f"{NAME}.h5", {"features": features.mean(axis=0)})


def stamp(folder: Path, features: np.ndarray, coords: np.ndarray, **changed: Any) -> Path:
    said = {
        "stamp_version": "2.3.0", "extractor": "mahmood-uni-0a1b2c3d", "unit": "um", "tile_size_um": 128.0,
        "tile_size_px": 224, "feat_type": "tile",
    }  # fmt: skip
    said = {name: value for name, value in (said | changed).items() if value is not None}
    datasets = {"feats": features, "coords": (coords * MPP).astype("f4")}
    return h5(folder / "mahmood-uni-0a1b2c3d" / f"{NAME}.h5", datasets, **said)


def slideflow(folder: Path, features: np.ndarray, coords: np.ndarray, tile_um: float | str = 128) -> Path:
    npz(folder / f"{NAME}.index.npz", coords + PATCH_SIZE_LEVEL0 // 2)
    extractor = {"class": "slideflow.model.extractors.retccl.RetCCLFeatures", "kwargs": {"center_crop": True}}
    config = {"extractor": extractor, "normalizer": None, "num_features": 4, "tile_px": 299, "tile_um": tile_um}
    written(folder / "bags_config.json", config)
    return pt(folder / f"{NAME}.pt", torch.from_numpy(features))


def slide2vec(folder: Path, features: np.ndarray, coords: np.ndarray, tiles: str = "tiles") -> Path:
    path = pt(folder / "tile_embeddings" / f"{NAME}.pt", torch.from_numpy(features))
    coordinates = folder / tiles / f"{NAME}.coordinates.npz"
    npz(coordinates, tile_index=np.arange(len(coords), dtype="i4"), x=coords[:, 0], y=coords[:, 1])
    tiling = {"requested_tile_size_px": PATCH_SIZE, "tile_size_lv0": PATCH_SIZE_LEVEL0, "n_tiles": len(coords)}
    written(
        coordinates.with_name(f"{NAME}.coordinates.meta.json"), {"provenance": {"sample_id": NAME}, "tiling": tiling}
    )
    record = {
        "sample_id": NAME, "artifact_type": "tile_embeddings", "encoder_name": "phikonv2", "encoder_level": "tile",
        "coordinates_npz_path": str(coordinates), "feature_dim": 4, "num_tiles": len(coords),
        "requested_spacing_um": 0.5, "requested_tile_size_px": PATCH_SIZE, "tile_size_lv0": PATCH_SIZE_LEVEL0,
    }  # fmt: skip
    written(path.with_name(f"{NAME}.meta.json"), record)
    return path


def slide2vec_other(folder: Path, kind: str, features: np.ndarray) -> Path:
    """What slide2vec makes of tiles: `kind` is slide_embeddings or hierarchical_embeddings."""
    path = pt(folder / kind / f"{NAME}.pt", torch.from_numpy(features))
    written(path.with_name(f"{NAME}.meta.json"), {"sample_id": NAME, "artifact_type": kind, "encoder_name": "prism"})
    return path


def atlaspatch(folder: Path, encoders: dict[str, np.ndarray], coords: np.ndarray) -> Path:
    read = np.full((len(coords), 2), PATCH_SIZE)
    table = np.concatenate([coords, read, np.ones((len(coords), 1))], axis=1).astype("i4")
    datasets = {"coords": table, "passports": np.zeros(3)} | {
        f"features/{name}": values for name, values in encoders.items()
    }
    return h5(
        folder / "patches" / f"{NAME}.h5", datasets, patch_size=PATCH_SIZE, patch_size_level0=PATCH_SIZE_LEVEL0,
        level0_magnification=40, target_magnification=20, overlap=0, level0_width=9000, level0_height=8000,
        num_patches=len(coords),
    )  # fmt: skip


def torchmil(folder: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    h5(folder / "coords" / f"{NAME}.h5", {"coords": coords})
    return h5(folder / "features" / f"{NAME}.h5", {"features": features})
