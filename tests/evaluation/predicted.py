"""Predictions made up of arrays. Import with `from tests.evaluation.predicted import predicted`."""

import numpy as np

from tests.small import TASK
from utils.evaluation.predictions import Predictions


def predicted(patients: int = 12, repeats: int = 1, folds: int = 3, **changes) -> Predictions:
    """Two slides of each patient, of classes no and yes in turn, in so many folds of each repeat."""
    rng = np.random.default_rng(0)
    patient = np.tile(np.repeat(np.arange(patients), 2), repeats)
    repeat = np.repeat(np.arange(repeats), 2 * patients)
    labels = patient % 2
    positive = np.clip(0.3 + 0.3 * labels + 0.2 * rng.standard_normal(len(labels)), 0.01, 0.99)
    columns = {
        "slides": np.array([f"P{number}-S{index % 2}" for index, number in enumerate(patient)]),
        "cases": np.array([f"P{number}" for number in patient]),
        "labels": labels,
        "values": np.stack([1 - positive, positive], axis=1),
        "task": TASK,
        "repeats": repeat + 1,
        "seed": 5,
        "folds": patient // 2 % folds + 1 + folds * repeat,
    }
    return Predictions(**(columns | changes))


def noisy_answers(rng: np.random.Generator, labels: np.ndarray, right: float = 0.8) -> np.ndarray:
    """Probabilities that are on the right side with this chance."""
    hit = rng.random(len(labels)) < right
    positive = np.where(hit, labels, 1 - labels) * 0.5 + rng.random(len(labels)) * 0.5
    return np.stack([1 - positive, positive], axis=1)


def repeated(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities, patients and repeats of 12 slides, tested thrice; patients of one to three slides."""
    rng = np.random.default_rng(seed)
    labels, cases = np.tile(np.arange(12) % 2, 3), np.tile(np.array(list("aabccdeefghh")), 3)
    return labels, noisy_answers(rng, labels), cases, np.repeat([1, 2, 3], 12)
