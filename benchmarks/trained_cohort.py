"""The synthetic cohort of `nested_cv.py`, and how it is trained on."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from loading import CHUNK, LAYOUTS

from utils.learning.settings import Training
from utils.learning.splits import OuterFold, nested_splits
from utils.tasks.classification import Classification

CLASSES = ("benign", "malignant")
TASK = Classification(CLASSES)
SEED = 42
SIGNAL = 0.5  # how much higher one feature is, in a third of a slide's patches


@dataclass(frozen=True)
class Plan:
    """The cohort, and how it is trained on."""

    slides: int = 200
    patches: int = 3000
    dim: int = 1024
    chunk_size: int = CHUNK
    layout: str = "CLAM, (32, D)"
    n_outer: int = 5
    n_inner: int = 4
    epochs: int = 2
    batch_size: int = 128
    lr: float = 1e-4
    threads: int = field(default_factory=torch.get_num_threads)
    jobs: int = 1
    workers: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def training(self) -> Training:
        return Training(epochs=self.epochs, patience=self.epochs, batch_size=self.batch_size, lr=self.lr)


# The agreement of both ways is looked at on chunks of many lengths, and a rate at which the loss moves.
SMALL = Plan(slides=24, patches=60, dim=32, chunk_size=25, n_outer=2, n_inner=2, epochs=5, batch_size=8, lr=2e-3)


@dataclass(frozen=True)
class Cohort:
    """The slides of a folder that `write_cohort` filled."""

    paths: list[Path]
    labels: np.ndarray
    cases: np.ndarray

    @classmethod
    def of(cls, folder: Path) -> "Cohort":
        rows = pd.read_csv(folder / "labels.csv", dtype=str)
        paths = [folder / "features" / f"{wsi_id}.h5" for wsi_id in rows["wsi_id"]]
        return cls(paths, rows["label"].map(CLASSES.index).to_numpy(), rows["case_id"].to_numpy())

    def folds(self, plan: Plan) -> list[OuterFold]:
        return nested_splits(self.labels, self.cases, CLASSES, plan.n_outer, plan.n_inner, SEED)


def write_cohort(folder: Path, plan: Plan) -> None:
    """Write slides of half to one and a half times `plan.patches`, four for every three patients."""
    (folder / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    patients = -(-plan.slides * 3 // 4)
    lines = ["case_id,wsi_id,label"]
    for slide in range(plan.slides):
        patient = slide % patients
        label = patient % len(CLASSES)
        count = int(rng.integers(plan.patches // 2, plan.patches * 3 // 2, endpoint=True))
        features = rng.standard_normal((count, plan.dim), dtype=np.float32)
        features[::3, label] += SIGNAL
        coords = 256 * np.stack([np.arange(count) % 100, np.arange(count) // 100], axis=1)
        LAYOUTS[plan.layout](folder / "features" / f"S{slide}.h5", features.astype(plan.dtype, copy=False), coords)
        lines.append(f"P{patient},S{slide},{CLASSES[label]}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
