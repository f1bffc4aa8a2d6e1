"""How many slides and patients a cohort has, and how their targets are spread, as text."""

from collections.abc import Sequence

import numpy as np

from utils.core.errors import plural


def class_counts(
    slides: Sequence[tuple[int, str]], class_names: Sequence[str], positive_class: str | None = None
) -> str:
    """Return how many slides and patients each class has, given every slide's class and patient, and which class is
    positive, if one is.
    """
    patients_of = [{patient for label, patient in slides if label == index} for index in range(len(class_names))]
    counts = [
        f"{name} {plural(sum(label == index for label, _ in slides), 'slide')} of "
        f"{plural(len(patients_of[index]), 'patient')}"
        for index, name in enumerate(class_names)
    ]
    all_patients = set().union(*patients_of)
    several = sum(sum(patient in patients for patients in patients_of) > 1 for patient in all_patients)
    mixed = f" ({several} in {'both' if len(class_names) == 2 else 'several'})" if several else ""
    positive = "" if positive_class is None else f"; positive: {positive_class}"
    return f"{'; '.join(counts)}; {plural(len(all_patients), 'patient')} in all{mixed}{positive}"


def range_text(values: np.ndarray) -> str:
    """Return the least and greatest of some numbers and their median."""
    return f"{values.min():.4g} to {values.max():.4g}, median {np.median(values):.4g}"


def label_counts(has_label: np.ndarray, is_known: np.ndarray, cases: Sequence[str], names: Sequence[str]) -> str:
    """Return how many slides and patients each of K labels has, given `has_label` and `is_known (n, K)` bool."""
    patients, texts = np.array(cases), []
    for name, rows, known in zip(names, has_label.T, is_known.T, strict=True):
        unknown = len(rows) - int(known.sum())
        slides, owners = plural(int(rows.sum()), "slide"), plural(len(np.unique(patients[rows])), "patient")
        texts.append(f"{name} in {slides} of {owners}" + (f" ({unknown} unknown)" if unknown else ""))
    return f"{'; '.join(texts)}; {plural(len(patients), 'slide')} of {plural(len(set(cases)), 'patient')} in all"
