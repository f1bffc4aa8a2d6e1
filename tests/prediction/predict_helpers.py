"""Models that are not trained, and the records of their predictions."""

import json
from pathlib import Path

import torch

from MILS import build_mil
from MILS.ensemble import Ensemble
from tests.cohort import synthetic_passport
from utils.prediction.checkpoint import Checkpoint, id_digests, save_checkpoint
from utils.prediction.forward_pass import SlideFeed

CLASSES = ("benign", "malignant")


def write_model(path: Path, seed: int, *, members: int = 1, feed=None, seen=None, temperature=2.0, **changes) -> Path:
    """An untrained model, its weights stirred, of 16 features."""
    torch.manual_seed(seed)
    models = [build_mil("LiteMIL", input_dim=16, num_classes=2, hidden_dim=32).eval() for _ in range(members)]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    state = (Ensemble(models) if members > 1 else models[0]).state_dict()
    checkpoint = {
        "model": models[0].spec, "state_dict": state, "class_names": CLASSES, "dataset": "demo",
        "feed": (feed or SlideFeed(None, "merge")).as_dict(), "recipe": synthetic_passport("x").recipe,
        "mpp_range": (0.5, 0.5), "selection": {"threshold": 0.4}, "temperature": temperature,
        "seen": {"slide": id_digests("slide", ["none"]), "case": []} if seen is None else seen,
    }  # fmt: skip
    save_checkpoint(path, Checkpoint(**(checkpoint | changes)))
    return path


def of(folder: Path, slide: str) -> dict:
    return json.loads((folder / f"{slide}_prediction.json").read_text())
