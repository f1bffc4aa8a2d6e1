"""Patients drawn at random: targets of survival with many ties and much censoring, and risks that say something."""

import numpy as np


def drawn_patients(count: int, seed: int, ties: bool = True, events: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Targets `(count, 2)`, whole times if there are `ties`, and risks `(count,)`, of one digit."""
    rng = np.random.default_rng(seed)
    risks = rng.normal(size=count).round(1)
    times = rng.exponential(10 * np.exp(-risks / 2))
    times = np.ceil(times) if ties else times
    return np.stack([times, (rng.random(count) < events).astype(float)], axis=1), risks


def once(targets: np.ndarray) -> np.ndarray:
    """Weights that count each patient once."""
    return np.ones((1, len(targets)))
