"""Cohorts made up for tests: bags of random features whose class can be learned (synthetic, not tissue).

Import with `from tests.cohort import ...`.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.bags.store import Bag, write_bag
from utils.core.files import write_text
from utils.core.passport import Passport
from utils.core.recipe import Recipe

PATCH_SIZE_LEVEL0 = 512  # a patch of 256 px at 0.5 um/px, on slides of 0.25 um/px
_SIGNAL_SHARE = 1 / 3


def write_cohort(
    folder: Path,
    *,
    patients_per_class: int = 6,
    slides_per_patient: int = 2,
    classes: Sequence[str] = ("benign", "malignant"),
    dim: int = 16,
    patches: tuple[int, int] = (20, 60),
    signal: float = 2.0,
    seed: int = 0,
    dtype: str | np.dtype = "float16",
) -> tuple[Path, Path]:
    """Write a small synthetic cohort and return its `labels.csv` (case_id,wsi_id,label) and its features folder.

    Patient `P<k>` of one class has slides `P<k>-S1`, `P<k>-S2`, ..., each `<wsi_id>.h5` of the least to the greatest
    number of `patches`, both included. Features are standard normal; in a third of a slide's patches, feature number
    `class index` is `signal` higher (0: nothing to learn, and chance is the right answer). Coordinates lie on a grid
    without overlaps, in raster order; all slides share one recipe. The same arguments write the same bytes.
    """
    features_dir = Path(folder) / "features"
    rng = np.random.default_rng(seed)
    lines = ["case_id,wsi_id,label"]
    for patient in range(patients_per_class * len(classes)):
        label = patient % len(classes)
        for slide in range(1, slides_per_patient + 1):
            wsi_id = f"P{patient:03d}-S{slide}"
            count = int(rng.integers(patches[0], patches[1], endpoint=True))
            features = synthetic_features(rng, count, dim, label, signal)
            write_bag(features_dir / f"{wsi_id}.h5", synthetic_bag(wsi_id, features.astype(dtype), rng))
            lines.append(f"P{patient:03d},{wsi_id},{classes[label]}")
    labels_csv = Path(folder) / "labels.csv"
    write_text(labels_csv, "\n".join(lines) + "\n")
    return labels_csv, features_dir


def synthetic_features(rng: np.random.Generator, count: int, dim: int, label: int, signal: float) -> np.ndarray:
    """`(count, dim)` float64: standard normal, and `signal` higher in feature `label` of a third of the rows."""
    features = rng.standard_normal((count, dim))
    bearing = rng.permutation(count)[: max(1, round(count * _SIGNAL_SHARE))]
    features[bearing, label] += signal
    return features


def synthetic_bag(name: str, features: np.ndarray, rng: np.random.Generator) -> Bag:
    """`features (N, D)` on random cells of a grid, in raster order, with a passport that says it is synthetic."""
    side = math.ceil(math.sqrt(2 * len(features)))
    cells = np.sort(rng.permutation(side * side)[: len(features)])
    coords = np.stack([cells % side, cells // side], axis=1) * PATCH_SIZE_LEVEL0
    return Bag(features, coords, PATCH_SIZE_LEVEL0, synthetic_passport(name, side * PATCH_SIZE_LEVEL0, features.dtype))


def synthetic_passport(name: str, edge: int = 10_240, dtype: str | np.dtype = "float16") -> Passport:
    """The passport of a square slide of `edge` level-0 pixels whose "backbone" is called synthetic."""
    recipe = {
        "backbone": "synthetic",
        "weights_digest": "0" * 64,
        "transform": {"resize": None, "crop": None, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
        "precision": "float32",
        "dtype": str(np.dtype(dtype)),
        "patch_size": 256,
        "stride": 256,
        "level": 1,
        "tissue_threshold": 0.5,
    }
    slide = {
        "name": name,
        "width": edge,
        "height": edge,
        "mpp": 0.25,
        "mpp_delivered": 0.5,
        "patch_size_level0": PATCH_SIZE_LEVEL0,
    }
    return Passport(Recipe.from_dict(recipe), slide, {"litemil": "synthetic"})
